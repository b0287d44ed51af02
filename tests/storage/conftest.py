from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from storage_faults import commit_content

from shoal.storage import DiskStore, Store
from shoal.storage.s3 import S3Store

BUCKET = "bucket"


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """A small committed directory with files in two levels, one of them empty."""
    directory = tmp_path / "parent" / "step-0000000007"
    commit_content(directory)
    return directory


@pytest.fixture(params=["disk", "s3"])
def make_store(request: pytest.FixtureRequest) -> Callable[[str], Store]:
    """Makes an empty store of a name: one of each kind that there is."""
    return request.getfixturevalue(f"{request.param}_store")  # type: ignore[no-any-return]


@pytest.fixture
def store(make_store: Callable[[str], Store]) -> Store:
    return make_store("store")


@pytest.fixture
def disk_store(tmp_path: Path) -> Callable[[str], Store]:
    return lambda name: DiskStore(tmp_path / "stores" / name)


@pytest.fixture
def s3_store(s3_url: str, request: pytest.FixtureRequest) -> Callable[[str], Store]:
    test = request.node.nodeid.partition("::")[2]
    return lambda name: S3Store.at(f"s3://{BUCKET}/{test}/{name}", endpoint_url=s3_url)


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """A server that speaks S3 on loopback, with one bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }.items():
            patch.setenv(name, value)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket=BUCKET)
        yield url
        server.stop()
