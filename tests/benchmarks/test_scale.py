"""Plans of made-up cases are real plans, and the verdicts follow from the rows."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import benchmarks.synthetic
from benchmarks.child import in_child
from benchmarks.scale import ScaleConfig, measure_plan, verdicts
from benchmarks.synthetic import LINKED_FILES, linked_cases, synthetic_manifest
from benchmarks.tree import TreeMeter
from ingest.errors import ConfigError, IngestError
from ingest.manifest import Manifest, cases_of
from ingest.plan import ShardConfig
from ingest.stores import open_store

# Not Python: a distribution's own does not find itself in a virtual environment under another name.
BASH, BUSY = "/bin/bash", "while :; do :; done"


def test_a_synthetic_manifest_is_one_that_loads() -> None:
    manifest = synthetic_manifest(1000, seed=3)
    again = Manifest.from_bytes(manifest.to_bytes())
    assert again.table.equals(manifest.table)
    assert len(again) == 1000
    assert manifest.table.equals(synthetic_manifest(1000, seed=3).table)
    assert np.all(manifest.case_bytes() > 100_000)


def test_a_plan_of_a_thousand_cases_has_every_field() -> None:
    row = measure_plan(cases=1000, seed=0)
    assert row["cases"] == 1000
    assert row["shards"] >= 1
    for field in ("load_s", "holdout_s", "plan_s", "tasks_s", "manifest_mb", "tasks_mb", "source_mb"):
        assert row[field] > 0
    assert row["peak_mb"] < 500


def test_a_child_process_answers_and_fails_loudly(capfd: pytest.CaptureFixture[str]) -> None:
    assert in_child("builtins:dict", cases=100, name="ä") == {"cases": 100, "name": "ä"}
    with pytest.raises(IngestError, match="divmod"):
        in_child("builtins:divmod", x=1)
    assert "Traceback" in capfd.readouterr().err


def test_linked_cases_read_as_any_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.synthetic, "DATA_DIR", tmp_path)
    manifest = linked_cases(200, pair_kb=3)
    assert linked_cases(200, pair_kb=3).table.equals(manifest.table)
    images, labels = open_store(manifest.images_uri), open_store(manifest.labels_uri)
    cases = cases_of(manifest.take(np.array([5, 5 + LINKED_FILES, 199])))
    first, same, other = images.fetch([case.image for case in cases])
    assert first == same
    assert first != other
    assert len(labels.fetch([case.label for case in cases])) == 3
    assert len(list(images.list())) == 200


def cost(cases: int, cpu_us: float, **more: float) -> dict[str, float]:
    return {
        "cases": cases,
        "cpu_us_per_sample": cpu_us,
        "shard_cases": ShardConfig().shard_cases,
        "ranks": 2,
        "epochs": 4,
        "alone": False,
        "first_batch_s": 2.0,
        "next_first_batch_s": 0.5,
        **more,
    }


@pytest.mark.parametrize(
    ("costs", "words", "held"),
    [
        ((850, 470, 390), "850, 470, 390 us, the most 118% above the least", "no"),
        ((410, 430, 392), "the most 10% above the least", "yes"),
        ((400, 445, 400), "the most 11% above the least", "no"),  # the ends alone would be flat
    ],
)
def test_flat_is_what_no_number_of_cases_departs_from(costs: tuple[float, ...], words: str, held: str) -> None:
    rows = [cost(cases, us) for cases, us in zip((1000, 10_000, 100_000), costs, strict=True)]
    flat, by_themselves, first_batch = verdicts([], [*rows, cost(1000, 850) | {"alone": True, "epochs": 1}])
    assert words in flat
    assert f"10%: {held} (in executions of 4, 4, 4 epochs" in flat
    assert by_themselves.endswith("850 us of 1,000 cases")
    assert first_batch.endswith("yes")


def test_a_plan_over_two_seconds_misses_its_target() -> None:
    row = {"cases": 1_000_000, "holdout_s": 0.5, "plan_s": 0.1, "tasks_s": 1.5, "peak_mb": 90.0}
    assert verdicts([row], [])[0].endswith("no")
    assert verdicts([row | {"tasks_s": 1.0}], [])[0].endswith("yes")


def test_the_tree_meter_counts_a_child_that_works() -> None:
    with TreeMeter() as meter:
        before_s = meter.cpu_s()
        subprocess.run([sys.executable, "-c", "sum(range(30_000_000)); import time; time.sleep(0.6)"], check=True)
        assert meter.cpu_s() - before_s > 0.1
        assert meter.peak_rss_bytes() > 20e6


@pytest.mark.parametrize(
    ("title", "role"),
    [
        ("ray::IDLE", "readers"),
        ("ray::_loaded", "readers"),
        ("ray::ReadPairedVolume->MapBatches(sample_patches)", "readers"),
        ("ray::SplitCoordinator.get", "coordinator"),
        ("ray::_StatsActor", "coordinator"),
        ("ray::DashboardAgent", "services"),
        ("/anywhere/raylet/raylet", "raylet"),
        ("/anywhere/gcs/gcs_server", "services"),
    ],
)
def test_cpu_time_is_told_by_what_a_process_of_ray_is_for(title: str, role: str) -> None:
    with TreeMeter() as meter:
        before_s = meter.cpu_s_by_role()[role]
        child = subprocess.Popen([title, "-c", BUSY], executable=BASH)
        try:
            deadline = time.monotonic() + 240
            while meter.cpu_s_by_role()[role] - before_s < 0.1:
                assert time.monotonic() < deadline, meter.cpu_s_by_role()
                time.sleep(0.05)
            by_role, all_s = meter.cpu_s_by_role(), meter.cpu_s()
            assert sum(by_role.values()) == pytest.approx(all_s, abs=0.1)
        finally:
            child.kill()
            child.wait()


def test_a_process_is_counted_by_the_name_that_it_takes_later() -> None:
    rename = f"sleep 0.8; exec -a ray::IDLE {BASH} -c '{BUSY}'"  # longer than from one look to the next
    with TreeMeter() as meter:
        child = subprocess.Popen([BASH, "-c", rename])
        try:
            deadline = time.monotonic() + 240
            while meter.cpu_s_by_role()["readers"] < 0.1:
                assert time.monotonic() < deadline, meter.cpu_s_by_role()
                time.sleep(0.05)
        finally:
            child.kill()
            child.wait()


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="plan_cases"):
        ScaleConfig(plan_cases=(0,))
