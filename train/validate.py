"""Scores the held-out cases over all ranks, each exactly once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed

from ingest.decode import decode_case
from ingest.fetch import ShardSpec, read_shard
from ingest.manifest import Manifest
from ingest.pipeline import DataConfig, views
from ingest.plan import Indices

from .evaluate import SlidingWindowConfig, score_case

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Holdout:
    """The held-out cases.

    Attributes:
        rows: of the manifest; each rank scores its own share of them.
        indices: (h,) int64, their indices in the whole manifest.
        data: how they are read.
    """

    rows: Manifest
    indices: Indices
    data: DataConfig


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


def evaluate(
    network: torch.nn.Module,
    holdout: Holdout,
    window: SlidingWindowConfig,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Scores:
    """Score every held-out case exactly once, over all ranks.

    Raises:
        RuntimeError: a case was scored twice or not at all.
    """
    network.eval()
    mine = np.arange(rank, len(holdout.rows), world_size, dtype=np.int64)
    scored: dict[int, list[float]] = {}
    for position, image, label in whole_cases(holdout, mine):
        dice = score_case(
            network,
            torch.from_numpy(image.copy()).to(device),
            torch.from_numpy(label.copy()).to(device),
            window,
        )
        scored[int(holdout.indices[position])] = [float(value) for value in dice]
    everyones = gather(scored)
    merged = {index: dice for part in everyones for index, dice in part.items()}
    if sum(map(len, everyones)) != len(merged) or len(merged) != len(holdout.rows):
        raise RuntimeError(
            f"expected {len(holdout.rows)} held-out cases, each scored once, found {sum(map(len, everyones))} scores "
            f"of {len(merged)} cases; report this with the log"
        )
    table = np.array([merged[index] for index in sorted(merged)], dtype=np.float64)
    return Scores(float(table.mean()), table.mean(axis=0).tolist(), len(merged))


def whole_cases(
    holdout: Holdout, positions: Sequence[int] | Indices
) -> Iterator[tuple[int, npt.NDArray[np.float32], npt.NDArray[np.uint8]]]:
    """Read held-out cases whole, a few ahead: their position, image (C, D, H, W) and label (1, D, H, W)."""
    data = holdout.data
    wanted = np.asarray(positions, dtype=np.int64)
    if len(wanted) == 0:
        return
    spec = ShardSpec(
        images_uri=holdout.rows.images_uri,
        labels_uri=holdout.rows.labels_uri,
        store=data.store,
        fetch=dataclasses.replace(data.fetch, chunk_cases=4, chunks_ahead=1),
        epoch=0,
        batch=1,
        rows=holdout.rows.take(wanted),
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
