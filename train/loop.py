"""What each training process runs: batches in, steps, scores, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.data import DataIterator

from ingest.errors import ConfigError
from ingest.plan import Indices
from ingest.progress import EpochPart, EpochRecorder
from ingest.quarantine import Quarantine
from ingest.stall import StallMeter, StallReport

from . import checkpoint
from .ahead import EpochBatches, executions_of
from .batches import Batch, step_batches
from .best import reached
from .config import Recipe
from .disk_full import disk_full
from .finite import stop_run
from .flag import Plan, give_up, noted_plan
from .holdout import HELD_OUT, Holdout
from .ledger import Ledger, attempt_name
from .metrics import merge_ranks, read_metrics
from .monitor import Monitor
from .optimizer import learning_rate_at
from .pulse import Pulses
from .step import TrainStep, memory_format
from .stop import StopWatch
from .unet3d import UNet3D
from .validate import evaluate, from_rank_0, gather, save_scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopJob:
    """What every rank is given: plain values, and the handle of the stop flag.

    Attributes:
        recipe: its store's transport is resolved.
        run_dir: where the run's checkpoints lie.
        holdout: the cases to score.
        train_cases: cases of an epoch.
        total_cases: cases of the manifest.
        together: epochs that are read in one execution of Ray Data, at the most.
        stop_flag: of `flag.make_flag`; None for a run that no signal reaches.
        quarantine: the run's bad cases; None where they end the run.
        monitor: is told how it goes; None where nobody follows.
    """

    recipe: Recipe
    run_dir: str
    holdout: Holdout
    train_cases: int
    total_cases: int
    together: int = 1
    stop_flag: Any = None
    quarantine: Quarantine | None = None
    monitor: Monitor | None = None

    def bad_cases(self, trained: Indices) -> Indices:
        """(q,) int64, the cases to train on that are quarantined by now, without those that turned bad once trained on.

        Args:
            trained: indices of an epoch that were trained on.
        """
        if self.quarantine is None:
            return np.zeros(0, dtype=np.int64)
        return np.setdiff1d(np.setdiff1d(self.quarantine.indices(), self.holdout.indices), trained)

    def executions(self, first_epoch: int) -> list[range]:
        """The epochs of each execution of Ray Data, of a start that begins with `first_epoch`."""
        trainer = self.recipe.trainer
        return executions_of(range(first_epoch, trainer.epochs), self.together, trainer.evaluates)

    def steps_left(self, trained: int, step_cases: int) -> int:
        """Steps of an epoch of which so many cases are trained on, over ranks that take `step_cases` together in one.

        What the plan of the epoch has: cases that an earlier number of ranks trained on need not be whole steps of this
        one, so that it is not all steps without those that are done.
        """
        return (self.train_cases - trained) // step_cases

    def planned(self) -> tuple[checkpoint.Position, Plan]:
        """Where the run stands, and what a start that goes on from there reads first, by the quarantine of now."""
        found = checkpoint.read_position(self.run_dir)
        left = self.train_cases - len(self.bad_cases(found.before.indices))
        return found, Plan(found.checkpoint, found.first_read(left, self.recipe.trainer.least_step_cases))

    def begin(self) -> Begin:
        """What the ranks of a start go by; rank 0 asks for it, and tells the others.

        Raises:
            RuntimeError: the data of this start were planned from another checkpoint.
            UnreachableError: they could not be planned.
        """
        noted = noted_plan(self.stop_flag)
        if noted is not None and noted.failure is not None:
            raise noted.failure
        position, plan = self.planned()
        noted = noted or plan
        if noted.checkpoint != position.checkpoint:
            raise RuntimeError(
                f"expected to go on from {noted.checkpoint or 'the start'}, which the data were planned from, found "
                f"that the run stands at {position.checkpoint or 'the start'}: another process writes to "
                f"{self.run_dir}, or a checkpoint was damaged just now; go on with --trainer.resume"
            )
        threshold = self.recipe.trainer.quality_threshold
        done = threshold is not None and reached(read_metrics(self.run_dir), threshold, position.epoch) is not None
        return Begin(position, noted.first_read, done)


@dataclasses.dataclass(frozen=True)
class Begin:
    """What all ranks of a start go by.

    Attributes:
        position: where the run stands.
        first_read: the first epoch whose data are read; see `Position.first_read`.
        done: whether an epoch that is trained has reached the quality threshold: nothing is left but to score the last
            one, where that was not finished. Its row may be written although its weights are not kept as the best.
    """

    position: checkpoint.Position
    first_read: int
    done: bool


@dataclasses.dataclass(frozen=True)
class Trained:
    """What one rank made of an epoch.

    Attributes:
        part: what it trained on; on rank 0 with all that was trained on before this start.
        timing: of this start's steps.
        rate: the learning rate of the last step.
        stop: whether the run was asked to stop in the last step.
    """

    part: EpochPart
    timing: StallReport
    rate: float
    stop: bool


def bad_on_all(by_rank: Sequence[Indices]) -> int:
    """How many cases of an epoch are bad by what each rank says: one that a rank trained on is not among its own."""
    return len(functools.reduce(np.intersect1d, by_rank))


def train_loop(config: dict[str, Any]) -> None:
    """Train this rank's share of every epoch, and report once an epoch and at each checkpoint.

    Args:
        config: `job`, a `LoopJob`.

    Raises:
        ConfigError: an epoch left this rank without a single whole batch.
        DiskFullError: a disk that the run writes to is full.
        NonFiniteError: a step's loss or gradient is NaN or infinite.
        RuntimeError: Ray Data delivered another epoch than the one that is trained, or a case twice.
    """
    job: LoopJob = config["job"]
    try:
        with contextlib.closing(RankLoop(job)) as rank_loop:
            rank_loop.run()
    except Exception as error:
        full = disk_full(error, job)
        give_up(job.stop_flag, full or error)
        if full is not None:
            raise full from error
        raise


class RankLoop:
    """One rank's run, from the last checkpoint to the last epoch, or to where it is asked to stop."""

    def __init__(self, job: LoopJob) -> None:
        """Build the model, and take up the last checkpoint if there is one."""
        self.job, self.recipe = job, job.recipe
        trainer = self.recipe.trainer
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(trainer.torch_threads or max(1, int(trainer.rank_cpus)))
        if trainer.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
            torch.use_deterministic_algorithms(True)
        torch.manual_seed(self.recipe.data.seed)
        self.network = UNet3D(self.recipe.model)
        layout = memory_format(self.recipe, self.device)
        self.network.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it
        self.take_step = TrainStep(self.network, ray.train.torch.prepare_model(self.network), self.recipe, self.device)
        self.step_cases = trainer.step_batch * self.world_size
        self.start = from_rank_0(job.begin)
        position = self.start.position
        self.checkpoint = position.checkpoint  # that the weights are of; None once this start has written its own
        if position.checkpoint is not None:
            state = checkpoint.load_state(job.run_dir, position.checkpoint)
            self.network.load_state_dict(state["model"])
            self.take_step.load_state_dict(state)
            torch.set_rng_state(state["torch_random"].cpu())
            if self.device.type == "cuda" and state["cuda_random"] is not None:
                torch.cuda.set_rng_state(state["cuda_random"].cpu(), self.device)
        self.step = position.step
        self.epochs = EpochBatches(
            ray.train.get_dataset_shard,
            self.batches,
            executions=job.executions(self.start.first_read),
            ahead=trainer.prefetch_batches,
        )
        attempt = from_rank_0(functools.partial(attempt_name, trainer.ledger))
        self.ledger = Ledger(
            trainer.ledger,
            attempt=attempt,
            rank=self.rank,
            world_size=self.world_size,
            batch_size=trainer.step_batch,
            step=self.step,
            checkpoint=position.checkpoint,
        )
        self.stop_watch = StopWatch(job.stop_flag, self.device)
        self.pulses = Pulses(job.monitor, self.rank, self.world_size)
        if self.rank == 0 and job.monitor is not None:
            if position.instead_of is not None:
                job.monitor.warn(position.instead_of)
            job.monitor.tell("begin", attempt, self.world_size, position.epoch, self.step, position.checkpoint)

    def run(self) -> None:
        """Score the epoch that is still to be scored, if one is, and train every epoch that is left."""
        position = self.start.position
        if self.start.done and position.unscored is None:
            return
        before: EpochPart | None = position.before
        epochs = range(position.epoch, self.recipe.trainer.epochs)
        self.start = dataclasses.replace(self.start, position=checkpoint.START)  # eight bytes a case, not needed again
        if position.unscored is not None:
            if not self.score(position.unscored):
                return
        elif self.start.first_read == position.epoch:
            self.epochs.begin(position.epoch)
        for epoch in epochs:
            if not self.epoch(epoch, before):
                return
            before = None

    def epoch(self, epoch: int, before: EpochPart | None) -> bool:
        """Train one epoch, or what is left of it, score it where it is due, and report its row.

        Returns:
            Whether to go on with the next epoch.
        """
        trained = self.train(epoch, before)
        if trained is None:
            return False
        row = self.row_of(epoch, trained)
        goes_on = not trained.stop
        nothing = EpochPart(epoch + 1, np.zeros(0, dtype=np.int64))
        if self.recipe.trainer.evaluates(epoch):
            self.save_and_report(nothing, row, is_done=False)
            return goes_on and self.score(row)
        if goes_on:
            self.epochs.begin(epoch + 1)
        self.save_and_report(nothing, row)
        return goes_on

    def train(self, epoch: int, before: EpochPart | None) -> Trained | None:
        """Take the steps of an epoch, or those that are left of it, and save in between as often as is wanted.

        Returns:
            What was trained; None where the run was asked to stop in mid-epoch, and saved.
        """
        trainer = self.recipe.trainer
        recorder = EpochRecorder(epoch, self.job.total_cases, before, keeps_before=self.rank == 0)
        trained_before = len(before.indices) if before is not None else 0
        done = trained_before // self.step_cases
        steps_per_epoch = max(1, self.job.train_cases // self.step_cases)
        left = self.job.steps_left(trained_before, self.step_cases)
        self.network.train()
        samples, stop = 0, False
        rate = learning_rate_at(self.recipe.optimizer, epoch, max(0, done - 1), steps_per_epoch)
        meter = StallMeter(time.perf_counter)
        self.pulses.begin(epoch, meter, steps_per_epoch, functools.partial(self.epochs.shard, epoch))
        batches: Iterator[tuple[Batch, list[int]]] = iter(())
        if epoch >= self.start.first_read:  # else a checkpoint left nothing of this epoch but its row and its scores
            batches = self.epochs.of(epoch, left, ahead=not trainer.evaluates(epoch))
        for taken, (batch, found) in enumerate(meter.steps(batches), 1):
            check_epoch(found, epoch)
            rate = learning_rate_at(self.recipe.optimizer, epoch, done, steps_per_epoch)
            loss, stop = self.one_step(epoch, batch, rate)
            indices = batch["index"].numpy()
            done += 1
            samples += len(indices)
            recorder.add(indices, loss * len(indices))
            self.ledger.append(epoch=epoch, step=self.step, indices=indices)
            self.pulses.step(step=self.step, done=done, loss=loss, learning_rate=rate, samples=len(indices))
            every = trainer.checkpoint_every_steps
            if stop and taken == left:
                break  # the epoch is trained: its row is kept, and only the scores are left
            if stop or (every is not None and done % every == 0 and done < steps_per_epoch):
                with meter.aside():
                    self.save_and_report(recorder.part())
            if stop:
                return None
        barrier()  # an epoch's time ends when the last rank is done, as the AU formula has it
        return Trained(recorder.part(), meter.result(samples=samples), rate, stop)

    def one_step(self, epoch: int, batch: Batch, rate: float) -> tuple[float, bool]:
        """Take one step on all ranks: its loss on this rank, and whether any rank was asked to stop.

        Raises:
            NonFiniteError: the loss or a gradient of any rank is NaN or infinite.
        """
        image, label = (batch[name].to(self.device, non_blocking=True) for name in ("image", "label"))
        result = self.take_step(image, label, rate)
        stop, finite = self.stop_watch.agreed(finite=result.finite)
        self.step += 1
        if not finite:
            stop_run(
                result,
                batch["index"].tolist(),
                epoch=epoch,
                step=self.step,
                rate=rate,
                run_dir=self.job.run_dir,
                rank=self.rank,
            )
        return result.loss, stop

    def row_of(self, epoch: int, trained: Trained) -> dict[str, Any]:
        """The row of a trained epoch over all ranks, without scores; the same on each of them.

        Raises:
            ConfigError: no rank took a step.
            RuntimeError: cases were lost on the way, see `remainder`.
        """
        part, timing = trained.part, trained.timing
        everyones = gather((len(part.indices), part.loss_sum, part.steps))
        cases, loss_sum, steps = (sum(values) for values in zip(*everyones, strict=True))
        if steps == 0:
            raise ConfigError(
                f"expected at least one step of {self.recipe.trainer.step_batch} samples a rank in epoch {epoch + 1}, "
                f"found {self.job.train_cases} cases for {self.world_size} ranks; lower --trainer.batch-size or "
                "--trainer.accumulate, or add cases"
            )
        # What every rank says, since each knows of its own part, and the next epoch may be finding more by now.
        quarantined = bad_on_all(gather(self.job.bad_cases(part.indices)))
        mine: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "train_loss": loss_sum / cases,
            "learning_rate": trained.rate,
            "samples": timing.samples,
            "samples_per_s": timing.samples_per_s,
            "first_batch_s": timing.first_batch_s,
            "stall_share": timing.stall_share,
            "au": timing.au,
            "mean_dice": None,
            "trained": cases,
            "quarantined": quarantined,
            "tail": remainder(self.job.train_cases, cases, quarantined, self.step_cases, epoch),
            **self.pulses.end(timing),
        }
        if self.take_step.loss_scale is not None:
            mine["loss_scale"] = self.take_step.loss_scale
        return merge_ranks(gather(mine))

    def score(self, row: dict[str, Any]) -> bool:
        """Score an epoch that is trained and whose checkpoint is written, and report its row.

        Returns:
            Whether to go on with the next epoch: False where the run is to stop, or reached its quality threshold, by
            this epoch or by one before.
        """
        trainer, epoch = self.recipe.trainer, int(row["epoch"])
        if trainer.evaluates(epoch):  # a resumed run may score no more
            before_s = time.perf_counter()
            scores = evaluate(
                self.network,
                self.job.holdout,
                self.recipe.window,
                ray.train.get_dataset_shard(HELD_OUT),
                self.device,
                lambda: self.stop_watch.asked,
            )
            if scores is None:
                return False
            if self.rank == 0:
                save_scores(self.job.run_dir, epoch, scores)
            row = row | {"mean_dice": scores.mean_dice, "dice_by_class": scores.by_class, "scored": scores.cases}
            row["mean_dice_present"] = scores.mean_dice_present
            row["evaluate_s"] = time.perf_counter() - before_s
        goes_on = not self.start.done and reached([row], trainer.quality_threshold, epoch + 1) is None
        if goes_on:
            self.epochs.begin(epoch + 1)
        ray.train.report(self.about(row, {}))
        return goes_on

    def batches(self, shard: DataIterator) -> Iterator[tuple[Batch, list[int]]]:
        """This rank's batches of one execution, a step's each, and the epochs of each."""
        return step_batches(shard, self.recipe.trainer.step_batch, pin_memory=self.device.type == "cuda")

    def save_and_report(self, part: EpochPart, row: dict[str, Any] | None = None, *, is_done: bool = True) -> None:
        """Write a checkpoint and report it; every rank waits for the others.

        Args:
            part: what this rank trained on in the epoch under way.
            row: of an epoch that is trained with it. The checkpoint keeps it: if it is lost on its way to latest.json,
                it is reported again.
            is_done: whether the row is reported now; else it is still to be scored.
        """
        self.ledger.sync()
        with tempfile.TemporaryDirectory() as folder:
            files = checkpoint.write(
                Path(folder),
                rank=self.rank,
                ranks=self.world_size,
                part=part,
                step=self.step,
                network=self.network,
                optimizer=self.take_step.optimizer,
                recipe_json=self.recipe.to_json(),
                scaler=self.take_step.scaler,
                unscored=row,
            )
            saved = ray.train.Checkpoint.from_directory(folder)
            self.checkpoint = None
            ray.train.report(self.about(row if is_done else None, files), checkpoint=saved)

    def about(self, row: dict[str, Any] | None, files: checkpoint.Files) -> dict[str, Any]:
        """What a rank reports to `MetricsWriter`: its files, or the checkpoint that a row without files belongs to."""
        return {"row": row, "files": files, "checkpoint": self.checkpoint, "ranks": self.world_size, "step": self.step}

    def close(self) -> None:
        """Let go of what is read, tell the last steps, close the ledger and end the asking for the stop flag."""
        self.epochs.close()
        self.pulses.tell()
        self.stop_watch.close()
        self.ledger.__exit__(None, None, None)


def remainder(cases: int, trained: int, quarantined: int, step_cases: int, epoch: int) -> int:
    """Cases of an epoch that were left out because they make no whole step over all ranks.

    Args:
        cases: to train on in each epoch.
        trained: of them, in this epoch, by all ranks.
        quarantined: of them, found bad by now and not trained on.
        step_cases: of one step over all ranks.
        epoch: its number, from 0.

    Raises:
        RuntimeError: so many are left out that they would have made a step: some were lost on the way.
    """
    left = max(0, cases - trained - quarantined)
    if left >= step_cases:
        raise RuntimeError(
            f"expected fewer than {step_cases} cases left out of epoch {epoch + 1}, one step over all ranks, found "
            f"{left}: {cases} to train on, {trained} trained on, {quarantined} in quarantine; a block of samples was "
            "lost: go on with --trainer.resume, and report this with the log"
        )
    return left


def check_epoch(found: Sequence[int], epoch: int) -> None:
    """Hold Ray Data's count of executions, which is private, and how it deals out blocks to the plan."""
    if list(found) != [epoch]:
        raise RuntimeError(
            f"expected samples of epoch {epoch + 1}, found some of {[each + 1 for each in found]}: Ray counts "
            "executions of a data set, or deals out blocks, otherwise than 2.60 does; take the Ray of constraints.txt"
        )


def barrier() -> None:
    """Wait for every rank; nothing with one."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
