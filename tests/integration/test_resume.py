"""Crashes and restarts: every case of every epoch is trained on exactly once, and the weights come out the same."""

import contextlib
import dataclasses
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console

from ingest.errors import ConfigError
from ingest.index import index_cases
from tests.integration.test_train import quiet, tiny
from train.__main__ import main
from train.audit import audit
from train.checkpoint import load_state, read_position
from train.config import Recipe
from train.launch import Outcome, run
from train.planned import most_together
from train.records import read_events

pytestmark = [pytest.mark.crash, pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(1500)]


class Killer(threading.Thread):
    """Kills the rank that wrote the newest ledger file, so many times, a seeded number of steps after each start."""

    def __init__(self, ledger: Path, times: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.ledger, self.times, self.rng = ledger, times, random.Random(seed)
        self.killed: list[int] = []

    def run(self) -> None:
        while len(self.killed) < self.times:
            wanted = self.rng.randint(2, 9)
            attempt = self.wait_for(wanted)
            pid = json.loads(attempt[0])["pid"]
            os.kill(pid, signal.SIGKILL)
            self.killed.append(pid)

    def wait_for(self, steps: int) -> list[str]:
        while True:
            for file in sorted(self.ledger.glob("*.jsonl"), reverse=True)[:1]:
                lines = file.read_text().splitlines()
                if len(lines) > steps and json.loads(lines[0])["pid"] not in self.killed:
                    return lines
            time.sleep(0.02)


DETERMINISTIC = {"num_workers": 1, "epochs": 4, "evaluate_every": 0, "deterministic": True, "checkpoint_every_steps": 5}


class Calm(NamedTuple):
    """A run of four epochs of 13 steps that nothing befell, with a ledger."""

    recipe: Recipe
    outcome: Outcome
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def calm(places, tmp_path_factory) -> Calm:
    folder = tmp_path_factory.mktemp("calm")
    recipe = tiny(places.local, folder / "run", **DETERMINISTIC, ledger=str(folder / "ledger"))
    outcome = run(recipe, "tiny", quiet())
    return Calm(recipe, outcome, weights_of(outcome.run_dir))


def weights_of(run_dir: str) -> dict[str, torch.Tensor]:
    return load_state(run_dir, read_position(run_dir).checkpoint)["model"]


def test_five_kills_lose_nothing_and_end_in_the_same_weights_to_the_last_bit(places, calm, tmp_path):
    ledger = tmp_path / "ledger"
    killer = Killer(ledger, times=5, seed=4)
    killer.start()
    recipe = tiny(places.local, tmp_path / "killed", **DETERMINISTIC, ledger=str(ledger), max_failures=10)
    killed = run(recipe, "tiny", quiet())
    assert len(killer.killed) == 5
    found = audit(killed.run_dir)
    assert found.attempts == 6
    assert found.passed, found
    assert [(e.cases, e.once, e.tail, e.finished) for e in found.epochs] == [(55, 52, 3, True)] * 4
    weights = weights_of(killed.run_dir)
    assert weights.keys() == calm.weights.keys()
    assert all(torch.equal(weights[name], calm.weights[name]) for name in weights)
    assert [row["train_loss"] for row in killed.rows] == pytest.approx([row["train_loss"] for row in calm.outcome.rows])


def test_epochs_by_themselves_train_as_epochs_read_on_end(places, calm, tmp_path):
    recipe = tiny(places.local, tmp_path / "run", **DETERMINISTIC)
    shards = dataclasses.replace(recipe.data.shards, execution_cases=1)
    by_themselves = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, shards=shards))
    manifest = index_cases(recipe.data.images, recipe.data.labels).manifest
    assert [most_together(each, manifest, np.arange(55)) >= 4 for each in (by_themselves, recipe)] == [False, True]
    alone = run(by_themselves, "tiny", quiet())
    weights = weights_of(alone.run_dir)
    assert all(torch.equal(weights[name], calm.weights[name]) for name in calm.weights)
    assert [row["samples"] for row in alone.rows] == [row["samples"] for row in calm.outcome.rows]


def test_epochs_on_end_between_scorings_train_every_case_once_and_a_finished_run_has_nothing_left(places, tmp_path):
    ledger = str(tmp_path / "ledger")
    recipe = tiny(places.gs, tmp_path / "run", epochs=6, evaluate_from=1, evaluate_every=2, ledger=ledger)
    outcome = run(recipe, "tiny", quiet())
    assert [row["epoch"] for row in outcome.rows] == list(range(6))
    assert [row["mean_dice"] is not None for row in outcome.rows] == [False, True] * 3
    assert {(row["samples"], row["trained"], row["tail"]) for row in outcome.rows} == {(48, 48, 7)}
    found = audit(outcome.run_dir)
    assert found.passed, found
    assert [(e.once, e.tail, e.finished) for e in found.epochs] == [(48, 7, True)] * 6
    again = dataclasses.replace(recipe, trainer=dataclasses.replace(recipe.trainer, resume=outcome.run_dir))
    assert run(dataclasses.replace(again, run_dir=None), "tiny", quiet()).rows == outcome.rows


def test_on_two_ranks_a_kill_leaves_the_loss_curve_as_it_would_have_been(places, tmp_path):
    options = {"num_workers": 2, "epochs": 3, "evaluate_every": 0, "deterministic": True, "checkpoint_every_steps": 2}
    calm = run(tiny(places.local, tmp_path / "calm", **options), "tiny", quiet())
    ledger = tmp_path / "ledger"
    killer = Killer(ledger, times=1, seed=1)
    killer.start()
    printed = io.StringIO()
    console = Console(file=printed, width=200, soft_wrap=True)
    killed = run(tiny(places.local, tmp_path / "killed", **options, ledger=str(ledger), max_failures=3), "t", console)
    assert len(killer.killed) == 1
    assert audit(killed.run_dir).passed
    # Beside what ranks do: a slow start that Ray began anew, or a checkpoint that was whole and not named yet.
    told = [event for event in read_events(killed.run_dir) if event.kind in ("start", "end") or "rank " in event.text]
    assert [event.kind for event in told] == ["start", "fault", "start", "end"], told
    began, failed, again = (event.text for event in told[:3])
    died = rf"rank [01] failed(?: \(with rank [01]\))?: the process of RayTrainWorker died, pid {killer.killed[0]}: .*"
    step = re.fullmatch(rf"{died}; restarting from step (\d+), 1 of 3", failed)
    assert step is not None, failed
    assert began == "2 ranks begin epoch 1 at step 0"
    # Ray's controller looks every half second: the kill may come before the first checkpoint is named.
    assert again == began if step[1] == "0" else f" at step {step[1]}, from checkpoint_" in again
    lines = [line for line in printed.getvalue().splitlines() if line in (began, failed, again)]
    assert lines == [began, failed, again]
    assert [row["train_loss"] for row in killed.rows] == pytest.approx(
        [row["train_loss"] for row in calm.rows], abs=1e-4
    )


def descendants(pid: int) -> set[int]:
    """The processes that a process started, and those that they started."""
    found: set[int] = set()
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, file.read_text().split()):
                found |= {child} | descendants(child)
    return found


def alive(pids: set[int]) -> set[int]:
    """Those of them that still run; one that waits to be reaped does not."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z":
                found.add(pid)
    return found


def start(places, run_dir: Path, ledger: Path, ranks: int, *options: str) -> subprocess.Popen[str]:
    arguments = [
        *("run", "kits19-small", "--data.images", f"{places.local}images", "--data.labels", f"{places.local}labels"),
        *("--data.crop.patch", "8", "8", "8", "--window.roi", "8", "8", "8", "--model.filters", "4", "8"),
        *("--model.bottleneck", "8", "--data.task-cpus", "0.5", "--data.holdout-fraction", "0.15"),
        *("--trainer.cpus-per-worker", "0.3", "--trainer.batch-size", "4", "--trainer.epochs", "60"),
        *("--trainer.num-workers", str(ranks), "--trainer.ledger", str(ledger), "--trainer.evaluate-every", "0"),
        *("--trainer.use-gpu", "False", "--trainer.checkpoint-every-steps", "5", *options),
    ]
    return subprocess.Popen([sys.executable, "-m", "train", *arguments], stdout=subprocess.PIPE, text=True)


def steps_of(ledger: Path) -> int:
    return sum(len(file.read_text().splitlines()) - 1 for file in ledger.glob("*rank-00000.jsonl"))


def wait_for_steps(process: subprocess.Popen[str], ledger: Path, steps: int) -> None:
    target = steps_of(ledger) + steps
    while steps_of(ledger) < target:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def stop_after(process: subprocess.Popen[str], ledger: Path, steps: int, number: signal.Signals) -> tuple[int, str]:
    wait_for_steps(process, ledger, steps)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=200)
    return process.returncode, printed


def test_a_run_goes_on_with_two_then_one_then_three_ranks_and_a_second_signal_ends_it_at_once(places, tmp_path, capsys):
    run_dir, ledger = tmp_path / "run", tmp_path / "ledger"
    resume = ["--trainer.resume", str(run_dir)]
    first = start(places, run_dir, ledger, 2, "--run-dir", str(run_dir))
    status, printed = stop_after(first, ledger, 10, signal.SIGINT)
    assert status == 130, printed
    assert f"go on with --trainer.resume {run_dir}" in printed
    status, printed = stop_after(start(places, run_dir, ledger, 1, *resume), ledger, 10, signal.SIGTERM)
    assert status == 143, printed
    assert f"going on from {run_dir}/checkpoint_" in printed
    third = start(places, run_dir, ledger, 3, *resume)
    wait_for_steps(third, ledger, 10)
    started = descendants(third.pid)
    assert len(started) > 3
    third.send_signal(signal.SIGINT)
    time.sleep(0.1)
    third.send_signal(signal.SIGINT)
    printed, _ = third.communicate(timeout=200)
    assert third.returncode == 130, printed
    while alive(started):
        time.sleep(0.2)
    found = audit(str(run_dir))
    assert found.attempts == 3
    assert found.passed, found
    assert sum(epoch.finished for epoch in found.epochs) >= 2
    for epoch in found.epochs[:-1]:
        assert epoch.once + epoch.tail == epoch.cases == 55
        assert epoch.tail < 12
    assert main(["audit", str(run_dir)]) == 0
    assert "lost 0, doubled 0, problems 0" in capsys.readouterr().out


def test_an_audit_finds_a_step_that_the_ledger_lost_and_one_it_has_twice(calm, tmp_path, capsys):
    run_dir, ledger = calm.outcome.run_dir, calm.recipe.trainer.ledger
    assert audit(run_dir).passed
    file = next(Path(ledger).glob("*.jsonl"))
    lines = file.read_text().splitlines()
    copy = tmp_path / file.name
    copy.write_text("\n".join([*lines[:5], *lines[6:]]) + "\n")
    assert main(["audit", run_dir, "--ledger", str(tmp_path)]) == 1
    assert "has no record of step 5" in capsys.readouterr().out
    again = json.loads(lines[6]) | {"indices": json.loads(lines[5])["indices"]}
    copy.write_text("\n".join([*lines[:6], json.dumps(again), *lines[7:]]) + "\n")
    found = audit(run_dir, str(tmp_path))
    assert len(found.epochs[0].more) == 4
    assert len(found.epochs[0].never) == 7


def test_a_run_folder_is_not_taken_twice_and_not_gone_on_with_by_another_recipe(calm):
    with pytest.raises(ConfigError, match=r"expected no run in .*, found one; go on with it by --trainer\.resume"):
        run(calm.recipe, "tiny", quiet())
    trainer = dataclasses.replace(calm.recipe.trainer, resume=calm.outcome.run_dir, epochs=5)
    other = dataclasses.replace(calm.recipe.optimizer, momentum=0.5)
    with pytest.raises(ConfigError, match=r"expected the settings of the run.*optimizer\.momentum"):
        run(dataclasses.replace(calm.recipe, trainer=trainer, optimizer=other), "tiny", quiet())


def test_there_must_be_a_run_to_go_on_with(places, tmp_path):
    recipe = tiny(places.local, tmp_path / "run", resume=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="expected a run in"):
        run(recipe, "tiny", quiet())


def test_an_elastic_run_takes_as_many_ranks_as_there_is_room_for(places, tmp_path):
    ledger = tmp_path / "ledger"
    options = {"num_workers": 1, "max_workers": 2, "cpus_per_worker": 1.0, "evaluate_every": 0}
    outcome = run(tiny(places.local, tmp_path / "run", **options, ledger=str(ledger)), "tiny", quiet())
    assert {row["ranks"] for row in outcome.rows} == {2}
    found = audit(outcome.run_dir)
    assert found.passed, found
    assert [epoch.once + epoch.tail for epoch in found.epochs] == [55, 55]
