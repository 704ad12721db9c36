"""Fixtures of unit tests."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says something about the host, not about the property.
settings.register_profile("any-host", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-host")


@pytest.fixture(scope="session", autouse=True)
def _private(own_directories: None) -> None:
    """State and sockets of these tests are their own."""
