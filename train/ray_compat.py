"""Uses of Ray Train that are private to Ray 2.60, which is pinned: each with its reason and the test that sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import ray._private.worker
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.execution.callback import ControllerCallback

RECORD_FILE = CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
"""Ray's own record of a run's checkpoints, in the run's folder. Ray replaces it in place, not in one step."""


class FailureCallback(ControllerCallback):
    """Calls a function of ours at each failure of a run, once it is decided whether the ranks start again.

    Ray's public `UserCallback.after_exception` does not say what is decided, is not called where the ranks cannot
    start, and is called at each poll while a node is being taken away.
    Test: `test_on_two_ranks_a_kill_leaves_the_loss_curve_as_it_would_have_been` looks at what is told.
    """

    def __init__(self, failed: Callable[[BaseException, bool], None]) -> None:
        """Take the function.

        Args:
            failed: is given Ray's `TrainingFailedError`, and whether the run goes on. It must not raise.
        """
        self._failed = failed

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:  # noqa: ARG002  Ray's
        """Ray's controller has gone from one state to another."""
        error = getattr(current_state, "training_failed_error", None)
        if isinstance(error, BaseException):
            self._failed(error, not current_state.is_terminal())


def session_folder() -> str | None:
    """The folder of this node's Ray session, where objects spill to unless Ray is told otherwise; None if not known.

    Test: `test_the_session_folder_of_a_worker_is_known`.
    """
    node = getattr(ray._private.worker, "_global_node", None)
    return None if node is None else str(node.get_session_dir_path())


def own_dead_processes() -> list[tuple[str, int, int]]:
    """Ray's processes that this process started and that ended by themselves: name, pid and exit status of each.

    Test: `test_a_raylet_that_is_killed_ends_the_run_with_one_message`.
    """
    node = getattr(ray._private.worker, "_global_node", None)
    if node is None:
        return []
    return [(str(name), int(process.pid), int(process.returncode)) for name, process in node.dead_processes()]


def recorded_checkpoints(record: bytes) -> list[str]:
    """The names of the checkpoints that Ray's record holds, which must all be there when Ray reads it.

    Test: `test_a_run_whose_disk_filled_up_while_ray_wrote_its_record_can_be_resumed`.

    Raises:
        ValueError, KeyError, TypeError: Ray could not read it.
    """
    return [str(each["checkpoint_dir_name"]) for each in json.loads(record)["checkpoint_results"]]
