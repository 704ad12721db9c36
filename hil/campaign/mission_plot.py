"""`hil mission show --plot`: a compiled mission drawn over mission time, with its ground track; HTML, SVG or PNG.

Nothing here was measured: sky, link and power are what the mission engine computes, and the page says so.
"""

from __future__ import annotations

import html
import importlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from hil.campaign import page, plot, world_map
from hil.campaign.forecast import Forecast, forecast
from hil.campaign.overview import Overview, overview
from hil.campaign.plot import LEFT, RIGHT, WIDTH, Axis, Band, Panel, Section, Series, Track
from hil.errors import UsageError
from hil.inventory import Mission
from hil.mission import budget, faults
from hil.mission.orbit import Ephemeris
from hil.mission.radio import DIRECTIONS
from hil.mission.timeline import Timeline
from hil.model import Direction, Span

SUFFIXES = (".html", ".svg", ".png")
MAP_H = 24.0  # hours of ground track on the map: more of it hides the map
PNG_ZOOM = 2
_LOOKS: tuple[tuple[int, plot.Style], ...] = ((3, "line"), (2, "dashed"))  # of the two forecasts
_TICK = 104  # pixels that a time with its date needs
_NAME = 9  # letters of a station's name that fit beside the strip


def check_path(path: Path) -> None:
    """Raises UsageError for a file that cannot be written, before anything is computed for it."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--plot {path}: unknown format", hint=f"end the name with one of {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: there is no directory {path.parent}")
    if path.suffix == ".png":
        _renderer()


def write(
    path: Path, mission: Mission, timeline: Timeline, *, start_s: float = 0.0, end_s: float | None = None
) -> None:
    """Draw mission seconds [start_s, end_s] of `timeline` into `path`; its suffix is one of SUFFIXES.

    Raises UsageError when the file cannot be written, or for a PNG without the package that renders it.
    """
    check_path(path)
    drawing = _Drawing(mission, timeline, start_s, timeline.duration_s if end_s is None else end_s)
    part = path.with_name(f".{path.name}.part")
    try:
        if path.suffix == ".html":
            part.write_text(drawing.page(), encoding="utf-8")
        elif path.suffix == ".svg":
            part.write_text(drawing.svg(), encoding="utf-8")
        else:
            part.write_bytes(bytes(_renderer()(svg_string=drawing.svg(), zoom=PNG_ZOOM)))
        os.replace(part, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def _renderer() -> Any:
    try:
        return importlib.import_module("resvg_py").svg_to_bytes
    except ImportError:
        raise UsageError(
            "a PNG needs the package resvg_py, which is not installed",
            hint="`pip install hil[plot]`; or write .svg or .html, which need nothing",
        ) from None


class _Drawing:
    """What is drawn, computed once: the mission's overview, its forecasts, and the panels of all formats."""

    def __init__(self, mission: Mission, timeline: Timeline, start_s: float, end_s: float) -> None:
        self.mission, self.timeline, self.start_s, self.end_s = mission, timeline, start_s, end_s
        self.told: Overview = overview(mission)
        self.axis = Axis([Section(start_s, end_s, start_s, 1.0)])
        self.map_end_s = min(end_s, start_s + MAP_H * 3600.0)
        power = timeline.environment.power
        self.forecasts: tuple[Forecast, ...] = ()
        if power is not None:
            self.forecasts = (
                forecast(timeline, "board idle", power.board_idle_w),
                forecast(timeline, "board at full load", power.board_full_w, power.board_idle_w),
            )
        self.panels = tuple(_panels(timeline, self.forecasts))

    def page(self) -> str:
        """One self-contained page."""
        file, cautions = self.mission.file, self.told.cautions
        data = plot.readings(self.axis, self.panels)
        data["start_ms"] = round(self.timeline.start.timestamp() * 1000)
        return page.page(
            "mission_page.html",
            title=_text(file.title),
            subtitle=" · ".join(self._subtitle()),
            notice="".join(f'<p class="notice">{_text(caution)}.</p>' for caution in cautions),
            cards="".join(_card(*card) for card in _cards(self.timeline, self.forecasts)),
            note=_text(self._note()),
            legend='<li><i style="background:var(--fail)"></i>fault</li>' if self.timeline.faults else "",
            map=world_map.world(self.timeline, self.start_s, self.map_end_s),
            plots="".join(self._stack()),
            honest=_list("Modelled", _modelled(self.timeline)) + _list("Assumed by the mission", file.assumptions),
            footer=_text(f"{self.mission.path.name} · timeline {self.timeline.hash}"),
            data=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        )

    def svg(self) -> str:
        """The same drawing as one SVG that needs no browser: colours written out, no script."""
        top, parts = 62.0, []
        margin = 16.0
        drawn = [world_map.world(self.timeline, self.start_s, self.map_end_s), *self._stack()]
        for element in drawn:
            height = float(re.search(r'viewBox="0 0 \S+ (\S+)"', element)[1])  # type: ignore[index]
            place = f'<svg x="{margin:g}" y="{top:.1f}" width="{WIDTH:g}" height="{height:g}" overflow="visible" '
            parts.append(element.replace("<svg ", place, 1))
            top += height + 2.0
        width, height = WIDTH + 2 * margin, top + margin
        subtitle = re.sub(r"</?b>", "", " · ".join(self._subtitle()))
        head = (
            f'<text x="{LEFT + margin:g}" y="28" style="font-size:20px;font-weight:bold" class="named">'
            f"{_text(self.mission.file.title)}</text>"
            f'<text x="{LEFT + margin:g}" y="46" class="tick">{subtitle}</text>'
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:.0f}" width="{width:g}" '
            f'height="{height:.0f}"><style>{_plain_style()}</style><rect width="100%" height="100%" fill="#ffffff"/>'
            f"{head}{''.join(parts)}</svg>\n"
        )

    def _subtitle(self) -> list[str]:
        start, end = self.timeline.start, self.timeline.start + timedelta(seconds=self.timeline.duration_s)
        return [
            f"<b>{_text(self.told.orbit)}</b>",
            _text(self.told.elements),
            f"{start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC",
            f"timeline <b>{self.timeline.hash[:12]}</b>",
        ]

    def _note(self) -> str:
        shown = f"{(self.map_end_s - self.start_s) / 3600.0:.3g} h"
        whole = self.map_end_s >= self.end_s
        return (
            "All of it is computed, nothing measured. Mission time runs from left to right; each pixel column shows "
            f"the lowest and the highest value in it. The map shows {'all' if whole else 'the first'} {shown}, "
            "from the yellow dot on; its circles are for the mean height of the orbit."
        )

    def _stack(self) -> Iterator[str]:
        timeline, axis = self.timeline, self.axis
        dark, dusk = _light_bands(timeline)
        shades = (dark, dusk, Band("contact", timeline.open_spans(self.start_s, self.end_s)))
        yield plot.strip(axis, tuple(_tracks(timeline, self.forecasts, shades)), ())
        for panel in self.panels:
            yield plot.render(axis, panel, shades, ())
        yield _time_axis(axis, timeline)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def _panels(timeline: Timeline, forecasts: Sequence[Forecast]) -> Iterator[Panel]:
    t_s = timeline.t_s
    yield Panel(
        "Sunlight",
        "% visible",
        (Series("of the solar disc", t_s, 100 * timeline.sunlit_fraction, 5),),
        height=78,
        top=100,
    )
    if len(timeline.contact_t_s):
        seen = "satellite" if timeline.environment.relay is None else "access satellite"
        yield Panel(
            f"Elevation of the {seen}", "°", (Series("serving station", t_s, timeline.elevation_deg, 4),), top=90.0
        )
    if timeline.contacts:
        delay = Series("each way", t_s, 1e3 * timeline.delay_s, 1)
        yield Panel("One-way delay", "ms", (delay,), digits=2)
        rates = tuple(_rate(timeline, direction) for direction in DIRECTIONS)
        yield Panel("Link rate", "Mbit/s", rates, log=True, digits=3)
    if forecasts:
        yield from _power_panels(timeline, forecasts)
        yield from _heat_panels(timeline, forecasts)


def _rate(timeline: Timeline, direction: Direction) -> Series:
    """What the direction carries at every row of the timeline; a contact may be shorter than a column of pixels."""
    since, loss = getattr(timeline, f"{direction}_step_t_s"), getattr(timeline, f"{direction}_step_loss")
    lost = loss[np.maximum(np.searchsorted(since, timeline.t_s, side="right") - 1, 0)] >= 1 if len(since) else False
    rate = getattr(timeline, f"{direction}_bps")
    shown = np.where((rate > 0) & ~np.asarray(lost), rate / 1e6, np.nan)
    colour: int
    style: plot.Style
    colour, style = (1, "line") if direction == "uplink" else (2, "dashed")
    return Series(direction, timeline.t_s, shown, colour, style)


def _heat_panels(timeline: Timeline, forecasts: Sequence[Forecast]) -> Iterator[Panel]:
    """One panel a node; where a temperature ends the work, that is marked."""
    thermal = timeline.environment.thermal
    cutoff = None if thermal is None else thermal.cutoff
    for node in forecasts[0].temperature_c:
        marks: tuple[tuple[float, str], ...] = ()
        if cutoff is not None and cutoff.node == node:
            marks = ((cutoff.off_c, f"stop {cutoff.off_c:g} °C"), (cutoff.on_c, f"go {cutoff.on_c:g} °C"))
        series = tuple(
            Series(f.label, f.t_s, f.temperature_c[node], colour, style)
            for f, (colour, style) in zip(forecasts, _LOOKS, strict=True)
        )
        yield Panel(f"Temperature of {node}, modelled", "°C", series, zero=False, marks=marks)


def _power_panels(timeline: Timeline, forecasts: Sequence[Forecast]) -> Iterator[Panel]:
    power = timeline.environment.power
    marks = () if power is None or power.shed is None else ((power.shed.shed_v, f"shed {power.shed.shed_v:g} V"),)
    styled = tuple(zip(forecasts, _LOOKS, strict=True))
    yield Panel(
        "Power, modelled",
        "W",
        (
            Series("array", timeline.t_s, timeline.array_w, 5),
            *(Series(f"load, {f.label}", f.t_s, f.load_w, colour, style, held=True) for f, (colour, style) in styled),
        ),
        height=124,
    )
    yield Panel(
        "State of charge, modelled",
        "%",
        tuple(Series(f.label, f.t_s, 100 * f.soc, colour, style) for f, (colour, style) in styled),
        top=100.0,
    )
    yield Panel(
        "Bus voltage, modelled",
        "V",
        tuple(Series(f.label, f.t_s, f.bus_voltage_v, colour, style) for f, (colour, style) in styled),
        zero=False,
        digits=2,
        marks=marks,
    )


def _light_bands(timeline: Timeline) -> tuple[Band, Band]:
    """Umbra and penumbra; an eclipse without umbra is all penumbra."""
    dark, dusk = [], []
    for item in timeline.eclipses:
        if item.umbra_entry_s is None or item.umbra_exit_s is None:
            dusk.append(Span(item.penumbra_entry_s, item.penumbra_exit_s, "penumbra"))
            continue
        dark.append(Span(item.umbra_entry_s, item.umbra_exit_s, "eclipse"))
        dusk.append(Span(item.penumbra_entry_s, item.umbra_entry_s, "penumbra"))
        dusk.append(Span(item.umbra_exit_s, item.penumbra_exit_s, "penumbra"))
    return Band("eclipse", tuple(dark)), Band("penumbra", tuple(dusk))


def _tracks(timeline: Timeline, forecasts: Sequence[Forecast], shades: Sequence[Band]) -> Iterator[Track]:
    dark, dusk = shades[0].spans, shades[1].spans
    edges = sorted([(span.start_s, span.end_s) for span in (*dark, *dusk)])
    sun = tuple(Span(low, high, "sun") for low, high in _gaps(edges, timeline.duration_s))
    yield Track("light", (Band("b-sun", sun), Band("b-penumbra", dusk), Band("b-eclipse", dark)), 0.0)
    spans = [span for contact in timeline.contacts for span in contact.spans]
    for name in dict.fromkeys([*(item.name for item in timeline.environment.stations), *(s.label for s in spans)]):
        own = tuple(span for span in spans if span.label == name)
        if own or len(timeline.contact_t_s):
            yield Track(name if len(name) <= _NAME else f"{name[: _NAME - 1]}…", (Band("b-up", own),))
    if forecasts and forecasts[1].shed:
        yield Track("load shed", (Band("b-fast", forecasts[1].shed),))
    if forecasts and forecasts[1].rest:
        yield Track("too hot", (Band("b-fault", forecasts[1].rest),))
    if timeline.faults:
        ephemeris = Ephemeris(timeline.environment.orbit, timeline.start)
        inside = faults.saa_windows(ephemeris, 0.0, timeline.duration_s).tolist()
        yield Track("anomaly", (Band("b-saa", tuple(Span(low, high, "SAA") for low, high in inside)),))
    for kind in dict.fromkeys(sorted(fault.kind for fault in timeline.faults)):
        hits = tuple(Span(f.t_s, f.t_s + 1e-3, kind) for f in timeline.faults if f.kind == kind)
        yield Track(kind if len(kind) <= _NAME else f"{kind[: _NAME - 1]}…", (Band("b-fault", hits),))


def _gaps(taken: Iterable[tuple[float, float]], end_s: float) -> Iterator[tuple[float, float]]:
    free_s = 0.0
    for low, high in taken:
        if low > free_s:
            yield free_s, low
        free_s = max(free_s, high)
    if free_s < end_s:
        yield free_s, end_s


def _time_axis(axis: Axis, timeline: Timeline) -> str:
    """Mission hours, and below them the same instants in UTC."""
    part = axis.sections[0]
    long_s = part.end_s - part.start_s
    steps_h = (1 / 60, 1 / 12, 1 / 6, 0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 24, 48, 96, 240, 480, 960)
    step_h = next((step for step in steps_h if long_s / 3600.0 / step * _TICK <= WIDTH - LEFT - RIGHT), steps_h[-1])
    out = [
        f'<svg class="plot" viewBox="0 0 {WIDTH:g} 44" role="img" aria-label="Mission time and UTC">',
        f'<text class="tick end" x="{LEFT - 7:g}" y="17">hours</text>',
        f'<text class="tick end" x="{LEFT - 7:g}" y="32">UTC</text>',
    ]
    day = None
    first, last = part.start_s / 3600.0 / step_h, part.end_s / 3600.0 / step_h
    for index in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1):
        hours = index * step_h
        x, moment = axis.x(hours * 3600.0), timeline.start + timedelta(hours=hours)
        anchor = "end" if x > WIDTH - RIGHT - 30 else "start" if x < LEFT + 30 else "mid"
        told = f"{moment:%H:%M}" if moment.date() == day else f"{moment:%b} {moment.day}, {moment:%H:%M}"
        day = moment.date()
        out.append(f'<line class="tickmark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="5"/>')
        out.append(f'<text class="tick {anchor}" x="{x:.1f}" y="17">{round(hours, 2):g}</text>')
        out.append(f'<text class="tick {anchor}" x="{x:.1f}" y="32">{told}</text>')
    return "".join((*out, "</svg>"))


# --- what is told ----------------------------------------------------------------------------------------------------


def _cards(timeline: Timeline, forecasts: Sequence[Forecast]) -> Iterator[tuple[str, str, str, str]]:
    days = timeline.duration_s / 86_400.0
    contact_s = sum(item.duration_s for item in timeline.contacts)
    yield "Contacts", f"{len(timeline.contacts)}", "", f"{contact_s / 60 / days:.0f} min a day" if contact_s else "none"
    for direction in DIRECTIONS:
        bits = timeline.capacity_bits(direction, 0.0, timeline.duration_s)
        yield f"{direction.capitalize()} can carry", *_bytes(bits / 8 / days), "a day, all contacts used"
    if timeline.contacts:
        delay = 1e3 * timeline.delay_s[np.isfinite(timeline.delay_s)]
        span = dict.fromkeys((f"{delay.min():.1f}", f"{delay.max():.1f}"))  # one figure where it does not change
        yield "One-way delay", " – ".join(span), "ms", "in contact"
    lit = float(np.trapezoid(timeline.sunlit_fraction, timeline.t_s)) / timeline.duration_s
    longest = max((item.duration_s for item in timeline.eclipses), default=0.0)
    dark = f"{len(timeline.eclipses)} eclipses, longest {longest / 60:.1f} min" if timeline.eclipses else "no eclipse"
    yield "In sunlight", f"{100 * lit:.1f}", "%", dark
    beta = timeline.beta_deg
    yield "Sun above the orbit plane", f"{beta.mean():.1f}", "°", f"beta, {beta.min():.1f}° to {beta.max():.1f}°"
    if forecasts:
        balance = budget.orbit_balance(timeline)
        told = f"{balance.available_wh:.1f} Wh from the array, {balance.needed_wh:.1f} Wh needed"
        left = "to spare" if balance.closes else "SHORT"
        yield "Energy of an orbit, idle", f"{balance.margin_wh:+.2f}", "Wh", f"{left}: {told}"
    for item in forecasts:
        times = len(item.shed)
        shed = f"load shed {times} time{'' if times == 1 else 's'}" if times else "load never shed"
        end = ", BUS COLLAPSED" if item.collapsed else ""
        yield f"Lowest charge, {item.label}", f"{100 * float(np.min(item.soc)):.0f}", "%", shed + end
    if timeline.faults:
        inside = sum(fault.in_saa for fault in timeline.faults)
        yield "Faults scheduled", f"{len(timeline.faults)}", "", f"{inside} of them in the South Atlantic Anomaly"


def _bytes(count: float) -> tuple[str, str]:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.3g}", unit
    return f"{count / 1e3:.3g}", "kB"


def _card(title: str, value: str, unit: str, detail: str) -> str:
    return (
        f'<div class="card"><div class="k">{_text(title)}</div><div class="n">{_text(value)}'
        f'<small>{_text(unit)}</small></div><div class="d">{_text(detail)}</div></div>'
    )


def _modelled(timeline: Timeline) -> list[str]:
    told = ["Orbit, sunlight, contacts, delay and rates: computed from the mission's orbit, stations and link."]
    power = timeline.environment.power
    if power is not None:
        told.append(
            f"Power: the satellite's model flown twice, with the board at {power.board_idle_w:g} W (idle) and at "
            f"{power.board_full_w:g} W (full load) throughout, as its type says, and {power.eps.platform_w:g} W for "
            "the platform. The load is shed and restored by the mission's rule, without its dwell in real time."
        )
    if timeline.environment.thermal is not None:
        told.append(
            "Heat: lumped nodes, as a flight in real time would have them; a board that is too hot to work idles. A "
            "flight at a higher clock rate does not scale heat."
        )
    if timeline.environment.faults is not None:
        told.append("Faults: one seeded draw from the mission's rates; the South Atlantic Anomaly is an ellipse.")
    return told


def _list(title: str, items: Sequence[str]) -> str:
    lines = "".join(f"<li>{_text(item)}</li>" for item in items)
    return f'<h3>{title}</h3><ul class="plain">{lines}</ul>' if items else ""


def _text(value: object) -> str:
    return html.escape(str(value))


def _plain_style() -> str:
    """The page's rules for SVG with the light colours in place of the variables, which few renderers know."""
    style = page.text("page.css")
    colours = dict(re.findall(r"--([\w-]+): ([^;]+);", style[: style.index("@media")]))
    rules = "".join(re.findall(r"svg [^{}]+\{[^{}]*\}", style[: style.index("@media print")]))
    rules = re.sub(r"\bsvg (?=[.\w])", "", rules)
    rules = re.sub(r"font-weight: 6\d\d", "font-weight: bold", rules)
    # not every renderer reads the shorthand, nor knows the system's font by that name
    rules = re.sub(
        r"font: (\d+px) [^;]+;", r"font-size: \1; font-family: 'Noto Sans', 'DejaVu Sans', sans-serif;", rules
    )
    return re.sub(r"var\(--([\w-]+)\)", lambda found: colours[found[1]], rules)
