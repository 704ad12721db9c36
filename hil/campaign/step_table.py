"""Which function flies which step of a mission file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from hil.campaign import endurance, program, steps, upload
from hil.campaign.flying import Flying

STEPS: Mapping[str, Callable[[Flying, Any], None]] = MappingProxyType(
    {
        "boot": steps.boot,
        "upload": upload.upload,
        "serve": steps.serve,
        "query": steps.query,
        "loss_of_signal": steps.loss_of_signal,
        "eclipse": steps.eclipse,
        "check": steps.check,
        "run": program.run,
        "cruise": endurance.cruise,
        "duty_cycle": endurance.duty_cycle,
        "end": steps.end,
    }
)
