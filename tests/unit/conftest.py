"""Fixtures of unit tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _private(own_directories: None) -> None:
    """State and sockets of these tests are their own."""
