"""Manifests of any number of cases, made a column at a time: without objects, or on files that share their contents."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ingest.manifest import SCHEMA, Manifest
from ingest.stores import open_store
from ingest.testing import make_cases

from .place import DATA_DIR, side_of

LINKED_FILES = 64
"""Different pairs behind a linked folder; a file system lets each have some 65,000 names."""


def synthetic_manifest(cases: int, *, pair_kb: int = 160, seed: int = 0) -> Manifest:
    """A manifest of objects that lie nowhere: for what plans cost.

    Args:
        cases: how many.
        pair_kb: image and label together; sizes vary by a tenth.
        seed: of sizes, generations and checksums.
    """
    rng = np.random.default_rng(seed)
    voxels = pair_kb * 1024 // 5 * rng.integers(90, 110, size=cases) // 100
    generations = 1_700_000_000_000_000 + rng.integers(0, 10**12, size=(2, cases))
    checksums = rng.integers(0, 2**32, size=(2, cases), dtype=np.uint32)
    sizes = np.stack([128 + 4 * voxels, 128 + voxels])
    return _manifest(
        sizes, generations, checksums, images_uri="gs://nowhere/images/", labels_uri="gs://nowhere/labels/"
    )


def linked_cases(cases: int, pair_kb: int) -> Manifest:
    """A manifest of cases on local files: each a name of its own, 64 different contents, all in the page cache.

    Args:
        cases: how many; 100,000 take 5 s to make once, and hardly any disk.
        pair_kb: image and label together.
    """
    folder = DATA_DIR.resolve() / f"linked-{pair_kb}kb-{cases}"
    side = side_of(pair_kb)
    contents = DATA_DIR.resolve() / f"linked-{pair_kb}kb-contents"
    if not (contents / ".made").exists():
        make_cases(
            open_store(str(contents / "images")), open_store(str(contents / "labels")), LINKED_FILES, (side, side, side)
        )
        (contents / ".made").touch()
    if not (folder / ".made").exists():
        for role, ending in (("images", "x"), ("labels", "y")):
            (folder / role).mkdir(parents=True, exist_ok=True)
            for number, name in enumerate(_names(cases, ending).to_pylist()):
                target = folder / role / name
                target.unlink(missing_ok=True)
                os.link(contents / role / f"case_{number % LINKED_FILES:05d}_{ending}.npy", target)
        (folder / ".made").touch()
    status = [
        [os.stat(contents / role / f"case_{number:05d}_{ending}.npy") for number in range(LINKED_FILES)]  # noqa: PTH116
        for role, ending in (("images", "x"), ("labels", "y"))
    ]
    which = np.arange(cases) % LINKED_FILES
    sizes = np.array([[file.st_size for file in files] for files in status])[:, which]
    generations = np.array([[file.st_mtime_ns for file in files] for files in status])[:, which]
    return _manifest(
        sizes,
        generations,
        None,
        images_uri=_uri(folder / "images"),
        labels_uri=_uri(folder / "labels"),
    )


def _uri(folder: Path) -> str:
    return folder.as_uri() + "/"


def _keys(cases: int) -> pa.Array:
    numbers = pc.utf8_lpad(pc.cast(pa.array(np.arange(cases)), pa.string()), 8, "0")
    return pc.binary_join_element_wise("case_", numbers, "")


def _names(cases: int, ending: str) -> pa.Array:
    return pc.binary_join_element_wise(_keys(cases), f"_{ending}.npy", "")


def _manifest(
    sizes: npt.NDArray[np.int64],
    generations: npt.NDArray[np.int64],
    checksums: npt.NDArray[np.uint32] | None,
    *,
    images_uri: str,
    labels_uri: str,
) -> Manifest:
    """All arrays are (2, cases): images, labels."""
    cases = sizes.shape[1]
    columns = [_keys(cases)]
    for role, ending in enumerate("xy"):
        checksum = pa.nulls(cases, pa.uint32()) if checksums is None else pa.array(checksums[role])
        columns += [_names(cases, ending), pa.array(sizes[role]), pa.array(generations[role]), checksum]
    return Manifest(pa.table(columns, schema=SCHEMA), images_uri, labels_uri)
