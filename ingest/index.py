"""Makes a manifest of two URIs: lists both places, pairs by key and, on request, reads every case."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools

from .errors import DecodeError, ObjectError
from .layout import Known
from .listing import list_objects
from .manifest import Manifest, cases_of
from .pairing import Case, PairingConfig, Problem, pair_cases
from .slab import BadCase, look_up
from .stores.base import StoreConfig, open_store

LOOKED_UP_AT_ONCE = 8  # cases, each with its whole label in memory


@dataclasses.dataclass(frozen=True)
class Index:
    """The result of indexing.

    Attributes:
        manifest: the cases.
        problems: objects that are in no case, if the policy lets the run go on.
    """

    manifest: Manifest
    problems: list[Problem]


def index_cases(
    images_uri: str, labels_uri: str, store: StoreConfig | None = None, pairing: PairingConfig | None = None
) -> Index:
    """List and pair.

    Raises:
        StoreError: a place cannot be listed, or is empty.
        PairingError: something is in no case and the policy is `fail`.
    """
    images, labels = open_store(images_uri, store), open_store(labels_uri, store)
    same_place = images.uri == labels.uri
    image_objects = list_objects(images)
    label_objects = image_objects if same_place else list_objects(labels)
    pairing_found = pair_cases(image_objects, label_objects, pairing, same_place=same_place)
    manifest = Manifest.from_cases(pairing_found.cases, images_uri=images.uri, labels_uri=labels.uri)
    return Index(manifest, pairing_found.problems)


@dataclasses.dataclass(frozen=True)
class BadEntry:
    """A case of a manifest that cannot be read.

    Attributes:
        index: of the case in the manifest.
        case: the case.
        uri: of the object at fault.
        error: what is wrong with it.
    """

    index: int
    case: Case
    uri: str
    error: ObjectError | DecodeError


@dataclasses.dataclass(frozen=True)
class LookedUp:
    """The result of reading every case of a manifest.

    Attributes:
        manifest: the manifest, with shapes and foreground boxes where they are known.
        known: shapes and boxes of each case; None for a case that is always read whole, and for a bad case.
        bad: the cases that cannot be read.
    """

    manifest: Manifest
    known: list[Known | None]
    bad: list[BadEntry]


def look_up_cases(manifest: Manifest, store: StoreConfig | None = None) -> tuple[Manifest, list[Known | None]]:
    """Read every case as `look_up_each` does, but raise the first error of an object that cannot be read.

    Raises:
        ObjectError: an object is missing, changed or damaged.
        StoreError: a place cannot be read.
    """
    found = look_up_each(manifest, store)
    for entry in found.bad:
        if isinstance(entry.error, ObjectError):
            raise entry.error
    return found.manifest, found.known


def look_up_each(manifest: Manifest, store: StoreConfig | None = None) -> LookedUp:
    """Read every label whole, and the header of every image. A case that cannot be read does not end the reading.

    Raises:
        StoreError: a place cannot be read.
    """
    images, labels = open_store(manifest.images_uri, store), open_store(manifest.labels_uri, store)
    with concurrent.futures.ThreadPoolExecutor(LOOKED_UP_AT_ONCE, thread_name_prefix="look-up") as pool:
        cases = cases_of(manifest.table)
        found = list(pool.map(functools.partial(look_up, images, labels), cases))
    known = [None if isinstance(each, BadCase) else each for each in found]
    bad: list[BadEntry] = []
    for index, (case, each) in enumerate(zip(cases, found, strict=True)):
        if isinstance(each, BadCase):
            uri = images.uri_of(case.image.name) if each.role == "image" else labels.uri_of(case.label.name)
            bad.append(BadEntry(index, case, uri, each.error))
    return LookedUp(manifest.with_known(known), known, bad)
