"""Writes a SYNTHETIC run directory: invented samples in the real formats, to test what reads them. Measures nothing."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from hil.bench.journal import Journal
from hil.bench.recorder import Recorder
from hil.mission.clock import MissionClock

CHUNK = 1 << 20
SIZE = 98_362_432
SHA = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EPOCH = 1_767_225_600.0  # 2026-01-01T00:00:00Z
MONO = 5_000.0
TICK_S = 0.1


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class SyntheticRun:
    """A flight of about four wall minutes, told step by step; every method moves the invented time on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.t = MONO
        self.clock = MissionClock(start_mission_s=0.0, wall_mono_s=MONO, rate=1.0)
        self.causes = ["start"]
        self.soc, self.sunlit, self.state = 1.0, 1.0, "off"
        self.bus_v, self.energy_j, self.mission_j = 16.6, 0.0, 0.0
        self.load_w, self.board_w = 0.0, 0.0
        self.link_up, self.sent = False, {"uplink": 0, "downlink": 0}
        self.crossed = True
        self.index = -1
        directory.mkdir(parents=True, exist_ok=True)
        self.recorder = Recorder(directory / "telemetry.sqlite", on_error=self._broken)
        self.journal = Journal(
            directory / "events.jsonl", "synthetic", monotonic=lambda: self.t, wall=lambda: EPOCH + self.t - MONO,
            stamp=lambda: (self.m, self.clock.rate),
        )  # fmt: skip

    @staticmethod
    def _broken(error: Exception) -> None:
        raise error

    @property
    def m(self) -> float:
        return self.clock.mission_s(self.t)

    def event(self, kind: str, **fields: Any) -> None:
        self.journal.write(kind, **fields)

    def rate(self, rate: float, cause: str) -> None:
        if rate != self.clock.rate:
            self.clock.set_rate(rate, self.t)
            self.causes.append(cause)
            self.journal.write("clock", rate=rate, skipped_s=0.0, cause=cause)
            self.links("clock")

    def skip(self, seconds: float, cause: str, *, sunlit: float = 1.0, soc: float | None = None) -> None:
        self.clock.skip_to(self.m + seconds, self.t)
        self.causes.append(cause)
        self.sunlit = sunlit
        self.soc = self.soc if soc is None else soc
        self.event("clock", skipped_s=seconds, cause=cause, assumed_board_w=round(self.board_w, 2), label="modelled")
        self.links("skip")

    def links(self, cause: str) -> None:
        swing = 0.5 + 0.5 * math.cos(self.m / 120.0)
        for direction, bps in (("uplink", 300e3), ("downlink", 1e6)):
            self.recorder.put("link", {
                "t_mono": self.t, "t_mission": self.m, "rate": self.clock.rate, "board": "vb1", "direction": direction,
                "delay_s": 0.0018 + 0.0056 * swing, "loss": 0.0, "rate_bps": bps * self.clock.rate,
                "outage": int(not self.link_up), "scheduled_s": self.t, "sent_s": self.t + 0.001,
                "acknowledged_s": self.t + 0.004, "verified_s": self.t + 0.006, "cause": cause,
            })  # fmt: skip

    def link(self, up: bool) -> None:
        if up != self.link_up:
            self.link_up = up
            self.links("aos" if up else "los")

    def fly(self, seconds: float, *, watts: float | None = None, ramp: float | None = None) -> None:
        """Power samples every tenth of a second; `ramp` is the sunlit share at the end."""
        steps = max(round(seconds / TICK_S), 1)
        first = self.sunlit
        for step in range(steps):
            self.t += seconds / steps
            if ramp is not None:
                self.sunlit = first + (ramp - first) * (step + 1) / steps
            noise = 0.08 * math.sin(7.1 * self.t) + 0.05 * math.sin(23.7 * self.t)
            target = {"off": 0.0, "shed": 0.0}.get(self.state, 5.0 if watts is None else watts)
            self.board_w += (target - self.board_w) * 0.5
            power_w = max(self.board_w + (noise if target else 0.0), 0.0)
            array_w = 44 * 0.85 * 0.95 * self.sunlit
            need = power_w + 6.0
            battery_w = need - array_w * 0.97
            dt = TICK_S * self.clock.rate
            self.soc = min(max(self.soc - battery_w * dt / 3600 / 10.0, 0.0), 1.0)
            if self.soc >= 1.0:
                battery_w = max(battery_w, 0.0)
            self.bus_v = 12.6 + 3.9 * self.soc - 0.1 * battery_w / 14
            on = self.state == "on"
            self.energy_j += power_w * TICK_S
            self.mission_j += power_w * dt
            volts = self.bus_v - 0.01 if on else 0.02
            self.recorder.put("power", {
                "t_mono": self.t, "t_mission": self.m, "rate": self.clock.rate, "board": "vb1", "state": self.state,
                "voltage_set_v": self.bus_v if on else 0.0, "current_limit_a": 2.5, "voltage_v": volts,
                "current_a": power_w / volts if on else 0.0, "power_w": power_w if on else 0.0,
                "energy_j": self.energy_j, "mission_energy_j": self.mission_j, "soc": self.soc,
                "bus_voltage_v": self.bus_v, "array_w": array_w, "array_used_w": min(array_w, need / 0.97 if
                self.soc >= 1.0 else array_w), "battery_w": battery_w, "sunlit": self.sunlit,
                "lateness_s": 0.002 + 0.001 * abs(noise), "gain": 0.04,
            })  # fmt: skip
            if step % 10 == 0:
                self.links("track")
                self.counters()

    def counters(self) -> None:
        for direction in ("uplink", "downlink"):
            self.recorder.put("qdisc", {
                "t_mono": self.t, "t_mission": self.m, "board": "vb1", "direction": direction,
                "sent_bytes": self.sent[direction], "sent_packets": self.sent[direction] // 1400, "dropped": 0,
                "backlog_packets": 0,
            })  # fmt: skip

    def step(self, name: str) -> None:
        self.finish()
        self.index += 1
        self.name = name
        self.event("step_started", step=name, index=self.index)

    def finish(self) -> None:
        if self.index >= 0:
            self.event("step_finished", step=self.name, index=self.index, ok=True)

    def boot(self, cause: str) -> None:
        self.state = "on"
        start = self.t
        self.event("board_on" if cause == "power on" else "load_restored", bus_voltage_v=self.bus_v, soc=self.soc)
        self.fly(14.0, watts=13.0)
        self.event("boot", uboot_s=1.1, kernel_s=3.4, login_s=11.8, ssh_s=self.t - start, cause=cause)

    def upload(self, share: float, acked: int, cut: bool) -> int:
        """One contact: its share of the file, then loss of signal; one chunk under way is lost by a cut."""
        self.skip(5_300.0, "next contact")
        self.rate(60.0, "upload")
        self.link(True)
        start, wall, end = self.t, 43.0 * share, min(acked + int(SIZE * share), SIZE)
        lost = CHUNK // 2 if cut else 0
        for part in range(1, 9):
            self.sent["uplink"] += int((end - acked + lost) / 8 * 1.05) if self.crossed else 0
            self.sent["downlink"] += 40_000
            self.fly(wall / 8, watts=6.5)
            value = acked + (end - acked) * part // 8
            self.recorder.put("progress", {
                "t_mono": self.t, "t_mission": self.m, "rate": 60.0, "board": "vb1", "kind": "upload_bytes",
                "value": value,
            })  # fmt: skip
        self.link(False)
        self.rate(1.0, "upload window over")
        self.event(
            "upload_window", window=0, station="kashgar", bytes_acked_start=acked, bytes_acked_end=end,
            bytes_sent=end - acked + lost, cut_by_los=cut, wall_s=wall, t_start_mono=start, clock_rate=60.0,
        )  # fmt: skip
        self.fly(1.0)
        return end

    def tokens(self, query: str, count: int, each_s: float, plane: str = "payload") -> None:
        for _ in range(count):
            self.fly(each_s, watts=14.6)
            self.recorder.put("tokens", {
                "t_mono": self.t, "t_mission": self.m, "rate": self.clock.rate, "board": "vb1", "query": query, "n": 1,
                "plane": plane,
            })  # fmt: skip

    def query(self, step: str, prompt: str, answer: str, count: int = 24) -> None:
        start, name = self.t, f"{step}-{sha(prompt)[:8]}"
        self.fly(1.5, watts=14.6)
        first = self.t + 0.25
        self.tokens(name, count, 0.25)
        self.event(
            "query", id=name, step=step, plane="payload", prompt=prompt, prompt_sha256=sha(prompt), answer=answer,
            answer_sha256=sha(answer), tokens=count, server_tokens=count, t_send_mono=start, t_first_mono=first,
            t_last_mono=self.t, duration_s=self.t - start, ttft_s=first - start, rate_min=1.0, rate_max=1.0,
            link_up_throughout=True, prompt_tps=22.0, decode_tps=4.1, finish_reason="length",
        )  # fmt: skip

    def close(self) -> None:
        for segment, cause in zip(self.clock.segments, self.causes, strict=True):
            self.recorder.put("clock", {
                "wall_start_s": segment.wall_start_s, "mission_start_s": segment.mission_start_s, "rate": segment.rate,
                "kind": segment.kind, "cause": cause,
            })  # fmt: skip
        self.recorder.close()
        self.journal.close()


PLANETS = "1. Mercury\n2. Venus\n3. Earth"


def write(directory: Path, *, answer_after: str = PLANETS, crossed: bool = True) -> Path:
    """A whole flight. `answer_after`: what the board says after the power cut; `crossed`: traffic passed netem."""
    run = SyntheticRun(directory)
    run.crossed = crossed
    run.event("flight_started", board="vb1")
    run.links("start")
    run.counters()
    run.step("boot")
    run.fly(1.0)
    run.boot("power on")
    run.step("upload")
    acked = 0
    for share, cut in ((0.27, True), (0.31, True), (0.25, True), (0.2, False)):
        acked = run.upload(share, acked, cut)
    run.event("upload_done", windows=4, size=SIZE, bytes_sent=SIZE + 3 * CHUNK // 2, sha256_ok=True)
    run.fly(0.5, watts=9.0)
    run.event("activated", sha256=SHA)
    run.step("serve")
    run.fly(4.0, watts=13.0)
    run.event("serve_ready", load_s=4.0)
    run.step("query")
    run.skip(5_400.0, "next contact")
    run.event("contact", station="miyun", aos_s=run.m, los_s=run.m + 460)
    run.fly(15.0)
    run.link(True)
    run.fly(1.0)
    run.query("query", "Name three planets.", PLANETS)
    run.fly(2.0)
    run.query("query", "What is the capital of France?", "The capital of France is Paris.", 9)
    run.step("loss_of_signal")
    run.skip(380.0, "towards loss of signal")
    run.fly(6.0, watts=14.6)
    run.link(False)
    run.fly(8.0, watts=14.6)
    run.skip(4_900.0, "next contact")
    run.link(True)
    run.fly(2.0)
    run.event(
        "mailbox", id="3f2b", prompt="What is an eclipse?", answer="An eclipse is a <shadow> & more.", tokens=31,
        answer_sha256=sha("x"), los_during=True, state_at_los="running", deliveries=1, duplicates=0,
        delivered_in_contact="kashgar", latency_mission_s=4_916.0,
    )  # fmt: skip
    run.link(False)
    run.step("eclipse")
    run.skip(2_400.0, "last eclipse", soc=0.97)
    run.rate(60.0, "eclipse")
    start = run.t
    run.tokens("eclipse", 8, 0.25, "mgmt")
    run.sunlit = 1.0
    run.fly(0.5, watts=14.6, ramp=0.0)
    count = 8
    while run.bus_v > 13.5:
        run.tokens("eclipse", 1, 0.25, "mgmt")
        count += 1
    run.rate(1.0, "load shedding")
    run.tokens("eclipse", 8, 0.25, "mgmt")
    run.bus_v = 13.19
    run.event("load_shed", bus_voltage_v=13.19, watched_v=13.19, soc=run.soc, verified_v=0.02)
    run.event("inference_load", tokens=count + 8, wall_s=run.t - start, t_start_mono=start, plane="mgmt")
    run.state = "shed"
    run.fly(5.0)
    run.rate(60.0, "recharge")
    run.fly(12.0)
    run.fly(0.5, ramp=1.0)
    run.fly(9.0)
    run.rate(1.0, "boot")
    run.boot("load restored")
    run.step("check")
    run.fly(4.0, watts=13.0)
    run.event("serve_ready", load_s=4.0)
    run.skip(3_000.0, "next contact")
    run.link(True)
    run.fly(2.0)
    run.query("check", "Name three planets.", answer_after)
    run.link(False)
    run.step("end")
    run.state = "off"
    run.fly(1.0)
    run.event("board_off", verified_v=0.02)
    run.event("flight_ended", ledger={
        "generated_j": 90_000.0, "stored_j": -1_000.0, "delivered_j": 60_000.0, "mppt_loss_j": 2_000.0,
        "resistance_loss_j": 400.0, "charge_loss_j": 100.0, "bus_loss_j": 0.0, "curtailed_j": 28_500.0,
    }, power_ledger={
        "metered_j": 800.0, "gap_j": 12.0, "metered_mission_j": 40_000.0, "fed_j": 39_600.0, "converter_j": 0.0,
        "assumed_j": 15_000.0,
        "samples": 900, "lost_samples": 2, "longest_gap_s": 1.5, "latest_s": 0.03, "overruns": 0, "writes": 300,
        "writes_skipped": 500, "meter": "rail VDD_IN", "compared": 61,
    })  # fmt: skip
    run.finish()
    run.close()
    source = Path(__file__).parents[2] / "fixtures/missions/star-compute-qwen3.yaml"
    (directory / "mission.yaml").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    provenance = {
        "schema": 1,
        "synthetic": "every number in this run was invented for tests",
        "hil": "0.1.0",
        "python": "3.11.7",
        "mission": {"name": "synthetic", "seed": 535},
        "bench": {"name": "virtual", "virtual": True},
        "board": {"name": "vb1", "type": "virtual-arm64", "hardware": "virtual", "undervoltage_lockout_v": 10.0},
        "model": {"title": "SmolLM2-135M-Instruct Q4_1", "sha256": SHA},
    }
    (directory / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    return directory


if __name__ == "__main__":
    import sys

    print(write(Path(sys.argv[1])))
