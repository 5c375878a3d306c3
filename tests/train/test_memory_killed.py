"""A process that Ray's memory monitor killed: which one, what it had, how full the node was, and what lowers that."""

from __future__ import annotations

import re

import pytest
from ray.exceptions import OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError

from ingest.errors import ConfigError
from tests.train.test_restarts import HealthCheckError, Told, at_step_40, ranks_failed  # noqa: F401  a fixture
from train.memory_killed import inference_out_of_memory, killed_for_memory, out_of_memory
from train.restarts import Restarts
from train.resume_rules import rule_of

# As Ray 2.60 words it; the lines that are left out here are of its object store, and of advice.
MESSAGE = """1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: aa) \
was 22.60GB used / 23.54GB limit (0.960000)
OOM kill reason: Memory usage 24266988249B exceeded threshold of 24012684697B (95.0% of 25276510208B limit)
Object store memory usage: [- objects spillable: 0
(global lru) bytes evicted: 0]
Ray killed 1 worker(s) based on the killing policy
Considered workers: [
Selected to kill: ({who}, required resources={{CPU: 1}}, pid=16466, actual memory used=8.87GB, worker ID=adc1)
]
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
16466\t8.87\tray::x
Refer to the documentation on how to address the out of memory issue"""
RANK = MESSAGE.format(who="Actor(717f): job ID=01, lease ID=00, task name=RayTrainWorker.__init__")
DATA = MESSAGE.format(who="Task: job ID=01, lease ID=00, task name=ReadCases->MapBatches(transform)")
NODE = "when 22.60 GB of the 23.54 GB of node 192.0.2.2 were in use, and 95.0% may be"


def test_a_rank_that_was_killed_for_its_memory_ends_the_run_in_one_sentence():
    error = ranks_failed(r0=HealthCheckError(OutOfMemoryError(RANK)))
    said = str(out_of_memory(error, "/runs/a"))
    assert "\n" not in said
    assert f"found that Ray's memory monitor killed a rank, pid 16466, which had 8.87 GB, {NODE}; go on with" in said
    assert "--trainer.resume /runs/a and a smaller --trainer.batch-size" in said


def test_a_data_worker_that_was_killed_is_told_from_a_rank_and_has_other_settings():
    said = str(out_of_memory(ControllerError(OutOfMemoryError(DATA)), "/runs/a"))
    assert "killed a data worker (ReadCases->MapBatches(transform)), pid 16466, which had 8.87 GB" in said
    assert "a larger --data.task-cpus" in said


def test_a_worker_of_evaluate_that_was_killed_is_named_with_settings_of_that_command():
    said = str(inference_out_of_memory(RuntimeError(DATA)))
    assert "killed a data worker (ReadCases->MapBatches(transform)), pid 16466, which had 8.87 GB" in said
    assert "fewer --workers, a smaller --window-batch" in said
    assert "--trainer" not in said
    assert inference_out_of_memory(ConfigError("x")) is None


def test_an_error_that_crossed_processes_as_text_is_read_too():
    assert killed_for_memory(RuntimeError(f"ray::Coordinator\n{DATA}")).who.startswith("a data worker")


def test_a_message_that_says_less_leaves_out_what_it_does_not_say():
    short = OutOfMemoryError("Task was killed due to the node running low on memory.")
    assert killed_for_memory(short).words == "Ray's memory monitor killed a worker"


@pytest.mark.parametrize("error", [ConfigError("x"), WorkerGroupError("x", {0: ValueError("MemoryError")})])
def test_other_errors_are_none_of_memory(error):
    assert out_of_memory(error, "/runs/a") is None


def test_each_setting_that_is_advised_may_change_when_the_run_goes_on():
    for text in (RANK, DATA):
        settings = re.findall(r"--([a-z.-]+)", killed_for_memory(OutOfMemoryError(text)).settings)
        assert settings
        for setting in settings:
            assert rule_of(setting.replace("-", "_")).verdict != "refused"


def test_a_restart_after_such_a_kill_is_told_of_in_one_line(at_step_40):  # noqa: F811
    told = Told()
    Restarts(at_step_40, 2, told, None)(ranks_failed(r1=HealthCheckError(OutOfMemoryError(RANK))), True)
    assert told.lines == [
        f"rank 1 failed: Ray's memory monitor killed a rank, pid 16466, which had 8.87 GB, {NODE}; restarting from "
        "step 40, 1 of 2"
    ]
