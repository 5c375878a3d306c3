"""What an output holds, what it still lacks, and whether it may be gone on with."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, ObjectError, PlaceNotFoundError
from ..geometry import to_json
from ..gunzip import uncompressed
from ..stores.base import Lists, ObjectMeta, Store, open_store
from .case import IMAGES, LABELS, CaseSource, geometry_name, image_name, label_name, npy_bytes

SETTINGS = "prepare.json"
FORMAT = "voxflux-prepare"
FORMAT_VERSION = 1

NPY_HEADER_BYTES = 128
"""Of a 4-D array in the .npy format, version 1: always this many for shapes that fit in memory."""

PUTS_IN_FLIGHT = 16
"""Pairs one task writes at once when a case has many copies."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One case and which of its copies are to be written (0 is the case itself). Plain values.

    Attributes:
        case: its number.
        missing: the copies to write.
        present: image and label of a copy that is there, to be copied instead of made anew.
    """

    case: int
    missing: tuple[int, ...]
    present: tuple[ObjectMeta, ObjectMeta] | None = None


def list_pairs(store: Lists) -> dict[str, ObjectMeta]:
    """Images and labels that an output holds, by name; nothing if the folder is not there yet.

    Raises:
        StoreError: it cannot be listed for another reason.
    """
    found: dict[str, ObjectMeta] = {}
    try:
        for prefix in (IMAGES, LABELS):
            found.update((meta.name, meta) for meta in store.list(prefix))
    except PlaceNotFoundError:
        return {}  # a folder is made by the first put; a bucket is not, and the put says so
    return found


def plan_jobs(found: dict[str, ObjectMeta], cases: Sequence[int], copies: int) -> list[Job]:
    """What is left to do.

    A pair counts as there when both objects are, neither is empty, and their sizes are those of one shape in
    float32 and in uint8; so a half-written or cut pair is made again.

    Args:
        found: what `list_pairs` gave.
        cases: numbers of the cases wanted.
        copies: how many of each there shall be, the case itself included.
    """
    jobs = []
    for case in cases:
        pairs = [_pair(found, case, copy) for copy in range(copies)]
        missing = tuple(copy for copy, pair in enumerate(pairs) if pair is None)
        if missing:
            present = next((pair for pair in pairs if pair is not None), None)
            jobs.append(Job(case=case, missing=missing, present=present))
    return jobs


def run_job(source: CaseSource, output: str, job: Job) -> Job:
    """Make or read one case and write what is missing of it: its affine, and each image before its label.

    Opens its own store: this is what a Ray task runs.

    Raises:
        DecodeError: the case's input is not what it must be.
        StoreError: the output cannot be read or written.
    """
    store = open_store(output)
    if job.present is not None:
        image, label = store.fetch(job.present)
    else:
        pair = source.make(job.case)
        image, label = npy_bytes(pair.image), npy_bytes(pair.label)
        store.put(geometry_name(job.case), to_json(source.affine(job.case)))

    def write(copy: int) -> None:
        store.put(image_name(job.case, copy), image)
        store.put(label_name(job.case, copy), label)

    if len(job.missing) == 1:
        write(job.missing[0])
    else:
        with concurrent.futures.ThreadPoolExecutor(min(PUTS_IN_FLIGHT, len(job.missing))) as threads:
            list(threads.map(write, job.missing))  # raises the first error
    return job


def claim(store: Store, settings: dict[str, Any], found: dict[str, ObjectMeta]) -> None:
    """Write the settings into an empty output, or check that an output was made with the same ones.

    `cases` and `copies` may grow from one run to the next, since a case does not depend on how many there
    are; they may not shrink, since the output would then hold more than was asked for.

    Args:
        store: the output.
        settings: what decides the bytes, JSON values; with the keys `cases` and `copies`.
        found: what `list_pairs` gave.

    Raises:
        ConfigError: the output was made with other settings, or holds cases of unknown settings.
    """
    before = _read_settings(store)
    if before is None:
        if found:
            raise ConfigError(
                f"{store.uri}: expected an empty place or one with {SETTINGS}, found {len(found)} "
                f"objects, first: {min(found)}, and no {SETTINGS}; choose another --output"
            )
    else:
        _check_same(store.uri, before, settings)
        if before == settings:
            return
    about = {"format": FORMAT, "version": FORMAT_VERSION, **settings}
    store.put(SETTINGS, json.dumps(about, indent=2, allow_nan=False).encode() + b"\n")


def _check_same(uri: str, before: dict[str, Any], settings: dict[str, Any]) -> None:
    grows = ("cases", "copies")
    other = [
        f"{name} {before.get(name)!r} before and {value!r} now"
        for name, value in settings.items()
        if name not in grows and before.get(name) != value
    ]
    fewer = [
        f"{name} {before[name]} before and {settings[name]} now"
        for name in grows
        if isinstance(before.get(name), int) and before[name] > settings[name]
    ]
    if other or fewer:
        raise ConfigError(
            f"{uri}: expected the settings this output was begun with ({SETTINGS}), found "
            f"{'; '.join(other + fewer)}; go on with the former ones, or choose another --output"
        )


def _read_settings(store: Store) -> dict[str, Any] | None:
    """The settings an output was begun with; None if there are none."""
    try:
        meta = next((meta for meta in store.list(SETTINGS) if meta.name == SETTINGS), None)
    except PlaceNotFoundError:
        return None
    if meta is None:
        return None
    try:
        about = json.loads(uncompressed(store.fetch([meta])[0]))
        if about.pop("format") != FORMAT or about.pop("version") != FORMAT_VERSION:
            raise ValueError(f"not {FORMAT} version {FORMAT_VERSION}")
    except ObjectError:
        raise
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{store.uri_of(SETTINGS)}: expected the settings of an earlier run, found something else "
            f"({type(error).__name__}: {error}); choose another --output"
        ) from error
    settings: dict[str, Any] = about
    if settings.get("source") == "kits19":
        settings.setdefault("resample", "mlperf")  # the only way there was when outputs did not say
    return settings


def _pair(found: dict[str, ObjectMeta], case: int, copy: int) -> tuple[ObjectMeta, ObjectMeta] | None:
    """Both objects of one copy if it is complete."""
    image, label = found.get(image_name(case, copy)), found.get(label_name(case, copy))
    if image is None or label is None:
        return None
    voxels = label.size_bytes - NPY_HEADER_BYTES
    whole = voxels > 0 and image.size_bytes - NPY_HEADER_BYTES == 4 * voxels
    return (image, label) if whole else None
