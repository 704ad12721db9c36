"""Time plots of a run as inline SVG: one axis for all panels, mission time with jumps cut out, envelopes for display.

A column of pixels shows the lowest and the highest sample that falls into it, so that no peak is lost to decimation.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from hil.campaign.record import Floats, Record
from hil.model import Span

WIDTH, LEFT, RIGHT = 1080.0, 58.0, 12.0
BREAK = 13.0  # width of a cut in the axis, where mission time was skipped
LETTER = 6.9  # width of a letter of a legend, about: the widest of the fonts that the page may get
_LEAST_SKIP_S = 1.0

Style = Literal["line", "dashed", "area"]


@dataclass(frozen=True, slots=True)
class Section:
    """A stretch of wall time in which mission time ran at one rate; `skipped_s` was cut out right before it."""

    start_s: float
    end_s: float
    mission_s: float
    rate: float
    skipped_s: float = 0.0


def sections(record: Record, start_s: float, end_s: float) -> list[Section]:
    """The mission clock's segments between two wall times; neighbours of the same rate without a jump are one."""
    clock = record.clock
    found: list[Section] = []
    for index, begin in enumerate(clock.wall_start_s):
        end = min(float(clock.wall_start_s[index + 1]) if index + 1 < len(clock.wall_start_s) else end_s, end_s)
        begin, mission, rate = float(begin), float(clock.mission_start_s[index]), float(clock.rate[index])
        if end <= max(begin, start_s):
            # Nothing was seen of it, but what it skipped counts with the next one.
            continue
        mission += (max(begin, start_s) - begin) * rate
        begin = max(begin, start_s)
        last = found[-1] if found else None
        skipped = mission - (last.mission_s + (last.end_s - last.start_s) * last.rate) if last else 0.0
        skipped = skipped if skipped >= _LEAST_SKIP_S else 0.0
        if last and last.rate == rate and not skipped:
            found[-1] = Section(last.start_s, end, last.mission_s, rate, last.skipped_s)
        else:
            found.append(Section(begin, end, mission, rate, skipped))
    return found or [Section(start_s, max(end_s, start_s + 1.0), 0.0, 1.0)]


class Axis:
    """Maps wall seconds to pixels. A section is as wide as it lasted in real time; each jump is one break."""

    def __init__(self, parts: Sequence[Section]) -> None:
        self.sections = tuple(parts)
        breaks = sum(part.skipped_s > 0 for part in parts)
        total = sum(part.end_s - part.start_s for part in parts)
        self.scale = (WIDTH - LEFT - RIGHT - breaks * BREAK) / max(total, 1e-9)
        lefts, x = [], LEFT
        for part in parts:
            x += BREAK if part.skipped_s > 0 else 0.0
            lefts.append(x)
            x += (part.end_s - part.start_s) * self.scale
        self._starts = np.array([part.start_s for part in parts])
        self._lefts = np.array(lefts)

    def x(self, t_s: float) -> float:
        """Pixels of one wall time, kept inside the plot."""
        at = max(int(np.searchsorted(self._starts, t_s, side="right")) - 1, 0)
        part = self.sections[at]
        inside = min(max(t_s - part.start_s, 0.0), part.end_s - part.start_s)
        return float(self._lefts[at]) + inside * self.scale

    def mission_s(self, t_s: float) -> float:
        """Mission time of one wall time."""
        part = self.sections[max(int(np.searchsorted(self._starts, t_s, side="right")) - 1, 0)]
        return part.mission_s + (t_s - part.start_s) * part.rate

    def runs(self) -> Iterator[tuple[float, float]]:
        """Wall intervals without a jump inside: a line may be drawn through each."""
        start = self.sections[0].start_s
        for before, after in zip(self.sections, self.sections[1:], strict=False):
            if after.skipped_s > 0:
                yield start, before.end_s
                start = after.start_s
        yield start, self.sections[-1].end_s

    def columns(self) -> Iterator[Floats]:
        """For each run the wall times of its pixel columns' borders."""
        for start, end in self.runs():
            count = max(math.ceil((end - start) * self.scale), 1)
            yield np.linspace(start, end, count + 1)


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a panel: sampled values, or with `held` states that last until the next one."""

    label: str
    t_s: Floats
    value: Floats
    colour: int
    style: Style = "line"
    held: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot. `marks` are horizontal reference lines: value and label; `log` needs values above zero or NaN."""

    title: str
    unit: str
    series: tuple[Series, ...]
    zero: bool = True
    height: float = 104.0
    digits: int = 1
    marks: tuple[tuple[float, str], ...] = ()
    top: float | None = None
    log: bool = False


@dataclass(frozen=True, slots=True)
class Band:
    """Stretches of wall time that are shaded or drawn as blocks in the strip; `css` is their class."""

    css: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Track:
    """A row of blocks in the strip above the plots."""

    title: str
    bands: tuple[Band, ...] = field(default_factory=tuple)
    least_width: float = 1.2  # pixels of a block, however short: what is rare must be seen


def envelope(series: Series, borders: Floats) -> tuple[Floats, Floats]:
    """Lowest and highest value in each column between `borders`; NaN without sample, -inf where samples have none."""
    count = len(borders) - 1
    low, high = np.full(count, np.nan), np.full(count, np.nan)
    if series.held:
        at = np.searchsorted(series.t_s, borders[1:], side="left") - 1
        known = at >= 0
        low[known] = series.value[at[known]]
        return low, low.copy()
    usable = np.isfinite(series.value) & (series.t_s >= borders[0]) & (series.t_s <= borders[-1])
    # A column between two samples is bridged; where samples say that there is no value, the line must end.
    hole = ~np.isfinite(series.value) & (series.t_s >= borders[0]) & (series.t_s <= borders[-1])
    column = np.clip(np.searchsorted(borders, series.t_s[usable], side="right") - 1, 0, count - 1)
    values = series.value[usable]
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, column, values)
    np.maximum.at(high, column, values)
    empty = ~np.isfinite(low)
    low[empty] = high[empty] = np.nan
    holes = np.searchsorted(borders, series.t_s[hole], side="right") - 1
    holes = holes[(holes >= 0) & (holes < count)]
    holes = holes[empty[holes]]
    low[holes], high[holes] = -np.inf, -np.inf
    return low, high


def render(axis: Axis, panel: Panel, shades: Sequence[Band], lines: Sequence[float]) -> str:
    """One panel as an SVG element."""
    pad, height = 24.0, panel.height
    bottom = height - 6
    ticks = decades(*_domain(panel)) if panel.log else nice_ticks(*_domain(panel), 4)

    def share(value: float) -> float:
        low, high = ticks[0], ticks[-1]
        return math.log(value / low) / math.log(high / low) if panel.log else (value - low) / (high - low)

    def y(value: float) -> float:
        return bottom - share(value) * (bottom - pad)

    out = [_open(height, f"{panel.title}, {panel.unit}", _described(panel))]
    out += _shades(axis, shades, pad, bottom)
    for tick in ticks:
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        out.append(f'<text class="tick end" x="{LEFT - 7}" y="{y(tick) + 3.5:.1f}">{_number(tick)}</text>')
    for value, _ in panel.marks:
        out.append(f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
    out += [f'<line class="event" x1="{x:.1f}" x2="{x:.1f}" y1="{pad}" y2="{bottom}"/>' for x in map(axis.x, lines)]
    out += [_path(axis, series, y) for series in panel.series]
    out += _breaks(axis, pad, bottom)
    x, last_y = LEFT + 5, math.inf
    for value, label in panel.marks:  # after the breaks, which would hide half a word
        x = x if abs(y(value) - last_y) < 12 else LEFT + 5  # beside the one before, where lines are close
        out.append(f'<text class="marked" x="{x:.0f}" y="{y(value) - 3.5:.1f}">{html.escape(label)}</text>')
        x, last_y = x + LETTER * len(label) + 6, y(value)
    out.append(_legend(panel))
    out.append(f'<line class="cursor" x1="0" x2="0" y1="{pad}" y2="{bottom}"/></svg>')
    return "".join(out)


def strip(axis: Axis, tracks: Sequence[Track], events: Sequence[tuple[float, str]]) -> str:
    """Rows of labelled blocks (steps, clock rate, light, link, output) and the numbered events above them."""
    row, top = 21.0, 44.0 if events else 4.0
    height = top + row * len(tracks) + 4
    out = [_open(height, "Phases of the flight", ", ".join(track.title for track in tracks))]
    for index, track in enumerate(tracks):
        y = top + index * row
        out.append(f'<text class="tick end" x="{LEFT - 7}" y="{y + 13.5:.1f}">{html.escape(track.title)}</text>')
        for band in track.bands:
            for span in band.spans:
                for x, width in _boxes(axis, span):
                    size = f'width="{max(width, track.least_width):.2f}" height="{row - 4}"'
                    out.append(
                        f'<rect class="{band.css}" x="{x:.1f}" y="{y:.1f}" {size}>'
                        f"<title>{html.escape(f'{track.title}: {span.label}')}</title></rect>"
                    )
                    if width > 6.2 * len(span.label) + 6:
                        out.append(
                            f'<text class="on on-{band.css}" x="{x + width / 2:.1f}" y="{y + 12.5:.1f}">'
                            f"{html.escape(span.label)}</text>"
                        )
    last = [-99.0, -99.0]
    for number, (t_s, text) in enumerate(events, start=1):
        x = axis.x(t_s)
        level = 0 if x - last[0] > 17 or last[0] <= last[1] else 1
        last[level] = x
        y = 12.0 + 18 * level
        out.append(
            f'<g class="flag"><line x1="{x:.1f}" x2="{x:.1f}" y1="{y + 8:.1f}" y2="{height}"/>'
            f'<circle cx="{x:.1f}" cy="{y}" r="8"/><text x="{x:.1f}" y="{y + 3.5:.1f}">{number}</text>'
            f"<title>{html.escape(text)}</title></g>"
        )
    out += _breaks(axis, top, height - 4)
    out.append(f'<line class="cursor" x1="0" x2="0" y1="{top}" y2="{height}"/></svg>')
    return "".join(out)


def time_axis(axis: Axis) -> str:
    """Mission time under the plots; what a break cut out is written below it."""
    out = [_open(47.0, "Mission time", "time since the start of the mission, hours:minutes:seconds")]
    free, skips = 0.0, [0.0, 0.0]
    for part in axis.sections:
        start, end = axis.x(part.start_s + 1e-9), axis.x(part.end_s)
        if part.skipped_s:
            text = f"{_duration(part.skipped_s)} skipped"
            at = start - BREAK / 2
            level = next((row for row, taken in enumerate(skips) if at - 2.8 * len(text) > taken), None)
            if level is not None:
                out.append(f'<text class="skip" x="{at:.1f}" y="{31 + 12 * level}">{text}</text>')
                skips[level] = at + 2.8 * len(text) + 3
        for mission in _time_ticks(part, end - start):
            x = start + (mission - part.mission_s) / part.rate * axis.scale
            out.append(f'<line class="tickmark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="5"/>')
            if x - 26 > free and x + 24 < WIDTH:
                out.append(f'<text class="tick mid" x="{x:.1f}" y="17">{clock_text(mission)}</text>')
                free = x + 28
    return "".join((*out, "</svg>"))


def readings(axis: Axis, panels: Sequence[Panel]) -> dict[str, Any]:
    """What the cursor reads out: the middle of each column's envelope."""
    borders = list(axis.columns())
    middles = np.concatenate([(part[:-1] + part[1:]) / 2 for part in borders])
    told = []
    for panel in panels:
        for series in panel.series:
            values = np.concatenate([sum(envelope(series, part)) / 2 for part in borders])
            told.append(
                {
                    "label": f"{panel.title}, {series.label}",
                    "unit": panel.unit,
                    "v": [round(float(v), panel.digits) if math.isfinite(v) else None for v in values],
                }
            )
    return {
        "width": WIDTH,
        "x": [round(axis.x(float(t_s)), 1) for t_s in middles],
        "mission": [round(axis.mission_s(float(t_s)), 1) for t_s in middles],
        "series": told,
    }


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values that enclose [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        low, high = (low - 0.5, low + 0.5) if math.isfinite(low) else (0.0, 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten that enclose [low, high], both above zero; at least two."""
    first = math.floor(math.log10(low) + 1e-9)
    return [10.0**power for power in range(first, max(math.ceil(math.log10(high) - 1e-9), first + 1) + 1)]


def clock_text(mission_s: float) -> str:
    """Mission time as h:mm:ss."""
    whole = round(mission_s)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _time_ticks(part: Section, width: float) -> list[float]:
    long = (part.end_s - part.start_s) * part.rate
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)
    step = next((step for step in steps if long / step * 58 <= width), None)
    if step is None:
        return [part.mission_s]
    first = math.ceil(part.mission_s / step) * step
    return [float(tick) for tick in np.arange(first, part.mission_s + long, step)]


def _duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _domain(panel: Panel) -> tuple[float, float]:
    values = [series.value[np.isfinite(series.value)] for series in panel.series]
    merged = np.concatenate([*values, np.array([value for value, _ in panel.marks])]) if values else np.array([])
    if not len(merged):
        return (0.1, 1.0) if panel.log else (0.0, 1.0)
    low, high = float(np.min(merged)), float(np.max(merged))
    if panel.log:
        return low, high
    low = min(low, 0.0) if panel.zero else low
    high = high if panel.top is None else max(high, panel.top)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _described(panel: Panel) -> str:
    told = []
    for series in panel.series:
        values = series.value[np.isfinite(series.value)]
        span = f"{np.min(values):.4g} to {np.max(values):.4g} {panel.unit}" if len(values) else "no data"
        told.append(f"{series.label}: {span}")
    return "; ".join(told)


def _open(height: float, title: str, text: str) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{html.escape(title)}">'
        f"<desc>{html.escape(text)}</desc>"
    )


def _boxes(axis: Axis, span: Span) -> Iterable[tuple[float, float]]:
    """Left edge and width of a span, cut where the axis is."""
    for start, end in axis.runs():
        begin, stop = max(span.start_s, start), min(span.end_s, end)
        if stop > begin:
            x = axis.x(begin + 1e-9)
            yield x, (stop - begin) * axis.scale


def _shades(axis: Axis, shades: Sequence[Band], top: float, bottom: float) -> list[str]:
    return [
        f'<rect class="{band.css}" x="{x:.1f}" y="{top}" width="{width:.1f}" height="{bottom - top:.1f}"/>'
        for band in shades
        for span in band.spans
        for x, width in _boxes(axis, span)
    ]


def _breaks(axis: Axis, top: float, bottom: float) -> list[str]:
    return [
        f'<rect class="break" x="{axis.x(part.start_s + 1e-9) - BREAK:.1f}" y="{top}" width="{BREAK}" '
        f'height="{bottom - top:.1f}"/>'
        for part in axis.sections
        if part.skipped_s
    ]


def _path(axis: Axis, series: Series, y: Callable[[float], float]) -> str:
    points: list[str] = []
    for borders in axis.columns():
        low, high = envelope(series, borders)
        middle = (borders[:-1] + borders[1:]) / 2
        pen_up = True
        previous = math.nan
        for t_s, least, most in zip(middle, low, high, strict=True):
            if not math.isfinite(least):
                # A column without a sample is bridged, a state that is unknown is not.
                pen_up = pen_up or series.held or least == -math.inf
                continue
            x = axis.x(t_s)
            if series.held and not pen_up and least != previous:
                points.append(f"H{x:.1f}")
            points.append(f"{'M' if pen_up else 'L'}{x:.1f} {y(least):.1f}")
            if most > least:
                points.append(f"V{y(most):.1f}")
            pen_up, previous = False, least
    return f'<path class="s{series.colour} {series.style}" d="{"".join(_thinned(points))}"/>'


def _thinned(points: Sequence[str]) -> Iterator[str]:
    """Leave out points in the middle of a flat stretch: they change nothing but the file's size."""

    def level(point: str) -> str | None:
        return point.split(" ")[1] if point[0] == "L" else None

    for index, point in enumerate(points):
        own = level(point)
        flat = own is not None and 0 < index < len(points) - 1 and points[index - 1][-len(own) - 1 :] == f" {own}"
        if not (flat and level(points[index + 1]) == own):
            yield point


def _legend(panel: Panel) -> str:
    title, unit = html.escape(panel.title), html.escape(panel.unit)
    out = [f'<text class="title" x="{LEFT}" y="15">{title} <tspan>{unit}</tspan></text>']
    x = WIDTH - RIGHT
    for series in reversed(panel.series):
        out.append(f'<text class="key end" x="{x:.1f}" y="15">{html.escape(series.label)}</text>')
        x -= LETTER * len(series.label)  # about what the font needs; the sample line keeps its distance
        out.append(f'<path class="s{series.colour} {series.style}" d="M{x - 28:.1f} 11.5H{x - 8:.1f}"/>')
        x -= 44
    return "".join(out)


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e4 else f"{value:.3g}"
