"""Every measure that an acceptance criterion may name: unit, definition, and how it comes from the raw record.

A measure returns its value with the evidence it rests on, or raises NoEvidence. It never asks Prometheus, whose
`increase()` extrapolates, and it never judges: `hil.campaign.verdict` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np

from hil.campaign import behind_array, derive, measures_steps, measures_timeline, measures_upload
from hil.campaign.evidence import (
    Measure,
    Measured,
    NoEvidence,
    clock_text,
    counted,
    events_of,
    extreme,
    must_have_ended,
    numbers_of,
    span_of,
)
from hil.campaign.record import Event, Floats, Record
from hil.inference import metrics


def _samples(record: Record, values: Floats, what: str) -> Floats:
    if not np.any(np.isfinite(values)):
        raise NoEvidence(f"no sample of {what} in telemetry.sqlite")
    return values


def _boot(name: str) -> Callable[[Record], Measured]:
    return lambda record: extreme(numbers_of(events_of(record, "boot"), name), max, f"longest {name}")


def _boot_count(record: Record) -> Measured:
    return counted(events_of(record, "boot"), "boots up to the login prompt")


def _upload_hash(record: Record) -> Measured:
    done = events_of(record, "upload_done")
    return Measured(all(event["sha256_ok"] is True for event in done), "hash of the whole file, taken on the board")


def _upload_windows(record: Record) -> Measured:
    return counted(events_of(record, "upload_window"), "contacts used")


def _upload_windows_cut(record: Record) -> Measured:
    windows = events_of(record, "upload_window")
    cut = [event for event in windows if event["cut_by_los"]]
    return Measured(float(len(cut)), f"{len(cut)} of {len(windows)} contacts", tuple(span_of(e) for e in windows))


def _upload_resent(record: Record) -> Measured:
    windows = events_of(record, "upload_window")
    events_of(record, "upload_done")
    pairs = [pair for pair in pairwise(windows) if pair[0]["cut_by_los"] and not pair[1].get("after_reboot")]
    resent = [_resent(before, after) for before, after in pairs]
    if not resent:
        raise NoEvidence("no upload was cut by loss of signal and resumed")
    return Measured(max(resent), f"bytes sent beyond where the next contact resumed, cuts: {len(resent)}")


def _resent(before: Event, after: Event) -> float:
    """What the sender counted as sent twice in the contact after a cut, or what its offsets say."""
    counted = after.get("bytes_resent")
    if counted is not None:
        return float(counted)
    return float(before["bytes_acked_start"] + before["bytes_sent"] - after["bytes_acked_start"])


def _upload_goodput(record: Record) -> Measured:
    windows = events_of(record, "upload_window")
    bits = capacity = 0.0
    for event in windows:
        could = derive.capacity_bits(record, "uplink", derive.event_span(event))
        if could is None:
            raise NoEvidence("no applied uplink state in telemetry.sqlite for an upload window")
        capacity += could
        bits += 8.0 * (event["bytes_acked_end"] - event["bytes_acked_start"])
    if capacity <= 0:
        raise NoEvidence("the uplink was never open in the upload windows")
    evidence = f"{bits / 8e6:.2f} MB acknowledged of {capacity / 8e6:.2f} MB that {len(windows)} contacts could carry"
    return Measured(bits / capacity, evidence, tuple(derive.event_span(event) for event in windows))


def _activated_once(record: Record) -> Measured:
    activated = events_of(record, "activated")
    hashed = [event for event in record.of("upload_done") if event["sha256_ok"] is True]
    wanted = record.meta.get("model_sha256") or record.provenance.get("model", {}).get("sha256")
    right = wanted is None or all(event["sha256"] == wanted for event in activated)
    after = bool(hashed) and all(event.t_mono >= hashed[0].t_mono for event in activated)
    evidence = f"activations: {len(activated)}, {'after' if after else 'NOT after'} the whole file's hash agreed"
    return Measured(len(activated) == 1 and right and after, evidence + ("" if right else ", of another file"))


def _payload_queries(record: Record) -> list[Event]:
    return events_of(record, "query", lambda event: event.get("plane", "payload") == "payload")


def _query(name: str, pick: Callable[..., Any], what: str) -> Callable[[Record], Measured]:
    return lambda record: extreme(numbers_of(_payload_queries(record), name), pick, what)


def _query_duration(record: Record) -> Measured:
    pairs = [(float(e["t_last_mono"]) - float(e["t_send_mono"]), e) for e in _payload_queries(record)]
    return extreme(pairs, max, "longest")


def _query_ttft(record: Record) -> Measured:
    answered = [event for event in _payload_queries(record) if event.get("t_first_mono") is not None]
    if not answered:
        raise NoEvidence("no query got a first token")
    return extreme([(float(e["t_first_mono"]) - float(e["t_send_mono"]), e) for e in answered], max, "longest")


def _query_decode(record: Record) -> Measured:
    pairs = []
    for event in _payload_queries(record):
        if event.get("t_first_mono") is not None:
            tps = metrics.decode_tps(float(event["t_first_mono"]), float(event["t_last_mono"]), int(event["tokens"]))
            pairs += [] if tps is None else [(tps, event)]
    if not pairs:
        raise NoEvidence("no query got two tokens")
    return extreme(pairs, min, "slowest")


def _query_count(record: Record) -> Measured:
    return counted(_payload_queries(record), "streamed queries over the payload link")


def _query_link_up(record: Record) -> Measured:
    queries = _payload_queries(record)
    up = [event for event in queries if event["link_up_throughout"] is True]
    return Measured(len(up) == len(queries), f"{len(up)} of {len(queries)} queries", tuple(span_of(e) for e in queries))


def _token_mismatch(record: Record) -> Measured:
    pairs = []
    for event in _payload_queries(record):
        if event.get("server_tokens") is not None:
            # llama.cpp counts the end-of-text token, which carries no content.
            unseen = 1 if event.get("finish_reason") == "stop" else 0
            server, own = int(event["server_tokens"]), int(event["tokens"])
            pairs.append((min(abs(server - own), abs(server - unseen - own)) / max(server, 1), event))
    if not pairs:
        raise NoEvidence("no query has the server's token count")
    return extreme(pairs, max, "largest")


def _tokens_unrecorded(record: Record) -> Measured:
    queries = events_of(record, "query")
    pairs = [
        (abs(float(np.sum(record.tokens.n[record.tokens.query == str(event["id"])])) - int(event["tokens"])), event)
        for event in queries
    ]
    return extreme(pairs, max, "largest difference between journal and telemetry")


def _mailbox_once(record: Record) -> Measured:
    letters = events_of(record, "mailbox")
    good = [event for event in letters if event["deliveries"] == 1 and event["duplicates"] == 0]
    return Measured(len(good) == len(letters), f"{len(good)} of {len(letters)} answers delivered once, none twice")


def _mailbox_los(record: Record) -> Measured:
    letters = events_of(record, "mailbox")
    cut = [event for event in letters if event["los_during"] is True]
    return Measured(len(cut) == len(letters), f"{len(cut)} of {len(letters)} queries lost the signal before the answer")


def _mailbox_latency(record: Record) -> Measured:
    return extreme(numbers_of(events_of(record, "mailbox"), "latency_mission_s"), max, "longest")


def _shed_count(record: Record) -> Measured:
    must_have_ended(record)
    sheds = record.of("load_shed")
    if not sheds and not any(event["step"] == "eclipse" for event in record.of("step_finished")):
        raise NoEvidence("the flight ended before its eclipse was flown")
    return counted(sheds, "load sheds in the journal")


def _shed_voltage(pick: Callable[..., Any], what: str) -> Callable[[Record], Measured]:
    return lambda record: extreme(numbers_of(events_of(record, "load_shed"), "watched_v"), pick, what)


def _bus_min(record: Record) -> Measured:
    volts = _samples(record, record.power.bus_voltage_v, "bus voltage")
    at = int(np.nanargmin(volts))
    return Measured(
        float(volts[at]), f"lowest of {len(volts)} samples, at mission time {clock_text(record.power.t_mission[at])}"
    )


def _below_lockout(record: Record) -> Measured:
    limit = _lockout_v(record)
    on = derive.powered(record)
    if not np.any(on):
        raise NoEvidence("no power sample of a board that is on")
    below = int(np.sum(on & (record.power.voltage_v < limit)))
    return Measured(float(below), f"{int(np.sum(on))} samples with the output on, lock-out at {limit:g} V")


def _lockout_v(record: Record) -> float:
    told = record.meta.get("undervoltage_lockout_v")
    if told is None:
        board = record.provenance.get("board")
        told = board.get("undervoltage_lockout_v") if isinstance(board, dict) else None
    if told is None:
        raise NoEvidence("neither telemetry meta nor provenance.json names the board's undervoltage_lockout_v")
    return float(told)


def _recover_boot(record: Record) -> Measured:
    shed = events_of(record, "load_shed")
    restored = [event for event in record.of("load_restored") if event.t_mono > shed[0].t_mono]
    boots = [event for event in record.of("boot") if event.t_mono > shed[0].t_mono and event.get("login_s") is not None]
    if not restored:
        raise NoEvidence("the load was shed and never restored")
    late = [cut for cut in restored if not any(boot.t_mono > cut.t_mono for boot in boots)]
    arms = {event.get("arm") for event in record.of("error")}
    if late and arms and "board" not in arms:
        raise NoEvidence("the flight was ended before the board could boot, by another than the board")
    return Measured(not late, f"sheds: {len(shed)}, restored: {len(restored)}, boots to login afterwards: {len(boots)}")


def _recover_answer(record: Record) -> Measured:
    after = events_of(record, "query", lambda event: event.get("step") == "check")
    cuts = record.of("load_shed", "board_off")
    same = compared = 0
    for event in after:
        for first in record.of("query"):
            cut_between = any(first.t_mono < cut.t_mono < event["t_send_mono"] for cut in cuts)
            if cut_between and first["prompt_sha256"] == event["prompt_sha256"] and first.get("step") != "check":
                compared += 1
                same += first["answer_sha256"] == event["answer_sha256"]
                break
    if compared < len(after):
        raise NoEvidence("a check query has no earlier answer to the same prompt with a power cut in between")
    return Measured(same == compared, f"{same} of {compared} greedy answers equal to the one before the power cut")


def _off_verified(record: Record) -> Measured:
    events_of(record, "board_off")
    return extreme(numbers_of(record.of("board_off", "input_off", "load_shed"), "verified_v"), max, "highest")


def _power_max(record: Record) -> Measured:
    watts = _samples(record, record.power.power_w, "power")
    at = int(np.nanargmax(watts))
    return Measured(
        float(watts[at]), f"highest of {len(watts)} samples, at mission time {clock_text(record.power.t_mission[at])}"
    )


def _mean(record: Record, chosen: Any, what: str) -> tuple[float, int]:
    watts = record.power.power_w[chosen]
    watts = watts[np.isfinite(watts)]
    if len(watts) < 5:
        raise NoEvidence(f"{len(watts)} power samples of {what}; five are needed")
    return float(np.mean(watts)), len(watts)


def _inference_power(record: Record) -> Measured:
    busy, busy_n = _mean(record, derive.inference_samples(record), "inference")
    idle, idle_n = _mean(record, derive.idle_samples(record), "an idle board")
    evidence = f"mean {busy:.2f} W of {busy_n} samples in inference, {idle:.2f} W of {idle_n} samples idle"
    return Measured(busy - idle, evidence)


# Causes of link states that no orbital edge scheduled: they are applied at once, whenever they are asked for.
_NO_EDGE = ("track", "clock", "skip", "start")


def _lateness(record: Record, share: float | None) -> Measured:
    link = record.link
    edges = ~np.isin(link.cause, _NO_EDGE) & np.isfinite(link.acknowledged_s) & np.isfinite(link.scheduled_s)
    late = (link.acknowledged_s - link.scheduled_s)[edges]
    if not len(late):
        raise NoEvidence("no link edge with its times in telemetry.sqlite")
    value = float(np.max(late)) if share is None else metrics.quantile(late.tolist(), share)
    return Measured(value, f"acknowledged - scheduled, {len(late)} edges (both directions)")


def _loop_lateness(record: Record) -> Measured:
    late = record.power.lateness_s[np.isfinite(record.power.lateness_s)]
    if not len(late):
        raise NoEvidence("no power loop lateness in telemetry.sqlite")
    return Measured(metrics.quantile(late.tolist(), 0.99), f"nearest rank of {len(late)} ticks")


def _crossed(record: Record) -> Measured:
    both = [derive.crossed_bytes(record, "uplink"), derive.crossed_bytes(record, "downlink")]
    if None in both:
        raise NoEvidence("fewer than two queue counter readings of a direction in telemetry.sqlite")
    return Measured(float(sum(item or 0.0 for item in both)), f"{both[0]:.0f} B up, {both[1]:.0f} B down")


def _crossed_share(record: Record) -> Measured:
    windows = events_of(record, "upload_window")
    acked = float(sum(event["bytes_acked_end"] - event["bytes_acked_start"] for event in windows))
    crossed = derive.crossed_bytes(record, "uplink")
    if crossed is None or acked <= 0:
        raise NoEvidence("no uplink queue counters, or nothing was uploaded")
    return Measured(
        crossed / acked, f"{crossed:.0f} B left the uplink queue, {acked:.0f} B of the file were acknowledged"
    )


def _ledger(record: Record) -> Measured:
    ended = events_of(record, "flight_ended")
    ledger = ended[-1].get("ledger")
    if not isinstance(ledger, dict) or not ledger.get("generated_j"):
        raise NoEvidence("the flight's end holds no energy ledger")
    spent = sum(float(value) for key, value in ledger.items() if key in (*_LEDGER_SINKS, "mismatch_loss_j"))
    missing = [key for key in _LEDGER_SINKS if key not in ledger]
    if missing:
        raise NoEvidence(f"the energy ledger lacks {', '.join(missing)}")
    residual = abs(float(ledger["generated_j"]) - spent) / float(ledger["generated_j"])
    return Measured(residual, f"{float(ledger['generated_j']):.0f} J generated (modelled satellite, mission time)")


_LEDGER_SINKS = (
    "stored_j",
    "delivered_j",
    "mppt_loss_j",
    "resistance_loss_j",
    "charge_loss_j",
    "bus_loss_j",
    "curtailed_j",
)


def _deadman(record: Record) -> Measured:
    must_have_ended(record)
    dead = [event for event in record.of("deadman") if event.get("alive") is False]
    return Measured(not dead, f"deaths of the dead-man that the daemon noticed in flight: {len(dead)}")


def _j_per_token(phase: str | None) -> Callable[[Record], Measured]:
    def of(record: Record) -> Measured:
        parts = [item for item in derive.per_phase(record) if phase in (None, item.phase)]
        tokens, joules = sum(item.tokens for item in parts), sum(item.energy_j for item in parts)
        if not tokens:
            raise NoEvidence("no token was generated while power was measured" + (f" in {phase}" if phase else ""))
        seconds = sum(item.seconds for item in parts)
        return Measured(joules / tokens, f"{joules:.1f} J (wall) over {seconds:.1f} s of inference, {tokens} tokens")

    return of


def _overruns(record: Record) -> Measured:
    must_have_ended(record)
    return counted(record.of("overrun"), "setpoints that came too late")


def _power_ledger(record: Record) -> dict[str, float]:
    ledger = events_of(record, "flight_ended")[-1].get("power_ledger")
    if not isinstance(ledger, dict):
        raise NoEvidence("the flight's end holds no ledger of the power loop")
    return ledger


def _gap_share(record: Record) -> Measured:
    ledger = _power_ledger(record)
    metered = float(ledger["metered_j"])
    if metered <= 0:
        raise NoEvidence("the board drew nothing")
    found = (
        f"{float(ledger['gap_j']):.1f} of {metered:.1f} J (wall), longest gap {float(ledger['longest_gap_s']):.2f} s"
    )
    return Measured(float(ledger["gap_j"]) / metered, found)


def _fed_residual(record: Record) -> Measured:
    ledger = _power_ledger(record)
    metered, fed = float(ledger["metered_mission_j"]), float(ledger["fed_j"])
    if metered <= 0:
        raise NoEvidence("the board drew nothing")
    skipped = f", {float(ledger['assumed_j']):.0f} J assumed in skips" if ledger["assumed_j"] else ""
    return Measured(abs(fed - metered) / metered, f"{fed:.0f} J fed, {metered:.0f} J metered (mission){skipped}")


def _compared(record: Record) -> Measured:
    ledger = _power_ledger(record)
    if not ledger["meter"]:
        raise NoEvidence("the bench has no second meter for this board")
    return Measured(float(ledger["compared"]), f"readings of {ledger['meter']} beside the supply's own")


def _steps_finished(record: Record) -> Measured:
    started = events_of(record, "step_started")
    good = {event["index"] for event in record.of("step_finished") if event["ok"] is True}
    return Measured(float(len(good)), f"{len(good)} of {len(started)} steps that were started")


_ALL: tuple[Measure, ...] = (
    Measure("boot.count", "boots", "Boots that reached the login prompt.", _boot_count),
    Measure(
        "boot.login_s.max", "s", "Longest time from output on to the login prompt on the console.", _boot("login_s")
    ),
    Measure("boot.ssh_s.max", "s", "Longest time from output on to an SSH session.", _boot("ssh_s")),
    Measure(
        "upload.sha256_ok", "", "The SHA-256 of the whole file, taken on the board, is the ground file's.", _upload_hash
    ),
    Measure("upload.windows", "windows", "Contacts in which the upload sent data.", _upload_windows),
    Measure("upload.windows_cut", "windows", "Contacts in which loss of signal cut the upload.", _upload_windows_cut),
    Measure(
        "upload.resent_bytes_per_cut.max",
        "B",
        "Most bytes that one loss of signal cost: sent before it, and sent again in the next contact.",
        _upload_resent,
    ),
    Measure(
        "upload.goodput_share",
        "1",
        "Acknowledged file bits over the bits that the applied uplink rate could carry in the contact time used.",
        _upload_goodput,
    ),
    Measure(
        "upload.activated_once",
        "",
        "The file was activated exactly once, after its whole hash agreed, and it is the mission's file.",
        _activated_once,
    ),
    Measure("query.count", "queries", "Streamed queries that were answered over the payload link.", _query_count),
    Measure("query.duration_s.max", "s", "Longest time from first byte up to last byte down.", _query_duration),
    Measure("query.ttft_s.max", "s", "Longest time from first byte up to first non-empty content.", _query_ttft),
    Measure(
        "query.tokens.min",
        "tokens",
        "Fewest content tokens of an answer, counted by the client.",
        _query("tokens", min, "fewest"),
    ),
    Measure(
        "query.decode_tps.min",
        "tokens/s",
        "Slowest decoding: (n - 1) / (last - first token), per query.",
        _query_decode,
    ),
    Measure(
        "query.token_mismatch.max",
        "1",
        "Largest difference between the client's and the server's token count over the server's count. One token "
        "without content is allowed where the server ended the answer itself.",
        _token_mismatch,
    ),
    Measure(
        "query.tokens_unrecorded.max",
        "tokens",
        "Largest difference between an answer's tokens in the journal and in the telemetry.",
        _tokens_unrecorded,
    ),
    Measure("query.link_up_throughout", "", "The link was up from first to last byte of every query.", _query_link_up),
    Measure("mailbox.delivered_exactly_once", "", "Every kept answer was delivered once and only once.", _mailbox_once),
    Measure(
        "mailbox.interrupted_by_los", "", "Signal was lost after acceptance and before every kept answer.", _mailbox_los
    ),
    Measure(
        "mailbox.latency_mission_s.max",
        "s",
        "Longest mission time from acceptance to delivery, the wait for the next contact included.",
        _mailbox_latency,
    ),
    Measure("eclipse.shed_count", "cuts", "Times the load was shed: the board's power really cut.", _shed_count),
    Measure(
        "eclipse.shed_voltage_v.min",
        "V",
        "Lowest voltage at which the load was shed: the battery's, which is the bus's unless that is regulated.",
        _shed_voltage(min, "lowest"),
    ),
    Measure(
        "eclipse.shed_voltage_v.max",
        "V",
        "Highest voltage at which the load was shed, the same.",
        _shed_voltage(max, "highest"),
    ),
    Measure("eclipse.min_bus_voltage_v", "V", "Lowest bus voltage of the flight (satellite's model).", _bus_min),
    Measure(
        "board.below_lockout_samples",
        "samples",
        "Power samples with the output on and the measured voltage below the board's own under-voltage lock-out.",
        _below_lockout,
    ),
    Measure("recover.boot_ok", "", "After every restored load the board booted to login by itself.", _recover_boot),
    Measure(
        "recover.identical_answer",
        "",
        "The same greedy prompt has the identical answer after the power cut.",
        _recover_answer,
    ),
    Measure(
        "power.off_verified_v.max",
        "V",
        "Highest voltage measured after the output was switched off, by command or by load shedding.",
        _off_verified,
    ),
    Measure("power.max_w", "W", "Highest measured power.", _power_max),
    Measure(
        "power.inference_minus_idle_w",
        "W",
        "Mean measured power in inference minus mean measured power of the idle board.",
        _inference_power,
    ),
    Measure(
        "power.loop_lateness_s.p99",
        "s",
        "99 % of the power loop's ticks were at most this late (nearest rank).",
        _loop_lateness,
    ),
    Measure(
        "link.edge_lateness_s.max",
        "s",
        "Longest time from a link edge's schedule to its acknowledgement.",
        lambda record: _lateness(record, None),
    ),
    Measure("link.edge_lateness_s.p99", "s", "The same, 99 % (nearest rank).", lambda record: _lateness(record, 0.99)),
    Measure("link.crossed_netem_bytes", "B", "Bytes that left the emulator's queues, by its own counters.", _crossed),
    Measure(
        "link.crossed_netem_share",
        "1",
        "Bytes that left the uplink queue over the file bytes that were acknowledged.",
        _crossed_share,
    ),
    Measure(
        "energy.ledger_residual_share",
        "1",
        "What the satellite's energy ledger does not account for, over what the array generated.",
        _ledger,
    ),
    Measure(
        "energy.gap_share",
        "1",
        "Share of the board's energy between samples too far apart: drawn straight between them, not measured.",
        _gap_share,
    ),
    Measure(
        "energy.fed_residual_share",
        "1",
        "What the battery model was fed for the board differs by this share from what was metered, skips left out.",
        _fed_residual,
    ),
    Measure("energy.meter_comparisons", "readings", "Readings of the second meter that were compared.", _compared),
    Measure(
        "energy.j_per_token",
        "J/token",
        "Measured wall energy of the board in inference over its tokens.",
        _j_per_token(None),
    ),
    Measure("energy.j_per_token.sun", "J/token", "The same, in full sunlight only.", _j_per_token(derive.SUN)),
    Measure("energy.j_per_token.eclipse", "J/token", "The same, in the umbra only.", _j_per_token(derive.ECLIPSE)),
    Measure(
        "deadman.alive", "", "The dead-man never died during the flight, which its daemon watched to the end.", _deadman
    ),
    Measure("clock.overruns", "setpoints", "Setpoints that came later than their overrun bound.", _overruns),
    Measure("steps.finished", "steps", "Steps of the mission that finished in order.", _steps_finished),
)


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        item.name: behind_array.guarded(item)
        for item in (*_ALL, *measures_steps.MEASURES, *measures_timeline.MEASURES, *measures_upload.MEASURES)
    }
)
"""Every measure with a name of its own. `reported.NAME.STATISTIC` comes from the mission's run steps: `find`."""

# The first prefix that fits names the steps of which one at least must be flown for the measure to have evidence.
_STEPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("boot.", ("boot",)),
    ("upload.", ("upload",)),
    ("query.", ("query", "check")),
    ("mailbox.", ("loss_of_signal",)),
    ("eclipse.min_bus", ()),
    ("eclipse.", ("eclipse", "cruise")),
    ("recover.boot_ok", ("eclipse", "cruise")),
    ("recover.", ("check",)),
    ("power.inference", ("query", "eclipse", "duty_cycle", "cruise")),
    ("energy.j_per_token", ("query", "eclipse", "duty_cycle", "cruise")),
    ("link.crossed_netem_share", ("upload",)),
    ("cruise.", ("cruise",)),
    ("run.", ("run",)),
    ("duty.", ("duty_cycle",)),
    (f"{measures_steps.REPORTED}.", ("run",)),
)


def steps_for(name: str) -> tuple[str, ...]:
    """The kinds of steps of which one at least must be flown for this measure; empty: any flight gives it."""
    return next((steps for prefix, steps in _STEPS if name.startswith(prefix)), ())


def find(name: str, reports: Mapping[str, str]) -> Measure | None:
    """The measure of this name; `reports` are the names and units that the mission's programs report."""
    told = measures_steps.split_reported(name)
    if told is None:
        return MEASURES.get(name)
    return measures_steps.reported(*told, reports[told[0]]) if told[0] in reports else None
