"""What dashboard, alerts and autoscaler ask for are metrics that /metrics exports, with labels that these have."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from server.api.health import MEASURES
from server.app import create_app
from server.settings import Settings

ROOT = Path(__file__).parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "docker/grafana/dashboards/medsora.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
ALERTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "docker/prometheus/alerts.yml").read_text())["groups"][0]["rules"]
# Of gauges and counters that are no Measure, as docs/observability.md tells; a test there has them by use.
OTHER_LABELS = {
    "medsora_num_requests_waiting": {"model"},
    "medsora_num_requests_running": {"model"},
    "medsora_num_bulk_clips_unfinished": {"kind"},
    "medsora_requests": {"model", "status"},
    "medsora_frames_generated": {"model"},
    "medsora_video_seconds_generated": {"model"},
    "medsora_jobs_redelivered": {"model"},
    "medsora_worker_up": {"worker"},
    "medsora_worker_resident_bytes": {"worker"},
    "medsora_gpu_peak_memory_bytes": {"worker"},
}
KEDA: dict[str, Any] = next(
    yaml.safe_load_all((ROOT / "docker/kubernetes/components/keda/scaled-object.yaml").read_text())
)
EXPRESSIONS = [
    *[target["expr"] for panel in PANELS for target in panel["targets"]],
    *[rule["expr"] for rule in ALERTS],
    *[trigger["metadata"]["query"] for trigger in KEDA["spec"]["triggers"]],
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Types of the metric families of /metrics, by name."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("data"), redis_url="redis://127.0.0.1:1")  # type: ignore[arg-type]
    with TestClient(create_app(settings)) as client:
        text = client.get("/metrics").text
    return {family.name: family.type for family in text_string_to_metric_families(text)}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_name_what_is_exported(expression: str, exported: dict[str, str]) -> None:
    names = re.findall(r"\bmedsora_\w+", expression)
    assert names or "up{" in expression
    measures = {measure.name: set(measure.labels) for measure in MEASURES}
    for name in names:
        family, suffix = name, ""
        for ending in ("_bucket", "_sum", "_count", "_total"):
            if name.endswith(ending) and name.removesuffix(ending) in exported:
                family, suffix = name.removesuffix(ending), ending
        assert family in exported, f"{name} is not exported"
        allowed = {"histogram": {"_bucket", "_sum", "_count"}, "counter": {"_total"}, "gauge": {""}}[exported[family]]
        assert suffix in allowed, f"{name} is a {exported[family]}"
        labels = measures.get(family) or OTHER_LABELS[family]
        for selector in re.findall(name + r"\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) <= labels, expression
    grouped = {label for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(", ")}
    known = set().union(*measures.values(), *OTHER_LABELS.values(), {"le"})
    assert grouped <= known


def test_rates_are_of_counters_and_quantiles_of_buckets() -> None:
    for expression in EXPRESSIONS:
        for inner in re.findall(r"(?:rate|increase)\((\w+)", expression):
            assert inner.endswith(("_total", "_bucket", "_sum", "_count")), expression
        if "histogram_quantile" in expression:
            assert "_bucket" in expression
            assert re.search(r"by \([^)]*\ble\b", expression)


def test_the_dashboard_shows_what_it_is_for() -> None:
    told = " ".join(panel["title"].lower() for panel in PANELS)
    for subject in ("queue", "latency by stage", "clips a second", "gpu memory", "fail", "real-time factor"):
        assert subject in told
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    cells = set()
    for panel in PANELS:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= own


def test_the_dashboard_finds_its_data_and_its_file() -> None:
    grafana = ROOT / "docker" / "grafana"
    (source,) = yaml.safe_load((grafana / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    used = {panel["datasource"]["uid"] for panel in PANELS}
    used |= {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]}
    assert used == {source["uid"]}
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    prefix = next(word.split("=")[1] for word in compose["prometheus"]["command"] if "route-prefix" in word)
    assert source["url"] == f"http://prometheus:9090{prefix}"
    (provider,) = yaml.safe_load((grafana / "provisioning/dashboards/medsora.yml").read_text())["providers"]
    mount = next(volume for volume in compose["grafana"]["volumes"] if volume.startswith("./docker/grafana:"))
    assert provider["options"]["path"] == mount.split(":")[1] + "/dashboards"
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert {name for expression in EXPRESSIONS for name in re.findall(r"\$(\w+)", expression)} <= variables
