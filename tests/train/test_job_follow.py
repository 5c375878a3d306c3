"""Ctrl-C while a job is followed: what is asked, at a terminal and without one, and what each answer does."""

from __future__ import annotations

import io
import os
import pty
import sys
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus
from rich.console import Console

from train.job_follow import follow


class Cluster:
    """Stands for Ray's client of a job that goes on until it is stopped, and for a user who presses Ctrl-C."""

    def __init__(self, ctrl_c: int = 1) -> None:
        self.ctrl_c = ctrl_c  # so many times, each after some of the log
        self.stops = 0
        self.log = "epoch 1\n"

    def get_address(self) -> str:
        return "http://cluster:8265"

    def stop_job(self, submission_id: str) -> None:
        self.stops += 1
        self.log += "saved\n"

    def get_job_info(self, submission_id: str) -> SimpleNamespace:
        return SimpleNamespace(status=JobStatus.STOPPED if self.stops else JobStatus.RUNNING, message="")

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        yield self.log  # from its start at each connection, as Ray's
        if self.ctrl_c > 0:
            self.ctrl_c -= 1
            raise KeyboardInterrupt


@pytest.fixture
def terminal(monkeypatch):
    """A terminal that the process reads from: what is written to it is what the user types."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield lambda typed: os.write(ours, typed)
    os.close(ours)


def followed(cluster: Cluster) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=1000)
    return follow(cluster, "mine", console), console.file.getvalue()


@pytest.mark.parametrize("answer", [b"y\n", b" YES \n"])
def test_y_at_ctrl_c_stops_the_job_and_the_log_is_shown_to_its_end_once(terminal, capsys, answer):
    cluster = Cluster()
    terminal(answer)
    status, said = followed(cluster)
    assert (status, cluster.stops) == (130, 1)
    assert "stop job mine? y stops it" in said
    assert said.endswith("job mine: STOPPED\n")
    assert capsys.readouterr().out == "epoch 1\nsaved\n"


@pytest.mark.parametrize("answer", [b"n\n", b"\n", b"yep\n", b"\x04"])
def test_any_other_answer_at_ctrl_c_leaves_the_job_running(terminal, answer):
    cluster = Cluster()
    terminal(answer)
    status, said = followed(cluster)
    assert (status, cluster.stops) == (130, 0)
    assert "job mine goes on; follow it again by `voxflux logs mine --follow --address http://cluster" in said


def test_ctrl_c_without_a_terminal_asks_nothing_and_leaves_the_job_running(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    cluster = Cluster()
    status, said = followed(cluster)
    assert (status, cluster.stops) == (130, 0)
    assert "stop job" not in said
    assert "job mine goes on" in said


def test_a_second_ctrl_c_leaves_a_job_that_is_being_stopped_to_itself(terminal):
    cluster = Cluster(ctrl_c=2)
    terminal(b"y\n")
    status, said = followed(cluster)
    assert (status, cluster.stops) == (130, 1)
    assert said.count("stop job mine?") == 1
    assert "job mine goes on" in said
