"""Small data sets in a folder, and every way in which a case of one can be bad."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ingest.stores import open_store
from ingest.testing import make_cases, npy_bytes

SIDE = 10  # voxels along each axis of a good case
BEFORE_LISTING = {
    "truncated": "truncated",
    "not-npy": "not-npy",
    "nan": "non-finite",
    "label-seven": "label-value",
    "wrong-dtype": "dtype",
    "shape-mismatch": "shape-mismatch",
    "too-small": "smaller-than-patch",
    "pickled": "pickled",
}
AFTER_LISTING = {"gone": "missing", "label-gone": "missing", "overwritten": "stale"}
REASONS = BEFORE_LISTING | AFTER_LISTING
LABEL_AT_FAULT = ("label-seven", "label-gone")


def make_set(root: Path, count: int) -> None:
    """So many good cases in root/images and root/labels."""
    make_cases(open_store(f"{root}/images"), open_store(f"{root}/labels"), count, shape=(SIDE, SIDE, SIDE), seed=count)


def copy_set(source: Path, target: Path, count: int | None = None) -> Path:
    """The first so many cases, or all, by hard links; `ruin` replaces files and never writes into one."""
    for role in ("images", "labels"):
        (target / role).mkdir(parents=True)
        for file in sorted((source / role).iterdir())[:count]:
            (target / role / file.name).hardlink_to(file)
    return target


def files_of(root: Path, number: int) -> tuple[Path, Path]:
    return root / "images" / f"case_{number:05d}_x.npy", root / "labels" / f"case_{number:05d}_y.npy"


def ruin(root: Path, number: int, kind: str) -> Path:
    """Make one case bad; the file at fault."""
    image, label = files_of(root, number)
    good, mask = np.load(image), np.load(label)
    file = label if kind in LABEL_AT_FAULT else image
    if kind == "label-seven":
        mask[0, 3, 4, 5] = 7
        body = npy_bytes(mask)
    elif kind == "nan":
        good[0, 1, 2, 3] = np.nan
        body = npy_bytes(good)
    elif kind == "truncated":
        body = image.read_bytes()[:-100]
    elif kind == "overwritten":
        body = npy_bytes(good + 1)
    else:
        body = {
            "not-npy": b"<html>502 Bad Gateway</html>",
            "wrong-dtype": npy_bytes(good.astype(np.float64)),
            "shape-mismatch": npy_bytes(good[:, :-1]),
            "too-small": npy_bytes(good[:, :7]),
            "pickled": npy_bytes(good).replace(b"'<f4'", b"'|O' ", 1),
        }.get(kind, b"")
    file.unlink()
    if kind == "too-small":
        label.unlink()
        label.write_bytes(npy_bytes(mask[:, :7]))
    if kind not in ("gone", "label-gone"):
        file.write_bytes(body)
    return file


def trip(root: Path, number: int) -> None:
    """From now on whoever reads the case fails with a StoreError, which no quarantine takes."""
    for file in files_of(root, number):
        file.unlink(missing_ok=True)
        file.symlink_to(file)
