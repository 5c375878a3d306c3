"""The Grafana dashboard, against Grafana's own model of one and against the metrics that there are."""

from __future__ import annotations

import json
import re

import pytest

from train.__main__ import main
from train.gauges import METRICS, exported_name


def test_every_metric_of_the_dashboard_is_one_that_is_exported_and_all_are_shown(capsys) -> None:
    assert main(["grafana"]) == 0
    printed = json.loads(capsys.readouterr().out)
    queries = [target["expr"] for panel in printed["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in printed["templating"]["list"] if variable["type"] == "query"]
    named = set(re.findall(r"ray_voxflux_\w+", " ".join(queries)))
    assert named == {exported_name(name) for name in METRICS}
    for query in queries:
        for labels in re.findall(r"by \(([^)]*)\) \((?:rate\()?ray_(voxflux_\w+?)(?:_total)?\{", query):
            asked, metric = set(labels[0].replace(" ", "").split(",")), METRICS[labels[1]]
            assert asked == {"run", metric.label} - {""}


def test_the_dashboard_is_one_by_grafanas_own_model() -> None:
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason="the SDK needs Python 3.11")

    from train.grafana import dashboard

    ours = json.loads(dashboard())
    understood = json.loads(json.dumps(models.Dashboard.from_json(ours), default=lambda value: value.to_json()))
    assert understood["uid"] == ours["uid"]
    assert [panel["title"] for panel in understood["panels"]] == [panel["title"] for panel in ours["panels"]]
    assert [panel["gridPos"] for panel in understood["panels"]] == [panel["gridPos"] for panel in ours["panels"]]
    assert {panel["type"] for panel in understood["panels"]} == {"timeseries"}
    for theirs, panel in zip(understood["panels"], ours["panels"], strict=True):
        assert theirs["datasource"] == panel["datasource"]
        assert len(theirs["targets"]) == len(panel["targets"])
        assert theirs.keys() >= panel.keys()  # nothing of ours is unknown to it
