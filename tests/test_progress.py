"""What was trained on: recorded once, joined without loss, refused when it comes twice."""

import io
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.progress import EpochPart, EpochRecorder, join


def indices(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@given(st.sets(st.integers(0, 10_000), max_size=300), st.integers(0, 5), st.floats(0, 100), st.integers(1, 4))
def test_parts_of_all_ranks_join_to_the_whole_through_a_file(cases, epoch, loss, ranks):
    split = np.array_split(np.array(sorted(cases), dtype=np.int64), ranks)
    parts = [EpochPart.from_bytes(EpochPart(epoch, mine, loss, 2).to_bytes()) for mine in split]
    whole = join(parts)
    assert set(whole.indices.tolist()) == cases
    assert (whole.epoch, whole.steps) == (epoch, 2 * ranks)
    assert whole.loss_sum == pytest.approx(loss * ranks)


def test_a_case_in_two_parts_is_refused():
    with pytest.raises(ValueError, match=r"found twice: \[2\]"):
        join([EpochPart(0, indices(1, 2)), EpochPart(0, indices(2, 3))])


def test_parts_of_two_epochs_are_refused():
    with pytest.raises(ValueError, match="expected parts of one epoch"):
        join([EpochPart(0, indices(1)), EpochPart(1, indices(2))])


def test_one_rank_keeps_what_was_done_before_and_the_others_only_their_own():
    before = EpochPart(3, indices(7, 8), loss_sum=1.5, steps=1)
    recorders = [EpochRecorder(3, 10, before, keeps_before=rank == 0) for rank in range(2)]
    recorders[0].add(indices(0, 1), 0.5)
    recorders[1].add(indices(2, 3), 0.25)
    whole = join([recorder.part() for recorder in recorders])
    assert sorted(whole.indices.tolist()) == [0, 1, 2, 3, 7, 8]
    assert (whole.loss_sum, whole.steps) == (2.25, 3)


@pytest.mark.parametrize("again", [indices(7), indices(0, 0)])
def test_a_case_that_comes_again_is_refused(again):
    recorder = EpochRecorder(3, 10, EpochPart(3, indices(7, 8)))
    with pytest.raises(RuntimeError, match="expected each case once in epoch 4"):
        recorder.add(again, 0.0)


def test_what_was_trained_on_is_recorded_without_holding_on_to_its_block():
    block = np.arange(100, dtype=np.int64)
    recorder = EpochRecorder(0, 100)
    for start in range(0, 100, 10):
        recorder.add(block[start : start + 10], 0.0)
    block[:] = -1  # as if its memory held something else by now
    assert recorder.part().indices.tolist() == list(range(100))


def test_a_million_cases_are_an_eighth_of_a_megabyte_in_a_checkpoint_and_between_ranks():
    rng = np.random.default_rng(0)
    part = EpochPart(2, np.flatnonzero(rng.random(1_000_000) < 0.5), 1.5, 7)  # of all bitmaps the one that packs worst
    assert len(part.to_bytes()) < 127_000
    between_ranks = pickle.dumps(part)
    assert len(between_ranks) < 127_000
    taken_up = pickle.loads(between_ranks)  # noqa: S301  made just above
    assert np.array_equal(taken_up.indices, part.indices)
    assert (taken_up.epoch, taken_up.loss_sum, taken_up.steps) == (2, 1.5, 7)


def test_a_recorder_holds_two_bytes_a_case_and_not_its_indices():
    recorder = EpochRecorder(0, 100_000, keeps_before=True)
    for start in range(0, 100_000, 1000):
        recorder.add(np.arange(start, start + 1000), 0.0)
    held = sum(sys.getsizeof(value) for value in vars(recorder).values())
    held += sum(sum(map(sys.getsizeof, value)) for value in vars(recorder).values() if isinstance(value, list))
    assert held < 210_000


def test_the_indices_that_an_earlier_version_kept_are_read():
    file = io.BytesIO()
    np.savez_compressed(file, epoch=3, indices=indices(7, 2), loss_sum=np.float64(0.5), steps=1)
    part = EpochPart.from_bytes(file.getvalue())
    assert (part.epoch, sorted(part.indices.tolist()), part.loss_sum, part.steps) == (3, [2, 7], 0.5, 1)
