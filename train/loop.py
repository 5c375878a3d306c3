"""What each training process runs: batches in, steps, scores, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.data import DataIterator
from ray.data.collate_fn import NumpyBatchCollateFn

from ingest.errors import ConfigError
from ingest.progress import EpochPart, EpochRecorder
from ingest.quarantine import Quarantine
from ingest.stall import StallMeter

from . import checkpoint
from .best import reached
from .config import Recipe
from .ledger import Ledger, attempt_name
from .loss import DiceCELoss
from .metrics import read_metrics
from .optimizer import learning_rate_at, make_optimizer, set_learning_rate
from .stop import StopWatch, give_up
from .unet3d import UNet3D
from .validate import HELD_OUT, Holdout, evaluate, gather, save_scores

Batch = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopJob:
    """What every rank is given: plain values, and the handle of the stop flag.

    Attributes:
        recipe: its store's transport is resolved.
        run_dir: where the run's checkpoints lie.
        holdout: the cases to score.
        train_cases: cases of an epoch.
        total_cases: cases of the manifest.
        stop_flag: of `stop.make_flag`; None for a run that no signal reaches.
        quarantine: the run's bad cases; None where they end the run.
    """

    recipe: Recipe
    run_dir: str
    holdout: Holdout
    train_cases: int
    total_cases: int
    stop_flag: Any = None
    quarantine: Quarantine | None = None

    def bad_cases(self) -> int:
        """How many of the cases to train on are quarantined by now."""
        if self.quarantine is None:
            return 0
        return len(np.setdiff1d(self.quarantine.indices(), self.holdout.indices))


class ToTensors(NumpyBatchCollateFn):
    """Views a batch's columns as tensors. They lie in the object store and are not to be written to."""

    def __init__(self) -> None:
        """Silence torch, which warns of memory that may not be written to; nothing of ours writes to a batch."""
        super().__init__()
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> Any:
        """`image` (N, C, D, H, W) float32, `label` (N, 1, D, H, W) uint8, `index` and `epoch` (N,) int64."""
        return {name: torch.from_numpy(batch[name]) for name in ("image", "label", "index", "epoch")}


def train_loop(config: dict[str, Any]) -> None:
    """Train this rank's share of every epoch, and report once an epoch and at each checkpoint.

    Args:
        config: `job`, a `LoopJob`.

    Raises:
        ConfigError: an epoch left this rank without a single whole batch.
        RuntimeError: Ray Data delivered another epoch than the one that is trained, or a case twice.
    """
    job: LoopJob = config["job"]
    rank_loop = RankLoop(job)
    try:
        rank_loop.run()
    except Exception as error:
        give_up(job.stop_flag, error)
        raise
    finally:
        rank_loop.close()


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
            torch.set_num_threads(trainer.torch_threads or max(1, int(trainer.cpus_per_worker)))
        if trainer.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
            torch.use_deterministic_algorithms(True)
        torch.manual_seed(self.recipe.data.seed)
        layout = torch.channels_last_3d if trainer.channels_last else torch.contiguous_format
        self.network = UNet3D(self.recipe.model)
        self.network.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it
        self.layout = layout
        self.model = ray.train.torch.prepare_model(self.network)
        self.optimizer = make_optimizer(self.network, self.recipe.optimizer)
        self.loss_of = DiceCELoss()
        self.precision = autocast(self.recipe, self.device)
        self.step_cases = trainer.batch_size * self.world_size
        bad = job.bad_cases()
        self.position = checkpoint.read_position(job.run_dir).skip_finished(
            job.train_cases - bad, trainer.least_step_cases
        )
        if self.position.checkpoint is not None:
            state = checkpoint.load_state(job.run_dir, self.position.checkpoint, self.device)
            self.network.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["torch_random"].cpu())
            if self.device.type == "cuda" and state["cuda_random"] is not None:
                torch.cuda.set_rng_state(state["cuda_random"].cpu(), self.device)
        self.step = self.position.step
        self.ledger = Ledger(
            trainer.ledger,
            attempt=gather(attempt_name())[0],
            rank=self.rank,
            world_size=self.world_size,
            batch_size=trainer.batch_size,
            step=self.step,
            checkpoint=self.position.checkpoint,
        )
        self.stop_watch = StopWatch(job.stop_flag, self.device)

    def run(self) -> None:
        """Train every epoch that is left."""
        threshold = self.recipe.trainer.quality_threshold
        if threshold is not None and reached(read_metrics(self.job.run_dir), threshold, self.position.epoch):
            return
        shard = ray.train.get_dataset_shard("train")
        before: EpochPart | None = self.position.before
        for epoch in range(self.position.epoch, self.recipe.trainer.epochs):
            finished = self.epoch(shard, epoch, before)
            before = None
            if not finished:
                return

    def epoch(self, shard: DataIterator, epoch: int, before: EpochPart | None) -> bool:
        """Train one epoch, or what is left of it, and report its row; False when to stop after it, or in its midst."""
        trainer = self.recipe.trainer
        recorder = EpochRecorder(epoch, self.job.total_cases, before, keeps_before=self.rank == 0)
        done = len(before.indices) // self.step_cases if before is not None else 0
        steps_per_epoch = max(1, self.job.train_cases // self.step_cases)
        self.model.train()
        samples = rate = 0.0
        meter = StallMeter(time.perf_counter)
        for batch in meter.steps(self.batches(shard)):
            check_epoch(batch, epoch)
            rate = learning_rate_at(self.recipe.optimizer, epoch, done, steps_per_epoch)
            loss = self.train_step(batch, rate)
            indices = batch["index"].cpu().numpy()
            self.step += 1
            done += 1
            samples += len(indices)
            recorder.add(indices, loss)
            self.ledger.append(epoch=epoch, step=self.step, indices=indices)
            stop = self.stop_watch.agreed()
            every = trainer.checkpoint_every_steps
            if stop or (every is not None and done % every == 0 and done < steps_per_epoch):
                with meter.aside():
                    self.save_and_report(recorder.part(), None)
            if stop:
                return False
        barrier()  # an epoch's time ends when the last rank is done, as the AU formula has it
        timing = meter.result(samples=int(samples))
        part = recorder.part()
        everyones = gather((len(part.indices), part.loss_sum, part.steps))
        trained, loss_sum, steps = (sum(values) for values in zip(*everyones, strict=True))
        if steps == 0:
            raise ConfigError(
                f"expected at least one batch of {trainer.batch_size} a rank in epoch {epoch}, found "
                f"{self.job.train_cases} cases for {self.world_size} ranks; lower --trainer.batch-size or add cases"
            )
        bad = self.job.bad_cases()
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "train_loss": loss_sum / steps,
            "learning_rate": rate,
            "samples": int(samples),
            "samples_per_s": timing.samples_per_s,
            "first_batch_s": timing.first_batch_s,
            "stall_share": timing.stall_share,
            "au": timing.au,
            "mean_dice": None,
            "trained": trained,
            "quarantined": bad,
            "tail": max(0, self.job.train_cases - trained - bad),
        }
        if trainer.evaluates(epoch):
            scores = evaluate(
                self.network,
                self.job.holdout,
                self.recipe.window,
                ray.train.get_dataset_shard(HELD_OUT),
                self.device,
            )
            if self.rank == 0:
                save_scores(self.job.run_dir, epoch, scores)
            row |= {"mean_dice": scores.mean_dice, "dice_by_class": scores.by_class, "scored": scores.cases}
        self.save_and_report(EpochPart(epoch + 1, np.zeros(0, dtype=np.int64)), row)
        return reached([row], trainer.quality_threshold, epoch + 1) is None

    def train_step(self, batch: Batch, rate: float) -> float:
        """One optimiser step; returns the loss, which waits for the device, so that compute is timed as compute."""
        set_learning_rate(self.optimizer, rate)
        with self.precision():
            logits = self.model(batch["image"].to(memory_format=self.layout))
        loss = self.loss_of(logits, batch["label"])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.recipe.optimizer.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.optimizer.clip_norm)
        self.optimizer.step()
        return float(loss.detach())

    def batches(self, shard: DataIterator) -> Iterator[Batch]:
        """This rank's batches of one epoch, on its device."""
        iterable = shard.iter_torch_batches(
            batch_size=self.recipe.trainer.batch_size,
            prefetch_batches=self.recipe.trainer.prefetch_batches,
            drop_last=True,
            collate_fn=ToTensors(),
            device=self.device,
            pin_memory=self.device.type == "cuda",
        )
        yield from iterable

    def save_and_report(self, part: EpochPart, row: dict[str, Any] | None) -> None:
        """Write a checkpoint and report it, with the epoch's row where it is done; every rank waits for the others."""
        self.ledger.sync()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.write(
                Path(folder),
                rank=self.rank,
                part=part,
                step=self.step,
                network=self.network,
                optimizer=self.optimizer,
                recipe_json=self.recipe.to_json(),
            )
            saved = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"row": row, "step": self.step}, checkpoint=saved)

    def close(self) -> None:
        """Close the ledger and end the asking for the stop flag."""
        self.stop_watch.close()
        self.ledger.__exit__(None, None, None)


def check_epoch(batch: Batch, epoch: int) -> None:
    """Hold Ray Data's count of executions, which is private, to ours."""
    found = int(batch["epoch"][0])
    if found != epoch:
        raise RuntimeError(
            f"expected samples of epoch {epoch}, found some of epoch {found}: Ray counts executions of a data set "
            "otherwise than 2.60 does; install the Ray of constraints.txt"
        )


def autocast(recipe: Recipe, device: torch.device) -> Any:
    """A factory of the contexts that the forward pass runs in."""
    wanted = recipe.trainer.precision
    if wanted == "auto":
        wanted = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if wanted == "fp32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def barrier() -> None:
    """Wait for every rank; nothing with one."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
