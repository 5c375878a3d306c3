"""From two URIs to a manifest: list both places, join by key."""

from __future__ import annotations

import dataclasses

from .listing import list_objects
from .manifest import Manifest
from .pairing import PairingConfig, Problem, pair_cases
from .stores.base import StoreConfig, open_store


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
