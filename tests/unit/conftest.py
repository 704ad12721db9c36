"""Fixtures of unit tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sshd
from sshd import Sshd

from hil.errors import HilError


@pytest.fixture(scope="session", autouse=True)
def _private(own_directories: None) -> None:
    """State and sockets of these tests are their own."""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """A real OpenSSH server of the tests' own."""
    try:
        sshd.find()
    except HilError as error:
        pytest.skip(f"no OpenSSH server here, and none can be fetched: {error.message}")
    with sshd.serve(tmp_path_factory.mktemp("sshd")) as running:
        yield running
