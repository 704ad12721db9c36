"""`report.html`: one self-contained page about a run, opens offline, holds no number that is not in the record."""

from __future__ import annotations

import html
import itertools
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hil.campaign import behind_array, derive, measures_upload, plot, verdict
from hil.campaign.evidence import NoEvidence
from hil.campaign.measures import MEASURES
from hil.campaign.page import page
from hil.campaign.plot import Axis, Band, Panel, Series, Track
from hil.campaign.record import Event, Floats, Record, spans
from hil.inference import metrics
from hil.inventory.mission import MissionFile
from hil.model import Criterion, Direction, Span, VerdictFile

_MEANING = {
    "pass": "every criterion was measured and kept",
    "fail": "at least one criterion was broken, or the board misbehaved",
    "infra": "the bench broke: this says nothing about the board",
    "invalid": "the bench could not measure what a criterion demands",
    "missing": "the record lacks evidence that a criterion needs",
}
_NUMBERS = ("Measured", "Limit", "Clock")
_LOOKS: tuple[tuple[int, plot.Style], ...] = (
    *((colour, "line") for colour in range(1, 6)),
    *((colour, "dashed") for colour in range(1, 6)),
)
_EPS_NOTE = "computed by the satellite's power model from the measured board power"


def write(path: Path, record: Record, judged: VerdictFile) -> None:
    """Write the report of a run whole or not at all."""
    mission = verdict.mission_of(record.directory)
    part = path.with_name(f".{path.name}.part")
    part.write_text(render(record, judged, mission), encoding="utf-8")
    os.replace(part, path)


def render(record: Record, judged: VerdictFile, mission: MissionFile) -> str:
    """The page as text."""
    axis = _axis(record)
    panels = _panels(record, mission)
    events = _events(record)
    counted = {name: sum(row.verdict == name for row in judged.criteria) for name in verdict.WORST_FIRST}
    told = ", ".join(f"{count} {name}" for name, count in counted.items() if count)
    synthetic = record.provenance.get("synthetic")
    return page(
        "report_template.html",
        title=_text(mission.title),
        verdict=judged.verdict,
        summary=_text(f"{_MEANING[judged.verdict]} ({told})"),
        notice=f'<p class="notice"><b>Synthetic:</b> {_text(synthetic)}.</p>' if synthetic else "",
        subtitle=_subtitle(record, mission, axis),
        cards="".join(_cards(record)),
        uploads=_uploads(record),
        criteria="".join(_criterion(row) for row in judged.criteria),
        certificate=_certificate(record),
        plots=_plots(record, axis, panels, events),
        events="".join(f"<li>{_text(text)}</li>" for _, text in events),
        talk="".join(_talk(record)) or '<p class="soft">No question was answered in this run.</p>',
        honest=_honest(record, mission, axis),
        provenance="".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in _flat(record.provenance)),
        footer=_text(f"hil {record.provenance.get('hil', '')} · run {record.directory.name}"),
        # `</` would end the script element.
        data=json.dumps(plot.readings(axis, panels), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _axis(record: Record) -> Axis:
    begins = [event.t_mono for event in record.of("flight_started")] or [event.t_mono for event in record.events]
    begins += [float(record.power.t_mono[0])] if len(record.power.t_mono) else []
    start = min(begins, default=0.0)
    return Axis(plot.sections(record, start, max(derive.end_s(record), start + 1.0)))


def _subtitle(record: Record, mission: MissionFile, axis: Axis) -> str:
    flown = axis.sections[-1].end_s - axis.sections[0].start_s
    covered = axis.mission_s(axis.sections[-1].end_s) - axis.sections[0].mission_s
    board = record.provenance.get("board", {})
    parts = [
        f"board <b>{_text(board.get('name', 'unknown'))}</b> ({_text(board.get('type', 'type unknown'))})",
        f"model <b>{_text(mission.model.title)}</b>",
        f"flown {_text(record.events[0].t_wall[:19].replace('T', ' '))} UTC" if record.events else "",
        f"<b>{_clock(covered)}</b> of mission time in <b>{_clock(flown)}</b> of real time",
    ]
    return " · ".join(part for part in parts if part)


def _clock(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    minutes, rest_s = divmod(round(seconds), 60)
    return f"{minutes} min {rest_s} s"


# --- key figures -----------------------------------------------------------------------------------------------------


def _cards(record: Record) -> Iterable[str]:
    yield _upload_card(record)
    yield _measure_card(record, "Uplink used", "upload.goodput_share", 100, "%", 0)
    queries = [e for e in record.of("query") if e.get("t_first_mono") is not None and e.get("plane") == "payload"]
    firsts = [float(e["t_first_mono"]) - float(e["t_send_mono"]) for e in queries]
    yield _card(
        "Time to first token",
        f"{statistics.median(firsts):.2f}" if firsts else None,
        "s",
        f"median of {len(firsts)} questions over the link, longest {max(firsts):.2f} s" if firsts else "no answer",
    )
    speeds = [
        speed
        for e in queries
        if (speed := metrics.decode_tps(float(e["t_first_mono"]), float(e["t_last_mono"]), int(e["tokens"])))
    ]
    yield _card(
        "Decoding",
        f"{statistics.median(speeds):.1f}" if speeds else None,
        "tokens/s",
        f"median of {len(speeds)} questions, one user, by the client's clock" if speeds else "no answer of two tokens",
    )
    yield _measure_card(record, "Longest answer, first byte up to last down", "query.duration_s.max", 1, "s", 1)
    unseen = behind_array.lacking("energy.j_per_token") if behind_array.flown(record) else ""
    phases = {} if unseen else {item.phase: item for item in derive.per_phase(record)}
    for phase, name in ((derive.SUN, "in sunlight"), (derive.ECLIPSE, "in eclipse")):
        part = phases.get(phase)
        each = part.j_per_token if part else None
        yield _card(
            f"Energy per token {name}",
            None if each is None else f"{each:.2f}",
            "J",
            f"{part.energy_j:.0f} J measured over {part.tokens} tokens" if part else unseen or f"no inference {name}",
        )
    yield _measure_card(record, "Inference draws above idle", "power.inference_minus_idle_w", 1, "W", 1)
    yield _measure_card(record, "Lowest bus voltage (modelled)", "eclipse.min_bus_voltage_v", 1, "V", 2)
    yield _measure_card(record, "Load shed", "eclipse.shed_count", 1, "×", 0)
    yield _measure_card(record, "Power on to login", "boot.login_s.max", 1, "s", 1)
    yield _measure_card(record, "Link edges late by at most", "link.edge_lateness_s.max", 1000, "ms", 1)


def _upload_card(record: Record) -> str:
    windows = record.of("upload_window")
    sent = sum(int(event["bytes_acked_end"]) - int(event["bytes_acked_start"]) for event in windows)
    cut = sum(bool(event["cut_by_los"]) for event in windows)
    protocols = " and ".join(measures_upload.by_protocol(record))
    return _card(
        "Model upload",
        f"{sent / 1e6:.1f}" if windows else None,
        "MB",
        f"by {protocols} in {len(windows)} contacts, {cut} cut by loss of signal" if windows else "no upload",
    )


def _uploads(record: Record) -> str:
    """What each upload protocol cost, in the same terms: a run that flew both compares them, two reports do too."""
    rows = "".join(_upload_row(name, cost) for name, cost in measures_upload.by_protocol(record).items())
    if not rows:
        return ""
    heads = ("Contacts", "Cut", "File MB", "On the wire MB", "Over the file", "Sent again kB", "Retransmitted packets")
    columns = "".join(f'<th class="num">{head}</th>' for head in (*heads, "Goodput kbit/s", "of the link"))
    return (
        '<section aria-labelledby="uploads"><h2 id="uploads">Upload by protocol</h2>'
        f'<div class="scroll"><table><thead><tr><th>Protocol</th>{columns}</tr></thead><tbody>{rows}</tbody></table>'
        '</div><p class="soft small">On the wire: all that the ground put on the payload link in these contacts, with '
        "headers, handshakes and repetitions. Sent again: bytes of the file, from where SFTP resumed or what CFDP was "
        "asked for. Retransmitted: TCP segments under SFTP, file data PDUs of CFDP. Goodput: acknowledged file bits a "
        "second of open contact in mission time, and as a share of what the applied rate could carry."
        f"{_upload_reboots(record)}</p></section>"
    )


def _upload_reboots(record: Record) -> str:
    """What reboots of the board in uploads cost, when there were any."""
    reboots = record.of("upload_rebooted")
    if not reboots:
        return ""
    windows = [event for event in record.of("upload_window") if event.get("after_reboot")]
    lost, again = (sum(int(event[name]) for event in windows) for name in ("bytes_lost", "bytes_resent"))
    how = "; ".join(f"{event['protocol']}, {event['cause']}: {event['goes_on']}" for event in reboots)
    return _text(
        f" Reboots of the board in uploads: {len(reboots)} ({how}). It lost {lost / 1e3:.1f} kB that it had confirmed; "
        f"{again / 1e3:.1f} kB were sent again in the contacts after."
    )


def _upload_row(name: str, cost: measures_upload.Cost) -> str:
    overhead, share = cost.overhead_share, cost.goodput_share
    cells = (
        f"{cost.contacts}",
        f"{cost.cut}",
        f"{cost.file_bytes / 1e6:.2f}",
        "–" if cost.wire_bytes is None else f"{cost.wire_bytes / 1e6:.2f}",
        "–" if overhead is None else f"{overhead:+.1%}",
        "–" if cost.resent_bytes is None else f"{cost.resent_bytes / 1e3:.1f}",
        "–" if cost.retransmissions is None else f"{cost.retransmissions}",
        "–" if cost.goodput_bps is None else f"{cost.goodput_bps / 1e3:.1f}",
        "–" if share is None else f"{share:.1%}",
    )
    return (
        f'<tr><th scope="row">{_text(name)}</th>' + "".join(f'<td class="num">{cell}</td>' for cell in cells) + "</tr>"
    )


def _measure_card(record: Record, title: str, name: str, factor: float, unit: str, digits: int) -> str:
    try:
        measured = MEASURES[name].of(record)
    except NoEvidence as lack:
        return _card(title, None, unit, str(lack))
    return _card(title, f"{float(measured.value) * factor:.{digits}f}", unit, measured.evidence)


def _card(title: str, value: str | None, unit: str, detail: str) -> str:
    number = f"{_text(value)}<small>{_text(unit)}</small>" if value is not None else "–"
    told = detail if value is not None or not detail else f"no evidence: {detail}"
    return (
        f'<div class="card"><div class="k">{_text(title)}</div><div class="n">{number}</div>'
        f'<div class="d">{_text(told)}</div></div>'
    )


# --- criteria --------------------------------------------------------------------------------------------------------


def _criterion(row: Criterion) -> str:
    rate = "" if row.clock_rate is None else f"×{row.clock_rate:g}"
    return (
        f'<tr><td><span class="tag {row.verdict}">{row.verdict}</span></td><th scope="row">{_text(row.name)}</th>'
        f'<td class="num">{_text(_value(row.measured))}</td><td class="num">{_text(_limit(row.limit))}</td>'
        f'<td>{_text(row.unit)}</td><td class="num">{rate}</td><td class="ev">{_text(row.evidence)}</td></tr>'
    )


def _certificate(record: Record) -> str:
    """What was measured of the link before the flight (`--certify`), or an empty text."""
    path = record.directory / "certificate.json"
    if not path.exists():
        return ""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = "".join(_criterion(Criterion(**row)) for row in found["criteria"])
        told = f"{found['verdict']}, by {found['backend']}; at the far end {found['far_end']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        rows, told = "", f"certificate.json cannot be read: {error!r}"
    heads = ("Verdict", "Measurement", "Measured", "Limit", "Unit", "Clock", "Evidence")
    columns = "".join(f'<th class="num">{head}</th>' if head in _NUMBERS else f"<th>{head}</th>" for head in heads)
    return (
        '<section aria-labelledby="certificate"><h2 id="certificate">Link certificate</h2>'
        f'<p class="soft small">What the emulator did to packets just before this flight: {_text(told)}.</p>'
        f'<div class="scroll"><table><thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table></div></section>'
    )


def _limit(limit: str) -> str:
    return limit.replace("<=", "≤").replace(">=", "≥")


def _value(value: float | str | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value).lower()
    return f"{value:.0f}" if value == int(value) else f"{value:.4g}"


# --- plots -----------------------------------------------------------------------------------------------------------


def _panels(record: Record, mission: MissionFile) -> tuple[Panel, ...]:
    power, shed = record.power, mission.power.shed
    array = behind_array.flown(record)
    t_s = power.t_mono
    on = np.where(derive.powered(record), power.voltage_v, np.nan)
    links = {direction: _link(record, direction) for direction in ("uplink", "downlink")}
    tokens = record.tokens
    uploaded = record.progress.kind == "upload_bytes"
    return (
        Panel(
            "Voltage",
            "V",
            (
                *(() if array else (Series("bus, modelled", t_s, power.bus_voltage_v, 2, "dashed"),)),
                Series("supply, measured while on", t_s, on, 1),
            ),
            zero=False,
            height=130,
            digits=2,
            marks=() if array else ((shed.voltage_v, f"shed {shed.voltage_v:g} V"),),
        ),
        Panel("Current", "A", (Series("supply, measured", t_s, power.current_a, 1),), digits=2),
        Panel(
            "Power",
            "W",
            (
                Series("array available, modelled", t_s, power.array_w, 5, "dashed")
                if array
                else Series("array used, modelled", t_s, power.array_used_w, 5, "dashed"),
                Series("drawn from the array, measured" if array else "board, measured", t_s, power.power_w, 1),
            ),
            height=130,
        ),
        *(
            ()
            if array
            else (Panel("State of charge", "%", (Series("battery, modelled", t_s, 100 * power.soc, 3),), top=100.0),)
        ),
        *_heat_panels(record, mission),
        Panel("Sunlight", "% visible", (Series("computed", t_s, 100 * power.sunlit, 5),), height=84, top=100),
        Panel("One-way delay", "ms", tuple(_line(name, s, 1e3 * d) for name, (s, _, d) in links.items()), digits=2),
        Panel(
            "Link rate, scaled with the clock",
            "Mbit/s",
            tuple(_line(name, s, r / 1e6) for name, (s, r, _) in links.items()),
            log=True,
            digits=2,
        ),
        Panel(
            "Uploaded",
            "MB",
            (
                Series(
                    "acknowledged by the board",
                    record.progress.t_mono[uploaded],
                    record.progress.value[uploaded] / 1e6,
                    3,
                    held=True,
                ),
            ),
            height=84,
        ),
        Panel(
            "Tokens",
            "since start",
            (Series("counted by the client", tokens.t_mono, np.cumsum(tokens.n), 4, held=True),),
            height=84,
            digits=0,
        ),
    )  # fmt: skip


def _heat_panels(record: Record, mission: MissionFile) -> Iterable[Panel]:
    """The thermal model's nodes, where the mission has one, and between what it has the work stop and go on."""
    thermal = record.thermal
    nodes = sorted(set(thermal.node.tolist()))
    if not nodes:
        return
    cutoff = None if mission.thermal is None else mission.thermal.cutoff
    series: list[Series] = []
    marks: tuple[tuple[float, str], ...] = ()
    for node, (colour, style) in zip(nodes, itertools.cycle(_LOOKS), strict=False):
        of = thermal.node == node
        series.append(Series(node, thermal.t_mono[of], thermal.temperature_c[of], colour, style))
    if cutoff is not None:
        marks = (
            (cutoff.off_c, f"{cutoff.node}: stop {cutoff.off_c:g} °C"),
            (cutoff.on_c, f"{cutoff.node}: go {cutoff.on_c:g} °C"),
        )
    yield Panel("Temperature, modelled", "°C", tuple(series), zero=False, height=130, marks=marks)


def _line(direction: str, since: Floats, value: Floats) -> Series:
    colour: int
    style: plot.Style
    colour, style = (1, "line") if direction == "uplink" else (2, "dashed")
    return Series(f"{direction}, applied", since, value, colour, style, held=True)


def _link(record: Record, direction: Direction) -> tuple[Floats, Floats, Floats]:
    """Since when, rate in bit/s, delay in seconds; both NaN in an outage: nothing passes."""
    since, rate, delay = derive.applied(record, direction)
    return since, np.where(rate > 0, rate, np.nan), np.where(rate > 0, delay, np.nan)


def _plots(record: Record, axis: Axis, panels: Sequence[Panel], events: Sequence[tuple[float, str]]) -> str:
    power = record.power
    phases = derive.light(power.sunlit)
    dark = Band("eclipse", tuple(_stretches(power.t_mono, phases == derive.ECLIPSE, "eclipse")))
    dusk = Band("penumbra", tuple(_stretches(power.t_mono, phases == derive.PENUMBRA, "penumbra")))
    since, rate, _ = derive.applied(record, "uplink")
    up = tuple(_stretches(np.append(since, derive.end_s(record)), np.append(rate > 0, False), "up"))
    sun = tuple(_stretches(power.t_mono, phases == derive.SUN, "sun"))
    on = tuple(_stretches(power.t_mono, derive.powered(record), "on"))
    clock = [Span(s.start_s, s.end_s, f"×{s.rate:g}") for s in axis.sections]
    tracks = (
        Track("step", (Band("b-step", tuple(derive.steps(record))),)),
        Track(
            "clock",
            (
                Band("b-slow", tuple(s for s in clock if s.label == "×1")),
                Band("b-fast", tuple(s for s in clock if s.label != "×1")),
            ),
        ),
        Track("light", (Band("b-sun", sun), Band("b-penumbra", dusk.spans), Band("b-eclipse", dark.spans))),
        Track("link", (Band("b-up", up),)),
        Track("output", (Band("b-on", on),)),
    )
    shades = (dark, dusk, Band("contact", up))
    lines = [t_s for t_s, _ in events]
    drawn = [plot.render(axis, panel, shades, lines) for panel in panels]
    return "".join([plot.strip(axis, tracks, events), *drawn, plot.time_axis(axis)])


def _stretches(t_s: Floats, flags: Any, label: str) -> Iterable[Span]:
    """Wall spans in which flags hold; each lasts until the next sample."""
    for first, last in spans(flags):
        yield Span(float(t_s[first]), float(t_s[min(last + 1, len(t_s) - 1)]), label)


def _events(record: Record) -> list[tuple[float, str]]:
    """What is marked in the plots: wall time and one line each, from the journal."""
    found = []
    for event in record.events:
        if text := _event(event):
            clock = "–" if event.t_mission is None else plot.clock_text(event.t_mission)
            found.append((event.t_mono, f"{clock} {text}"))
    return found


def _event(event: Event) -> str | None:
    get = event.get
    match event.kind:
        case "board_on":
            return "Output on"
        case "boot":
            return f"Booted ({get('cause')}): login {_s(get('login_s'))} after power on"
        case "upload_window":
            whole = "file complete" if get("complete", True) else "ended before loss of signal"
            ending = "cut by loss of signal" if get("cut_by_los") else whole
            return f"Upload over {get('station')}: {get('bytes_acked_end', 0) / 1e6:.1f} MB on board, {ending}"
        case "upload_rebooted":
            return f"The board was rebooted in the upload ({get('cause')}); it goes on: {get('goes_on')}"
        case "activated":
            return "Whole-file SHA-256 agrees: model activated"
        case "activation_refused":
            return "Whole-file SHA-256 differs: activation refused"
        case "serve_ready":
            return f"Model server ready after {_s(get('load_s'))}"
        case "query":
            return f"Answered ({get('step')}): {get('tokens')} tokens in {_s(get('duration_s'))}"
        case "mailbox":
            return f"Answer kept on board delivered over {get('delivered_in_contact')}"
        case "array_dark":
            return "The array is dark: its output is off, the power unit's battery carries the board"
        case "array_lit":
            return "Light on the array: its output is on again"
        case "array_collapsed":
            volts, share = get("voltage_v", math.nan), get("light", math.nan)
            return f"The array collapsed to {volts:.2f} V: more asked than it has in {share:.0%} of its light"
        case "array_recovered":
            return "The array has its voltage again"
        case "load_shed":
            return f"Load shed at {get('watched_v', math.nan):.2f} V: the board's power is cut"
        case "load_restored":
            return "Load restored"
        case "board_off":
            volts = get("verified_v")
            return "Output off" + ("" if volts is None else f", verified at {volts:.2f} V")
        case "thermal_cutoff" | "thermal_ready":
            told = ", ".join(f"{node} {celsius:.1f} °C" for node, celsius in get("nodes", {}).items())
            rest = "Too hot: the work must rest" if event.kind == "thermal_cutoff" else "Cool again: the work may go on"
            return f"{rest} (modelled: {told})"
        case "tripped":
            return f"Supply tripped: {get('cause')}"
        case "envelope_breach":
            return f"Outside the board's envelope: {get('cause')}"
        case "power_on_failed":
            return f"Power on failed: {get('error')}"
        case "deadman" if get("alive") is False:
            return "The dead-man died"
        case "invalid":
            return f"Not measurable: {get('reason')}"
        case "error":
            return f"Error ({get('arm')}): {str(get('message')).splitlines()[0]}"
    return None


def _s(value: object) -> str:
    return f"{value:.1f} s" if isinstance(value, int | float) else "unknown time"


# --- questions and answers -------------------------------------------------------------------------------------------


def _talk(record: Record) -> Iterable[str]:
    for event in record.of("query", "mailbox"):
        if event.kind == "query":
            first = event.get("ttft_s")
            facts = [
                f"step {event.get('step')}",
                f"{event.get('tokens')} tokens",
                f"first token after {_s(first)}" if first is not None else "no token",
                f"first byte up to last byte down {_s(event.get('duration_s'))}",
                "link up throughout" if event.get("link_up_throughout") else "link NOT up throughout",
            ]
            if event.get("step") == "check":
                before = next(e for e in record.of("query") if e["prompt_sha256"] == event["prompt_sha256"])
                same = before["answer_sha256"] == event["answer_sha256"] and before is not event
                facts.append("identical to the answer before" if same else "NOT identical to an answer before")
        else:
            facts = [
                "asked just before loss of signal, answered on board",
                f"{event.get('tokens')} tokens",
                f"delivered over {event.get('delivered_in_contact')}",
                f"deliveries: {event.get('deliveries')}, duplicates: {event.get('duplicates')}",
                f"latency {_clock(float(event.get('latency_mission_s', 0)))} of mission time, the gap included",
            ]
        yield (
            f'<article><p class="ask">{_text(event.get("prompt", "(prompt not in the record)"))}</p>'
            f"<blockquote>{_text(str(event.get('answer', '')).strip())}</blockquote>"
            f'<div class="soft small">{_text(" · ".join(facts))}</div></article>'
        )


# --- scaled, modelled, assumed ---------------------------------------------------------------------------------------


def _honest(record: Record, mission: MissionFile, axis: Axis) -> str:
    scaled = (
        "<h3>Scaled</h3><p>With the mission clock scale: battery charge, link rate, spacing of events. Never scaled: "
        "delay, loss, the board's compute, handshakes, protections. Energy per token is wall energy.</p>"
        + _rates_table(axis)
        + _asked(record)
    )
    return (
        scaled
        + _list("Modelled", _modelled(record, mission))
        + _list("Assumed by the mission", mission.assumptions)
        + (_list("The mission's sources", mission.sources))
    )


def _asked(record: Record) -> str:
    """What the operator asked of the mission clock instead of what the mission says."""
    asked = record.provenance.get("clock") or {}
    rate, gaps = asked.get("rate"), "skipped" if asked.get("contacts_only") else "flown at that rate"
    told = []
    if rate is not None:
        told.append(f"Asked for: steps that scale time at ×{rate:g} instead of their own rates, gaps {gaps}.")
    elif asked.get("contacts_only"):
        told.append("Asked for: gaps between contacts skipped, also where a step would fly them.")
    if asked.get("from_s"):
        told.append(
            f"Asked for: a flight from {asked['from']} on ({plot.clock_text(asked['from_s'])} of the mission). "
            "The battery began it with the mission's initial charge."
        )
    if asked.get("until_s") is not None:
        end = "it ended there" if record.of("time_is_up") else "the mission's steps were over before"
        told.append(
            f"Asked for: an end at {asked['until']} ({plot.clock_text(asked['until_s'])} of the mission); {end}."
        )
    return f'<ul class="plain">{"".join(f"<li>{_text(line)}</li>" for line in told)}</ul>' if told else ""


def _rates_table(axis: Axis) -> str:
    rates = sorted({part.rate for part in axis.sections})
    rows = []
    for rate in rates:
        wall = sum(part.end_s - part.start_s for part in axis.sections if part.rate == rate)
        rows.append(
            f'<tr><th scope="row">flown at ×{rate:g}</th><td class="num">{_clock(wall)}</td>'
            f'<td class="num">{_clock(wall * rate)}</td></tr>'
        )
    jumps = [part.skipped_s for part in axis.sections if part.skipped_s]
    rows.append(
        f'<tr><th scope="row">skipped in {len(jumps)} jumps (charge advanced by model)</th><td class="num">–</td>'
        f'<td class="num">{_clock(sum(jumps))}</td></tr>'
    )
    return (
        '<div class="scroll"><table><thead><tr><th>Mission clock</th><th class="num">Real time</th>'
        f'<th class="num">Mission time</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _modelled(record: Record, mission: MissionFile) -> list[str]:
    told = [
        "Orbit, contacts, sunlight, link delay and rate: computed from the mission's orbit and stations.",
        f"Solar array, battery, bus voltage, state of charge: {_EPS_NOTE}.",
        f"The rest of the satellite draws a constant {mission.power.platform_w:g} W.",
    ]
    board = record.provenance.get("board", {})
    if board.get("hardware") == "virtual":
        told.append(
            "The board is emulated. Its supply current follows the CPU time that the emulator really used, between "
            "modelled idle and full-load watts"
            + (f": {board['modelled_power']}." if board.get("modelled_power") else " (boards/virtual-arm64.yaml).")
        )
    if record.provenance.get("bench", {}).get("virtual"):
        told.append(
            "Supply and link box are virtual instruments: real SCPI over TCP, real netem in an emulated machine."
        )
    told += [f"{event.data}" for event in record.of("scaled", "modelled")]
    for event in record.of("upload_done"):
        if event.get("preloaded"):
            told.append(f"{event['preloaded'] / 1e6:.1f} MB of the model were put on the board beforehand, over mgmt.")
    watts = [float(e["assumed_board_w"]) for e in record.of("clock") if e.get("assumed_board_w") is not None]
    if watts:
        told.append(
            f"In {len(watts)} jumps of the mission clock the charge was advanced by model, the board taken to draw "
            f"{min(watts):.1f} to {max(watts):.1f} W (unless told otherwise, its mean just before)."
        )
    return told


def _list(title: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    return f'<h3>{title}</h3><ul class="plain">{"".join(f"<li>{_text(item)}</li>" for item in items)}</ul>'
