"""Client of the on-board mailbox (`hil.inference.onboard`): ask in one contact, take the answer once in a later one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hil.errors import BoardError
from hil.inference.client import Connect, Reply, request


@dataclass(frozen=True, slots=True)
class Letter:
    """A query in the mailbox. `state`: queued, running, done, failed or delivered.

    `answer` and `tokens` (the server's count) are there once it is done; `attempts` counts restarts after power cuts.
    `deliveries` is 0, or 1 after the one acknowledgement that counts.
    """

    id: str
    state: str
    deliveries: int
    answer: str | None = None
    tokens: int | None = None
    attempts: int | None = None
    inference_s: float | None = None

    @property
    def finished(self) -> bool:
        return self.state in ("done", "delivered")


def submit(
    connect: Connect,
    base: str,
    identity: str,
    messages: Sequence[Mapping[str, str]],
    max_tokens: int,
    *,
    timeout_s: float = 10.0,
    api_key: str | None = None,
    **options: Any,
) -> Letter:
    """Hand in a query; it is on the board's disk when this returns. The same `identity` again is accepted once.

    `options`: temperature, seed, ... Raises LinkLost (ask again with the same identity), BoardError when refused.
    """
    body = {"id": identity, "messages": [dict(item) for item in messages], "max_tokens": max_tokens, **options}
    return _letter(request(connect, "POST", f"{base}/v1/queries", body, api_key=api_key, timeout_s=timeout_s))


def fetch(
    connect: Connect,
    base: str,
    identity: str,
    *,
    wait_s: float = 0.0,
    timeout_s: float = 10.0,
    api_key: str | None = None,
) -> Letter:
    """State and, when there is one, answer; the board holds the reply back up to `wait_s` for an answer to come."""
    url = f"{base}/v1/queries/{identity}?wait_s={wait_s:g}"
    return _letter(request(connect, "GET", url, api_key=api_key, timeout_s=timeout_s + wait_s))


def acknowledge(
    connect: Connect, base: str, identity: str, token: str, *, timeout_s: float = 10.0, api_key: str | None = None
) -> Letter:
    """Tell the board that the answer is safe on the ground. Repeat it with the same `token` when the reply was lost.

    Raises BoardError when it was delivered before under another token: this caller would be a second delivery.
    """
    url = f"{base}/v1/queries/{identity}/ack"
    return _letter(request(connect, "POST", url, {"delivery": token}, api_key=api_key, timeout_s=timeout_s))


def _letter(reply: Reply) -> Letter:
    told = reply.json()
    if reply.status not in (200, 202):
        raise BoardError(f"the mailbox answered {reply.status}: {told.get('error', told)}")
    answer = told.get("answer") or {}
    return Letter(
        id=str(told["id"]),
        state=str(told["state"]),
        deliveries=int(told.get("deliveries", 0)),
        answer=answer.get("text"),
        tokens=(answer.get("usage") or {}).get("completion_tokens"),
        attempts=answer.get("attempts"),
        inference_s=answer.get("inference_s"),
    )
