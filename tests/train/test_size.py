"""How many data workers a job calls for."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.errors import ConfigError
from train.__main__ import main
from train.size import BUSY, SizeConfig, size_of

REFERENCE = {"gpus": 8, "step_s": 0.21, "batch": 32}


def test_the_reference_job_needs_no_data_worker_at_a_millisecond_a_sample() -> None:
    size = size_of(SizeConfig(**REFERENCE), 1.0)
    assert size.samples_per_s == pytest.approx(1219, abs=1)
    assert size.cpus == pytest.approx(1.219 / 0.75, abs=0.01)
    assert (size.gpu_workers, size.spare_cpus, size.data_workers) == (2, 88, 0)


def test_a_sample_that_costs_more_than_the_gpu_workers_can_spare_calls_for_data_workers() -> None:
    assert size_of(SizeConfig(**REFERENCE), 100.0).data_workers == math.ceil(1219.05 * 0.1 / 0.75 / 32)


@given(
    gpus=st.integers(1, 512),
    step_s=st.floats(0.001, 10),
    batch=st.integers(1, 512),
    cost_ms=st.floats(0.01, 5000),
)
def test_the_cpus_of_a_size_are_enough(gpus: int, step_s: float, batch: int, cost_ms: float) -> None:
    size = size_of(SizeConfig(gpus=gpus, step_s=step_s, batch=batch), cost_ms)
    wanted = gpus * batch / step_s * cost_ms / 1000 / BUSY
    cpus = 32 * size.data_workers if size.data_workers else size.spare_cpus
    assert cpus >= wanted * (1 - 1e-9)
    assert size.data_workers == 0 or 32 * (size.data_workers - 1) < wanted * (1 + 1e-9)


@pytest.mark.parametrize("wrong", [{"gpus": 0}, {"step_s": 0.0}, {"batch": 0}, {"cpu_ms_per_sample": -1.0}])
def test_a_job_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        SizeConfig(**(REFERENCE | wrong))


def test_the_command_prints_what_to_give_to_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["size", "--gpus", "8", "--step-s", "0.21", "--batch", "32", "--cpu-ms-per-sample", "100"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "--gpu-workers 2 --data-workers 6" in out
    assert "given" in out
