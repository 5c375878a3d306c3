"""Kills one random process of a run after the other, goes on with the run each time, and audits it at the end.

By hand, from the repository: `python -m tests.integration.chaos --minutes 10 --seed 1`. It makes a small demo run with
a ledger. When the run has taken a few steps, it kills one of its processes: a rank, a data worker, the coordinator that
deals out blocks, the controller, the monitor, the quarantine, the embedded server, the driver, or one of Ray's own. The
run either goes on by itself or ends; a run that ended is resumed. At the end the run is asked to stop, and the audit
must find nothing lost and nothing doubled.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TARGETS = {
    "rank": r"^ray::RayTrainWorker",
    "data worker": r"^ray::(Read|IDLE)",
    "coordinator": r"^ray::SplitCoordinator",
    "controller": r"^ray::TrainController",
    "monitor": r"^ray::RunMonitor",
    "quarantine": r"^ray::QuarantineBook",
    "server": r"fake-gcs-server",
    "driver": r"-m train run",
    "raylet": r"raylet/raylet --",
    "gcs": r"gcs/gcs_server --",
}
"""By name: what the command line of such a process matches; Ray gives its workers titles."""

STUCK_S = 300.0
"""A run that neither ends nor takes a step for so long is stuck. Starting a cluster and a run takes about 30 s."""

STEPS_BETWEEN = (2, 15)
SETTINGS = [
    *("--demo.cases", "40", "--demo.shape", "16", "16", "16", "--data.crop.patch", "16", "16", "16"),
    *("--window.roi", "16", "16", "16", "--model.filters", "4", "8", "--model.bottleneck", "8"),
    *("--data.task-cpus", "0.5", "--data.on-bad", "quarantine", "--data.budget-cases", "3"),
    *("--data.store.retry-deadline-s", "5", "--trainer.cpus-per-worker", "0.3", "--trainer.batch-size", "2"),
    *("--trainer.epochs", "100000", "--trainer.evaluate-every", "3", "--trainer.checkpoint-every-steps", "4"),
    *("--trainer.max-failures", "2"),
]


@dataclasses.dataclass
class Chaos:
    """One run, and what was done to it.

    Attributes:
        folder: of the run, its data and its ledger.
        draw: decides what is killed, and when.
        say: is told what happens.
        kills: what was killed.
        seen: pids of the run's processes.
        resumed: how often the run had ended.
    """

    folder: Path
    draw: random.Random
    say: Callable[[str], None]
    kills: list[str] = dataclasses.field(default_factory=list)
    seen: set[int] = dataclasses.field(default_factory=set)
    resumed: int = 0

    def run(self, seconds: float, targets: list[str]) -> None:
        """Kill processes for about so long; each target at least once if the time suffices.

        Raises:
            AssertionError: the run is stuck, leaves processes behind, or its audit fails.
        """
        ends = time.monotonic() + seconds
        left: list[str] = []
        process = self.start()
        while time.monotonic() < ends:
            if process.poll() is not None:
                process = self.go_on(process)
            self.wait_for_steps(process, self.draw.randint(*STEPS_BETWEEN))
            if process.poll() is not None:
                continue
            left = left or self.draw.sample(targets, len(targets))
            self.kill(process, left.pop())
            self.wait_for_steps(process, 1)
        if process.poll() is not None:
            process = self.go_on(process)
            self.wait_for_steps(process, 3)
        process.send_signal(signal.SIGINT)
        self.end(process)
        self.audit()

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """Start the run, or go on with it."""
        where = list(options) or ["--run-dir", str(self.folder / "run")]
        command = [sys.executable, "-m", "train", "run", "demo", *SETTINGS, *where]
        command += ["--demo.data-dir", str(self.folder / "data"), "--trainer.ledger", str(self.folder / "ledger")]
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def go_on(self, ended: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        """Resume a run whose driver has ended, once all of its processes have."""
        self.wait_for_end_of_all(ended)
        self.resumed += 1
        self.say(f"  the run ended with status {ended.returncode}; resuming")
        begun = (self.folder / "run" / "recipe.json").exists()
        return self.start("--trainer.resume", str(self.folder / "run")) if begun else self.start()

    def kill(self, process: subprocess.Popen[bytes], target: str) -> None:
        """Kill one process of a kind, if there is one at this instant."""
        there = sorted(of_run(process.pid).items())
        self.seen |= {pid for pid, _ in there}
        found = [pid for pid, title in there if re.search(TARGETS[target], title)]
        if not found:
            self.say(f"no {target} at this instant, of {sorted({title[:40] for _, title in there})}")
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.draw.choice(found), signal.SIGKILL)
            self.kills.append(target)
            self.say(f"killed a {target} at step {self.steps()}")

    def steps(self) -> int:
        """Steps that the ledger holds, those that were taken back included."""
        files = (self.folder / "ledger").glob("*rank-00000.jsonl")
        return sum(max(0, file.read_bytes().count(b"\n") - 1) for file in files)

    def wait_for_steps(self, process: subprocess.Popen[bytes], steps: int) -> None:
        """Wait until so many more steps are taken, or the run ends."""
        target = self.steps() + steps
        self.wait(lambda: process.poll() is not None or self.steps() >= target, f"step {target} or the run's end")

    def wait(self, until: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + STUCK_S
        while not until():
            assert time.monotonic() < deadline, f"expected {what} within {STUCK_S:g} s; see {self.folder / 'log.txt'}"
            time.sleep(0.1)

    def end(self, process: subprocess.Popen[bytes]) -> None:
        self.wait(lambda: process.poll() is not None, "the run to save and stop")
        self.wait_for_end_of_all(process)

    def wait_for_end_of_all(self, ended: subprocess.Popen[bytes]) -> None:
        """Wait until no process of a run is left whose driver has ended."""
        self.wait(
            lambda: not of_run(ended.pid) and not self.seen & processes().keys(), "no process of a run that has ended"
        )

    def audit(self) -> None:
        """Hold the run to its ledger."""
        command = [sys.executable, "-m", "train", "audit", str(self.folder / "run")]
        done = subprocess.run(command, capture_output=True, text=True)
        self.say(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = json.loads((self.folder / "run" / "metrics.json").read_text())
        epochs = [row["epoch"] for row in rows]
        assert epochs == list(range(len(epochs))), f"expected a row an epoch, found {epochs}"
        unscored = [row["epoch"] for row in rows if row["epoch"] % 3 == 0 and row["mean_dice"] is None]
        assert not unscored, f"expected every third epoch scored, found no score of {unscored}"


@dataclasses.dataclass(frozen=True)
class Process:
    """A process as /proc has it."""

    parent: int
    session: int
    command: str


def processes() -> dict[int, Process]:
    """All processes of the machine by pid, without those that only wait to be reaped."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, parent, _, session = (folder / "stat").read_text().rpartition(") ")[2].split()[:4]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if state != "Z":
                found[int(folder.name)] = Process(int(parent), int(session), command)
    return found


def of_run(driver: int) -> dict[int, str]:
    """The command lines, by pid, of a driver in a session of its own, and of all that it started."""
    there = processes()
    found = {pid for pid, process in there.items() if process.session == driver}
    while more := {pid for pid, process in there.items() if process.parent in found} - found:
        found |= more
    return {pid: there[pid].command for pid in found}


def main() -> None:
    """Run it by hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only these; may be given often")
    parser.add_argument("--folder", type=Path, help="kept; by default a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        chaos = Chaos(folder, random.Random(options.seed), lambda words: print(words, flush=True))
        chaos.run(options.minutes * 60, options.target or sorted(TARGETS))
        print(f"{len(chaos.kills)} processes killed, {chaos.resumed} times resumed: nothing lost, nothing doubled")


if __name__ == "__main__":
    main()
