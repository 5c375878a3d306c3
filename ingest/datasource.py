"""The Ray Data source: plans each epoch, and turns its shards into read tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import ray.data
from ray.data.block import BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import ReadTask

from .fetch import RAW_SCHEMA, FetchConfig, ShardSpec, read_shard
from .manifest import Manifest
from .plan import EpochPlan
from .stores.base import StoreConfig


class PairedVolumeDatasource(ray.data.Datasource):
    """Reads cases as raw bytes, in another order each epoch.

    Ray plans anew for each execution of the data set; the number of executions so far, which Ray keeps in the
    data context, says which epoch it is. Planning lists nothing and opens nothing.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: Callable[[int], EpochPlan],
        *,
        first_epoch: int = 0,
        batch: int = 1,
        store: StoreConfig | None = None,
        fetch: FetchConfig | None = None,
    ) -> None:
        """Hold what planning needs.

        Args:
            manifest: the cases.
            plan: picklable; gives the plan of an epoch.
            first_epoch: the epoch of the first execution.
            batch: cases that are handed on together.
            store: how workers open the two places; its transport is resolved.
            fetch: how a read task walks through its shard.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._manifest = manifest
        self._plan = plan
        self._first_epoch = first_epoch
        self._batch = batch
        self._store = store or StoreConfig()
        self._fetch = fetch or FetchConfig()

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all objects of the first epoch."""
        return int(self._manifest.case_bytes()[self._plan(self._first_epoch).order].sum())

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002  the plan decides, so that shards are the same on every cluster
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """One task a shard of this epoch's plan."""
        # The same private counter that Ray's own FileShuffleConfig goes by; a test pins how it counts.
        executions = data_context._execution_idx if data_context is not None else 0
        plan = self._plan(self._first_epoch + executions)
        sizes = self._manifest.case_bytes()
        tasks: list[ReadTask] = []
        for number in range(plan.num_shards):
            indices = plan.shard(number)
            spec = ShardSpec(
                images_uri=self._manifest.images_uri,
                labels_uri=self._manifest.labels_uri,
                store=self._store,
                fetch=self._fetch,
                epoch=plan.epoch,
                batch=self._batch,
                rows=self._manifest.take(indices),
                indices=indices,
            )
            metadata = BlockMetadata(
                num_rows=len(indices),
                size_bytes=int(sizes[indices].sum()),
                exec_stats=None,
                input_files=None,
            )
            read = functools.partial(read_shard, spec)
            functools.update_wrapper(read, read_shard)  # Ray names a read task by its function's __name__
            tasks.append(ReadTask(read, metadata, schema=RAW_SCHEMA, per_task_row_limit=per_task_row_limit))
        return tasks
