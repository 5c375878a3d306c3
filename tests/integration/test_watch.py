"""Watching a run: Ray's Prometheus endpoint while it trains, and what it leaves behind to look at."""

import dataclasses
import json
import re
import threading
import urllib.request

import pytest
import ray
from rich.console import Console

from benchmarks.metrics import MetricsConfig, measured
from benchmarks.tree import TreeMeter
from ingest.quarantine import BadCaseConfig
from ingest.stores import open_store
from ingest.stores.base import StoreConfig
from tests.integration.test_train import tiny
from train.gauges import METRICS, exported_name
from train.launch import run
from train.monitor import start_monitor
from train.records import read_events, read_steps
from train.waits import CAUSES

pytestmark = pytest.mark.usefixtures("ray_here")
HOSTILE = '"><img src=x onerror=alert(1)>'


class Scraper(threading.Thread):
    """Asks Ray's metrics endpoint as Prometheus would, and keeps the newest answer that has metrics of ours."""

    def __init__(self) -> None:
        super().__init__(name="scraper", daemon=True)
        (node,) = [node for node in ray.nodes() if node["Alive"]]
        self._url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        self._done = threading.Event()
        self.newest = ""

    def run(self) -> None:
        while not self._done.wait(0.5):
            with urllib.request.urlopen(self._url, timeout=10) as answer:
                text = answer.read().decode()
            if "ray_voxflux_stall_seconds" in text:
                self.newest = text

    def close(self) -> None:
        self._done.set()
        self.join()


def values(text: str, name: str) -> dict[str, float]:
    """A metric's values by all of its labels; those of this module's run, and of no other that this Ray has seen."""
    found = re.findall(rf"^{exported_name(name)}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
    return {labels: float(value) for labels, value in found if 'run="run-watched"' in labels}


def test_a_run_exports_its_metrics_says_why_it_waits_and_leaves_a_page(places, bucket, tmp_path, capsys):
    root = f"gs://{bucket}/set/"
    for role, suffix in (("images", "x"), ("labels", "y")):
        source, target = open_store(f"{places.local}{role}/"), open_store(f"{root}{role}/")
        for number, entry in enumerate(source.list()):
            body = b"no volume" * 200 if number in (4, 9) and role == "labels" else source.fetch([entry])[0]
            name = f"{HOSTILE}{number}_{suffix}.npy" if number in (4, 9) else entry.name
            target.put(name, body)
    recipe = tiny(root, tmp_path / "run-watched", epochs=2, evaluate_every=2, tensorboard=True)
    data = dataclasses.replace(
        recipe.data,
        bad=BadCaseConfig(on_bad="quarantine", budget_cases=3),
        store=StoreConfig(transport="compose"),
    )
    scraper = Scraper()
    scraper.start()
    try:
        outcome = run(dataclasses.replace(recipe, data=data), "watched", Console(width=200, soft_wrap=True))
    finally:
        scraper.close()
    printed = capsys.readouterr().out
    for row in outcome.rows:
        assert list(row["stall_by_cause_s"]) == list(CAUSES)
        causes = {cause: seconds for cause, seconds in row["stall_by_cause_s"].items() if cause != "listing"}
        assert sum(causes.values()) == pytest.approx(row["stall_s"], rel=1e-6)
        assert row["stall_s"] <= row["wall_s"]
        # Ray's own account is private to it: were it not found, everything would be `other`.
        assert causes["other"] < 0.5 * row["stall_s"], row
        assert causes["starting"] > 0
    totals = {cause: sum(row["stall_by_cause_s"][cause] for row in outcome.rows) for cause in CAUSES}
    assert totals["fetching"] > 0
    assert totals["transforming"] > 0
    assert totals["batching"] > 0
    assert [row["stall_by_cause_s"]["listing"] > 0 for row in outcome.rows] == [True, False]
    last = re.findall(r"waited for data .*", printed)
    assert len(last) == 1
    assert re.search(r"of it\)", printed)

    found = {name: values(scraper.newest, name) for name in METRICS}
    assert {name for name, by_label in found.items() if not by_label} <= {"voxflux_retries"}  # nothing went wrong
    assert sum(found["voxflux_samples"].values()) >= 40
    assert sum(found["voxflux_bytes"].values()) > 1e5
    assert sum(found["voxflux_composites"].values()) > 0
    assert {cause for labels in found["voxflux_stall_seconds"] for cause in re.findall(r'cause="(\w+)"', labels)} <= {
        *CAUSES
    }

    steps = read_steps(outcome.run_dir)
    assert len(steps) == 1
    (records,) = steps.values()
    assert [record.step for record in records] == list(range(1, outcome.rows[-1]["step"] + 1))
    first, *between, last_event = (event.kind for event in read_events(outcome.run_dir))
    assert (first, {*between}, last_event) == ("start", {"quarantine"}, "end")
    assert len(list((tmp_path / "run-watched" / "tensorboard").iterdir())) == 1
    page = (tmp_path / "run-watched" / "report.html").read_text("utf-8")
    assert outcome.page == str(tmp_path / "run-watched" / "report.html")
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert page.count('class="case"') == 3
    assert json.loads((tmp_path / "run-watched" / "metrics.json").read_text()) == outcome.rows


def test_what_metrics_cost_is_measured_on_all_that_a_run_tells(tmp_path):
    monitor = start_monitor(str(tmp_path))
    with TreeMeter() as tree:
        found = measured(monitor, tree, MetricsConfig(blocks=5, batches=3), epoch=0)
    assert found["here_us_per_sample"] > 0
    assert found["cpu_us_per_sample"] == pytest.approx(found["here_us_per_sample"] + found["others_us_per_sample"])
    (records,) = read_steps(str(tmp_path)).values()
    assert [record.step for record in records] == list(range(1, 16))
    assert monitor.ask("work_of", 0).fetch_s == pytest.approx(0.015)
