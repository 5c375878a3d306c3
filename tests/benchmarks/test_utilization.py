"""A row of the utilization benchmark is the formula of FACTS section 5, worked by hand on made-up step times."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from matplotlib.figure import Figure

from benchmarks.emulated import EmulatedJob, EmulatedRank, RankReport
from benchmarks.utilization import PROFILES, UtilizationConfig, draw, row_of
from ingest.errors import ConfigError
from ingest.stall import StallMeter, StallReport

BATCH = 4


class HandClock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s

    def move(self, seconds: float) -> None:
        self.now_s += seconds


def timed(waits: list[float], compute_s: float, sync_s: float = 0.0) -> StallReport:
    """A rank that waits, computes, and then waits for the other ranks at every step."""
    clock = HandClock()
    meter = StallMeter(clock)

    def batches() -> Iterator[None]:
        for wait_s in waits:
            clock.move(wait_s)
            yield

    for _ in meter.steps(batches()):
        clock.move(compute_s)
        with meter.aside():
            clock.move(sync_s)
    return meter.result(samples=BATCH * len(waits))


def rank(epochs: list[list[float]], compute_s: float, sync_s: float = 0.0) -> RankReport:
    whole = timed([wait_s for waits in epochs for wait_s in waits], compute_s, sync_s)
    return RankReport(whole=whole, by_epoch=[timed(waits, compute_s, sync_s) for waits in epochs])


def test_a_rank_of_the_control_sleeps_through_every_step_and_waits_for_nothing() -> None:
    class Alone:
        def wait(self) -> None:
            pass

    job = EmulatedJob(
        step_s=0.01, epochs=3, together=2, steps_per_epoch=5, batch=BATCH, prefetch_batches=1, in_memory=True
    )
    clock = HandClock()
    report = EmulatedRank(job, Alone(), clock=clock, sleep=clock.move).run()
    assert (report.whole.steps, report.whole.samples) == (15, 15 * BATCH)
    assert [epoch.steps for epoch in report.by_epoch] == [5, 5, 5]
    assert report.whole.compute_s == pytest.approx(15 * 0.01)
    assert report.whole.wait_s == 0.0
    assert [epoch.wait_s for epoch in report.by_epoch] == [0.0] * 3


def test_au_is_the_formula_over_all_epochs_on_end() -> None:
    # T = 5 + 0.5 + 1 + 0.5 waiting + 4 * 2 computing = 15; p_1 = 5 + 2; AU = 3 * 2 / (15 - 7).
    row = row_of([rank([[5.0, 0.5], [1.0, 0.5]], 2.0)], step_s=2.0, batch=BATCH)
    assert row["au"] == pytest.approx(6 / 8)
    # By epochs, as DLIO has it: 2 / (2 + 0.5) for each of the two.
    assert row["au_by_epoch"] == pytest.approx(0.8)


def test_the_first_batch_of_a_later_epoch_counts_as_a_stall() -> None:
    quick = row_of([rank([[5.0, 0.0], [0.0, 0.0]], 1.0)], step_s=1.0, batch=BATCH)
    slow = row_of([rank([[5.0, 0.0], [2.0, 0.0]], 1.0)], step_s=1.0, batch=BATCH)
    assert quick["au"] == pytest.approx(1.0)
    assert slow["au"] == pytest.approx(3 / 5)
    assert slow["epoch_first_batch_s"] == pytest.approx(2.0)


def test_what_ranks_wait_for_each_other_is_not_compute() -> None:
    row = row_of([rank([[1.0, 0.0, 0.0]], 1.0, sync_s=0.25)], step_s=1.0, batch=BATCH)
    assert row["au"] == pytest.approx(2 / (2 + 3 * 0.25))
    assert row["sync_s"] == pytest.approx(0.25)


def test_ranks_are_joined_by_mean_au_sum_of_rates_and_worst_stall() -> None:
    row = row_of([rank([[1.0, 0.0, 0.0]], 1.0), rank([[1.0, 1.0, 1.0]], 1.0)], step_s=1.0, batch=BATCH)
    assert row["au"] == pytest.approx((1.0 + 0.5) / 2)
    assert row["stall_p50_s"] == pytest.approx(1.0)
    assert row["demanded_samples_per_s"] == pytest.approx(2 * BATCH / 1.0)
    assert row["samples_per_s"] == pytest.approx(8 / 3 + 8 / 5)
    assert (row["ranks"], row["steps"], row["epochs"], row["batch"]) == (2, 3, 1, BATCH)


def test_a_run_without_compute_demands_nothing() -> None:
    row = row_of([rank([[1.0, 0.5]], 0.0)], step_s=0.0, batch=BATCH)
    assert row["demanded_samples_per_s"] is None
    assert row["au"] == 0.0


def test_the_demo_demands_what_its_gpus_trained() -> None:
    demo = PROFILES["demo-v100"]
    assert 8 * demo.batch / demo.step_s == pytest.approx(1219, abs=1)


def test_the_picture_takes_rows_with_and_without_au() -> None:
    row = {"profile": "sweep", "demanded_samples_per_s": 10.0, "au": 0.5, "samples_per_s": 5.0}
    draw(Figure().add_subplot(), [row, row | {"profile": "rate", "au": None, "demanded_samples_per_s": None}])


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="shares"):
        UtilizationConfig(shares=(0.0,))
    with pytest.raises(ConfigError, match="ranks"):
        UtilizationConfig(ranks=0)
