"""What the API takes of a request: bodies of bounded length, shapes with bounds, short answers to what is wrong."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from hil.bench.api import LeaseBody, LinkBody, RecordBody, make_app
from hil.model import LinkState


def post(path: str, body: bytes) -> tuple[int, str]:
    """(status, message) of a call to a daemon without parts: it is refused before they are asked."""
    nothing: Any = None

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(nothing, nothing), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post(path, content=body, headers={"Content-Type": "application/json"})

    answer = asyncio.run(call())
    return answer.status_code, answer.json()["error"]["message"]


def test_a_link_state_is_the_models_own() -> None:
    sent = {"uplink": {"delay_s": 0.15, "rate_bps": 2e6}, "downlink": {"outage": True}}
    body = LinkBody.model_validate(sent)
    assert (body.uplink, body.downlink) == (LinkState(delay_s=0.15, rate_bps=2e6), LinkState(outage=True))
    for wrong, said in (
        ({"loss": 2.0}, "LinkState.loss must be within 0..1, got 2.0"),
        ({"dely_s": 1.0}, "dely_s"),
        ({"delay_s": math.inf}, "finite"),
    ):
        with pytest.raises(ValidationError, match=said):
            LinkBody.model_validate({"uplink": wrong, "downlink": {}})


@pytest.mark.parametrize("pid", [0, -1, 2**31, 2**40])
def test_a_holder_is_a_number_that_a_process_can_have(pid: int) -> None:
    assert LeaseBody(holder="me", pid=2**31 - 1).pid == 2**31 - 1
    with pytest.raises(ValidationError, match="pid"):
        LeaseBody(holder="me", pid=pid)


def test_only_the_record_of_a_flight_may_be_long() -> None:
    for path, limit in (("/v1/leases", 65_536), ("/v1/flight/event", 65_536), ("/v1/flight/record", 1 << 20)):
        assert post(path, b" " * limit)[0] == 400
        status, said = post(path, b" " * (limit + 1))
        assert status == 413
        assert f"a body of {limit + 1} bytes is too long, at most {limit} are taken" in said


def test_an_answer_to_what_is_wrong_all_over_is_short() -> None:
    keys = "{" + ",".join(f'"{number:x}":1' for number in range(4000)) + "}"
    status, said = post("/v1/leases", keys.encode())
    assert status == 400
    assert "holder: Field required" in said
    assert said.endswith("; 3996 more")
    assert len(said) < 1500
    assert len(post("/v1/leases", b'{"%s": 1}' % (b"x" * 60_000))[1]) < 1000


WIDE = json.dumps({str(number): 1 for number in range(21)})


@pytest.mark.parametrize("row", ["[]", '{"a": []}', '{"a": NaN}', '{"a": 9223372036854775808}', WIDE])
def test_a_poor_record_is_refused_at_its_first_row_that_is_wrong(row: str) -> None:
    rows = f"[{{}}, {', '.join([row] * 900)}]"
    status, said = post("/v1/flight/record", f'{{"table": "tokens", "rows": {rows}}}'.encode())
    assert status == 400
    assert "row 1 is no mapping of at most 20 columns to numbers and texts" in said
    assert len(said) < 200
    good = {"t_mono": 1.5, "query": "q", "n": 1, "plane": None}
    assert RecordBody(table="tokens", rows=[good]).rows == [good]
