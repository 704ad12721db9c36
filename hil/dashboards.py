"""Builds the Grafana dashboards as code: `python -m hil.dashboards` writes grafana/dashboards/hil/*.json.

Grafana's v1 JSON (schemaVersion 41; Grafana 13 migrates it on load). The committed files are this module's output; a
test regenerates and compares them. Every query is run against a real Prometheus by the tests; no Grafana server is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATASOURCE: dict[str, str] = {"type": "prometheus", "uid": "hil-prometheus"}
SCHEMA_VERSION = 41
COLUMNS = 24
_BOARD = 'board="$board"'


@dataclass(frozen=True, slots=True)
class Target:
    """One query. `legend` may use `{{label}}`; `instant` asks for one value, not a range."""

    expr: str
    legend: str
    instant: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel; Grafana's unit names. `options` and `custom` go into the panel's options and its drawing defaults."""

    title: str
    description: str
    kind: str
    unit: str
    targets: tuple[Target, ...]
    width: int = 12
    height: int = 7
    options: Mapping[str, Any] = field(default_factory=dict)
    custom: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[Mapping[str, Any], ...] = ()


def mission_dashboard() -> dict[str, Any]:
    """The Mission dashboard: what happens to one board in flight, now and over the last minutes."""
    return dashboard(
        uid="hil-mission",
        title="hil / Mission",
        description="One board in orbit on the bench: light, power, battery, heat, link, upload and inference.",
        rows=(
            ("Now", _now()),
            ("Phases", _phases()),
            ("Power", _power()),
            ("Heat", _heat()),
            ("Link", _link()),
            ("Inference", _inference()),
        ),
        annotations=(
            (
                "Power cut",
                f"changes(hil_board_power_cuts_total{{{_BOARD}}}[$__interval]) > 0",
                "red",
                "The board's power was cut.",
            ),
        ),
    )


def _now() -> tuple[Panel, ...]:
    def stat(title: str, text: str, unit: str, expr: str, legend: str = "", **defaults: Any) -> Panel:
        target = Target(expr, legend or title, instant=True)
        return Panel(title, text, "stat", unit, (target,), 3, 4, {**_STAT}, {}, defaults)

    return (
        stat(
            "Mission time", "Mission seconds since the mission's start.", "dthms", _metric("hil_mission_time_seconds")
        ),
        stat(
            "Clock rate",
            "Mission seconds a wall second: 1 is real time.",
            "suffix:x",
            _metric("hil_mission_clock_rate"),
        ),
        stat(
            "State of charge",
            "Of the modelled battery.",
            "percentunit",
            _metric("hil_battery_state_of_charge_ratio"),
            min=0,
            max=1,
            thresholds=_steps(("red", None), ("orange", 0.3), ("green", 0.5)),
            color={"mode": "thresholds"},
        ),
        stat(
            "Bus voltage",
            "Modelled voltage of the satellite's bus.",
            "volt",
            _metric("hil_bus_voltage_volts"),
            decimals=2,
        ),
        stat("Power", "Measured at the supply's terminals.", "watt", _metric("hil_board_power_watts"), decimals=1),
        stat(
            "Link",
            "Whether the payload link carries traffic. An outage is 100 % loss, as in orbit.",
            "none",
            _metric("hil_link_visible"),
            mappings=_mapping({0: ("outage", "red"), 1: ("up", "green")}),
        ),
        stat("Uploaded", "Bytes that the board has acknowledged.", "bytes", _metric("hil_upload_bytes_total")),
        stat(
            "Dead-man",
            "The process that switches outputs off when the daemon dies.",
            "none",
            "min(hil_deadman_alive)",
            mappings=_mapping({0: ("DEAD", "red"), 1: ("alive", "green")}),
        ),
    )


def _phases() -> tuple[Panel, ...]:
    light = " + ".join(
        f'{number} * max(hil_orbit_phase{{{_BOARD}, phase="{phase}"}})'
        for number, phase in ((1, "sunlit"), (2, "penumbra"), (3, "umbra"))
    )
    mappings = {
        "light": {
            0: ("no flight", "text"),
            1: ("sunlit", "yellow"),
            2: ("penumbra", "orange"),
            3: ("umbra", "dark-blue"),
        },
        "link": {0: ("outage", "transparent"), 1: ("up", "green")},
        "output": {0: ("off", "transparent"), 1: ("on", "blue")},
    }
    return (
        _timeline(
            "Light, link and output",
            "Phase of the orbit from the visible part of the solar disc, whether the link is up, whether the output is "
            "commanded on.",
            Target(light, "light"),
            Target(f"max({_metric('hil_link_visible')})", "link"),
            Target(f"max({_metric('hil_board_power_commanded')})", "output"),
            width=COLUMNS,
            height=6,
            overrides=tuple(
                {
                    "matcher": {"id": "byName", "options": name},
                    "properties": [{"id": "mappings", "value": _mapping(mapping)}],
                }
                for name, mapping in mappings.items()
            ),
        ),
    )


def _power() -> tuple[Panel, ...]:
    return (
        _graph(
            "Voltage",
            "The satellite's bus as modelled, and what the supply measures. Apart from each other: the output is off.",
            "volt",
            Target(_metric("hil_bus_voltage_volts"), "bus, modelled"),
            Target(_metric("hil_supply_voltage_volts"), "supply, measured"),
        ),
        _graph("Current", "Measured by the supply.", "amp", Target(_metric("hil_supply_current_amperes"), "supply")),
        _graph(
            "Power", "Measured by the supply.", "watt", Target(_metric("hil_board_power_watts"), "board"), zero=True
        ),
        _graph(
            "State of charge",
            "Of the modelled battery, which carries the measured load.",
            "percentunit",
            Target(_metric("hil_battery_state_of_charge_ratio"), "battery"),
            max=1,
            zero=True,
        ),
        _graph(
            "Age of the newest power sample",
            "Grows without bound when the power loop stands still.",
            "s",
            Target(f"time() - {_metric('hil_board_last_sample_timestamp_seconds')}", "age"),
            zero=True,
        ),
        _graph(
            "Lateness of the power loop",
            "How late the newest tick of measure, model and setpoint was.",
            "s",
            Target(_metric("hil_power_loop_lateness_seconds"), "lateness"),
            zero=True,
        ),
    )


def _heat() -> tuple[Panel, ...]:
    """Empty in flights of missions without `thermal:`."""
    return (
        _graph(
            "Temperature",
            "Nodes of the mission's thermal model, warmed by the board's measured power; modelled, never measured. "
            "Empty without a thermal model.",
            "celsius",
            Target(_metric("hil_thermal_node_celsius"), "{{node}}, modelled"),
        ),
        _timeline(
            "Workload and heat",
            "Whether the thermal model lets the workload run or makes it rest until it has cooled. Empty without one.",
            Target(f"max({_metric('hil_thermal_may_run')})", "workload"),
            defaults={"mappings": _mapping({0: ("must rest", "red"), 1: ("may run", "green")})},
        ),
    )


def _link() -> tuple[Panel, ...]:
    return (
        _graph(
            "One-way delay",
            "As applied by the emulator; 0 in an outage.",
            "s",
            Target(_metric("hil_link_delay_seconds"), "{{direction}}"),
            zero=True,
        ),
        _graph(
            "Link rate",
            "As applied by the emulator, scaled with the mission clock; 0 in an outage.",
            "bps",
            Target(_metric("hil_link_rate_bits_per_second"), "{{direction}}"),
            zero=True,
        ),
        _graph(
            "Upload",
            "Bits a second of wall time that the board has acknowledged.",
            "bps",
            Target(f"8 * sum by (board) ({_rate('hil_upload_bytes_total')})", "acknowledged"),
            zero=True,
        ),
        _graph(
            "Link edges played too late",
            "Acquisition, loss, handover and rate steps that came later than the overrun bound, in the last minutes.",
            "short",
            Target(f"sum by (board) (increase({_metric('hil_link_overruns_total')}[$__range]))", "too late"),
            zero=True,
        ),
    )


def _inference() -> tuple[Panel, ...]:
    tokens, energy = (_rate(name) for name in ("hil_inference_output_tokens_total", "hil_board_energy_joules_total"))
    return (
        _graph(
            "Output tokens",
            "Tokens a second, counted by the client as they come, by the phase they came in.",
            "suffix: tokens/s",
            Target(f"sum by (phase) ({tokens})", "{{phase}}"),
            zero=True,
        ),
        _graph(
            "Energy per token",
            "All energy the board drew over its tokens, while there were any; wall time. An estimate for the eye: "
            "acceptance is judged from raw samples.",
            "joule",
            Target(f"sum by (phase) ({energy}) / (sum by (phase) ({tokens}) > 0)", "{{phase}}"),
            zero=True,
        ),
        _bars(
            "Energy drawn, by phase",
            "In the shown range, idle time included.",
            "joule",
            "hil_board_energy_joules_total",
        ),
        _bars("Tokens, by phase", "In the shown range.", "short", "hil_inference_output_tokens_total"),
    )


_REDUCE: dict[str, Any] = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
_STAT: dict[str, Any] = {
    **_REDUCE,
    "colorMode": "value",
    "graphMode": "none",
    "justifyMode": "auto",
    "textMode": "value",
}
_TOOLTIP: dict[str, Any] = {"tooltip": {"mode": "multi", "sort": "none"}}


def _legend(*calcs: str) -> dict[str, Any]:
    return {"legend": {"showLegend": True, "displayMode": "list", "placement": "bottom", "calcs": list(calcs)}}


def _graph(title: str, text: str, unit: str, *targets: Target, zero: bool = False, **defaults: Any) -> Panel:
    return Panel(
        title,
        text,
        "timeseries",
        unit,
        targets,
        options={**_TOOLTIP, **_legend()},
        custom={"lineWidth": 1, "fillOpacity": 0, "showPoints": "never", "spanNulls": False},
        defaults={**({"min": 0} if zero else {}), **defaults},
    )


def _bars(title: str, text: str, unit: str, counter: str) -> Panel:
    expr = f"sum by (phase) (increase({_metric(counter)}[$__range]))"
    target = Target(expr, "{{phase}}", instant=True)
    return Panel(
        title,
        text,
        "bargauge",
        unit,
        (target,),
        height=6,
        options={"orientation": "horizontal", "displayMode": "basic", **_REDUCE},
    )


def _timeline(title: str, text: str, *targets: Target, **more: Any) -> Panel:
    return Panel(
        title,
        text,
        "state-timeline",
        "none",
        targets,
        options={"mergeValues": True, "showValue": "auto", "rowHeight": 0.85, **_TOOLTIP, **_legend()},
        custom={"lineWidth": 0, "fillOpacity": 80},
        **more,
    )


def _metric(name: str) -> str:
    return f"{name}{{{_BOARD}}}"


def _rate(name: str) -> str:
    return f"rate({_metric(name)}[$__rate_interval])"


def _mapping(values: Mapping[int, tuple[str, str]]) -> list[dict[str, Any]]:
    options = {
        str(value): {"text": text, "color": colour, "index": index}
        for index, (value, (text, colour)) in enumerate(values.items())
    }
    return [{"type": "value", "options": options}]


def _steps(*steps: tuple[str, float | None]) -> dict[str, Any]:
    return {"mode": "absolute", "steps": [{"color": colour, "value": value} for colour, value in steps]}


def dashboard(
    *,
    uid: str,
    title: str,
    description: str,
    rows: Sequence[tuple[str, Sequence[Panel]]],
    annotations: Sequence[tuple[str, str, str, str]] = (),
) -> dict[str, Any]:
    """A v1 dashboard: titled rows of panels, one `board` variable, annotations (name, query, colour, text)."""
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["hil"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "5s",
        "time": {"from": "now-10m", "to": "now"},
        "timezone": "utc",
        "timepicker": {"refresh_intervals": ["1s", "5s", "10s", "30s", "1m"]},
        "fiscalYearStartMonth": 0,
        "links": [],
        "preload": False,
        "templating": {"list": [_board_variable()]},
        "annotations": {"list": [_annotation(*item) for item in annotations]},
        "panels": list(_placed(rows)),
    }


def _board_variable() -> dict[str, Any]:
    query = "label_values(hil_board_info, board)"
    return {
        "name": "board",
        "label": "Board",
        "description": "Which board of the bench.",
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"},
        "refresh": 2,
        "sort": 1,
        "multi": False,
        "includeAll": False,
        "hide": 0,
        "options": [],
        "current": {},
    }


def _annotation(name: str, expr: str, colour: str, text: str) -> dict[str, Any]:
    return {
        "name": name,
        "datasource": DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": colour,
        "expr": expr,
        "step": "",
        "titleFormat": name,
        "textFormat": text,
        "target": {"expr": expr, "refId": "Anno", "interval": ""},
    }


def _placed(rows: Sequence[tuple[str, Sequence[Panel]]]) -> Iterator[dict[str, Any]]:
    """Panels left to right, top to bottom, ids in that order."""
    identity, y = 1, 0
    for title, panels in rows:
        yield {
            "id": identity,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y},
            "panels": [],
        }
        identity, y, x, tallest = identity + 1, y + 1, 0, 0
        for panel in panels:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            yield _panel(panel, identity, x, y)
            identity, x, tallest = identity + 1, x + panel.width, max(tallest, panel.height)
        y += tallest


def _panel(panel: Panel, identity: int, x: int, y: int) -> dict[str, Any]:
    return {
        "id": identity,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"h": panel.height, "w": panel.width, "x": x, "y": y},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "editorMode": "code",
                "expr": target.expr,
                "legendFormat": target.legend,
                "instant": target.instant,
                "range": not target.instant,
            }
            for index, target in enumerate(panel.targets)
        ],
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": dict(panel.custom), **panel.defaults},
            "overrides": [dict(item) for item in panel.overrides],
        },
        "options": dict(panel.options),
    }


def panel_queries(dashboard_json: Mapping[str, Any], **variables: str) -> list[str]:
    """Every panel's queries with Grafana's variables replaced as `substituted` does, as Prometheus understands them."""
    return [
        substituted(target["expr"], **variables)
        for panel in dashboard_json["panels"]
        for target in panel.get("targets", ())
    ]


def annotation_queries(dashboard_json: Mapping[str, Any], **variables: str) -> list[str]:
    """The same for annotations; these may well have no result."""
    return [substituted(item["expr"], **variables) for item in dashboard_json["annotations"]["list"]]


def substituted(expr: str, *, board: str, rate_interval: str = "10s", range_: str = "5m", interval: str = "2s") -> str:
    """Put values in the place of the variables that these dashboards use."""
    for name, value in (
        ("$__rate_interval", rate_interval),
        ("$__range", range_),
        ("$__interval", interval),
        ("$board", board),
    ):
        expr = expr.replace(name, value)
    if "$" in expr:
        raise ValueError(f"a variable is left in {expr!r}")
    return expr


def files() -> dict[str, str]:
    """File name and content of every dashboard."""
    return {"mission.json": json.dumps(mission_dashboard(), indent=2) + "\n"}


def main(arguments: Sequence[str]) -> int:
    """Write the dashboards below the given directory (default: this repository's grafana/dashboards/hil)."""
    target = Path(arguments[0]) if arguments else Path(__file__).parents[1] / "grafana/dashboards/hil"
    target.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (target / name).write_text(text, encoding="utf-8")
        print(target / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
