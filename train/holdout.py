"""The held-out cases of a run, how they are dealt to its ranks, and the record of them that its folder keeps.

What deals them out runs in processes of Ray's own, so this module imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray.data
import ray.train

from ingest.errors import ManifestError, PlaceNotFoundError
from ingest.fetch import read_shard
from ingest.holdout import Split, read_case_list, split_by_fraction, split_by_list, split_by_second
from ingest.index import index_cases
from ingest.manifest import Manifest
from ingest.pipeline import DataConfig
from ingest.plan import Indices
from ingest.quarantine import Quarantine
from ingest.stores import open_store
from ingest.volumes import Case, case_shard, case_volumes, decode_rows

HELD_OUT = "held_out"  # the data set's name among those of a trainer
HELD_OUT_FILE = "held_out.parquet"


@dataclasses.dataclass(frozen=True)
class Holdout:
    """The held-out cases.

    Attributes:
        rows: to score; with no row where nothing is held out.
        indices: (h,) int64, their indices in the run.
        data: how they are read.
        quarantine: the run's bad cases; None where they end the run.
    """

    rows: Manifest
    indices: Indices
    data: DataConfig
    quarantine: Quarantine | None = None

    def dataset(self) -> ray.data.Dataset:
        """All of them, raw; nothing is read before it is iterated."""
        return case_volumes(self.rows, self.indices, self.data, self.quarantine)

    def good_cases(self) -> Iterator[Case]:
        """The good ones, one after the other, read here."""
        for index in range(len(self.rows)):
            picked = np.array([index])
            for raw in read_shard(case_shard(self.rows, picked, self.indices[picked], self.data, self.quarantine)):
                yield from decode_rows(raw, self.data, self.quarantine)


class RankData(ray.train.DataConfig):
    """Deals training samples out evenly, and held-out cases each to exactly one rank."""

    def configure(
        self,
        datasets: dict[str, ray.data.Dataset],
        world_size: int,
        worker_handles: list[Any] | None,
        worker_node_ids: list[str] | None,
        **kwargs: Any,
    ) -> list[dict[str, ray.data.DataIterator]]:
        """See `ray.train.DataConfig.configure`, which would leave out cases for the sake of equal numbers."""
        others = {name: dataset for name, dataset in datasets.items() if name != HELD_OUT}
        output: list[dict[str, ray.data.DataIterator]] = super().configure(
            others, world_size, worker_handles, worker_node_ids, **kwargs
        )
        if HELD_OUT in datasets:
            parts = datasets[HELD_OUT].streaming_split(world_size, equal=False, locality_hints=worker_node_ids)
            for mine, part in zip(output, parts, strict=True):
                mine[HELD_OUT] = part
        return output


def split_of(data: DataConfig, manifest: Manifest, run_dir: str | None = None) -> Split:
    """Split a run's cases as its configuration says.

    Args:
        data: names a list, a second pair of URIs, or a share.
        manifest: of all cases.
        run_dir: of the run that is gone on with or looked at: a list or a listing holds as it was when the run began.
            None for a new run.

    Raises:
        ConfigError: a listed case is not in the manifest, nothing would be left to train on, or the subject pattern
            names no subject in a case id.
        IngestError: the second pair of URIs cannot be listed or paired.
    """
    if not data.holdout_cases and not data.eval_images:
        return split_by_fraction(manifest, data.seed, data.holdout_fraction, data.subject_pattern)
    saved = None if run_dir is None else load_held_out(run_dir)
    if data.holdout_cases:
        names = read_case_list(data.holdout_cases, data.store) if saved is None else saved.table["case_id"].to_pylist()
        return split_by_list(manifest, names, data.holdout_cases, data.subject_pattern)
    second = saved or index_cases(data.eval_images, data.eval_labels, data.store, data.pairing).manifest
    return split_by_second(manifest, second, data.subject_pattern)


def save_held_out(run_dir: str, split: Split) -> None:
    """Keep the held-out cases with the run, where there are any."""
    if len(split.held_out):
        split.held_out.save(f"{run_dir.rstrip('/')}/{HELD_OUT_FILE}")


def load_held_out(run_dir: str) -> Manifest:
    """The cases that a run holds out.

    Raises:
        ManifestError: the run kept none.
    """
    uri = f"{run_dir.rstrip('/')}/{HELD_OUT_FILE}"
    store = open_store(run_dir)
    try:
        there = any(entry.name == HELD_OUT_FILE for entry in store.list(HELD_OUT_FILE))
    except PlaceNotFoundError:
        there = False
    try:
        return Manifest.load(uri)
    except ManifestError as error:
        if there:
            raise ManifestError(
                f"expected the held-out cases of a run in {uri}, found a damaged file ({error}); put back a copy of "
                "it, or score other cases: give --images and --labels, and no --cases held-out"
            ) from error
        raise ManifestError(
            f"expected the held-out cases of a run in {uri}, found none ({error}); give --images and --labels, and no "
            "--cases held-out"
        ) from error
