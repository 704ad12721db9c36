"""What the API takes of a request: shapes with bounds."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from hil.bench.api import LeaseBody


@pytest.mark.parametrize("pid", [0, -1, 2**31, 2**40])
def test_a_holder_is_a_number_that_a_process_can_have(pid: int) -> None:
    assert LeaseBody(holder="me", pid=2**31 - 1).pid == 2**31 - 1
    with pytest.raises(ValidationError, match="pid"):
        LeaseBody(holder="me", pid=pid)
