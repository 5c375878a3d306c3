"""Replays a run's ledger against its checkpoints: was every case of every epoch trained on exactly once?"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from ingest.errors import ConfigError
from ingest.manifest import Manifest
from ingest.stores import open_store

from .checkpoint import Position, read_position
from .config import Recipe, from_json
from .holdout import split_of
from .ledger import read_ledger
from .long_table import add_chosen


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One start of the ranks, as all of them recorded it.

    Attributes:
        name: sorts by when it began.
        start_step: steps that its checkpoint covered.
        checkpoint: that it went on from; None at the start of the run.
        step_cases: cases of one step over all ranks.
        steps: by step number, the epoch and the indices of each rank.
    """

    name: str
    start_step: int
    checkpoint: str | None
    step_cases: int
    steps: dict[int, list[tuple[int, list[int]]]]


@dataclasses.dataclass(frozen=True)
class EpochAudit:
    """What became of an epoch's cases.

    Attributes:
        epoch: which one.
        cases: that were to be trained on.
        once: trained on exactly once.
        more: indices trained on more than once.
        never: indices that are lost: neither trained on, nor quarantined, nor few enough to be a tail.
        quarantined: bad cases, left out with a reason.
        tail: left out since they made no whole step.
        finished: whether the epoch came to its end; nothing is lost of one that has yet to go on.
    """

    epoch: int
    cases: int
    once: int
    more: list[int]
    never: list[int]
    quarantined: int
    tail: int
    finished: bool


@dataclasses.dataclass(frozen=True)
class Audit:
    """The whole run.

    Attributes:
        epochs: by epoch.
        attempts: starts of the ranks.
        rolled_back: steps that were taken, and taken back by going on from an earlier checkpoint.
        problems: contradictions between ledger and checkpoint.
    """

    epochs: list[EpochAudit]
    attempts: int
    rolled_back: int
    problems: list[str]

    @property
    def passed(self) -> bool:
        """Whether nothing is lost or doubled, and ledger and checkpoint agree."""
        return not self.problems and not any(epoch.more or epoch.never for epoch in self.epochs)


def audit(run_dir: str, ledger: str | None = None) -> Audit:
    """Audit a run.

    Args:
        run_dir: the run's folder, or gs:// place.
        ledger: its ledger's folder; None takes the one that the run was started with.

    Raises:
        ConfigError: there is no run, or no ledger.
    """
    store = open_store(run_dir)
    saved = next((entry for entry in store.list("recipe.json") if entry.name == "recipe.json"), None)
    if saved is None:
        raise ConfigError(f"expected a run in {run_dir}, found no recipe.json; check the folder")
    recipe = _recipe(store.fetch([saved])[0], store.uri_of(saved.name))
    folder = ledger or recipe.trainer.ledger
    if folder is None:
        raise ConfigError(
            f"expected a ledger, found that {run_dir} was run without --trainer.ledger; give --ledger DIR"
        )
    manifest = Manifest.load(f"{run_dir.rstrip('/')}/manifest.parquet")
    candidates = split_of(recipe.data, manifest, run_dir).train
    return replay(
        read_attempts(folder),
        candidates=set(candidates.tolist()),
        quarantined=_quarantined(run_dir),
        position=read_position(run_dir),
        recipe=recipe,
    )


def _recipe(data: bytes, place: str) -> Recipe:
    try:
        return from_json(data)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def read_attempts(folder: str | Path) -> list[Attempt]:
    """All attempts of a ledger, in the order they began.

    A line cut short at the end of a file is a step that was being recorded when its process was killed; no
    checkpoint can cover it.

    Raises:
        ConfigError: there is no ledger, or a line of it is damaged elsewhere.
    """
    attempts: list[Attempt] = []
    for number, texts in read_ledger(str(folder)).items():
        name = f"attempt-{number}"
        ranks = [_lines(text, f"{folder}/{name}-rank-{rank}.jsonl") for rank, text in texts.items()]
        headers = [lines[0] for lines in ranks if lines]
        if not headers:
            continue
        steps: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
        try:
            for lines in ranks:
                for line in lines[1:]:
                    steps[line["step"]].append((line["epoch"], line["indices"]))
            first = headers[0]
            step_cases = first["world_size"] * first["batch_size"]
            attempts.append(Attempt(name, first["step"], first["checkpoint"], step_cases, dict(steps)))
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{folder}/{name}-rank-*: expected the steps that a run recorded, found other lines ({error}); put "
                "back a copy of these files"
            ) from error
    return attempts


def _lines(whole: str, file: str) -> list[dict[str, Any]]:
    text = whole.split("\n")
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(text):
        if not line:
            continue
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            if number == len(text) - 1:
                break
            raise ConfigError(f"{file}:{number + 1}: expected a line of JSON, found {line[:60]!r}; damaged") from error
    return entries


def replay(
    attempts: Sequence[Attempt],
    *,
    candidates: set[int],
    quarantined: set[int],
    position: Position,
    recipe: Recipe,
) -> Audit:
    """Count what was trained on in the steps that stand.

    A step of an attempt stands if every later attempt began at it or after it, and if the run's last checkpoint covers
    it. A later attempt may begin before its predecessor did: the predecessor's checkpoint may have been damaged.
    """
    trained: dict[int, Counter[int]] = defaultdict(Counter)
    step_cases: dict[int, int] = defaultdict(int)  # the most that a step of the epoch's attempts takes
    problems: list[str] = []
    rolled_back = 0
    reached = 0  # the last step that an attempt so far has taken
    for number, attempt in enumerate(attempts):
        stands = min([position.step, *(later.start_step for later in attempts[number + 1 :])])
        if attempt.start_step > reached:
            problems.append(f"{attempt.name} goes on from step {attempt.start_step}, expected {reached} at the most")
        problems.extend(
            f"{attempt.name} has no record of step {step}, which a checkpoint covers"
            for step in range(attempt.start_step + 1, stands + 1)
            if step not in attempt.steps
        )
        for step, parts in attempt.steps.items():
            if step > stands:
                rolled_back += 1
                continue
            for epoch, indices in parts:
                trained[epoch].update(indices)
                # An attempt of more ranks may find that what an epoch has left makes no step of theirs, and go on with
                # the next: so it counts for the epoch before its own too.
                for bounded in (epoch - 1, epoch):
                    step_cases[bounded] = max(step_cases[bounded], attempt.step_cases)
        reached = max([reached, attempt.start_step, *attempt.steps])
    before = set(position.before.indices.tolist())
    in_ledger = set(trained.get(position.epoch, Counter()))
    if before != in_ledger:
        problems.append(
            f"the last checkpoint covers {len(before)} cases of epoch {position.epoch + 1}, the ledger {len(in_ledger)}"
        )
    epochs: list[EpochAudit] = []
    for epoch in sorted(trained):
        counts = trained[epoch]
        strangers = sorted(set(counts) - candidates)
        if strangers:
            problems.append(f"epoch {epoch + 1} trained on cases that are held out or unknown: {strangers[:5]}")
        left = sorted(candidates - set(counts) - quarantined)
        finished = epoch < position.epoch
        lost = left if finished and len(left) >= step_cases[epoch] else []
        epochs.append(
            EpochAudit(
                epoch=epoch,
                cases=len(candidates),
                once=sum(count == 1 for count in counts.values()),
                more=sorted(index for index, count in counts.items() if count > 1),
                never=lost,
                quarantined=len((candidates & quarantined) - set(counts)),
                tail=len(left) if finished and not lost else 0,
                finished=finished,
            )
        )
    missing = sorted(set(range(min(position.epoch, recipe.trainer.epochs))) - set(trained))
    if missing:
        problems.append(f"epochs without a single step: {[epoch + 1 for epoch in missing]}")
    return Audit(epochs, len(attempts), rolled_back, problems)


def _quarantined(run_dir: str) -> set[int]:
    store = open_store(run_dir)
    for entry in store.list("quarantine.parquet"):
        if entry.name == "quarantine.parquet":
            table = pq.read_table(pa.BufferReader(store.fetch([entry])[0]), columns=["index"])
            return set(table["index"].to_pylist())
    return set()


def audit_table(found: Audit) -> Table:
    """The audit, a row an epoch, counted from 1; of many epochs the first, the last, and those with lost cases."""
    table = Table(title=f"{found.attempts} starts, {found.rolled_back} steps rolled back")
    for heading in ("epoch", "cases", "trained once", "more than once", "never", "quarantined", "tail", "finished"):
        table.add_column(heading, justify="right")
    cells = [
        (
            *map(str, (epoch.epoch + 1, epoch.cases, epoch.once, len(epoch.more), len(epoch.never))),
            *map(str, (epoch.quarantined, epoch.tail, "yes" if epoch.finished else "no")),
        )
        for epoch in found.epochs
    ]
    add_chosen(table, cells, [at for at, epoch in enumerate(found.epochs) if epoch.more or epoch.never])
    return table
