"""A job that does not start: what `submit`, `stop` and `logs --follow` say of it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus
from rich.console import Console

from tests.train.fake_dashboard import fake_dashboard
from train import job_follow
from train.__main__ import main
from train.job_cluster import JobError
from train.job_follow import follow, tell_to_stop

WAITS = "Job has not started yet. It may be waiting for the runtime environment to be set up."


class Cluster:
    """Stands for Ray's client of a job that has not started: these states are told, the last one for ever."""

    def __init__(self, *states: JobStatus, known: bool = True) -> None:
        self.states = list(states)
        self.known = known
        self.told = asyncio.Event()

    def get_address(self) -> str:
        return "http://cluster:8265"

    def stop_job(self, submission_id: str) -> bool:
        return self.known

    def get_job_info(self, submission_id: str) -> SimpleNamespace:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        message = WAITS if state is JobStatus.PENDING else ""
        return SimpleNamespace(status=state, message=message, start_time=None, end_time=None, metadata={})

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        await self.told.wait()  # Ray's log gives nothing before the job starts
        yield "epoch 1\n"


@pytest.mark.parametrize("command", [["submit", "demo"]])
def test_submit_refuses_a_relative_token_path_before_it_sends_anything(monkeypatch, capsys, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "./token")
    (tmp_path / "token").write_text("a" * 64)
    with fake_dashboard() as dashboard:
        assert main([*command, "--address", dashboard.url]) == 1
        assert not dashboard.submitted
    error = capsys.readouterr().err
    assert "expected an absolute path in RAY_AUTH_TOKEN_PATH" in error
    assert f"set RAY_AUTH_TOKEN_PATH={tmp_path}/token, for the head as well" in error


@pytest.mark.parametrize(("content", "found"), [(None, "No such file"), ("\n", "an empty file")])
def test_submit_refuses_a_token_path_without_a_token(monkeypatch, capsys, tmp_path, content, found):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", f"{tmp_path}/token")
    if content is not None:
        (tmp_path / "token").write_text(content)
    assert main(["submit", "demo", "--address", "http://127.0.0.1:1"]) == 1
    assert found in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cluster", "status", "said"),
    [
        (Cluster(JobStatus.PENDING, JobStatus.STOPPED), 0, ["it has not started, and Ray stops it", "mine: STOPPED"]),
        (Cluster(JobStatus.PENDING), 1, ["mine: PENDING", WAITS[:-1], "Ray keeps the order to stop"]),
        (
            Cluster(JobStatus.PENDING, known=False),
            1,
            ["Ray has no process of it yet", "no order to stop was kept: give `voxflux stop mine` again"],
        ),
        (Cluster(JobStatus.RUNNING, JobStatus.STOPPED), 0, ["it saves after the step under way", "mine: STOPPED"]),
    ],
)
def test_stop_says_what_becomes_of_the_job(monkeypatch, capsys, cluster, status, said):
    monkeypatch.setattr("train.jobs.connect", lambda address: cluster)
    assert main(["stop", "mine", "--wait-s", "0"]) == status
    printed = capsys.readouterr().out
    assert all(words in printed for words in said), printed


def test_a_job_that_is_followed_and_does_not_start_is_said_to_wait_and_why(monkeypatch, capsys):
    monkeypatch.setattr(job_follow, "PENDING_S", 0.01)
    cluster = Cluster(JobStatus.PENDING, JobStatus.SUCCEEDED)

    class Page(io.StringIO):
        def write(self, text: str) -> int:
            if "PENDING" in text:
                cluster.told.set()  # and now it starts
            return super().write(text)

    console = Console(file=Page(), width=1000)
    assert follow(cluster, "mine", console) == 0
    assert f"the job is PENDING for 0 s: {WAITS[:-1]}; a head whose RAY_AUTH_TOKEN_PATH" in console.file.getvalue()
    assert capsys.readouterr().out == "epoch 1\n"


def test_an_order_to_stop_that_does_not_arrive_is_an_error_that_says_what_to_do():
    class Deaf(Cluster):
        def stop_job(self, submission_id: str) -> bool:
            raise ConnectionError("the connection was closed")

    with pytest.raises(JobError, match=r"to take the order to stop mine, found: the connection.*`voxflux status mine`"):
        tell_to_stop(Deaf(JobStatus.RUNNING), "mine")
