"""Where the shared data lies, and what every test may rely on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: test processes share the cores

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Hear the signals that tests send, to this process and to its children, whoever started it.

    A shell without job control starts `make test &` with SIGINT ignored; every child inherits that, and a program
    rightly keeps ignoring what it was told to ignore.
    """
    for signum, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, usual)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real clips, golden vectors and official lists; skips loudly where it is absent."""
    folder = Path(os.environ.get("COLDFRAME_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}: set COLDFRAME_SHARED")
    return folder


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    """The folder of recorded behaviour of the original implementations."""
    named = os.environ.get("COLDFRAME_GOLDEN")
    return Path(named) if named else request.getfixturevalue("shared") / "golden"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 on this machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket, which this process and its children reach as users do: by their environment."""
    import fsspec

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "2",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    s3 = fsspec.get_filesystem_class("s3")
    s3.clear_instance_cache()
    system = fsspec.filesystem("s3")
    system.mkdir("videos-and-stores")
    yield "s3://videos-and-stores"
    system.rm("videos-and-stores", recursive=True)
    s3.clear_instance_cache()
