"""An execution of Ray Data counts on all its CPUs from its first second on."""

import contextlib
import os
import pickle
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import ReadTask

from ingest.execution import PromptLimits, execution_options, made_with
from ingest.pipeline import warm_reader
from train.batches import tensor_batches

WAIT_S = 10.0
NAP_S = 0.8  # Ray itself would know of its CPUs after a second


class Naps(ray.data.Datasource):
    """Two tasks that sleep, and say from when to when."""

    def get_read_tasks(self, parallelism, per_task_row_limit=None, data_context=None):
        def nap():  # in here, since the workers cannot import this module
            begun_s = time.time()
            time.sleep(NAP_S)
            yield pa.table({"begun_s": [begun_s], "ended_s": [time.time()]})

        metadata = BlockMetadata(num_rows=1, size_bytes=16, exec_stats=None, input_files=None)
        return [ReadTask(nap, metadata) for _ in range(2)]

    def estimate_inmemory_data_size(self):
        return 32


def test_the_first_tasks_of_an_execution_run_side_by_side(ray_here):
    with made_with(execution_options(), block_bytes=1):
        naps = ray.data.read_datasource(Naps(), override_num_blocks=2)
    beside = 0
    for _ in range(5):  # the first ones start processes: Ray's own, and workers
        first, second = sorted(naps.iter_rows(), key=lambda row: row["begun_s"])
        beside += second["begun_s"] < first["ended_s"]
        if beside:
            break
    assert beside


def test_the_settings_of_a_data_set_are_its_own_and_outlive_a_split_of_it(ray_here):
    before = DataContext.get_current().custom_execution_callback_classes
    with (
        contextlib.suppress(ZeroDivisionError),
        made_with(execution_options(in_order=False), block_bytes=7),
    ):
        rows = ray.data.range(4)
        raise ZeroDivisionError
    assert DataContext.get_current().custom_execution_callback_classes == before
    (split,) = rows.streaming_split(1)
    context = split.get_context()
    assert context.custom_execution_callback_classes == [*before, PromptLimits]
    assert context.target_max_block_size == 7
    assert not context.execution_options.preserve_order


def test_a_worker_loads_what_reading_needs_and_then_reads(ray_here):
    warm = ray.get(warm_reader(), timeout=240)
    loaded = ray.remote(lambda: (os.getpid(), "ingest.pipeline" in sys.modules))
    found = {}
    for _ in range(20):  # which workers take them is Ray's choice
        found |= dict(ray.get([loaded.remote() for _ in range(8)], timeout=240))
        if warm in found:
            break
    assert found[warm]


def test_an_execution_leaves_no_thread_behind_whether_it_is_read_to_its_end_or_not(ray_here):
    columns = {"image": np.zeros((8, 1, 2, 2, 2), np.float32), "label": np.zeros((8, 1, 2, 2, 2), np.uint8)}
    numbers = {"index": np.arange(8), "epoch": np.zeros(8, np.int64)}
    rows = [{name: column[row] for name, column in (columns | numbers).items()} for row in range(8)]
    (shard,) = ray.data.from_items(rows).streaming_split(1)
    before = set(threading.enumerate())
    for _ in range(3):
        found = list(tensor_batches(shard, 4))
        assert [batch["index"].tolist() for batch in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    batches = tensor_batches(shard, 4)
    next(batches)
    of_ray = [each for each in set(threading.enumerate()) - before if each.name in ("Prefetcher", "iter_threaded")]
    assert {each.name for each in of_ray} == {"Prefetcher", "iter_threaded"}
    batches.close()
    for thread in of_ray:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert len([each for each in threading.enumerate() if each.name == "Prefetcher"]) == 0
    pickle.dumps(shard)
