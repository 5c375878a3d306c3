"""The plan of an epoch: pure, complete, and the same for the same seed."""

import itertools
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ingest.errors import ConfigError
from ingest.plan import (
    ShardConfig,
    TrainingPlan,
    epoch_order,
    epochs_together,
    plan_epochs,
    shard_bounds,
    split_holdout,
    stream,
)

sizes = hnp.arrays(np.int64, st.integers(1, 200), elements=st.integers(0, 10_000))


@given(sizes, st.integers(0, 2**32), st.integers(0, 1000))
def test_every_case_is_in_the_epoch_exactly_once(case_bytes, seed, epoch):
    plan = plan_epochs(case_bytes=case_bytes, seed=seed, epochs=(epoch,), shards=ShardConfig(shard_cases=7))
    shards = [plan.shard(i) for i in range(plan.num_shards)]
    assert sorted(np.concatenate(shards).tolist()) == list(range(len(case_bytes)))
    assert all(1 <= len(shard) <= 7 for shard in shards)


@given(sizes, st.integers(1, 20_000), st.integers(1, 50))
def test_no_shard_is_over_its_limits_unless_one_case_is(case_bytes, shard_bytes, shard_cases):
    config = ShardConfig(shard_bytes=shard_bytes, shard_cases=shard_cases)
    bounds = shard_bounds(case_bytes, config)
    assert bounds[0] == 0
    assert bounds[-1] == len(case_bytes)
    for start, stop in itertools.pairwise(bounds):
        assert 0 < stop - start <= shard_cases
        assert stop - start == 1 or case_bytes[start:stop].sum() <= shard_bytes


@given(sizes, st.integers(1, 20_000), st.integers(1, 50), st.integers(1, 9))
def test_no_shard_cuts_a_batch(case_bytes, shard_bytes, shard_cases, batch):
    bounds = shard_bounds(case_bytes, ShardConfig(shard_bytes=shard_bytes, shard_cases=shard_cases), batch)
    assert (bounds[:-1] % batch == 0).all()
    for start, stop in itertools.pairwise(bounds):
        assert stop - start <= max(batch, shard_cases)


def test_a_small_epoch_is_eight_shards_of_whole_blocks():
    assert np.diff(shard_bounds(np.full(960, 160_000), ShardConfig(), 32)).tolist() == [128] * 7 + [64]
    assert np.diff(shard_bounds(np.full(5, 160_000), ShardConfig())).tolist() == [1] * 5


@given(sizes, st.integers(1, 16), st.data())
def test_consumed_cases_and_the_tail_are_left_out_and_the_rest_keep_their_order(case_bytes, multiple, data):
    total = len(case_bytes)
    consumed = np.array(sorted(data.draw(st.sets(st.integers(0, total - 1), max_size=total))), dtype=np.int64)
    plan = plan_epochs(
        case_bytes=case_bytes, seed=5, epochs=(3,), shards=ShardConfig(), consumed=consumed, multiple=multiple
    )
    left = [i for i in epoch_order(5, 3, total).tolist() if i not in set(consumed.tolist())]
    assert plan.order.tolist() + plan.tail.tolist() == left
    assert len(plan.order) % multiple == 0
    assert len(plan.tail) < multiple


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(1, 7))
def test_blocks_dealt_out_in_turn_give_the_ranks_the_steps_of_the_order(steps, batch, ranks, batches):
    sizes = np.ones(steps * batch * ranks, np.int64)
    plan = plan_epochs(
        case_bytes=sizes, seed=1, epochs=(0,), shards=ShardConfig(), multiple=batch * ranks, batch=batch, ranks=ranks,
        batches=batches,
    )  # fmt: skip
    dealt = [[] for _ in range(ranks)]
    blocks = 0
    for number in range(plan.num_shards):
        shard = plan.shard(number).tolist()
        assert len(shard) % (batch * batches) == 0 or len(shard) < batch * batches
        for start in range(0, len(shard), batch * batches):
            dealt[blocks % ranks] += shard[start : start + batch * batches]
            blocks += 1
    trained = [index for s in range(steps) for rank in dealt for index in rank[s * batch : (s + 1) * batch]]
    assert trained == epoch_order(1, 0, len(sizes)).tolist()


@given(st.integers(1, 4), st.integers(0, 9), st.integers(1, 5), st.integers(1, 3), st.integers(1, 7), st.data())
def test_epochs_read_on_end_give_each_rank_the_steps_of_one_epoch_after_the_other(
    count, first, batch, ranks, batches, data
):
    step = batch * ranks
    total = data.draw(st.integers(step, 12 * step))
    consumed = np.arange(data.draw(st.integers(0, total - step)))
    epochs = range(first, first + count)
    plan = plan_epochs(
        case_bytes=np.full(total, 7), seed=1, epochs=epochs, shards=ShardConfig(shard_cases=40), consumed=consumed,
        multiple=step, batch=batch, ranks=ranks, batches=batches,
    )  # fmt: skip
    expected, tails = [], []
    for epoch in epochs:
        order = epoch_order(1, epoch, total).tolist()
        left = [index for index in order if epoch != first or index not in set(consumed.tolist())]
        whole = len(left) - len(left) % step
        expected += [(epoch, index) for index in left[:whole]]
        tails += left[whole:]
    assert plan.tail.tolist() == tails
    dealt = [[] for _ in range(ranks)]
    blocks = 0
    for start, stop in itertools.pairwise(plan.bounds.tolist()):
        rows = list(zip(plan.epochs[start:stop].tolist(), plan.order[start:stop].tolist(), strict=True))
        for at in range(0, len(rows), batch * batches):
            dealt[blocks % ranks] += rows[at : at + batch * batches]
            blocks += 1
    steps = len(expected) // step
    assert [row for s in range(steps) for rank in dealt for row in rank[s * batch : (s + 1) * batch]] == expected
    for rank in dealt:  # no batch is of two epochs
        assert all(len({epoch for epoch, _ in rank[s * batch : (s + 1) * batch]}) == 1 for s in range(steps))


def test_epochs_that_could_end_within_a_batch_are_not_read_on_end():
    with pytest.raises(ValueError, match=r"whole batch of 4 for each of 2 ranks.* 3 of them .* multiples of 4"):
        plan_epochs(
            case_bytes=np.ones(50, np.int64), seed=1, epochs=range(3), shards=ShardConfig(), multiple=4, batch=4,
            ranks=2,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("cases", "case_bytes", "epochs"),
    [
        (1000, 160 * 1024, 33),
        (10_000, 160 * 1024, 4),
        (32_767, 1, 2),
        (32_768, 1, 1),
        (100_000, 160 * 1024, 1),
        (168, 147_000_000, 1),  # by their bytes
        (168, 4_500_000, 8),
        (1, 1, 32_768),
    ],
)
def test_as_many_epochs_are_read_on_end_as_make_up_for_an_executions_start(cases, case_bytes, epochs):
    assert epochs_together(np.full(cases, case_bytes), ShardConfig()) == epochs
    assert epochs_together(np.full(cases, case_bytes), ShardConfig(execution_cases=1)) == 1


def test_small_epochs_on_end_are_cut_into_shards_as_one_large_epoch_is():
    plan = TrainingPlan(case_bytes=np.full(960, 160_000), seed=1, shards=ShardConfig(), multiple=64, batch=32, ranks=2)
    nobody = np.zeros(0, dtype=np.int64)
    assert plan((0,), nobody).num_shards == 8
    assert plan(range(32), nobody).num_shards == 32 * 960 // 768
    assert plan(range(32), nobody).epochs.tolist() == np.repeat(np.arange(32), 960).tolist()


@pytest.mark.parametrize(("batches", "first"), [(1, 1), (2, 1), (5, 2), (6, 3)])
def test_each_ranks_first_block_is_half_as_large_so_that_the_first_step_comes_soon(batches, first):
    batch, ranks = 4, 3
    plan = plan_epochs(
        case_bytes=np.ones(80 * batches * batch * ranks, np.int64), seed=1, epochs=(0,),
        shards=ShardConfig(shard_cases=1), multiple=batch * ranks, batch=batch, ranks=ranks, batches=batches,
    )  # fmt: skip
    blocks = (np.diff(plan.bounds) // batch).tolist()
    assert blocks[: ranks + 1] == [first] * ranks + [batches]
    assert set(blocks[ranks:-ranks]) == {batches}


@pytest.mark.parametrize("steps", [1, 3, 8, 20, 40])
def test_a_short_execution_is_read_in_blocks_of_its_own_size_so_that_its_first_steps_come_soon(steps):
    batch, ranks, batches = 4, 2, 6  # as longer executions of the same data set have them
    plan = plan_epochs(
        case_bytes=np.ones(steps * 8, np.int64), seed=1, epochs=(0,), shards=ShardConfig(), multiple=8, batch=batch,
        ranks=ranks, batches=batches,
    )  # fmt: skip
    blocks = np.diff(plan.bounds).tolist()  # each a shard: Ray gathers smaller blocks of one shard into large ones
    assert max(blocks) == batch * -(-steps // 8)
    assert len(blocks) <= 2 * 8 + 4
    assert blocks[::2] == blocks[1::2]  # one for each rank


def test_each_epoch_has_another_order_and_the_same_seed_the_same():
    first, again, next_epoch, other_seed = (epoch_order(s, e, 1000) for s, e in ((1, 0), (1, 0), (1, 1), (2, 0)))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, next_epoch)
    assert not np.array_equal(first, other_seed)


def test_the_order_of_an_epoch_is_pinned_so_that_old_runs_can_be_resumed():
    assert epoch_order(7, 2, 10).tolist() == [1, 7, 2, 9, 4, 5, 3, 6, 0, 8]


def test_streams_of_different_cases_epochs_and_seeds_differ():
    draws = {tuple(stream(s, e, c, p).random(3)) for s in (0, 1) for e in (0, 1) for c in (0, 1) for p in (0, 1)}
    assert len(draws) == 16


def test_the_held_out_cases_are_never_trained_on():
    train, held = split_holdout(3, np.arange(100), 0.15)
    assert len(held) == 15
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(100))
    for epoch in range(3):
        plan = plan_epochs(
            case_bytes=np.ones(100, np.int64), seed=3, epochs=(epoch,), shards=ShardConfig(), candidates=train
        )
        assert set(plan.order.tolist()) == set(train.tolist())


def test_copies_of_one_subject_are_held_out_together():
    subjects = np.repeat(np.arange(10), 7)
    train, held = split_holdout(1, subjects, 0.3)
    assert len(held) == 21
    assert not set(subjects[train]) & set(subjects[held])


def test_holding_out_every_case_is_refused():
    with pytest.raises(ConfigError, match="found 1 of which 1 would be held out"):
        split_holdout(0, np.arange(1), 0.1)


def test_a_million_cases_plan_within_five_seconds_of_cpu_time_and_within_a_gigabyte():
    case_bytes = np.full(1_000_000, 160_000, dtype=np.int64)
    tracemalloc.start()
    started = time.thread_time()
    plan = plan_epochs(case_bytes=case_bytes, seed=1, epochs=(0,), shards=ShardConfig(shard_cases=128), multiple=256)
    seconds, (_, peak_bytes) = time.thread_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.num_shards == -(-(1_000_000 - 1_000_000 % 256) // 128)
    assert seconds < 5
    assert peak_bytes < 2**30
