"""API keys: read once from a private file, kept as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import stat
from collections.abc import Iterable
from pathlib import Path

from shoal.errors import AccessError
from shoal.serve.core.answer import Header, Refusal

MIN_KEY_LENGTH = 16


class Keys:
    """The keys that open an app. It holds SHA-256 digests only, so that no dump or log shows a key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple({_digest(key.encode()) for key in keys})

    def __repr__(self) -> str:
        return f"Keys({len(self._digests)})"

    @classmethod
    def load(cls, path: Path) -> Keys:
        """The keys in a file; raises what `read_keys` does."""
        return cls(read_keys(path))

    def check(self, headers: Iterable[Header]) -> None:
        """Pass if the headers hold one of the keys: ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``.

        Raises:
            Refusal: 401 without a key, 403 with a wrong one.
        """
        given = _given_key(headers)
        if given is None:
            raise Refusal(
                401,
                "key_missing",
                "This app needs an API key.",
                "Send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.",
                headers=((b"www-authenticate", b"Bearer"),),
            )
        digest = _digest(given)
        # Every digest is compared, so that the time taken does not tell which one matched.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise Refusal(403, "key_wrong", "The API key is not valid.", "Ask the app's owner for a key.")


def read_keys(path: Path) -> list[str]:
    """The keys in a file, at least one: one per line; empty lines and ``# comments`` are skipped.

    Raises:
        AccessError: the file is missing, others can read it, it holds no key, or a key is shorter than
            16 characters or holds a space or a character beyond ASCII.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise AccessError(f"the keys file {path} cannot be read: {reason}. Write one key per line.") from None
    if mode & 0o077:
        raise AccessError(f"others can read the keys file {path} (mode {mode:04o}); run: chmod 600 {path}")
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise AccessError(
            f"the keys file {path} holds no key; write one per line, {MIN_KEY_LENGTH}+ characters"
        )
    for number, key in enumerate(keys, 1):
        if len(key) < MIN_KEY_LENGTH or not key.isascii() or any(c.isspace() for c in key):
            raise AccessError(
                f"key {number} in {path} is not usable: a key has {MIN_KEY_LENGTH} or more ASCII characters "
                "and no space, as from: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _given_key(headers: Iterable[Header]) -> bytes | None:
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip()
        if name == b"x-api-key":
            return value.strip()
    return None
