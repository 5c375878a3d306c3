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
from ingest.plan import ShardConfig, epoch_order, plan_epoch, shard_bounds, split_holdout, stream

sizes = hnp.arrays(np.int64, st.integers(1, 200), elements=st.integers(0, 10_000))


@given(sizes, st.integers(0, 2**32), st.integers(0, 1000))
def test_every_case_is_in_the_epoch_exactly_once(case_bytes, seed, epoch):
    plan = plan_epoch(case_bytes=case_bytes, seed=seed, epoch=epoch, shards=ShardConfig(shard_cases=7))
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
    plan = plan_epoch(
        case_bytes=case_bytes, seed=5, epoch=3, shards=ShardConfig(), consumed=consumed, multiple=multiple
    )
    left = [i for i in epoch_order(5, 3, total).tolist() if i not in set(consumed.tolist())]
    assert plan.order.tolist() + plan.tail.tolist() == left
    assert len(plan.order) % multiple == 0
    assert len(plan.tail) < multiple


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(1, 7))
def test_blocks_dealt_out_in_turn_give_the_ranks_the_steps_of_the_order(steps, batch, ranks, batches):
    sizes = np.ones(steps * batch * ranks, np.int64)
    plan = plan_epoch(
        case_bytes=sizes, seed=1, epoch=0, shards=ShardConfig(), multiple=batch * ranks, batch=batch, ranks=ranks,
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
        plan = plan_epoch(
            case_bytes=np.ones(100, np.int64), seed=3, epoch=epoch, shards=ShardConfig(), candidates=train
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


def test_a_million_cases_plan_within_a_second_or_five_and_within_a_gigabyte():
    case_bytes = np.full(1_000_000, 160_000, dtype=np.int64)
    tracemalloc.start()
    started = time.perf_counter()
    plan = plan_epoch(case_bytes=case_bytes, seed=1, epoch=0, shards=ShardConfig(shard_cases=128), multiple=256)
    seconds, (_, peak_bytes) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.num_shards == -(-(1_000_000 - 1_000_000 % 256) // 128)
    assert seconds < 5
    assert peak_bytes < 2**30
