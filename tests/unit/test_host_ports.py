"""Ports that tests hand to servers: no two workers of a run may be given the same one."""

from __future__ import annotations

import pytest
from host import free_ports


def test_workers_are_never_given_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "3")
    given = []
    for worker in ("gw0", "gw1", "gw2"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        given.append(set(free_ports(2000)))
        assert len(given[-1]) == 2000
    # Of some 5,000 ports a worker: two who drew from the same ones would share hundreds.
    assert given[0].isdisjoint(given[1])
    assert given[0].isdisjoint(given[2])
    assert given[1].isdisjoint(given[2])
