"""The Ray Data source: plans each execution, and turns its shards into read tasks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray.cloudpickle
import ray.data
from ray.data.block import BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import ReadTask

from .fetch import RAW_SCHEMA, FetchConfig, ShardSpec, read_shard
from .manifest import Manifest
from .plan import Indices, ReadPlan
from .quarantine import BadCaseConfig, Quarantine
from .shield import shielded
from .slab import Slabs
from .stores.base import StoreConfig
from .tally import Recorder


class PairedVolumeDatasource(ray.data.Datasource):
    """Reads cases as raw bytes, in another order each epoch.

    Ray plans anew for each execution of the data set; the number of executions so far, which Ray keeps in the
    data context, says which epoch it is, or which epochs. Planning lists nothing and opens nothing.

    Ray asks for read tasks several times an execution, and only once, last, with the data context: that answer is
    what is read, and leaves out the cases that are quarantined by then. The other answers, by which Ray counts blocks,
    go by what was known when the source was made, so that their number stays the same.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: Callable[[Sequence[int], Indices], ReadPlan],
        *,
        first_epoch: int = 0,
        executions: Sequence[range] | None = None,
        block: int = 1,
        store: StoreConfig | None = None,
        fetch: FetchConfig | None = None,
        bad: BadCaseConfig | None = None,
        quarantine: Quarantine | None = None,
        slabs: Slabs | None = None,
        record: Recorder | None = None,
    ) -> None:
        """Hold what planning needs.

        Args:
            manifest: the cases.
            plan: picklable; gives the plan of some epochs without some cases.
            first_epoch: the epoch of the first execution, where each is one epoch and there is no end of them.
            executions: instead, the epochs of each execution, at least of one.
            block: cases that are handed on together.
            store: how workers open the two places; its transport is resolved.
            fetch: how a read task walks through its shard.
            bad: what a read task does about a case that cannot be read.
            quarantine: the run's bad cases; None where there are none to be kept.
            slabs: cuts the patches of large cases in the read task; None hands all volumes on whole.
            record: is told what each task does.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._manifest = manifest
        self._plan = plan
        self._first_epoch, self._executions = first_epoch, executions
        self._block = block
        self._store = store or StoreConfig()
        self._fetch = fetch or FetchConfig()
        self._bad = bad or BadCaseConfig()
        self._quarantine = quarantine
        self._slabs = slabs
        self._record = record
        self._known_first = self._known()
        self._planned: tuple[int, ReadPlan] | None = None
        self._counted: ReadPlan | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but the plan that only counts, which is made again where it is asked for."""
        return vars(self) | {"_counted": None}

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all objects of the first execution."""
        plan = self._plan_now(None)
        return int(self._manifest.case_bytes()[plan.order].sum())

    def first_shards(self) -> int:
        """Shards of the first execution, as far as bad cases are known."""
        return self._plan_now(None).num_shards

    def most_shards(self) -> int:
        """About as many shards as the largest execution has: the last of them, of which nothing is consumed."""
        executions = self._executions or [range(self._first_epoch + 1, self._first_epoch + 2)]
        return self._plan(max(reversed(executions), key=len), self._known_first).num_shards

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002  the plan decides, so that shards are the same on every cluster
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """One task a shard of this execution's plan; without the data context they can be counted and not be read."""
        plan = self._plan_now(data_context)
        rows = None if data_context is None else self._manifest.take(plan.order)
        sizes = np.concatenate([[0], np.cumsum(self._manifest.case_bytes()[plan.order])])
        tasks: list[ReadTask] = []
        for start, stop in itertools.pairwise(plan.bounds.tolist()):
            metadata = BlockMetadata(
                num_rows=stop - start,
                size_bytes=int(sizes[stop] - sizes[start]),
                exec_stats=None,
                input_files=None,
            )
            read = _only_counted if rows is None else self._read(plan, slice(start, stop), rows)
            tasks.append(ReadTask(read, metadata, schema=RAW_SCHEMA, per_task_row_limit=per_task_row_limit))
        return tasks

    def _read(self, plan: ReadPlan, part: slice, rows: pa.Table) -> Callable[[], Iterator[pa.Table]]:
        spec = ShardSpec(
            images_uri=self._manifest.images_uri,
            labels_uri=self._manifest.labels_uri,
            store=self._store,
            fetch=self._fetch,
            epochs=plan.epochs[part],
            block=self._block,
            rows=rows[part],
            indices=plan.order[part],
            bad=self._bad,
            quarantine=self._quarantine,
            slabs=self._slabs,
            record=self._record,
        )
        return shielded_task(functools.partial(read_shard, spec))

    def _plan_now(self, data_context: DataContext | None) -> ReadPlan:
        if data_context is None:
            if self._counted is None:
                self._counted = self._plan(self._epochs_of(0), self._known_first)
            return self._counted
        # The same private counter that Ray's own FileShuffleConfig goes by; a test pins how it counts.
        execution = data_context._execution_idx
        if self._planned is None or self._planned[0] != execution:
            # Kept: were Ray to ask again in the same execution, cases found bad meanwhile must not shift the shards.
            self._planned = execution, self._plan(self._epochs_of(execution), self._known())
        return self._planned[1]

    def _epochs_of(self, execution: int) -> Sequence[int]:
        if self._executions is None:
            return (self._first_epoch + execution,)
        if execution >= len(self._executions):
            raise RuntimeError(
                f"expected {len(self._executions)} executions of this data set, found it asked for one more; ask for "
                "as many as it was made for"
            )
        return self._executions[execution]

    def _known(self) -> Indices:
        return np.zeros(0, dtype=np.int64) if self._quarantine is None else self._quarantine.indices()


def shielded_task(function: functools.partial[Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The same generator function for a Ray task, run where cancelling the task cannot break its process.

    Args:
        function: with its settings bound. It is pickled here, so that a worker loads it on the shielded thread.
    """
    payload: bytes = ray.cloudpickle.dumps(function)  # type: ignore[no-untyped-call]

    def task(*arguments: Any) -> Iterator[Any]:
        return shielded(payload, *arguments)

    task.__name__ = task.__qualname__ = function.func.__name__  # Ray names its tasks by it
    return task


def _only_counted() -> Iterator[pa.Table]:
    raise RuntimeError(
        "expected Ray Data to read the tasks that it asked for with its data context, found it reading those by which "
        "it counts blocks; take the Ray of constraints.txt, or hand get_read_tasks a data context"
    )
