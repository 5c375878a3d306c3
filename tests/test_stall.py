"""AU and stalls by hand-computed examples, on a clock that only the test moves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ingest.stall import StallMeter, StallReport, percentile


class HandClock:
    """A clock that stands still until it is told to move."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def move(self, seconds: float) -> None:
        self.now_s += seconds


def run_epoch(
    waits: list[float], computes: list[float], *, setup_s: float = 0.0, end_wait_s: float = 0.0, barrier_s: float = 0.0
) -> StallReport:
    """An epoch of four samples a step whose every wait and compute takes just so long."""
    clock = HandClock()
    meter = StallMeter(clock)
    clock.move(setup_s)

    def batches() -> Iterator[int]:
        for step, wait_s in enumerate(waits):
            clock.move(wait_s)
            yield step
        clock.move(end_wait_s)

    for step in meter.steps(batches()):
        clock.move(computes[step])
    clock.move(barrier_s)
    return meter.result(samples=4 * len(waits))


def test_au_equals_the_formula_worked_by_hand() -> None:
    # T = 1 + 2 + 3 + (5 + 1 + 1) compute + 0.5 end + 2.5 barrier = 16; p_1 = 1 + 5 = 6; AU = (1 + 1) / (16 - 6).
    report = run_epoch([1.0, 2.0, 3.0], [5.0, 1.0, 1.0], end_wait_s=0.5, barrier_s=2.5)
    assert report.wall_s == 16.0
    assert report.au == pytest.approx(0.2)


def test_stall_share_counts_the_first_batch_and_the_wait_for_the_end() -> None:
    report = run_epoch([1.0, 2.0, 3.0], [5.0, 1.0, 1.0], end_wait_s=0.5, barrier_s=2.5)
    assert report.wait_s == 6.5
    assert report.stall_share == pytest.approx(6.5 / 16)
    assert report.compute_s == 7.0
    assert report.samples_per_s == pytest.approx(12 / 16)
    assert (report.steps, report.samples) == (3, 12)


def test_first_batch_counts_from_the_start_of_the_epoch() -> None:
    assert run_epoch([1.0, 2.0], [1.0, 1.0], setup_s=0.25).first_batch_s == 1.25


def test_an_epoch_that_never_waits_has_au_one() -> None:
    report = run_epoch([0.0, 0.0, 0.0], [3.0, 2.0, 2.0])
    assert report.au == 1.0
    assert report.stall_share == 0.0


def test_percentiles_leave_out_the_first_batch() -> None:
    report = run_epoch([50.0, *[float(i) for i in range(101)]], [1.0] * 102)
    assert report.stall_p50_s == 50.0
    assert report.stall_p95_s == 95.0
    assert report.stall_p99_s == 99.0


def test_percentiles_lie_between_neighbours_in_a_straight_line() -> None:
    assert percentile([4.0, 1.0], 50) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0], 95) == pytest.approx(3.85)
    assert percentile([7.0], 99) == 7.0
    assert percentile([], 50) is None


def test_an_epoch_of_one_step_has_no_au() -> None:
    report = run_epoch([1.0], [2.0])
    assert report.au is None
    assert report.stall_p50_s is None
    assert report.first_batch_s == 1.0


def test_an_epoch_without_batches_reports_nothing_but_its_wall_time() -> None:
    report = run_epoch([], [], end_wait_s=3.0)
    assert (report.steps, report.wall_s, report.stall_share) == (0, 3.0, 1.0)
    assert report.au is None
    assert report.first_batch_s is None


def test_an_epoch_in_which_no_time_passes_divides_by_nothing() -> None:
    report = run_epoch([0.0, 0.0], [0.0, 0.0])
    assert report.au is None
    assert report.stall_share is None
    assert report.samples_per_s is None


def test_a_loop_left_early_counts_its_last_step() -> None:
    clock = HandClock()
    meter = StallMeter(clock)
    for step in meter.steps(range(10)):
        clock.move(2.0)
        if step == 2:
            break
    report = meter.result(samples=3)
    assert (report.steps, report.compute_s, report.au) == (3, 6.0, 1.0)


def test_batches_pass_through_unchanged_and_so_does_an_error() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    steps = StallMeter().steps(failing())
    assert next(steps) == 1
    with pytest.raises(OSError, match="gone"):
        next(steps)


def test_the_meter_works_on_the_real_clock() -> None:
    meter = StallMeter()
    for _ in meter.steps(range(3)):
        sum(range(10_000))
    report = meter.result(samples=3)
    assert report.au is not None
    assert 0 < report.au <= 1


def test_what_is_done_aside_is_neither_compute_nor_wait() -> None:
    clock = HandClock()
    meter = StallMeter(clock)
    for _ in meter.steps(range(2)):
        clock.move(1.0)
        with meter.aside():
            clock.move(3.0)
    report = meter.result(samples=2)
    assert report.compute_s == 2.0
    assert report.wait_s == 0.0
    assert report.au == pytest.approx(1 / 7)
