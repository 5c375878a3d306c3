"""From two URIs to a manifest: list both places, join by key, and look at the cases where that is asked."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools

from .layout import Known
from .listing import list_objects
from .manifest import Manifest, cases_of
from .pairing import PairingConfig, Problem, pair_cases
from .slab import look_up
from .stores.base import StoreConfig, open_store

LOOKED_UP_AT_ONCE = 8  # cases, each with its whole label in memory


@dataclasses.dataclass(frozen=True)
class Index:
    """What indexing found.

    Attributes:
        manifest: the cases.
        problems: objects that are in no case, where the policy lets the run go on.
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


def look_up_cases(manifest: Manifest, store: StoreConfig | None = None) -> tuple[Manifest, list[Known | None]]:
    """Read every label whole and every image's header: the manifest with shapes and foreground boxes, and these.

    A case that is not read in part, being no pair of C-ordered `.npy` volumes, or a bad one, has None.

    Raises:
        StoreError: a place cannot be read.
    """
    images, labels = open_store(manifest.images_uri, store), open_store(manifest.labels_uri, store)
    with concurrent.futures.ThreadPoolExecutor(LOOKED_UP_AT_ONCE, thread_name_prefix="look-up") as pool:
        known = list(pool.map(functools.partial(look_up, images, labels), cases_of(manifest.table)))
    return manifest.with_known(known), known
