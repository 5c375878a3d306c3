"""Scores the held-out cases over all ranks, each exactly once: Ray Data deals them out, each rank scores its own."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch
import torch.distributed

from ingest.errors import ConfigError
from ingest.pipeline import DataConfig
from ingest.quarantine import QUARANTINE_FILE, Quarantine, QuarantineEntry
from ingest.stores import open_store
from ingest.volumes import decode_rows

from .evaluate import SlidingWindowConfig, score_case
from .holdout import Holdout

T = TypeVar("T")

SCORES_FOLDER = "scores"
SHOWN = 3  # cases that a message names


def gather(mine: T) -> list[T]:
    """Every rank's value, by rank, on every rank."""
    if not torch.distributed.is_initialized():
        return [mine]
    everyones: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, mine)
    return everyones


def from_rank_0(read: Callable[[], T]) -> T:
    """What rank 0 reads, on every rank; the others read nothing.

    Raises:
        Exception: whatever `read` raises on rank 0, on every rank.
    """
    if not torch.distributed.is_initialized():
        return read()
    answers: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            answers = [(read(), None)]
        except Exception as error:  # noqa: BLE001  it is raised below, on every rank
            answers = [(None, error)]
    torch.distributed.broadcast_object_list(answers, src=0)
    found, failure = answers[0]
    if failure is not None:
        raise failure
    return cast("T", found)


@dataclasses.dataclass(frozen=True)
class CaseScore:
    """One case's Dice.

    Attributes:
        index: of the case in the run.
        case_id: its key.
        dice: of classes 1 to K-1. A class that is absent from the label scores 1 if it is not predicted either, and
            about 0 if it is.
        present: for each of these classes, whether the label has it.
    """

    index: int
    case_id: str
    dice: list[float]
    present: list[bool]

    @property
    def mean_dice(self) -> float:
        """Over the foreground classes."""
        return float(np.mean(self.dice))

    @property
    def mean_dice_present(self) -> float | None:
        """Over the classes that the label has; None where it has none."""
        there = [dice for dice, present in zip(self.dice, self.present, strict=True) if present]
        return float(np.mean(there)) if there else None

    @property
    def empty(self) -> bool:
        """Whether the label has no foreground."""
        return not any(self.present)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Held-out scores over all ranks.

    Attributes:
        mean_dice: mean over cases of the mean over foreground classes.
        by_class: mean over cases, for each foreground class.
        by_case: each case's, by index.
    """

    mean_dice: float
    by_class: list[float]
    by_case: list[CaseScore]

    @property
    def cases(self) -> int:
        """How many were scored."""
        return len(self.by_case)

    @property
    def empty(self) -> int:
        """Cases whose label has no foreground."""
        return sum(score.empty for score in self.by_case)

    @property
    def mean_dice_present(self) -> float | None:
        """Mean over cases of the mean over the classes that a case's label has; cases with empty labels are left out.

        None where every label is empty.
        """
        means = [score.mean_dice_present for score in self.by_case]
        there = [mean for mean in means if mean is not None]
        return float(np.mean(there)) if there else None


def score_rows(
    network: torch.nn.Module,
    tables: Iterable[pa.Table],
    data: DataConfig,
    window: SlidingWindowConfig,
    device: torch.device,
    quarantine: Quarantine | None = None,
) -> Iterator[CaseScore]:
    """Score raw cases, one after the other."""
    for raw in tables:
        for case in decode_rows(raw, data, quarantine):
            image, label = (torch.from_numpy(volume.copy()).to(device) for volume in (case.image, case.label))
            dice = score_case(network, image, label, window)
            present = [bool((label == number).any()) for number in range(1, len(dice) + 1)]
            yield CaseScore(case.index, case.case_id, [float(value) for value in dice], present)


def merge(parts: Sequence[Sequence[CaseScore]], expected: int) -> Scores:
    """All ranks' scores as one: the same to the last bit whatever the ranks, since sums are taken by index.

    Args:
        parts: what each scored.
        expected: how many cases there are.

    Raises:
        RuntimeError: a case was scored twice or not at all.
        ConfigError: every case's label is empty, so that predicting nothing would score 1.
    """
    by_index = {score.index: score for part in parts for score in part}
    if sum(map(len, parts)) != len(by_index) or len(by_index) != expected:
        raise RuntimeError(
            f"expected {expected} good held-out cases, each scored once, found {sum(map(len, parts))} scores of "
            f"{len(by_index)} cases; report this with the log"
        )
    by_case = [by_index[index] for index in sorted(by_index)]
    if by_case and all(score.empty for score in by_case):
        raise ConfigError(
            "expected foreground in the label of at least one held-out case, found only background in all "
            f"{len(by_case)}, first: {by_case[0].case_id}; check the labels' values, and that --data.labels names the "
            "right place"
        )
    table = np.array([score.dice for score in by_case], dtype=np.float64)
    return Scores(float(table.mean()), table.mean(axis=0).tolist(), by_case)


def evaluate(
    network: torch.nn.Module,
    holdout: Holdout,
    window: SlidingWindowConfig,
    shard: ray.data.DataIterator,
    device: torch.device,
    asked: Callable[[], bool] = lambda: False,
) -> Scores | None:
    """Score every held-out case exactly once, over all ranks; each rank calls it.

    Args:
        network: the same on every rank.
        holdout: all cases.
        window: how a volume is covered.
        shard: this rank's part of `Holdout.dataset`.
        device: of the network.
        asked: whether this rank is asked to stop, which may be known to some ranks before others.

    Returns:
        The scores; None on every rank if one of them was asked to stop after a case, the last one included.

    Raises:
        ConfigError: every held-out case is in quarantine.
        RuntimeError: a case was scored twice or not at all.
    """
    network.eval()
    share_buffers(network)
    tables = shard.iter_batches(batch_size=None, batch_format="pyarrow")  # type: ignore[arg-type]  # None: as blocks lie
    mine: list[CaseScore] = []
    stopped = False
    for score in score_rows(network, tables, holdout.data, window, device, holdout.quarantine):
        mine.append(score)
        if stopped := asked():
            break
    everyones = gather((mine, stopped))
    if any(stopped for _, stopped in everyones):
        return None
    parts = [part for part, _ in everyones]
    bad = []
    if holdout.quarantine is not None:
        # Not those that were scored: Ray may read a block again later, and find a case of it bad by then.
        unscored = set(holdout.indices.tolist()) - {score.index for part in parts for score in part}
        bad = [entry for entry in holdout.quarantine.entries() if entry.index in unscored]
    if bad and len(bad) == len(holdout.rows):
        raise none_to_score(bad)
    return merge(parts, len(holdout.rows) - len(bad))


def none_to_score(bad: Sequence[QuarantineEntry]) -> ConfigError:
    """The error of a run whose held-out cases are all bad.

    Args:
        bad: the quarantine's entries of all held-out cases, at least one.
    """
    named = "; ".join(f"{entry.case_id} ({entry.reason}): {entry.message}" for entry in bad[:SHOWN])
    more = f"; and {len(bad) - SHOWN} more, in {QUARANTINE_FILE} of the run's folder" if len(bad) > SHOWN else ""
    return ConfigError(
        f"expected at least one held-out case that can be scored, found all {len(bad)} in quarantine: {named}{more}; "
        "mend these cases and begin a new run, or go on without scores by --trainer.resume with "
        "--trainer.evaluate-every 0"
    )


def share_buffers(network: torch.nn.Module) -> None:
    """Give every rank rank 0's running statistics of batch norm, which are those that checkpoints hold.

    DDP does so at the beginning of a step, and each rank then adds its own batch to them.
    """
    if torch.distributed.is_initialized():
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)


def to_parquet(by_case: Sequence[CaseScore]) -> bytes:
    """A row a case: `case_id`, `mean_dice`, `mean_dice_present`, `empty`, and `dice_1`, `dice_2`, … by class.

    `mean_dice_present` is null where the label is empty.
    """
    columns: dict[str, Any] = {
        "case_id": [score.case_id for score in by_case],
        "mean_dice": [score.mean_dice for score in by_case],
        "mean_dice_present": pa.array([score.mean_dice_present for score in by_case], pa.float64()),
        "empty": [score.empty for score in by_case],
    }
    for number in range(len(by_case[0].dice) if by_case else 0):
        columns[f"dice_{number + 1}"] = [score.dice[number] for score in by_case]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def save_scores(run_dir: str, epoch: int, scores: Scores) -> None:
    """Keep an epoch's scores by case in RUN_DIR/scores/epoch-00000.parquet."""
    open_store(run_dir).put(f"{SCORES_FOLDER}/epoch-{epoch:05d}.parquet", to_parquet(scores.by_case))
