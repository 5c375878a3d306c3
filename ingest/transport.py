"""Which transport a run reads with: settled once, on the driver, and said with its reason."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from .manifest import Manifest, cases_of
from .stores.base import ObjectMeta, StoreConfig, open_store

SAMPLE = 64  # cases looked at to judge the objects' sizes


@dataclasses.dataclass(frozen=True)
class Choice:
    """A transport and why.

    Attributes:
        store: the configuration with both settled, for every worker.
    """

    transport: Literal["compose", "direct"]
    reason: str
    store: StoreConfig


def choose_transport(manifest: Manifest, config: StoreConfig) -> Choice:
    """The transport for both places of a data set: compose only where both allow and reward it.

    Raises:
        StoreError: a place cannot be read at all.
    """
    from .stores.gcs import GCSStore
    from .stores.gcs_probe import Settled

    spread = np.linspace(0, len(manifest) - 1, min(SAMPLE, len(manifest))).astype(np.int64)
    cases = cases_of(manifest.take(np.unique(spread)))
    by_place: dict[str, list[ObjectMeta]] = {}
    for uri, objects in (
        (manifest.images_uri, [case.image for case in cases]),
        (manifest.labels_uri, [case.label for case in cases]),
    ):
        by_place.setdefault(uri, []).extend(objects)
    found: list[Settled] = []
    for uri, objects in by_place.items():
        store = open_store(uri, config)
        if isinstance(store, GCSStore):
            found.append(store.settle(objects))
    if not found:
        return Choice("direct", "files are local", dataclasses.replace(config, transport="direct"))
    # Compose only where both places allow and reward it.
    decisive = next((settled for settled in found if settled.transport == "direct"), found[0])
    in_flight = max(settled.max_in_flight for settled in found)
    settled = dataclasses.replace(config, transport=decisive.transport, max_in_flight=in_flight)
    return Choice(decisive.transport, decisive.reason, settled)


def place_facts(uri: str, config: StoreConfig) -> list[str]:
    """What the server tells of a place that matters for cost and safety, a sentence each."""
    from .stores.gcs import GCSStore

    store = open_store(uri, config)
    if not isinstance(store, GCSStore):
        return ["local files"]
    facts = store.bucket_facts()
    if facts.unknown_because:
        return [f"the bucket's settings are not known, since {facts.unknown_because}"]
    sentences = [f"location {facts.location or 'not told'}, storage class {facts.storage_class or 'not told'}"]
    kept = facts.keeps_composites()
    sentences.append(f"warning: {kept}" if kept else "soft delete, versioning and retention are off")
    return sentences
