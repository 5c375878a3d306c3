"""Finds and deletes the composites that killed processes left behind."""

from __future__ import annotations

import functools
from datetime import datetime, timedelta, timezone
from typing import NamedTuple

from dataflux_core.download import COMPOSED_PREFIX

from ..errors import ConfigError, PlaceNotFoundError
from .base import StoreConfig
from .gcs import GCSStore
from .gcs_clients import google_client
from .gcs_errors import AbsentError, call


class Composite(NamedTuple):
    """One of Dataflux's composites.

    Attributes:
        name: its key in the bucket.
        size_bytes: its length.
        generation: of the object that was listed; no other is deleted.
        age: since it was made.
    """

    name: str
    size_bytes: int
    generation: int
    age: timedelta


def list_composites(uri: str, config: StoreConfig, *, older_than: timedelta) -> list[Composite]:
    """The composites of a bucket that are at least so old.

    Raises:
        ConfigError: the URI is not ``gs://bucket``.
        PlaceNotFoundError: the bucket does not exist.
        StoreError: it cannot be listed.
    """
    if not uri.startswith("gs://"):
        raise ConfigError(f"expected gs://bucket, found {uri!r}; composites are made in buckets only")
    bucket = GCSStore(uri, config).bucket
    client = google_client(config)

    def every() -> list[Composite]:
        now = datetime.now(timezone.utc)
        blobs = client.list_blobs(
            bucket,
            prefix=COMPOSED_PREFIX,
            fields="items(name,size,generation,timeCreated),nextPageToken",
            retry=None,
            timeout=config.read_timeout_s,
        )
        return [Composite(b.name, int(b.size), int(b.generation), now - b.time_created) for b in blobs]

    try:
        found = call(config, every, what=f"listing composites of gs://{bucket}", permission="storage.objects.list")
    except AbsentError as error:
        raise PlaceNotFoundError(
            f"expected the bucket gs://{bucket}, found that it does not exist; check its name"
        ) from error
    return [composite for composite in found if composite.age >= older_than]


def delete_composite(uri: str, composite: Composite, config: StoreConfig) -> bool:
    """Delete one; False where it is gone already.

    Raises:
        StoreError: it cannot be deleted.
    """
    bucket = GCSStore(uri, config).bucket
    blob = google_client(config).bucket(bucket).blob(composite.name, generation=composite.generation)
    delete = functools.partial(blob.delete, retry=None, timeout=config.read_timeout_s)
    try:
        call(
            config,
            delete,
            what=f"deleting gs://{bucket}/{composite.name}",
            permission="storage.objects.delete",
        )
    except AbsentError:
        return False
    return True
