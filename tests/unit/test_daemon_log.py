"""The daemon's log never stops its event loop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import logging, os, sys
from pathlib import Path
from hil.bench.daemon import _log_to

_log_to(Path(sys.argv[1]), to_terminal=True)
for number in range(5000):
    logging.getLogger("hil").info("line %d of many", number)
print("logged", flush=True)
os._exit(0)
"""


def test_a_terminal_that_is_held_stops_nothing(tmp_path: Path) -> None:
    """Whoever stops the output of `hil bench serve` must not have the outputs cut."""
    argv = [sys.executable, "-c", PROGRAM, tmp_path / "daemon.log"]
    # Nobody reads stderr: its pipe is full after 64 KiB.
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.wait(20)
            assert process.stdout.read() == "logged\n"
        finally:
            process.kill()
    assert "line 0 of many" in (tmp_path / "daemon.log").read_text()
