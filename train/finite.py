"""Stops a run whose loss or gradient is no longer finite, and names the cases of that step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

from ingest.errors import IngestError
from ingest.manifest import Manifest
from ingest.stores import open_store

from .plain_json import to_json
from .step import StepResult
from .validate import gather

NONFINITE_FILE = "nonfinite.json"
NAMED = 8


class NonFiniteError(IngestError):
    """A step's loss or gradient is NaN or infinite.

    Attributes:
        case_ids: the cases whose own loss is not finite; all of the step, over all ranks, where each loss is finite
            and only the gradient is not.
    """

    def __init__(self, message: str, case_ids: Sequence[str] = ()) -> None:
        super().__init__(message, tuple(case_ids))
        self.case_ids = tuple(case_ids)

    def __str__(self) -> str:
        return str(self.args[0])


def stop_run(
    result: StepResult, indices: Sequence[int], *, epoch: int, step: int, rate: float, run_dir: str, rank: int
) -> NoReturn:
    """Write RUN_DIR/nonfinite.json and raise; every rank must call it, and all raise the same.

    Args:
        result: this rank's step.
        indices: of this rank's cases of the step, in the order of `result.sample_losses`.
        epoch: from 0.
        step: the number that the step would have had; it is in no checkpoint.
        rate: the learning rate.
        run_dir: the run's folder, or gs:// place; its manifest has the names of the cases.
        rank: of this process; rank 0 writes.

    Raises:
        NonFiniteError: always.
    """
    everyones = gather((list(indices), result.sample_losses, result.gradient_norm))
    losses = {index: loss for part, values, _ in everyones for index, loss in zip(part, values, strict=True)}
    norms = [norm for _, _, norm in everyones]
    guilty = sorted(index for index, loss in losses.items() if not math.isfinite(loss))
    ids = Manifest.load(f"{run_dir}/manifest.parquet").table["case_id"]
    name_of = {index: str(ids[index].as_py()) for index in losses}
    named = [name_of[index] for index in guilty or sorted(losses)]
    if rank == 0:
        report: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            "learning_rate": rate,
            "gradient_norm": [_plain(norm) for norm in norms],
            "case_ids": named,
            "loss_by_case": {name_of[index]: _plain(losses[index]) for index in sorted(losses)},
        }
        open_store(run_dir).put(NONFINITE_FILE, to_json(report).encode() + b"\n")
    if guilty:
        found = f"a loss that is not finite for {len(guilty)} of its {len(losses)} cases"
    else:
        found = f"a gradient that is not finite (norm {norms[0]}), with a finite loss for each of its cases"
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    raise NonFiniteError(
        f"expected a finite loss and gradient in step {step}, epoch {epoch + 1} (learning rate {rate:g}), found "
        f"{found}: {', '.join(named[:NAMED])}{more}; look at the cases in {run_dir}/{NONFINITE_FILE}, then go "
        f"on by --trainer.resume {run_dir} with a lower --optimizer.learning-rate than {rate:g}, with "
        "--optimizer.clip-norm, or with --trainer.precision fp32",
        named,
    )


def _plain(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
