"""What each training process runs: batches in, steps, scores, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.data import DataIterator
from ray.data.collate_fn import NumpyBatchCollateFn

from ingest.decode import decode_case
from ingest.errors import ConfigError
from ingest.fetch import ShardSpec, read_shard
from ingest.manifest import Manifest
from ingest.pipeline import views
from ingest.plan import Indices
from ingest.stall import StallMeter

from .config import Recipe
from .evaluate import score_case
from .loss import DiceCELoss
from .optimizer import learning_rate_at, make_optimizer, set_learning_rate
from .unet3d import UNet3D

Batch = dict[str, torch.Tensor]
T = TypeVar("T")
CHECKPOINT_FILE = "state.pt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopJob:
    """What every rank is given: plain values.

    Attributes:
        recipe: its store's transport is resolved.
        holdout: the held-out rows of the manifest; each rank scores its own share of them.
        holdout_indices: (h,) int64, their indices.
        train_cases: cases that an epoch is planned over.
    """

    recipe: Recipe
    holdout: Manifest
    holdout_indices: Indices
    train_cases: int


class ToTensors(NumpyBatchCollateFn):
    """Makes tensors of a batch's columns, without a copy where the block may be written to."""

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> Any:
        """`image` (N, C, D, H, W) float32, `label` (N, 1, D, H, W) uint8, `index` and `epoch` (N,) int64."""
        return {
            name: torch.from_numpy(batch[name] if batch[name].flags.writeable else batch[name].copy())
            for name in ("image", "label", "index", "epoch")
        }


def train_loop(config: dict[str, Any]) -> None:
    """Train this rank's share of every epoch, and report once an epoch.

    Args:
        config: `job`, a `LoopJob`.

    Raises:
        ConfigError: an epoch left this rank without a single whole batch.
        RuntimeError: Ray Data delivered another epoch than the one that is trained.
    """
    job: LoopJob = config["job"]
    recipe, context = job.recipe, ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(recipe.trainer.torch_threads or max(1, int(recipe.trainer.cpus_per_worker)))
    torch.manual_seed(recipe.data.seed)
    network = UNet3D(recipe.model)
    model = ray.train.torch.prepare_model(network)
    optimizer = make_optimizer(network, recipe.optimizer)
    loss_of = DiceCELoss()
    precision = autocast(recipe, device)
    first_epoch, step = restore(network, optimizer, device)
    shard = ray.train.get_dataset_shard("train")
    steps_per_epoch = job.train_cases // (recipe.trainer.batch_size * world_size)
    for epoch in range(first_epoch, recipe.trainer.epochs):
        model.train()
        losses: list[float] = []
        samples = 0
        meter = StallMeter(time.perf_counter)
        for batch in meter.steps(batches(shard, recipe, device)):
            check_epoch(batch, epoch)
            rate = learning_rate_at(recipe.optimizer, epoch, len(losses), steps_per_epoch)
            set_learning_rate(optimizer, rate)
            with precision():
                logits = model(batch["image"])
            loss = loss_of(logits, batch["label"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if recipe.optimizer.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.optimizer.clip_norm)
            optimizer.step()
            samples += len(batch["index"])
            step += 1
            losses.append(float(loss.detach()))  # waits for the device, so that compute is timed as compute
        barrier()  # an epoch's time ends when the last rank is done, as the AU formula has it
        timing = meter.result(samples=samples)
        if not losses:
            raise ConfigError(
                f"expected at least one batch of {recipe.trainer.batch_size} a rank in epoch {epoch}, found "
                f"{job.train_cases} cases for {world_size} ranks; lower --trainer.batch-size or add cases"
            )
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            "train_loss": sum(losses) / len(losses),
            "learning_rate": rate,
            "samples": samples,
            "samples_per_s": timing.samples_per_s,
            "first_batch_s": timing.first_batch_s,
            "stall_share": timing.stall_share,
            "au": timing.au,
            "mean_dice": None,
            "tail": job.train_cases - samples * world_size,
        }
        if recipe.trainer.evaluates(epoch):
            scores = evaluate(network, job, rank, world_size, device)
            row |= {"mean_dice": scores.mean_dice, "dice_by_class": scores.by_class, "scored": scores.cases}
        save_and_report(row, network, optimizer, recipe, rank)


def batches(shard: DataIterator, recipe: Recipe, device: torch.device) -> Iterator[Batch]:
    """This rank's batches of one epoch, on its device."""
    iterable = shard.iter_torch_batches(
        batch_size=recipe.trainer.batch_size,
        prefetch_batches=recipe.trainer.prefetch_batches,
        drop_last=True,
        collate_fn=ToTensors(),
        device=device,
        pin_memory=device.type == "cuda",
    )
    yield from iterable


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


def gather(mine: T) -> list[T]:
    """Every rank's value, by rank, on every rank."""
    if not torch.distributed.is_initialized():
        return [mine]
    everyones: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, mine)
    return everyones


@dataclasses.dataclass(frozen=True)
class Scores:
    """Held-out scores over all ranks.

    Attributes:
        mean_dice: mean over cases of the mean over foreground classes.
        by_class: mean over cases, for each foreground class.
        cases: how many were scored.
    """

    mean_dice: float
    by_class: list[float]
    cases: int


def evaluate(network: torch.nn.Module, job: LoopJob, rank: int, world_size: int, device: torch.device) -> Scores:
    """Score every held-out case exactly once, over all ranks.

    Raises:
        RuntimeError: a case was scored twice or not at all.
    """
    network.eval()
    mine = np.arange(rank, len(job.holdout), world_size, dtype=np.int64)
    scored: dict[int, list[float]] = {}
    for position, image, label in whole_cases(job, mine):
        dice = score_case(
            network,
            torch.from_numpy(image.copy()).to(device),
            torch.from_numpy(label.copy()).to(device),
            job.recipe.window,
        )
        scored[int(job.holdout_indices[position])] = [float(value) for value in dice]
    everyones = gather(scored)
    merged = {index: dice for part in everyones for index, dice in part.items()}
    if sum(map(len, everyones)) != len(merged) or len(merged) != len(job.holdout):
        raise RuntimeError(
            f"expected {len(job.holdout)} held-out cases, each scored once, found {sum(map(len, everyones))} scores "
            f"of {len(merged)} cases; report this with the log"
        )
    table = np.array([merged[index] for index in sorted(merged)], dtype=np.float64)
    return Scores(float(table.mean()), table.mean(axis=0).tolist(), len(merged))


def whole_cases(
    job: LoopJob, positions: Sequence[int] | Indices
) -> Iterator[tuple[int, npt.NDArray[np.float32], npt.NDArray[np.uint8]]]:
    """Read held-out cases whole, a few ahead: their position, image (C, D, H, W) and label (1, D, H, W)."""
    data = job.recipe.data
    wanted = np.asarray(positions, dtype=np.int64)
    if len(wanted) == 0:
        return
    spec = ShardSpec(
        images_uri=job.holdout.images_uri,
        labels_uri=job.holdout.labels_uri,
        store=data.store,
        fetch=dataclasses.replace(data.fetch, chunk_cases=4, chunks_ahead=1),
        epoch=0,
        batch=1,
        rows=job.holdout.take(wanted),
        indices=wanted,
    )
    for table in read_shard(spec):
        names = zip(table["image_name"].to_pylist(), table["label_name"].to_pylist(), strict=True)
        bodies = zip(views(table["image_npy"]), views(table["label_npy"]), strict=True)
        for position, (image_name, label_name), (image, label) in zip(
            table["index"].to_pylist(), names, bodies, strict=True
        ):
            yield (
                position,
                *decode_case(image, label, data.decode, image_name=image_name, label_name=label_name),
            )


def restore(network: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[int, int]:
    """Take up the run's last checkpoint, if it has one: the epoch to train next, and the steps so far."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0, 0
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / CHECKPOINT_FILE, map_location=device, weights_only=True)
    network.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"]) + 1, int(state["step"])


def save_and_report(
    row: dict[str, Any],
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    rank: int,
) -> None:
    """Report the epoch's row; rank 0 adds a checkpoint. A barrier: every rank waits for the others here."""
    if rank != 0:
        ray.train.report(row)
        return
    with tempfile.TemporaryDirectory() as folder:
        state = {
            "model": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": row["epoch"],
            "step": row["step"],
            "recipe": recipe.to_json(),
        }
        torch.save(state, Path(folder) / CHECKPOINT_FILE)
        ray.train.report(row, checkpoint=ray.train.Checkpoint.from_directory(folder))
