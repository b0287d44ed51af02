"""A bucket of S3, or of a server that speaks its protocol, as a `Store`. Needs ``shoal[s3]``.

It must know conditional writes (``If-None-Match``: AWS since August 2024, MinIO, Ceph, R2), since a token of
the fence is given out once by them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import CorruptError, RequestError, StorageError
from shoal.storage.disk import storage_error
from shoal.storage.store import MAX_OBJECT_BYTES, no_object

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 60
MAX_ATTEMPTS = 5
"""Of one request, with growing pauses: an object store answers 503 now and then."""

_NONE = ("404", "NoSuchKey", "NotFound")
_TAKEN = ("412", "PreconditionFailed")
_BUSY = ("409", "ConditionalRequestConflict")
"""Another conditional write of that key is on its way; asking again says how it ended."""


@dataclass(frozen=True)
class S3Store:
    """The objects under ``prefix`` of ``bucket``; credentials and region are boto3's to find."""

    bucket: str
    prefix: str = ""
    """Ends with ``/`` unless it is empty."""
    endpoint_url: str | None = None
    """Of a server that is not AWS's; None: as boto3 finds it (``AWS_ENDPOINT_URL``)."""

    @classmethod
    def at(cls, url: str, *, endpoint_url: str | None = None) -> S3Store:
        """The store at ``s3://bucket/prefix``; touches nothing but what is installed.

        Raises:
            RequestError: no such URL.
            StorageError: boto3 is not installed.
        """
        scheme, _, rest = url.partition("://")
        bucket, _, prefix = rest.partition("/")
        if scheme != "s3" or not bucket:
            raise RequestError(f"{url}: a bucket is s3://bucket, or s3://bucket/prefix")
        _boto3()
        prefix = prefix.strip("/")
        return cls(bucket, f"{prefix}/" if prefix else "", endpoint_url)

    def __str__(self) -> str:
        return self._url("")

    def create(self, key: str, content: bytes) -> bool:
        with self._errors("write", key):
            try:
                for _ in range(MAX_ATTEMPTS):
                    try:
                        self._put(key, content, IfNoneMatch="*")
                        return True
                    except _client_error() as error:
                        if _code(error) not in _BUSY:
                            raise
            except _client_error() as error:
                if _code(error) not in _TAKEN:
                    raise
        # Whoever was first: an answer that was lost makes boto3 send our own request again.
        found = self._find(key)
        return found is not None and found == content

    def put(self, key: str, content: bytes) -> None:
        with self._errors("write", key):
            self._put(key, content)

    def put_file(self, key: str, file: Path) -> None:
        with self._errors("write", key):
            self._client.upload_file(
                str(file), self.bucket, self.prefix + key, ExtraArgs={"ChecksumAlgorithm": "SHA256"}
            )

    def read(self, key: str) -> bytes:
        found = self._find(key)
        if found is None:
            raise no_object(self._url(key))
        return found

    def read_file(self, key: str, file: Path) -> None:
        with self._errors("read", key):
            try:
                self._client.download_file(self.bucket, self.prefix + key, str(file))
            except _client_error() as error:
                if _code(error) in _NONE:
                    raise no_object(self._url(key)) from None
                raise

    def list(self, prefix: str = "") -> list[str]:
        with self._errors("list", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + prefix
            )
            keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return sorted(key.removeprefix(self.prefix) for key in keys)

    def delete(self, key: str) -> None:
        with self._errors("delete", key):
            self._client.delete_object(Bucket=self.bucket, Key=self.prefix + key)

    @property
    def _client(self) -> Any:
        return _client(self.endpoint_url, os.getpid())

    def _put(self, key: str, content: bytes, **condition: str) -> None:
        """The server compares what it received with the digest before it answers."""
        self._client.put_object(
            Bucket=self.bucket, Key=self.prefix + key, Body=content, ChecksumAlgorithm="SHA256", **condition
        )

    def _find(self, key: str) -> bytes | None:
        with self._errors("read", key):
            try:
                answer = self._client.get_object(Bucket=self.bucket, Key=self.prefix + key)
            except _client_error() as error:
                if _code(error) in _NONE:
                    return None
                raise
            with answer["Body"] as body:
                content: bytes = body.read(MAX_OBJECT_BYTES + 1)
        if len(content) > MAX_OBJECT_BYTES:
            raise CorruptError(
                f"{self._url(key)} has more than {MAX_OBJECT_BYTES} bytes; nobody wrote that there"
            )
        return content

    def _url(self, key: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}{key}"

    @contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        """Whatever boto3 and the network raise, as a StorageError that says what to do."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError

        try:
            yield
        except (_client_error(), BotoCoreError, Boto3Error) as error:
            raise StorageError(
                f"cannot {action} {self._url(key)}: {error}. What was committed before is untouched; check the "
                "bucket's name, the credentials (`aws sts get-caller-identity`) and the network, and try again"
            ) from error
        except OSError as error:  # of the file here
            raise storage_error(action, Path(self._url(key)), error) from error


def _boto3() -> Any:
    try:
        import boto3
    except ImportError as error:
        raise StorageError(
            f'storage on S3 needs boto3, which is not installed ({error}): pip install "shoal[s3]"'
        ) from error
    return boto3


@functools.cache
def _client(endpoint_url: str | None, pid: int) -> Any:
    """One per process ``pid``, whose threads may share it: making one takes tenths of a second."""
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "max_attempts": MAX_ATTEMPTS},
    )
    return _boto3().client("s3", endpoint_url=endpoint_url, config=config)


def _client_error() -> Any:
    from botocore.exceptions import ClientError

    return ClientError


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
