"""The audit's own judgement, on ledgers written by hand."""

import dataclasses
import io

import numpy as np
from rich.console import Console

from ingest.progress import EpochPart
from train.audit import Attempt, Audit, EpochAudit, audit_table, replay
from train.checkpoint import Position
from train.recipes import DEMO


def position(epoch: int, step: int, *indices: int) -> Position:
    return Position(step, EpochPart(epoch, np.array(indices, dtype=np.int64)), f"checkpoint_{step}")


def judge(attempts, where, quarantined=frozenset(), cases=8):
    return replay(attempts, candidates=set(range(cases)), quarantined=set(quarantined), position=where, recipe=DEMO)


def attempt(name: str, start: int, step_cases: int, steps: dict[int, tuple[int, list[int]]]) -> Attempt:
    return Attempt(name, start, None, step_cases, {step: [entry] for step, entry in steps.items()})


WHOLE = {1: (0, [0, 1, 2, 3]), 2: (0, [4, 5, 6, 7]), 3: (1, [7, 6, 5, 4])}


def test_a_whole_epoch_and_half_a_one_pass():
    found = judge([attempt("a", 0, 4, WHOLE)], position(1, 3, 4, 5, 6, 7))
    assert found.passed
    assert [(e.once, e.finished, e.tail) for e in found.epochs] == [(8, True, 0), (4, False, 0)]


def test_steps_after_the_checkpoint_are_rolled_back_and_not_doubled():
    again = attempt("b", 2, 4, {3: (1, [0, 1, 2, 3]), 4: (1, [4, 5, 6, 7])})
    found = judge([attempt("a", 0, 4, WHOLE), again], position(2, 4))
    assert found.passed
    assert found.rolled_back == 1


def test_a_start_from_an_older_checkpoint_than_the_start_before_takes_back_the_steps_of_both():
    second = attempt("b", 3, 4, {4: (1, [0, 1, 2, 3])})  # the checkpoint of step 3 is found damaged after it
    third = attempt("c", 2, 4, {3: (1, [0, 1, 2, 3]), 4: (1, [4, 5, 6, 7])})
    found = judge([attempt("a", 0, 4, WHOLE), second, third], position(2, 4))
    assert found.passed, found.problems
    assert (found.rolled_back, found.attempts) == (2, 3)
    # The audit itself may be the first to go back, where no start has followed.
    found = judge([attempt("a", 0, 4, WHOLE), second], position(1, 2))
    assert found.passed, found.problems
    assert found.rolled_back == 2


def test_a_case_trained_on_twice_is_found():
    found = judge([attempt("a", 0, 4, WHOLE | {2: (0, [3, 5, 6, 7])})], position(1, 3, 4, 5, 6, 7))
    assert not found.passed
    assert found.epochs[0].more == [3]


def test_cases_that_would_have_made_a_step_are_lost_and_fewer_are_a_tail():
    lost = judge([attempt("a", 0, 4, {1: WHOLE[1], 2: (1, [0, 1, 2, 3])})], position(1, 2, 0, 1, 2, 3))
    assert lost.epochs[0].never == [4, 5, 6, 7]
    tail = judge([attempt("a", 0, 4, WHOLE)], position(1, 3, 4, 5, 6, 7), cases=11)
    assert tail.passed
    assert tail.epochs[0].tail == 3


def test_what_more_ranks_cannot_share_is_a_tail():
    few = attempt("a", 0, 4, {1: (0, [0, 1, 2, 3])})
    many = attempt("b", 1, 6, {2: (1, [0, 1, 2, 3, 4, 5])})
    found = judge([few, many], position(1, 2, 0, 1, 2, 3, 4, 5))
    assert found.passed
    assert found.epochs[0].tail == 4


def test_quarantined_cases_are_neither_lost_nor_tail():
    found = judge([attempt("a", 0, 4, {1: WHOLE[1], 2: (1, [0, 1, 2, 3])})], position(1, 2, 0, 1, 2, 3), {4, 5, 6, 7})
    assert found.passed
    assert found.epochs[0].quarantined == 4


def test_a_checkpoint_that_the_ledger_contradicts_is_a_problem():
    assert judge([attempt("a", 0, 4, WHOLE)], position(1, 3, 0, 1, 2, 3)).problems
    assert judge([attempt("a", 0, 4, WHOLE), attempt("b", 9, 4, {})], position(1, 3)).problems


def test_training_on_a_held_out_case_is_a_problem():
    found = judge([attempt("a", 0, 4, WHOLE | {3: (1, [7, 6, 5, 99])})], position(1, 3, 5, 6, 7, 99))
    assert any("held out or unknown" in problem for problem in found.problems)


def long_audit(epochs: int) -> Audit:
    """Of a run that lost cases in its 101st epoch and trained two twice in its 201st."""
    found = [EpochAudit(epoch, 8, 8, [], [], 0, 0, True) for epoch in range(epochs)]
    found[100] = dataclasses.replace(found[100], once=6, never=[1, 2])
    found[200] = dataclasses.replace(found[200], once=6, more=[3, 4])
    return Audit(found, 1, 0, [])


def test_a_long_audit_prints_the_first_and_last_epochs_and_those_with_lost_or_doubled_cases_counted_from_1():
    out = io.StringIO()
    Console(file=out, width=120).print(audit_table(long_audit(512)))
    lines = [line.split("│")[1:-1] for line in out.getvalue().splitlines() if line.count("│") > 2]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert [int(line[0]) for line in cells] == [1, 2, 3, 4, 5, 101, 201, 508, 509, 510, 511, 512]
    assert cells[5][:5] == ["101", "8", "6", "0", "2"]
    assert cells[6][:5] == ["201", "8", "6", "2", "0"]
    assert "12 of 512 epochs: the first and last 5, those with problems" in out.getvalue()
