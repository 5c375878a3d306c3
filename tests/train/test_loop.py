"""What a rank does at an epoch's end, without Ray: its checkpoint, its scores, its row, and where it is to stop."""

from __future__ import annotations

import functools
import itertools
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ingest.manifest import Manifest
from ingest.pipeline import DataConfig
from ingest.progress import EpochPart
from train import checkpoint, loop
from train.best import read_best
from train.config import Recipe, TrainerConfig
from train.holdout import Holdout
from train.loop import Begin, LoopJob, RankLoop
from train.metrics import MetricsWriter, read_metrics
from train.optimizer import OptimizerConfig
from train.stop import StopWatch
from train.validate import CaseScore, Scores

STEPS = 3
BATCH = 2
CASES = STEPS * BATCH


class Batches:
    """In the place of `EpochBatches`: epochs of three steps of two cases, all but those trained on before."""

    def __init__(self, before: EpochPart) -> None:
        self.before = before
        self.read: list[int] = []

    def begin(self, epoch: int) -> None:
        """Nothing is read ahead."""

    def shard(self, epoch: int) -> None:
        return None

    def of(self, epoch: int, steps: int, *, ahead: bool = True) -> Any:
        self.read.append(epoch)
        indices = np.arange(CASES)
        if epoch == self.before.epoch:
            indices = np.setdiff1d(indices, self.before.indices)
        for start in range(0, len(indices), BATCH):
            volume = torch.zeros(BATCH, 1, 2, 2, 2)
            yield {"image": volume, "label": volume, "index": torch.from_numpy(indices[start : start + BATCH])}, [epoch]


class Asked(StopWatch):
    """Is asked to stop from the given number of questions on."""

    def __init__(self, after: float) -> None:
        super().__init__(None, torch.device("cpu"))
        self.left = after

    def agreed(self, *, finite: bool = True) -> tuple[bool, bool]:
        self.left -= 1
        self._asked = self.left <= 0
        return super().agreed(finite=finite)


class Step:
    """In the place of `TrainStep`: counts, and fails nowhere."""

    loss_scale = scaler = None

    def __init__(self, network: torch.nn.Module) -> None:
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def __call__(self, image: torch.Tensor, label: torch.Tensor, rate: float) -> Any:
        return types.SimpleNamespace(loss=0.5, finite=True)


class Run:
    """Starts of one rank in one folder, with Ray's part played by a controller of this process."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run_dir = str(run_dir)
        self.numbers = itertools.count()
        self.scored: list[int] = []
        self.fail_scoring = False
        monkeypatch.setattr(loop.ray.train, "report", self.report)
        monkeypatch.setattr(loop.ray.train, "get_dataset_shard", lambda name: None)
        monkeypatch.setattr(loop, "evaluate", self.evaluate)

    def report(self, metrics: dict[str, Any], checkpoint: Any = None) -> None:
        kept = None
        if checkpoint is not None:
            kept = types.SimpleNamespace(path=f"{self.run_dir}/checkpoint_{next(self.numbers):03d}")
            Path(kept.path).mkdir()
            for file in Path(checkpoint.path).iterdir():
                (Path(kept.path) / file.name).write_bytes(file.read_bytes())
        self.writer.after_report(None, [metrics], kept)

    def evaluate(self, network: Any, holdout: Any, window: Any, shard: Any, device: Any, asked: Any) -> Scores | None:
        if self.fail_scoring:
            raise ConnectionError("the held-out cases do not answer")
        if asked():
            return None
        self.scored.append(self.position.epoch - 1)
        score = CaseScore(9, "case_00009", [0.25], [True])
        return Scores(0.25, [0.25], [score])

    @property
    def position(self) -> checkpoint.Position:
        return checkpoint.read_position(self.run_dir)

    def start(self, *, stop_after: float = float("inf"), **settings: Any) -> tuple[int, list[int]]:
        """One start, to its end: the steps that it took, and the epochs whose data it read."""
        trainer = TrainerConfig(num_workers=1, batch_size=BATCH, epochs=2, evaluate_every=1)
        trainer = dataclass_replace(trainer, settings)
        data = DataConfig(images="images", labels="labels")
        recipe = Recipe(data=data, trainer=trainer, optimizer=OptimizerConfig())
        held_out = Holdout(Manifest.from_cases([], images_uri="", labels_uri=""), np.array([9]), data)
        job = LoopJob(recipe=recipe, run_dir=self.run_dir, holdout=held_out, train_cases=CASES, total_cases=10)
        self.writer = MetricsWriter(self.run_dir)
        rank = object.__new__(RankLoop)  # its model and its data need Ray
        rank.job, rank.recipe, rank.rank, rank.world_size = job, recipe, 0, 1
        rank.device, rank.step_cases = torch.device("cpu"), BATCH
        rank.network = torch.nn.Linear(1, 1)
        rank.take_step = Step(rank.network)
        rank.start = job.begin()
        rank.step, rank.checkpoint = rank.start.position.step, rank.start.position.checkpoint
        begun_at = rank.step
        rank.epochs = Batches(rank.start.position.before)
        rank.ledger = types.SimpleNamespace(append=lambda **_: None, sync=lambda: None)
        rank.stop_watch = Asked(stop_after)
        rank.pulses = loop.Pulses(None, 0, 1)
        read = rank.epochs.read
        rank.run()
        return rank.step - begun_at, read


def dataclass_replace(config: Any, settings: dict[str, Any]) -> Any:
    return loop.dataclasses.replace(config, **settings)


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    return Run(tmp_path, monkeypatch)


def outcome(run: Run) -> list[tuple[int, int, Any, int]]:
    return [(row["epoch"], row["step"], row["mean_dice"], row["trained"]) for row in read_metrics(run.run_dir)]


WHOLE = [(0, 3, 0.25, 6), (1, 6, 0.25, 6)]


def test_a_run_that_nothing_befalls_scores_each_epoch_once(run):
    assert run.start() == (6, [0, 1])
    assert outcome(run) == WHOLE
    assert (run.position.epoch, run.position.phase, run.scored) == (2, "train", [0, 1])


def test_an_error_while_scoring_throws_no_trained_epoch_away(run):
    run.fail_scoring = True
    with pytest.raises(ConnectionError):
        run.start()
    position = run.position
    assert (position.phase, position.epoch, position.step) == ("score", 1, 3)
    with pytest.raises(ConnectionError):
        run.start()
    assert run.position.step == 3
    run.fail_scoring = False
    assert run.start() == (3, [1])
    assert outcome(run) == WHOLE
    assert run.scored == [0, 1]


def test_a_stop_in_the_last_step_of_an_epoch_leaves_only_its_scores_and_resuming_gives_them(run):
    assert run.start(stop_after=6) == (6, [0, 1])
    assert (run.position.phase, run.position.epoch, run.scored) == ("score", 2, [0])
    assert run.start() == (0, [])
    assert outcome(run) == WHOLE
    assert run.scored == [0, 1]
    assert run.start() == (0, [])  # a run that is done has nothing left
    assert run.scored == [0, 1]


def test_a_stop_in_the_last_step_of_an_epoch_that_is_not_scored_ends_it(run):
    assert run.start(stop_after=3, evaluate_every=0) == (3, [0])
    assert (run.position.phase, run.position.epoch) == ("train", 1)
    assert outcome(run) == [(0, 3, None, 6)]
    assert run.start(evaluate_every=0) == (3, [1])


def test_a_crash_before_the_first_checkpoint_is_named_loses_no_row_of_an_epoch_that_is_not_scored(run, monkeypatch):
    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("train.metrics.name_latest", die)
        with pytest.raises(KeyboardInterrupt):
            run.start(evaluate_every=0)
    assert (run.position.checkpoint, run.position.step) == ("checkpoint_000", 3)  # it is whole
    assert run.start(evaluate_every=0) == (3, [1])
    assert outcome(run) == [(0, 3, None, 6), (1, 6, None, 6)]


def test_a_stop_while_scoring_ends_the_run_and_resuming_scores_the_epoch(run, monkeypatch):
    def asked_meanwhile(*arguments: Any) -> Scores | None:
        return run.evaluate(*arguments[:-1], lambda: True)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "evaluate", asked_meanwhile)
        assert run.start() == (3, [0])
    assert (run.position.phase, run.position.epoch, outcome(run)) == ("score", 1, [])
    assert run.start() == (3, [1])
    assert outcome(run) == WHOLE


def test_a_checkpoint_in_mid_epoch_that_leaves_nothing_to_train_still_gets_its_row_and_its_scores(run, monkeypatch):
    # As under a quarantine, where the number of steps is not known beforehand.
    monkeypatch.setattr(LoopJob, "steps_left", lambda self, trained, step_cases: STEPS + 1)
    assert run.start(stop_after=3) == (3, [0])
    position = run.position
    assert (position.phase, position.epoch, len(position.before.indices)) == ("train", 0, CASES)
    assert run.start() == (3, [1])
    assert outcome(run) == WHOLE
    row = read_metrics(run.run_dir)[0]
    assert (row["samples"], row["train_loss"], row["first_batch_s"]) == (0, 0.5, None)


def test_a_stop_in_mid_epoch_goes_on_where_it_was(run):
    assert run.start(stop_after=2) == (2, [0])
    assert (run.position.epoch, run.position.before.indices.tolist()) == (0, [0, 1, 2, 3])
    assert run.start() == (4, [0, 1])
    assert outcome(run) == WHOLE


def test_a_crash_before_an_epoch_is_said_to_be_scored_scores_it_again(run, monkeypatch):
    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("train.metrics.keep_best", die)
        with pytest.raises(KeyboardInterrupt):
            run.start()
    assert run.position.phase == "score"
    assert run.start() == (3, [1])
    assert outcome(run) == WHOLE
    assert run.scored == [0, 0, 1]


def test_a_crash_after_the_row_that_reaches_the_threshold_is_written_loses_no_best_weights(run, monkeypatch):
    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("train.metrics.keep_best", die)
        with pytest.raises(KeyboardInterrupt):
            run.start(quality_threshold=0.2)
    assert (run.position.phase, outcome(run)) == ("score", WHOLE[:1])
    assert run.start(quality_threshold=0.2) == (0, [])
    assert (run.position.phase, outcome(run)) == ("train", WHOLE[:1])
    assert read_best(run.run_dir)["epoch"] == 0
    assert run.start(quality_threshold=0.2) == (0, [])  # it is done
    assert run.scored == [0, 0]


def test_a_threshold_that_was_reached_before_it_was_lowered_ends_the_run_once_the_open_epoch_is_scored(run):
    assert run.start(stop_after=6) == (6, [0, 1])
    assert (run.position.phase, outcome(run)) == ("score", WHOLE[:1])
    assert run.start(quality_threshold=0.2, epochs=3) == (0, [])
    assert outcome(run) == WHOLE


def test_a_resumed_run_that_scores_no_more_reports_the_row_without_scores(run):
    run.fail_scoring = True
    with pytest.raises(ConnectionError):
        run.start()
    assert run.start(evaluate_every=0) == (3, [1])
    assert outcome(run) == [(0, 3, None, 6), (1, 6, None, 6)]


def test_ranks_refuse_a_checkpoint_that_the_data_were_not_planned_from(run, monkeypatch):
    run.start(stop_after=2)
    monkeypatch.setattr(loop, "noted_plan", lambda flag: loop.Plan("checkpoint_other", 0))
    with pytest.raises(RuntimeError, match=r"expected to go on from checkpoint_other.*found.*checkpoint_000"):
        run.start()


def test_what_one_rank_reads_every_rank_has_and_its_error_too(tmp_path):
    def on_rank(meeting: Path, rank: int, queue: Any) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        part = EpochPart(3, np.array([5, 7]), 1.5, 2)
        begin = loop.from_rank_0(lambda: Begin(checkpoint.Position(4, part, "checkpoint_a"), 3, rank == 1))
        try:
            loop.from_rank_0(functools.partial(int, "no number" if rank == 0 else "1"))
        except ValueError as error:
            queue.put((rank, begin.position.before.indices.tolist(), begin.done, str(error)))
        torch.distributed.destroy_process_group()

    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    ranks = [context.Process(target=on_rank, args=(tmp_path / "meeting", rank, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = sorted(queue.get() for _ in ranks)
    for process in ranks:
        process.join()
    assert [each[:3] for each in found] == [(0, [5, 7], False), (1, [5, 7], False)]
    assert all("no number" in each[3] for each in found)
