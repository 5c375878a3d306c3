"""Why training waited, by hand-computed examples."""

from __future__ import annotations

import pytest

from train.waits import CAUSES, Blocked, EpochWork, by_cause, why


def test_waiting_for_production_goes_to_fetching_and_transforming_as_the_workers_time_does() -> None:
    blocked = Blocked(production_s=9.0, transfer_s=0.5, batching_s=0.25)
    work = EpochWork(fetch_s=30.0, transform_s=10.0, first_task_unix_s=1.0)
    causes = by_cause(10.0, blocked, work, starting_s=1.0)
    assert causes == {
        "listing": 0.0,
        "starting": 1.0,
        "fetching": 6.0,
        "transforming": 2.0,
        "transfer": 0.5,
        "batching": 0.25,
        "other": 0.25,
    }
    assert list(causes) == list(CAUSES)


def test_making_the_iterator_is_part_of_the_start_and_not_of_production() -> None:
    blocked = Blocked(setup_s=4.0, production_s=6.0)
    causes = by_cause(10.0, blocked, EpochWork(fetch_s=1.0), starting_s=7.0)
    assert (causes["starting"], causes["fetching"], causes["other"]) == (7.0, 3.0, 0.0)


@pytest.mark.parametrize(
    ("wait_s", "blocked", "work", "starting_s"),
    [
        (2.0, Blocked(), EpochWork(), 0.0),
        (2.0, Blocked(production_s=5.0, transfer_s=1.0), EpochWork(fetch_s=1.0), 0.5),
        (2.0, Blocked(production_s=5.0), EpochWork(transform_s=1.0), 7.0),
        (2.0, Blocked(production_s=1.0), EpochWork(fetch_s=1.0), -3.0),
        (0.0, Blocked(), EpochWork(fetch_s=1.0), 0.0),
    ],
)
def test_the_causes_add_up_to_the_wait_and_none_is_negative(wait_s, blocked, work, starting_s) -> None:
    causes = by_cause(wait_s, blocked, work, starting_s)
    assert sum(causes.values()) == pytest.approx(wait_s)
    assert min(causes.values()) >= 0


def test_what_the_workers_did_not_tell_is_not_made_up() -> None:
    assert by_cause(3.0, Blocked(production_s=2.0), EpochWork())["other"] == 3.0


def test_a_run_says_why_it_waited_largest_share_first_and_listing_too() -> None:
    rows = [
        {"wall_s": 10.0, "stall_by_cause_s": {"fetching": 3.0, "other": 0.001, "listing": 1.0}},
        {"wall_s": 9.0, "stall_by_cause_s": {"fetching": 0.0, "transforming": 0.999}},
        {"epoch": 2},
    ]
    assert why(rows) == "waited for data 5.0 s of 20.0 s (25.0%): fetching 60%, listing 20%, transforming 20%"


def test_a_run_that_recorded_nothing_says_so() -> None:
    assert why([{"epoch": 0}]) == why([]) == "waited for data: not known"
