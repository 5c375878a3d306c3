"""What is said and kept of a step that is not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ingest.manifest import Manifest
from ingest.pairing import Case
from ingest.stores import ObjectMeta
from train.finite import NONFINITE_FILE, NonFiniteError, stop_run
from train.step import StepResult


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's folder whose manifest has twelve cases."""
    ids = [f"case_{number:05d}" for number in range(12)]
    cases = [Case(i, ObjectMeta(f"{i}_x.npy", 10), ObjectMeta(f"{i}_y.npy", 5)) for i in ids]
    manifest = Manifest.from_cases(cases, images_uri="/data/images/", labels_uri="/data/labels/")
    manifest.save(f"{tmp_path}/manifest.parquet")
    return tmp_path


def stopped(run_dir: Path, result: StepResult, indices: list[int], rank: int = 0) -> NonFiniteError:
    with pytest.raises(NonFiniteError) as caught:
        stop_run(result, indices, epoch=3, step=41, rate=0.8, run_dir=str(run_dir), rank=rank)
    return caught.value


def test_an_infinite_gradient_with_finite_losses_names_every_case_of_the_step(run_dir: Path) -> None:
    error = stopped(run_dir, StepResult(0.5, [0.4, 0.5, 0.6], math.inf, finite=False), [7, 2, 11])
    assert error.case_ids == ("case_00002", "case_00007", "case_00011")
    assert "step 41, epoch 4 (learning rate 0.8), found a gradient that is not finite (norm inf)" in str(error)
    assert "case_00002, case_00007, case_00011; look at" in str(error)
    report = json.loads((run_dir / NONFINITE_FILE).read_text())
    assert report["gradient_norm"] == ["inf"]
    assert report["loss_by_case"] == {"case_00002": 0.5, "case_00007": 0.4, "case_00011": 0.6}


def test_of_many_cases_the_first_eight_are_said_and_all_are_kept(run_dir: Path) -> None:
    losses = [math.nan] * 10 + [0.5]
    error = stopped(run_dir, StepResult(math.nan, losses, math.nan, finite=False), list(range(11)))
    assert error.case_ids == tuple(f"case_{number:05d}" for number in range(10))
    assert "for 10 of its 11 cases" in str(error)
    assert "case_00007 and 2 more; look at" in str(error)
    assert json.loads((run_dir / NONFINITE_FILE).read_text())["case_ids"] == list(error.case_ids)


def test_ranks_other_than_0_say_the_same_and_write_nothing(run_dir: Path) -> None:
    error = stopped(run_dir, StepResult(math.inf, [math.inf], math.inf, finite=False), [5], rank=1)
    assert error.case_ids == ("case_00005",)
    assert not (run_dir / NONFINITE_FILE).exists()
