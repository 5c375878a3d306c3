"""The read tasks of an epoch: what Ray counts them by, and what goes to a worker."""

import inspect
import pickle

import numpy as np
import pytest
from ray.data.context import DataContext
from ray.data.datasource import ReadTask

from ingest.datasource import PairedVolumeDatasource
from ingest.fetch import ShardSpec
from ingest.layout import Known, Layout, known_of
from ingest.manifest import Manifest, cases_of
from ingest.pairing import Case
from ingest.plan import ShardConfig, TrainingPlan
from ingest.stores.base import ObjectMeta


def manifest_of(count, generation=1):
    def meta(name):
        return ObjectMeta(name, 1000, generation, 7)

    cases = [Case(f"case_{i:05d}", meta(f"case_{i:05d}_x.npy"), meta(f"case_{i:05d}_y.npy")) for i in range(count)]
    return Manifest.from_cases(cases, images_uri="file:///images", labels_uri="file:///labels")


@pytest.fixture
def source():
    manifest = manifest_of(1000)
    plan = TrainingPlan(case_bytes=manifest.case_bytes(), seed=3, shards=ShardConfig(shard_cases=40))
    return PairedVolumeDatasource(manifest, plan, first_epoch=2)


def test_the_tasks_that_ray_counts_are_as_many_and_as_large_as_those_it_reads(source):
    counted = [task.metadata for task in source.get_read_tasks(1)]
    read = [task.metadata for task in source.get_read_tasks(1, data_context=DataContext.get_current().copy())]
    assert [(each.num_rows, each.size_bytes) for each in counted] == [(each.num_rows, each.size_bytes) for each in read]
    assert len(counted) == 25
    assert {each.size_bytes for each in counted} == {40 * 2000}


def test_a_task_by_which_ray_only_counts_is_never_taken_for_one_that_has_nothing_to_read(source):
    with pytest.raises(RuntimeError, match="found it reading those by which it counts"):
        list(source.get_read_tasks(1)[0]())


def spec_of(task: ReadTask) -> ShardSpec:
    """The spec that a task carries, as a worker unpickles it."""
    payload = inspect.getclosurevars(task.read_fn).nonlocals["payload"]
    return pickle.loads(payload).args[0]  # noqa: S301  it is ours


def test_each_task_carries_its_own_cases_and_no_others_to_the_worker(source):
    tasks = source.get_read_tasks(1, data_context=DataContext.get_current().copy())
    specs = [spec_of(task) for task in tasks]
    order = np.concatenate([spec.indices for spec in specs])
    assert sorted(order.tolist()) == list(range(1000))
    for spec in specs:
        pickled = pickle.dumps(spec)
        there = pickle.loads(pickled)  # noqa: S301  it is ours
        assert cases_of(there.rows) == cases_of(spec.rows)
        assert [case.case_id for case in cases_of(there.rows)] == [f"case_{i:05d}" for i in spec.indices]
        assert set(there.epochs.tolist()) == {2}
        assert (len(there.epochs), there.images_uri, there.block) == (len(spec.indices), "file:///images", 1)
        assert len(pickled) < 40 * 200  # 1,000 cases would be 25 times as many


def test_shapes_boxes_and_what_is_unknown_get_to_the_worker():
    box = ((0, 2), (1, 3), (2, 4))
    known = [None if i % 3 else Known(Layout(128, 128, (4, 5, 6)), ((box,),) * (i % 2)) for i in range(1000)]
    manifest = manifest_of(1000, generation=None).with_known(known)
    plan = TrainingPlan(case_bytes=manifest.case_bytes(), seed=3, shards=ShardConfig(shard_cases=40))
    source = PairedVolumeDatasource(manifest, plan)
    for task in source.get_read_tasks(1, data_context=DataContext.get_current().copy())[1::8]:
        spec = spec_of(task)
        there = pickle.loads(pickle.dumps(spec))  # noqa: S301  it is ours
        assert there.rows.equals(spec.rows)
        assert there.rows.schema == manifest.table.schema
        assert known_of(there.rows) == known_of(manifest.take(spec.indices))
        assert {case.image.generation for case in cases_of(there.rows)} == {None}


def test_each_execution_reads_the_epochs_that_it_is_for_and_there_is_none_after_the_last():
    manifest = manifest_of(100)
    plan = TrainingPlan(case_bytes=manifest.case_bytes(), seed=3, shards=ShardConfig(shard_cases=70), multiple=10)
    source = PairedVolumeDatasource(manifest, plan, executions=[range(2, 5), range(7, 8)])
    context = DataContext.get_current().copy()
    found = []
    for execution in range(2):
        context._execution_idx = execution  # as Ray counts
        tasks = source.get_read_tasks(1, data_context=context)
        found.append(np.concatenate([spec_of(task).epochs for task in tasks]).tolist())
    assert found == [[2] * 100 + [3] * 100 + [4] * 100, [7] * 100]
    assert sum(task.metadata.num_rows for task in source.get_read_tasks(1)) == 300
    context._execution_idx = 2
    with pytest.raises(RuntimeError, match="expected 2 executions of this data set, found it asked for one more"):
        source.get_read_tasks(1, data_context=context)


def test_read_tasks_at_once_are_bounded_by_the_largest_execution_and_not_by_a_short_first_one():
    manifest = manifest_of(100)
    plan = TrainingPlan(
        case_bytes=manifest.case_bytes(), seed=3, shards=ShardConfig(shard_cases=10), resumed_epoch=4,
        consumed=np.arange(95),
    )  # fmt: skip
    mixed = PairedVolumeDatasource(manifest, plan, executions=[range(4, 5), range(5, 7), range(7, 8)])
    assert (mixed.first_shards(), mixed.most_shards()) == (5, 20)
    resumed = PairedVolumeDatasource(manifest, plan, first_epoch=4)
    assert (resumed.first_shards(), resumed.most_shards()) == (5, 10)


class Found:
    """Cases that are found bad one after the other."""

    def __init__(self) -> None:
        self.bad: list[int] = []

    def indices(self) -> np.ndarray:
        return np.array(self.bad, dtype=np.int64)


def test_a_case_found_bad_is_left_out_from_the_next_execution_on_and_shifts_none_that_is_under_way():
    manifest, found = manifest_of(100), Found()
    plan = TrainingPlan(case_bytes=manifest.case_bytes(), seed=3, shards=ShardConfig(shard_cases=10))
    source = PairedVolumeDatasource(manifest, plan, quarantine=found)
    context = DataContext.get_current().copy()

    def order_of(source):
        tasks = source.get_read_tasks(1, data_context=context)
        return [index for task in tasks for index in spec_of(task).indices.tolist()]

    first = order_of(source)
    found.bad.append(first[0])
    assert order_of(source) == first
    assert order_of(pickle.loads(pickle.dumps(source))) == first  # noqa: S301  it is ours
    context._execution_idx += 1
    assert set(order_of(source)) == set(first[1:])
    assert len(source.get_read_tasks(1)) == 10  # what Ray counts by stays what it was
