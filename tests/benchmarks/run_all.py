"""All benchmarks one after the other, and whether the host was quiet enough to believe them; `make bench` runs it.

A host with other work on it misses limits that the code meets. So before and after each script this one looks for a
second at what runs beside it, and over the whole script at the time that the hypervisor kept from this machine (steal,
proc(5)). A script that misses a limit on a noisy host is `invalid`, not failed: run it again.

    python tests/benchmarks/run_all.py [NAME ...]      NAME: bench_scpi and so on; all without

Exit code 0: every limit held; 1: one was missed on a quiet host; 6: one was missed, but only on a noisy host.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
LOOK_S = 1.0
OTHERS_LIMIT = 0.15  # of one core, used by others before or after
STEAL_LIMIT = 0.02  # of all cores, over the whole script


@dataclass(frozen=True, slots=True)
class Processor:
    """Clock ticks of all cores together, and the moment at which they were read."""

    at_s: float
    busy: int
    steal: int

    @classmethod
    def now(cls) -> Processor:
        user, nice, system, _idle, _iowait, irq, softirq, steal = (
            int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        )
        return cls(time.monotonic(), user + nice + system + irq + softirq, steal)

    def since(self, before: Processor) -> tuple[float, float]:
        """Cores that were busy, and the share of all that was stolen."""
        ticks = (self.at_s - before.at_s) * os.sysconf("SC_CLK_TCK")
        return (self.busy - before.busy) / ticks, (self.steal - before.steal) / ticks / (os.cpu_count() or 1)


def others() -> float:
    """Cores that are busy while nothing of ours runs."""
    before = Processor.now()
    time.sleep(LOOK_S)
    return Processor.now().since(before)[0]


def run(script: Path) -> str:
    """`pass`, `fail` or `invalid`; everything is printed."""
    print(f"== {script.name}", flush=True)
    beside, before = others(), Processor.now()
    failed = subprocess.run([sys.executable, script], check=False).returncode != 0
    stolen = Processor.now().since(before)[1]
    beside = max(beside, others())
    noisy = beside > OTHERS_LIMIT or stolen > STEAL_LIMIT
    verdict = "pass" if not failed else "invalid" if noisy else "fail"
    print(f"{script.stem}: {verdict}; beside it {beside:.2f} cores were busy, {stolen:.1%} of the time was stolen")
    return verdict


def main() -> int:
    """See the module's text."""
    scripts = sorted(HERE.glob("bench_*.py"))
    unknown = sorted(set(sys.argv[1:]) - {script.stem for script in scripts})
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(script.stem for script in scripts)}")
        return 4
    verdicts = {script.stem: run(script) for script in scripts if script.stem in sys.argv[1:] or not sys.argv[1:]}
    print("\n".join(f"{verdict:8}{name}" for name, verdict in verdicts.items()))
    if "invalid" in verdicts.values():
        print("invalid: a limit was missed while the host did other things; run that one again on a quiet host")
    return 1 if "fail" in verdicts.values() else 6 if "invalid" in verdicts.values() else 0


if __name__ == "__main__":
    sys.exit(main())
