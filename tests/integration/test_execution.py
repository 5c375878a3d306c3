"""An execution of Ray Data counts on all its CPUs from its first second on."""

import time

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from ingest.execution import execution_options, made_with
from ingest.pipeline import warm_reader

NAP_S = 0.3


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
    # The first execution starts processes of Ray's; the second has everything but its limits.
    for _ in range(2):
        first, second = sorted(naps.iter_rows(), key=lambda row: row["begun_s"])
    assert second["begun_s"] < first["ended_s"]


def test_a_worker_can_be_had_to_load_what_reading_needs(ray_here):
    ready, _ = ray.wait([warm_reader()], timeout=60)
    assert ready
    assert ray.get(ready) == [None]
