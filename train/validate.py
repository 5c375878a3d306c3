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
from ingest.errors import DecodeError
from ingest.fetch import ShardSpec, read_shard
from ingest.manifest import Manifest
from ingest.pipeline import DataConfig, views
from ingest.plan import Indices
from ingest.quarantine import Quarantine, entry_of

from .evaluate import SlidingWindowConfig, score_case

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Holdout:
    """The held-out cases.

    Attributes:
        rows: of the manifest; each rank scores its own share of them.
        indices: (h,) int64, their indices in the whole manifest.
        data: how they are read.
        quarantine: the run's bad cases; None where they end the run.
    """

    rows: Manifest
    indices: Indices
    data: DataConfig
    quarantine: Quarantine | None = None


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
    bad = 0
    if holdout.quarantine is not None:
        bad = len(np.intersect1d(holdout.quarantine.indices(), holdout.indices))
    if sum(map(len, everyones)) != len(merged) or len(merged) != len(holdout.rows) - bad:
        raise RuntimeError(
            f"expected {len(holdout.rows) - bad} good held-out cases, each scored once, found "
            f"{sum(map(len, everyones))} scores of {len(merged)} cases; report this with the log"
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
        block=1,
        rows=holdout.rows.take(wanted),
        indices=holdout.indices[wanted],
        bad=data.bad,
        quarantine=holdout.quarantine,
    )
    position_of = dict(zip(spec.indices.tolist(), wanted.tolist(), strict=True))
    for table in read_shard(spec):
        bodies = zip(views(table["image_npy"]), views(table["label_npy"]), strict=True)
        for row, (image_npy, label_npy) in zip(
            table.drop_columns(["image_npy", "label_npy"]).to_pylist(), bodies, strict=True
        ):
            if row["left_out"]:
                continue
            names = {"image_name": row["image_name"], "label_name": row["label_name"]}
            try:
                image_CDHW, label_1DHW = decode_case(image_npy, label_npy, data.decode, **names)
            except DecodeError as error:
                if holdout.quarantine is None or not data.bad.takes(error):
                    raise
                uri = names["label_name"] if str(error).startswith(names["label_name"]) else names["image_name"]
                holdout.quarantine.report(
                    entry_of(error, index=row["index"], case_id=row["case_id"], uri=uri, epoch=row["epoch"])
                )
                continue
            yield position_of[row["index"]], image_CDHW, label_1DHW
