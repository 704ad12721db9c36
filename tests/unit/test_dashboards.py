"""The committed dashboards: generated, nothing changed by hand, and clean by the rules of Grafana's own linter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hil import dashboards

ROOT = Path(__file__).parents[2] / "grafana"
FILES = sorted((ROOT / "dashboards/hil").glob("*.json"))
UNITS = {"volt", "amp", "watt", "joule", "celsius", "s", "bps", "bytes", "percentunit", "dthms", "short", "none"}
TARGETS = [
    pytest.param(panel, target, id=f"{path.stem}-{panel['title']}-{target['refId']}")
    for path in FILES
    for panel in json.loads(path.read_text())["panels"]
    for target in panel.get("targets", ())
]
PANELS = [
    pytest.param(panel, id=f"{path.stem}-{panel['title']}")
    for path in FILES
    for panel in json.loads(path.read_text())["panels"]
    if panel["type"] != "row"
]


def test_regenerating_changes_nothing() -> None:
    assert {path.name: path.read_text() for path in FILES} == dashboards.files()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_dashboard_as_a_whole(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"].startswith("hil-")
    assert 39 <= board["schemaVersion"] <= 41
    assert board["editable"] is False
    assert board["title"]
    assert board["description"]
    assert "id" not in board  # Grafana gives it
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    for annotation in board["annotations"]["list"]:
        assert annotation["datasource"] == dashboards.DATASOURCE
        assert "$board" in annotation["expr"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_panels_do_not_overlap_and_fit(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(path.read_text())["panels"]:
        grid = panel["gridPos"]
        cells = {(grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"])}
        assert grid["x"] + grid["w"] <= dashboards.COLUMNS
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_template_rules(path: Path) -> None:
    variables = {item["name"]: item for item in json.loads(path.read_text())["templating"]["list"]}
    # template-job and template-instance: `board` takes their place, one exporter serves all boards of a bench.
    assert set(variables) == {"board"}
    assert variables["board"]["refresh"] == 2
    assert re.fullmatch(r"label_values\(\w+, board\)", variables["board"]["definition"])


@pytest.mark.parametrize("panel", PANELS)
def test_panel_rules(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert len(panel["description"]) > 10
    assert panel["description"].endswith(".")
    assert panel["datasource"] == dashboards.DATASOURCE
    assert panel["targets"]
    unit = panel["fieldConfig"]["defaults"]["unit"]
    assert unit in UNITS or unit.startswith("suffix:")
    if unit == "none":
        # panel-units: no unit only where every value has a name.
        mapped = panel["fieldConfig"]["defaults"].get("mappings") or [
            item for override in panel["fieldConfig"]["overrides"] for item in override["properties"]
        ]
        assert mapped
    references = [target["refId"] for target in panel["targets"]]
    assert len(references) == len(set(references))


@pytest.mark.parametrize(("panel", "target"), TARGETS)
def test_target_rules(panel: dict[str, Any], target: dict[str, Any]) -> None:
    expr = target["expr"]
    assert target["datasource"] == dashboards.DATASOURCE
    assert target["legendFormat"]
    assert target["instant"] != target["range"]
    # target-rate-interval
    for window in re.findall(r"rate\([^\[\]]*\[([^\]]+)\]", expr):
        assert window == "$__rate_interval"
    for window in re.findall(r"increase\([^\[\]]*\[([^\]]+)\]", expr):
        assert window == "$__range"
    # target-counter-agg: a counter is shown as rate or increase; as it stands only as the newest value of one series.
    for counter in re.finditer(r"\w+_total\b", expr):
        before = expr[: counter.start()]
        wrapped = before.endswith(("rate(", "increase("))
        assert wrapped or (target["instant"] and panel["type"] == "stat")
    # Every board-bound metric is asked for one board.
    for metric, selector in re.findall(r"(hil_\w+)(\{[^}]*\})?", expr):
        assert 'board="$board"' in selector or metric == "hil_deadman_alive"
    # Legends that name a label need it kept by the aggregation.
    for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
        if " by (" in expr:
            assert all(label in kept for kept in re.findall(r"by \(([^)]*)\)", expr))


def test_issue_asks_for_these_panels() -> None:
    (path,) = [path for path in FILES if path.stem == "mission"]
    titles = {panel["title"] for panel in json.loads(path.read_text())["panels"]}
    assert titles >= {
        "Light, link and output",
        "Voltage",
        "Current",
        "Power",
        "State of charge",
        "Temperature",
        "One-way delay",
        "Link rate",
        "Output tokens",
        "Energy per token",
    }


def test_variables_are_replaced_and_none_is_left() -> None:
    queries = dashboards.panel_queries(dashboards.mission_dashboard(), board="vb1", rate_interval="8s", range_="3m")
    assert all("$" not in query for query in queries)
    assert any("[8s]" in query for query in queries)
    assert any("[3m]" in query for query in queries)
    with pytest.raises(ValueError, match="a variable is left"):
        dashboards.substituted("up{x=$other}", board="a", rate_interval="1s", range_="1m", interval="1s")


def test_provisioning_agrees_with_dashboards_and_scrape_interval() -> None:
    (source,) = yaml.safe_load((ROOT / "provisioning/datasources/hil.yml").read_text())["datasources"]
    assert {"type": source["type"], "uid": source["uid"]} == dashboards.DATASOURCE
    scrape = yaml.safe_load((ROOT / "prometheus/prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scrape["global"]["scrape_interval"]
    assert source["url"].startswith("http://127.0.0.1:")
    (provider,) = yaml.safe_load((ROOT / "provisioning/dashboards/hil.yml").read_text())["providers"]
    assert provider["allowUiUpdates"] is False
    assert provider["options"]["path"].endswith("grafana/dashboards/hil")


def test_documentation_lists_every_exported_metric() -> None:
    text = (ROOT.parent / "docs/metrics.md").read_text()
    source = (ROOT.parent / "hil/bench/exporter.py").read_text()
    exported = set()
    for kind, name in re.findall(r'(gauge|counter|by_phase)\(\s*"(hil_\w+)"', source):
        exported.add(name if kind == "gauge" else f"{name}_total")
    assert len(exported) > 20
    assert exported == set(re.findall(r"^\| `(hil_\w+)` ", text, re.MULTILINE))
    used = set(re.findall(r"hil_\w+", " ".join(str(target["expr"]) for _, target in (t.values for t in TARGETS))))
    assert used <= exported
