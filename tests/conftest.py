"""Fixtures for all tests. Nothing here is automatic: tests/campaigns runs on benches that are in use.

But for the clock: it is the host's there too, in a form that `timelapse.run` can put forward.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import timelapse

time.monotonic = timelapse.monotonic  # before anything of hil takes it for a default

import sshd  # noqa: E402
from host import Host, left_behind  # noqa: E402
from sshd import Sshd  # noqa: E402

from hil.errors import HilError  # noqa: E402


def pytest_configure() -> None:
    # Behind a script's `&` Ctrl-C is ignored, and every `hil` that a test starts and interrupts would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def own_directories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leases, journals, boards' disks and sockets of tests never mix with those of the person who runs them.

    At the end no process may be left that was started here.
    """
    # A unix socket's path is short, pytest's directories are not.
    own = {"XDG_STATE_HOME": str(tmp_path_factory.mktemp("state")), "XDG_RUNTIME_DIR": tempfile.mkdtemp(prefix="hil-")}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    yield
    left = left_behind(f"XDG_RUNTIME_DIR={own['XDG_RUNTIME_DIR']}")
    shutil.rmtree(own["XDG_RUNTIME_DIR"], ignore_errors=True)
    for disk in Path(own["XDG_STATE_HOME"]).rglob("*.img"):
        disk.unlink()  # the logs stay in pytest's directory, for whoever looks at a failure
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    assert not left, f"tests left processes behind: {left}"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """A real OpenSSH server of the tests' own, in the place of a board's."""
    try:
        sshd.find()
    except HilError as error:
        pytest.skip(f"no OpenSSH server here, and none can be fetched: {error.message}")
    with sshd.serve(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def host() -> Iterator[Host]:
    """For limits of real time: `host.excuses("off", measured_s, 2.0)` asserts it, unless the host itself stalled."""
    watch = Host()
    yield watch
    watch.close()
