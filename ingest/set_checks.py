"""Finds faults of a data set as a whole. `inspect` and the start of a run share these checks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow.compute as pc

from .crop import Shape
from .decode import LABEL_DTYPE, DecodeConfig, check_channels, read_array, read_header
from .errors import ConfigError, DecodeError, ObjectError, QuarantineBudgetError, StaleManifestError
from .manifest import Manifest, cases_of
from .plan import Indices
from .quarantine import BadCaseConfig
from .stores import ObjectMeta, Store, StoreConfig, open_store

LABELS_LOOKED_AT = 32  # at the most, where none has foreground
LOOKED_AT = 8  # smallest images that are read at the most, where those before are to be quarantined


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a run wants of every volume."""

    patch: Shape
    """(D, H, W) of the patch, in voxels."""

    decode: DecodeConfig
    """The properties of a good case."""

    store: StoreConfig
    """How to read images."""

    bad: BadCaseConfig
    """The policies for bad and stale cases."""


def check_foreground(manifest: Manifest, store: StoreConfig, seed: int, left_out: Indices | None = None) -> str | None:
    """Refuse a data set whose labels are all empty: predicting nothing would score 1 on it.

    Where the manifest has boxes (`voxflux index --boxes`), nothing is read. Else labels are read in a random order, by
    the run's seed, until one has foreground: of nearly all data sets, one. A label that cannot be read says nothing
    here: its reading by the run will report it.

    Args:
        manifest: of all cases.
        store: how to read labels.
        seed: of the run.
        left_out: (q,) int64, indices of the cases that the run leaves out already.

    Returns:
        A warning where every label that was looked at is empty, and there are more; else None.

    Raises:
        ConfigError: every label is empty.
    """
    table = manifest.table
    if "boxes" in table.column_names and not table["boxes"].null_count:
        if len(manifest) and not any(table["boxes"].to_pylist()):
            raise _all_empty(manifest)
        return None
    wanted = np.arange(len(manifest)) if left_out is None else np.setdiff1d(np.arange(len(manifest)), left_out)
    order = np.random.default_rng(seed).permutation(wanted)[:LABELS_LOOKED_AT]
    labels = open_store(manifest.labels_uri, store)
    empty = 0
    for index in order.tolist():
        label = cases_of(manifest.take(np.asarray([index])))[0].label
        found = _has_foreground(labels, label)
        if found:
            return None
        empty += found is not None
    if empty and empty == len(manifest):
        raise _all_empty(manifest)
    if not empty:
        return None
    return (
        f"warning: expected foreground in the labels, found only background in the {empty} that were looked at, of "
        f"{len(manifest)} in {manifest.labels_uri}; check the labels' values, and that --data.labels names the right "
        "place"
    )


def _has_foreground(store: Store, label: ObjectMeta) -> bool | None:
    body = store.fetch_each([label])[0]
    if isinstance(body, ObjectError):
        return None
    try:
        return bool(read_array(body, store.uri_of(label.name), np.dtype(LABEL_DTYPE)).any())
    except DecodeError:
        return None


def _all_empty(manifest: Manifest) -> ConfigError:
    return ConfigError(
        f"expected foreground in at least one label, found only background in all {len(manifest)} labels of "
        f"{manifest.labels_uri}; check the labels' values, and that --data.labels names the right place"
    )


def check_smallest(
    manifest: Manifest,
    wanted: Wanted,
    candidates: Indices | None = None,
    quarantined: Indices | None = None,
) -> str | None:
    """Every volume to train on must hold a patch, or be one that the run may quarantine.

    Where the manifest has shapes, all of them are looked at. Of cases without one, the smallest image by its bytes is
    read. A case that the policies quarantine is passed over, as its reading will report it, and the next one is looked
    at, up to LOOKED_AT of them.

    Args:
        manifest: of all cases.
        wanted: the patch, and the policies for bad and stale cases.
        candidates: (n,) int64, indices to train on; None for all.
        quarantined: (q,) int64, indices of the cases that the run leaves out already.

    Returns:
        What is bad and will be quarantined, in words; None where nothing was found.

    Raises:
        ConfigError: a volume is smaller than the patch, and such cases end the run.
        ObjectError, DecodeError: an image that was looked at cannot be read, and such cases end the run.
        QuarantineBudgetError: more cases are bad than the run may leave out.
    """
    bad = wanted.bad
    left_out = np.zeros(0, dtype=np.int64) if quarantined is None or not bad.quarantines else quarantined
    trained = np.setdiff1d(np.arange(len(manifest)) if candidates is None else candidates, left_out)
    thin, first, unknown = _known_thin(manifest, trained, wanted.patch)
    if first is not None and bad.on_bad == "fail":
        raise _too_small(wanted.patch, first, thin)
    lines = [] if first is None else [f"{thin} volumes are smaller than the patch, first {first[0]} of {first[1]}"]
    order = unknown[np.argsort(manifest.table["image_bytes"].to_numpy()[unknown], kind="stable")]
    for index in order[:LOOKED_AT].tolist():
        found = _look_at(manifest, wanted, index)
        if found is None:
            break
        thin += 1
        lines.append(found)
    if not lines:
        return None
    budget = bad.budget(len(manifest))
    if len(left_out) + thin > budget:
        raise QuarantineBudgetError(
            f"expected at most {budget} bad cases, found {len(left_out) + thin}, of which {len(left_out)} are "
            f"quarantined already: {'; '.join(lines)}; mend these cases, choose a smaller --data.crop.patch, or raise "
            "--data.budget-cases"
        )
    return f"{thin} cases will be quarantined, of a budget of {budget}: {'; '.join(lines)}"


def _known_thin(
    manifest: Manifest, wanted: Indices, patch: Shape
) -> tuple[int, tuple[str, tuple[int, ...]] | None, Indices]:
    """How many volumes are too small by the manifest, the first one and its shape, and the cases of unknown shape."""
    if "depth" not in manifest.table.column_names:
        return 0, None, wanted
    # Unknown shapes are 0 here: a known one is above 0 on every axis.
    columns = [pc.fill_null(manifest.table[name], 0).to_numpy() for name in ("depth", "height", "width")]
    shapes = np.stack(columns, axis=1)[wanted]
    unknown = shapes[:, 0] == 0
    thin = np.flatnonzero(~unknown & (shapes < np.asarray(patch)).any(axis=1))
    if len(thin) == 0:
        return 0, None, wanted[unknown]
    name = manifest.images_uri + manifest.table["image"][int(wanted[thin[0]])].as_py()
    return len(thin), (name, tuple(shapes[thin[0]].tolist())), wanted[unknown]


def _look_at(manifest: Manifest, wanted: Wanted, index: int) -> str | None:
    """Read one image's header: why its case will be quarantined, or None where it is good.

    Raises:
        IngestError: it is bad, and the policy is to end the run.
    """
    bad, patch = wanted.bad, wanted.patch
    image = cases_of(manifest.take(np.asarray([index])))[0].image
    store = open_store(manifest.images_uri, wanted.store)
    name = store.uri_of(image.name)
    body = store.fetch_each([image])[0]
    if isinstance(body, StaleManifestError) and bad.on_stale == "refresh":
        now = next((found for found in store.list(image.name) if found.name == image.name), None)
        body = body if now is None else store.fetch_each([now])[0]
    try:
        if isinstance(body, ObjectError):
            raise body
        header, _ = read_header(body, name)
        if len(header.shape) == 4:  # before the patch: with channels last, the last of D, H and W would be too small
            check_channels(header.shape, wanted.decode, name)
    except (ObjectError, DecodeError) as error:
        if not bad.takes(error):
            raise
        return str(error)
    shape = header.shape[1:]
    if len(header.shape) != 4 or all(have >= want for have, want in zip(shape, patch, strict=True)):
        return None  # what else may be wrong is for the reading to say
    if bad.on_bad == "fail":
        raise _too_small(patch, (name, shape))
    return f"{name} of {shape} is smaller than the patch"


def _too_small(patch: Shape, first: tuple[str, tuple[int, ...]], count: int | None = None) -> ConfigError:
    name, shape = first
    where = f"the smallest, {name}" if count is None else f"the first of {count} that do not, {name}"
    return ConfigError(
        f"expected every volume to hold a patch of {patch}, found {shape} in {where}; choose a "
        "smaller --data.crop.patch, prepare the cases with a larger --shape, or leave them out by --data.on-bad "
        "quarantine"
    )
