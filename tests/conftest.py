"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from host import Host


@pytest.fixture
def host() -> Iterator[Host]:
    """For limits of real time: `host.excuses("off", measured_s, 2.0)` asserts it, unless the host itself stalled."""
    watch = Host()
    yield watch
    watch.close()
