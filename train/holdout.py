"""The held-out cases of a run, and the record of them that its folder keeps."""

from __future__ import annotations

from ingest.errors import ManifestError
from ingest.holdout import Split, read_case_list, split_by_fraction, split_by_list, split_by_second
from ingest.index import index_cases
from ingest.manifest import Manifest
from ingest.pipeline import DataConfig

HELD_OUT_FILE = "held_out.parquet"


def split_of(data: DataConfig, manifest: Manifest, run_dir: str | None = None) -> Split:
    """Split a run's cases as its configuration says.

    Args:
        data: names a list, a second pair of URIs, or a share.
        manifest: of all cases.
        run_dir: of the run that is gone on with or looked at: a list or a listing holds as it was when the run began.
            None for a new run.

    Raises:
        ConfigError: a listed case is not in the manifest, or nothing would be left to train on.
        IngestError: the second pair of URIs cannot be listed or paired.
    """
    if not data.holdout_cases and not data.eval_images:
        return split_by_fraction(manifest, data.seed, data.holdout_fraction)
    saved = None if run_dir is None else load_held_out(run_dir)
    if data.holdout_cases:
        names = read_case_list(data.holdout_cases, data.store) if saved is None else saved.table["case_id"].to_pylist()
        return split_by_list(manifest, names, data.holdout_cases)
    second = saved or index_cases(data.eval_images, data.eval_labels, data.store, data.pairing).manifest
    return split_by_second(manifest, second)


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
    try:
        return Manifest.load(uri)
    except ManifestError as error:
        raise ManifestError(
            f"expected the held-out cases of a run in {uri}, found none ({error}); give --images and --labels, and no "
            "--cases held-out"
        ) from error
