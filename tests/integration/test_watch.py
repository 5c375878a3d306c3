"""A run with bad cases, watched: Ray's Prometheus endpoint while it trains, its quarantine, and what it leaves."""

import dataclasses
import io
import json
import re
import threading
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest
import ray
from rich.console import Console

from benchmarks.metrics import MetricsConfig, measured
from benchmarks.tree import TreeMeter
from ingest.quarantine import BadCaseConfig
from ingest.stores import dataflux, open_store
from ingest.stores.base import StoreConfig
from tests.integration.test_train import tiny
from train.audit import audit
from train.flag import make_flag
from train.gauges import METRICS, exported_name
from train.launch import Outcome, run
from train.monitor import start_monitor
from train.ray_compat import session_folder
from train.records import read_events, read_steps
from train.waits import CAUSES

pytestmark = pytest.mark.usefixtures("ray_here")
HOSTILE = '"><img src=x onerror=alert(1)>'
# Numbers of the cases whose labels are bad, and what these cases are called.
SPOILT = {number: f"case_{number:05d}" for number in (7, 14, 21, 28)} | {4: f"{HOSTILE}4", 9: f"{HOSTILE}9"}


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


class Watched(NamedTuple):
    """A run of two ranks and two epochs that composes, with six bad labels, and what was seen of it."""

    outcome: Outcome
    printed: str
    newest: str


@pytest.fixture(scope="module")
def watched(places, gcs_server, tmp_path_factory) -> Watched:
    gcs_server.create_bucket("watched")
    root, folder = "gs://watched/set/", tmp_path_factory.mktemp("watched")
    for role, suffix in (("images", "x"), ("labels", "y")):
        source, target = open_store(f"{places.local}{role}/"), open_store(f"{root}{role}/")
        for number, entry in enumerate(source.list()):
            body = b"no volume" * 200 if number in SPOILT and role == "labels" else source.fetch([entry])[0]
            name = f"{SPOILT[number]}_{suffix}.npy" if number in SPOILT else entry.name
            target.put(name, body)
    recipe = tiny(root, folder / "run-watched", tensorboard=True, ledger=str(folder / "ledger"))
    bad = BadCaseConfig(on_bad="quarantine", budget_cases=10)
    data = dataclasses.replace(
        recipe.data, bad=bad, store=StoreConfig(transport="direct" if dataflux.missing() else "compose")
    )
    printed = io.StringIO()
    console = Console(file=printed, width=200, soft_wrap=True)
    scraper = Scraper()
    scraper.start()
    try:
        outcome = run(dataclasses.replace(recipe, data=data), "watched", console)
    finally:
        scraper.close()
    return Watched(outcome, printed.getvalue(), scraper.newest)


def test_bad_cases_are_quarantined_counted_and_the_run_goes_on(watched):
    outcome = watched.outcome
    table = pq.read_table(Path(outcome.run_dir) / "quarantine.parquet")
    assert sorted(table["case_id"].to_pylist()) == sorted(SPOILT.values())
    assert set(table["reason"].to_pylist()) == {"not-npy"}
    for row in outcome.rows:
        assert row["scored"] == 9  # one of the six is held out
        assert row["trained"] + row["tail"] + row["quarantined"] == 55
        assert row["tail"] < 8
    found = audit(outcome.run_dir)
    assert found.passed, found
    assert [epoch.quarantined for epoch in found.epochs] == [row["quarantined"] for row in outcome.rows]


def test_a_run_exports_its_metrics_says_why_it_waits_and_leaves_a_page(watched):
    outcome, run_dir = watched.outcome, Path(watched.outcome.run_dir)
    for row in outcome.rows:
        assert list(row["stall_by_cause_s"]) == list(CAUSES)
        causes = {cause: seconds for cause, seconds in row["stall_by_cause_s"].items() if cause != "listing"}
        assert sum(causes.values()) == pytest.approx(row["stall_s"], rel=1e-6)
        assert row["stall_s"] <= row["wall_s"]
        assert causes["other"] < max(0.5 * row["stall_s"], 0.1), row
    # Ray's own account is private to it: were it not found, everything would be `other`. Of the epoch that nothing was
    # begun ahead of; later ones wait for milliseconds.
    first = outcome.rows[0]
    assert first["stall_by_cause_s"]["other"] < 0.5 * first["stall_s"], first
    assert first["stall_by_cause_s"]["starting"] > 0
    totals = {cause: sum(row["stall_by_cause_s"][cause] for row in outcome.rows) for cause in CAUSES}
    assert totals["fetching"] > 0
    assert totals["transforming"] > 0
    assert totals["batching"] > 0
    assert [row["stall_by_cause_s"]["listing"] > 0 for row in outcome.rows] == [True, False]
    last = re.findall(r"waited for data .*", watched.printed)
    assert len(last) == 1
    assert re.search(r"of it\)", watched.printed)

    found = {name: values(watched.newest, name) for name in METRICS}
    never = {"voxflux_retries", *(["voxflux_composites"] if dataflux.missing() else [])}  # nothing went wrong
    assert {name for name, by_label in found.items() if not by_label} <= never
    assert sum(found["voxflux_samples"].values()) >= 40
    assert sum(found["voxflux_bytes"].values()) > 1e5
    assert (sum(found["voxflux_composites"].values()) > 0) == (not dataflux.missing())
    assert {cause for labels in found["voxflux_stall_seconds"] for cause in re.findall(r'cause="(\w+)"', labels)} <= {
        *CAUSES
    }

    steps = read_steps(outcome.run_dir)
    assert len(steps) == 1
    (records,) = steps.values()
    assert [record.step for record in records] == list(range(1, outcome.rows[-1]["step"] + 1))
    first, *between, last_event = (event.kind for event in read_events(outcome.run_dir))
    assert (first, {*between}, last_event) == ("start", {"quarantine"}, "end")
    assert len(list((run_dir / "tensorboard").iterdir())) == 1
    page = (run_dir / "report.html").read_text("utf-8")
    assert outcome.page == str(run_dir / "report.html")
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert page.count('class="case"') == 3
    assert json.loads((run_dir / "metrics.json").read_text()) == outcome.rows


def test_what_metrics_cost_is_measured_on_all_that_a_run_tells(tmp_path):
    monitor = start_monitor(str(tmp_path))
    with TreeMeter() as tree:
        found = measured(monitor, tree, MetricsConfig(blocks=5, batches=3), epoch=0)
    assert found["here_us_per_sample"] > 0
    assert found["cpu_us_per_sample"] == pytest.approx(found["here_us_per_sample"] + found["others_us_per_sample"])
    (records,) = read_steps(str(tmp_path)).values()
    assert [record.step for record in records] == list(range(1, 16))
    assert monitor.ask("work_of", 0).fetch_s == pytest.approx(0.015)


def test_a_monitor_and_a_stop_flag_that_were_killed_answer_again_and_are_told_of(tmp_path):
    monitor = start_monitor(str(tmp_path))
    flag = make_flag(monitor.warn)
    ray.get(flag.set.remote())
    ray.kill(flag, no_restart=False)
    while ray.get(flag.is_set.remote()):  # until it has died and forgotten: a driver sets it anew while it waits
        time.sleep(0.05)
    ray.kill(monitor.keeper, no_restart=False)
    monitor.tell("event", "fault", "rank 0 failed")
    told: list[str] = []
    while not any("monitor died and was started again" in text for text in told):
        told = [event.text for event in (monitor.ask("told_since", None) or (None, []))[1]]
    monitor.ask("close", "end", "the run is done")
    kept = [event.text for event in read_events(str(tmp_path))]
    assert "rank 0 failed" in kept
    assert any("stop flag died and was started again" in text for text in kept)


def test_the_session_folder_of_a_worker_is_known():
    found = ray.get(ray.remote(num_cpus=0)(session_folder).remote())
    assert found == session_folder()
    assert (Path(found) / "sockets").is_dir()
