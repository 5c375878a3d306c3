"""How Ray Data runs a data set of ours: the settings it is made with, and its CPUs from the first moment on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ray.data import ExecutionOptions
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.context import DataContext

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

PROMPT_S = 2.0
"""Seconds of an execution in which its limits are asked for anew at each step while they are none; Ray does so itself
by then."""


class PromptLimits(ExecutionCallback):
    """Lets an execution count on its CPUs as soon as Ray has told it of them, and not a second later.

    Ray Data 2.60 asks for an execution's resources without waiting for the answer (its pull request 62725): it takes
    the one that has come when it asks again, a second later. Until then an execution has no CPU by its own
    reckoning, and reads with one task at a time on the whole cluster: the first second of every epoch. Epochs of 1,000
    cases of 160 KB came in 0.75 to 0.8 s instead of 1.0 (two cores, 2026-11-26).

    What this touches is private to Ray, which is pinned; a test sees it work.
    """

    def __init__(self) -> None:
        self._until_s: float | None = None

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Have limits of nothing asked for again at the next step."""
        if self._until_s is None:  # from the first step on: this object is made before planning, which may take longer
            self._until_s = time.monotonic() + PROMPT_S
        if time.monotonic() < self._until_s:
            manager = executor._resource_manager
            if manager is not None and not manager._global_limits.cpu:
                manager._global_limits_last_update_time = 0


def execution_options(label_selector: dict[str, str] | None = None, *, in_order: bool = True) -> ExecutionOptions:
    """Ray Data's options for a data set of ours: rows in the order of its plan, from nodes with these labels."""
    return ExecutionOptions(preserve_order=in_order, label_selector=label_selector or None)


@contextlib.contextmanager
def made_with(options: ExecutionOptions, *, block_bytes: int) -> Iterator[None]:
    """Settings for data sets that are made meanwhile: each takes a copy of the context as it stands then.

    Args:
        options: of their executions.
        block_bytes: the target size of their blocks.
    """
    context = DataContext.get_current()
    before = context.target_max_block_size, context.execution_options, context.custom_execution_callback_classes
    try:
        context.target_max_block_size, context.execution_options = block_bytes, options
        context.custom_execution_callback_classes = [*before[2], PromptLimits]
        yield
    finally:
        context.target_max_block_size, context.execution_options, context.custom_execution_callback_classes = before
