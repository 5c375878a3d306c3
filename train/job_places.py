"""Where a job reads and writes: places that mean the same on the cluster as where the job is submitted."""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePosixPath

from ingest.holdout import SHIPPED

from .config import Recipe

HOME = "~/voxflux"
"""Of a job's own folders on the head: Ray removes a job's working directory after it."""


def placed(recipe: Recipe, submission_id: str) -> Recipe:
    """The recipe with every local place made absolute, and a run folder on the head where none was given.

    Relative ones are taken from here, as the user typed them; `~` in a run folder is the head's.
    """
    data, trainer, demo = recipe.data, recipe.trainer, recipe.demo
    listed = data.holdout_cases
    data = dataclasses.replace(
        data,
        images=absolute(data.images),
        labels=absolute(data.labels),
        manifest=absolute(data.manifest) if data.manifest else None,
        eval_images=absolute(data.eval_images),
        eval_labels=absolute(data.eval_labels),
        # A list that comes with voxflux is named, and no file.
        holdout_cases=listed if listed is None or listed in SHIPPED else absolute(listed),
    )
    run_dir = recipe.run_dir
    if run_dir is None and trainer.resume is None:
        run_dir = f"{HOME}/runs/{submission_id}"
    trainer = dataclasses.replace(
        trainer,
        resume=absolute(trainer.resume) if trainer.resume else None,
        ledger=absolute(trainer.ledger) if trainer.ledger else None,
    )
    if demo is not None and not PurePosixPath(demo.data_dir).is_absolute() and not demo.data_dir.startswith("~"):
        demo = dataclasses.replace(demo, data_dir=f"{HOME}/{demo.data_dir}")
    return dataclasses.replace(
        recipe, run_dir=absolute(run_dir) if run_dir else None, data=data, trainer=trainer, demo=demo
    )


def absolute(place: str) -> str:
    """A URI or a place under a home folder as it is; any other as an absolute path."""
    return place if not place or "://" in place or place.startswith("~") else str(Path(place).absolute())


def place_warnings(recipe: Recipe, here: str, node_ips: list[str]) -> list[str]:
    """What may not be there on the cluster.

    Args:
        recipe: as `placed` gives it.
        here: this machine's IP address, as Ray sees it.
        node_ips: of the cluster's nodes.
    """
    warnings = []
    others = [ip for ip in node_ips if ip != here]
    reads = {"--data.images": recipe.data.images, "--data.labels": recipe.data.labels}
    reads |= {"--data.manifest": recipe.data.manifest or ""}
    reads |= {"--data.eval-images": recipe.data.eval_images, "--data.eval-labels": recipe.data.eval_labels}
    if recipe.data.holdout_cases not in SHIPPED:
        reads["--data.holdout-cases"] = recipe.data.holdout_cases or ""
    for flag, place in reads.items():
        if place and _is_local(place) and others:
            warnings.append(
                f"{flag} {place} is a folder, and the cluster has other machines than this one ({_some(others)}): "
                "the run fails unless it is the same folder on all of them; gs:// places are seen by all"
            )
    writes = {"--run-dir": recipe.run_dir or "", "--trainer.resume": recipe.trainer.resume or ""}
    writes |= {"--trainer.ledger": recipe.trainer.ledger or ""}
    for flag, place in writes.items():
        if place and _is_local(place) and len(node_ips) > 1:
            warnings.append(
                f"{flag} {place} is a folder, and the cluster has {len(node_ips)} nodes: ranks on other nodes than "
                f"the head fail unless all share it; give {flag} gs://…"
            )
    return warnings


def _is_local(place: str) -> bool:
    return "://" not in place or place.startswith("file://")


def _some(ips: list[str]) -> str:
    return ", ".join(ips[:3]) + (f" and {len(ips) - 3} more" if len(ips) > 3 else "")
