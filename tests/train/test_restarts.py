"""Each failure of a run is told of in one line: who failed, why, and what follows from it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, PreemptionError, WorkerGroupError

from ingest.errors import ConfigError, DiskFullError, IngestError
from tests.train.test_checkpoint import save
from train import restarts
from train.checkpoint import name_latest
from train.flag import give_up
from train.restarts import Restarts, failure_in_words, in_words, process_died

DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: {name}
\tactor_id: c0d9
\tpid: 5900
{named}\tnamespace: ae1b
\tip: 192.0.2.2
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) ..."""


class Told:
    """A monitor that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def ask(self, method: str, kind: str, text: str) -> None:
        assert (method, kind) == ("event", "fault")
        self.lines.append(text)


class DiedError(ActorDiedError):
    def __init__(self, name: str = "RayTrainWorker", named: str = "", *, preempted: bool = False) -> None:
        super().__init__()
        self.words = DIED.format(name=name, named=f"\tname: {named}\n" if named else "")
        self._taken = preempted

    def __str__(self) -> str:
        return self.words

    @property
    def preempted(self) -> bool:
        return self._taken


class HealthCheckError(Exception):
    """As Ray wraps a rank's death."""

    def __init__(self, failure: Exception) -> None:
        super().__init__("A worker health check failed.")
        self.health_check_failure = failure


def ranks_failed(**by_rank: Exception) -> WorkerGroupError:
    return WorkerGroupError("long text\n" * 9, {int(rank.removeprefix("r")): error for rank, error in by_rank.items()})


@pytest.fixture
def at_step_40(tmp_path: Path) -> str:
    save(tmp_path, "checkpoint_a", epoch=2, step=40, parts=[np.zeros(0, dtype=np.int64)])
    name_latest(str(tmp_path), "checkpoint_a")
    return str(tmp_path)


def test_each_failure_says_which_rank_why_and_from_where_the_run_goes_on_and_the_last_one_that_it_ends(at_step_40):
    told = Told()
    failed = Restarts(at_step_40, 2, told, None)
    failed(ranks_failed(r1=RuntimeError("CUDA error\nmore of it")), True)
    failed(ranks_failed(r0=HealthCheckError(DiedError())), True)
    failed(ranks_failed(r0=HealthCheckError(DiedError())), False)
    died = "rank 0 failed: the process of RayTrainWorker died, pid 5900: Worker unexpectedly exits with a connection "
    assert told.lines == [
        "rank 1 failed: RuntimeError: CUDA error; restarting from step 40, 1 of 2",
        f"{died}error code 2. End of file; restarting from step 40, 2 of 2",
        f"{died}error code 2. End of file; the run ends, as --trainer.max-failures is 2",
    ]


def test_restarts_without_a_limit_are_counted_too_and_nodes_taken_away_are_not(at_step_40):
    told = Told()
    failed = Restarts(at_step_40, -1, told, None)
    failed(ranks_failed(r0=ValueError("one")), True)
    failed(PreemptionError(SimpleNamespace(preempted_ranks=[1, 2])), True)
    failed(ranks_failed(r0=HealthCheckError(DiedError(preempted=True))), True)
    failed(ranks_failed(r0=ValueError("two")), True)
    assert told.lines[0] == "rank 0 failed: ValueError: one; restarting from step 40, restart 1 without a limit"
    assert told.lines[1] == (
        "the node of ranks 1, 2 is taken away; restarting from step 40; this does not count as a failure"
    )
    assert told.lines[2].endswith("; restarting from step 40; this does not count as a failure")
    assert told.lines[3] == "rank 0 failed: ValueError: two; restarting from step 40, restart 2 without a limit"


def test_a_failure_that_a_restart_would_meet_again_is_told_once_and_promises_no_restart(at_step_40, monkeypatch):
    reason = ConfigError("expected A, found B; do C")
    monkeypatch.setattr(restarts, "given_up", lambda flag: reason)
    told = Told()
    failed = Restarts(at_step_40, 50, told, object())
    failed(ranks_failed(r0=reason), True)
    failed(ControllerError(reason), False)  # Ray starts the ranks all the same, and our data refuses
    assert told.lines == ["rank 0 failed: expected A, found B; do C; the run ends, since a restart would meet the same"]


def test_ranks_that_cannot_start_are_told_of_once_as_long_as_it_is_the_same(tmp_path):
    told = Told()
    failed = Restarts(str(tmp_path), 3, told, None)
    for _ in range(3):
        failed(ControllerError(TimeoutError("waiting for 4 workers. Potential causes include: (1) others")), True)
    failed(ControllerError(OSError("no route")), False)
    assert told.lines == [
        "the ranks could not start: TimeoutError: waiting for 4 workers; restarting from step 0; this does not count "
        "as a failure",
        "the controller of the run failed: OSError: no route; the run ends",
    ]


def test_what_is_known_of_a_full_disk_is_in_the_line_of_a_controller_that_failed_for_it(at_step_40):
    told = Told()
    named = DiskFullError("expected room to write /a, found none")
    failed = Restarts(at_step_40, 3, told, None, lambda error: named if isinstance(error, OSError) else None)
    failed(ControllerError(OSError(28, "No space left")), False)
    assert told.lines == ["the controller of the run failed: expected room to write /a, found none; the run ends"]


def test_where_the_checkpoint_cannot_be_read_the_line_leaves_out_the_step(tmp_path):
    (tmp_path / "latest.json").write_text("damaged")
    told = Told()
    Restarts(str(tmp_path), 3, told, None)(ranks_failed(r0=ValueError("one")), True)
    assert told.lines == ["rank 0 failed: ValueError: one; restarting, 1 of 3"]


def test_the_rank_that_says_why_is_named_first_and_the_others_are_counted():
    lost = RuntimeError("Connection closed by peer")
    error = ranks_failed(
        r0=lost, r1=lost, r2=IngestError("expected this, found that\nlong"), r3=HealthCheckError(DiedError())
    )
    assert failure_in_words(error) == "rank 2 failed (with ranks 0, 1, 3): expected this, found that"
    assert failure_in_words(ranks_failed(r0=lost, r3=HealthCheckError(DiedError()))).startswith(
        "rank 3 failed (with rank 0): the "
    )
    many = ranks_failed(**{f"r{rank}": lost for rank in range(20)})
    assert "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 11 more)" in failure_in_words(many)


def test_a_process_that_died_is_named():
    assert in_words(DiedError("SplitCoordinator")).startswith(
        "the process of SplitCoordinator died, pid 5900: Worker unexp"
    )
    named = in_words(DiedError("QuarantineBook", "voxflux-quarantine-12"))
    assert named.startswith("the process of voxflux-quarantine-12 died, pid 5900")
    assert in_words(ray.exceptions.ActorDiedError()).startswith("the process of an actor died")
    assert in_words(KeyError("x")) == "KeyError: 'x'"
    assert in_words(DiskFullError("")) == "DiskFullError"


def test_an_actor_that_could_not_be_made_is_named():
    class UnmadeError(DiedError):
        def __str__(self) -> str:
            return (
                "The actor died because of an error raised in its creation task, \x1b[36mray::_Book.__init__()\x1b[39m "
                "(pid=7, ip=192.0.2.2)\nTraceback\n  File x\nOSError: no"
            )

    assert in_words(UnmadeError()) == "the process of _Book died: OSError: no"


def test_a_run_whose_controller_or_ranks_were_killed_ends_with_their_name_and_the_way_to_go_on():
    ended = process_died(DiedError("TrainController"), "/runs/one")
    assert "found that the process of TrainController died, pid 5900: Worker unexpectedly exits" in str(ended)
    assert "--trainer.resume /runs/one" in str(ended)
    killed = ranks_failed(r0=HealthCheckError(DiedError()), r1=HealthCheckError(DiedError()))
    assert "found that rank 0 failed (with rank 1): the process of RayTrainWorker" in str(process_died(killed, "/r"))
    assert process_died(ranks_failed(r0=HealthCheckError(DiedError()), r1=RuntimeError("x")), "/r") is None
    assert process_died(ControllerError(RuntimeError("x")), "/r") is None


def test_an_error_is_not_hidden_by_a_stop_flag_that_is_gone():
    def remote(reason: IngestError) -> None:
        raise DiedError("_Flag")

    give_up(SimpleNamespace(give_up=SimpleNamespace(remote=remote)), ConfigError("expected A, found B"))


CONTROLLER = DiedError("TrainController")


class Flag:
    """A stop flag in this process, which counts failures."""

    def __init__(self) -> None:
        self.failures = 0

    def count(self, flag: object) -> None:
        assert flag is self
        self.failures += 1


@pytest.fixture
def flag(monkeypatch):
    flag = Flag()
    monkeypatch.setattr(restarts, "count_failure", flag.count)
    monkeypatch.setattr(restarts, "given_up", lambda flag: None)
    return flag


def test_a_controller_that_died_counts_as_a_failure_with_those_of_ranks_before_it(at_step_40, flag):
    told = Told()
    first = Restarts(at_step_40, 2, told, flag)
    first(ranks_failed(r0=ValueError("one")), True)
    second = Restarts(at_step_40, 2, told, flag, before=flag.failures)
    assert second.left == 1
    second(CONTROLLER, True)
    third = Restarts(at_step_40, 2, told, flag, before=flag.failures)
    assert third.left == 0
    third(CONTROLLER, False)
    assert flag.failures == 2
    died = "the process of TrainController died, pid 5900: Worker unexpectedly exits with a connection error code 2."
    assert told.lines == [
        "rank 0 failed: ValueError: one; restarting from step 40, 1 of 2",
        f"{died} End of file; restarting from step 40, 2 of 2",
        f"{died} End of file; the run ends, as --trainer.max-failures is 2",
    ]


def test_without_a_limit_a_new_controller_has_none(at_step_40, flag):
    assert Restarts(at_step_40, -1, Told(), flag, before=7).left == -1


def test_a_node_that_is_taken_away_is_not_counted_for_a_new_controller(at_step_40, flag):
    Restarts(at_step_40, 2, Told(), flag)(ranks_failed(r0=HealthCheckError(DiedError(preempted=True))), True)
    assert flag.failures == 0


def test_only_the_controller_s_own_death_is_taken_for_it():
    assert restarts.controller_died(CONTROLLER)
    assert not restarts.controller_died(DiedError("RayTrainWorker"))
    assert not restarts.controller_died(ControllerError(ValueError("TrainController")))
