from __future__ import annotations

from pathlib import Path

import pytest

from shoal.errors import AccessError
from shoal.serve.core.keys import Keys, read_keys

KEY = "a-key-of-24-characters-x"


def keys_file(path: Path, text: str, mode: int = 0o600) -> Path:
    file = path / "keys"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_comments_and_empty_lines_are_skipped(tmp_path: Path) -> None:
    assert read_keys(keys_file(tmp_path, f"# team a\n\n  {KEY}\n")) == [KEY]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(AccessError, match="chmod 600"):
        Keys.load(keys_file(tmp_path, KEY, mode))


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "short\n", "with a space in the key\n", "schlüssel-mit-umlaut\n"]
)
def test_unusable_keys_are_refused_without_being_shown(tmp_path: Path, text: str) -> None:
    with pytest.raises(AccessError) as caught:
        Keys.load(keys_file(tmp_path, text))
    assert "short" not in str(caught.value)
    assert "umlaut" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="cannot be read"):
        Keys.load(tmp_path / "none")


def test_keys_do_not_show(tmp_path: Path) -> None:
    keys = Keys.load(keys_file(tmp_path, KEY))
    assert KEY not in repr(keys)
    assert KEY not in repr(vars(keys))
