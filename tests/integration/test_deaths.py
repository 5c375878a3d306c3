"""A process that a run cannot live without is killed: the run ends at once, with one message and how to go on."""

from __future__ import annotations

import random
import signal

import pytest

from tests.integration.chaos import Chaos

pytestmark = [pytest.mark.crash, pytest.mark.timeout(900)]

STEPS_OF_EPOCH = 9  # 36 cases in batches of 2 on 2 ranks


def killed(chaos: Chaos, target: str) -> list[str]:
    """The lines that a run prints whose process of that kind is killed once it trains; it must end by itself."""
    process = chaos.start("--run-dir", str(chaos.folder / "run"), "--trainer.max-failures", "50")
    chaos.wait_for_steps(process, 3)
    chaos.kill(process, target)
    assert chaos.kills == [target]
    chaos.end(process)
    assert process.returncode == 1
    lines = (chaos.folder / "log.txt").read_text().splitlines()
    assert not [line for line in lines if line.startswith("Traceback")], lines
    assert not [line for line in lines if "restarting" in line or "state-dump" in line], lines
    return lines


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("server", "expected the embedded server to go on at http://127.0.0.1"),
        ("raylet", "expected Ray's raylet to live as long as the run"),
        ("gcs", "expected Ray's gcs_server to live as long as the run"),
    ],
)
def test_what_a_run_cannot_live_without_is_named_when_it_is_killed(tmp_path, target, found):
    chaos = Chaos(tmp_path, random.Random(1), print)
    lines = killed(chaos, target)
    (error,) = (line for line in lines if line.startswith("error: "))
    assert found in error
    assert f"go on with --trainer.resume {tmp_path / 'run'}" in error
    process = chaos.start("--trainer.resume", str(tmp_path / "run"))
    chaos.wait_for_steps(process, STEPS_OF_EPOCH + 1)
    process.send_signal(signal.SIGINT)
    chaos.end(process)
    chaos.audit()


def test_a_controller_that_is_killed_is_started_again_as_often_as_max_failures_allows(tmp_path):
    chaos = Chaos(tmp_path, random.Random(1), print)
    process = chaos.start("--run-dir", str(tmp_path / "run"), "--trainer.max-failures", "1")
    chaos.wait_for_steps(process, 5)
    chaos.kill(process, "controller")
    assert chaos.kills == ["controller"]
    chaos.wait(lambda: "1 of 1" in (tmp_path / "log.txt").read_text() or process.poll() is not None, "the restart")
    chaos.wait_for_steps(process, 5)
    assert process.poll() is None
    chaos.kill(process, "controller")
    chaos.end(process)
    assert process.returncode == 1
    printed = (tmp_path / "log.txt").read_text()
    assert "the process of TrainController died" in printed
    assert "; the run ends, as --trainer.max-failures is 1" in printed
    assert f"go on with --trainer.resume {tmp_path / 'run'}" in printed
    assert "Traceback" not in printed
    process = chaos.start("--trainer.resume", str(tmp_path / "run"))
    chaos.wait_for_steps(process, STEPS_OF_EPOCH + 1)
    process.send_signal(signal.SIGINT)
    chaos.end(process)
    chaos.audit()
