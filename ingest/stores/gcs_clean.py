"""Finds and deletes the composites that killed processes left behind."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from typing import NamedTuple

from ..errors import ConfigError, PlaceNotFoundError, StoreError
from .base import StoreConfig
from .dataflux import composite_prefix
from .gcs import GCSStore
from .gcs_clients import google_client
from .gcs_errors import AbsentError, call

logger = logging.getLogger(__name__)

_PASSES = 5


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


def list_composites(
    uri: str, config: StoreConfig, *, older_than: timedelta = timedelta(0), run_id: str = ""
) -> list[Composite]:
    """The composites of a bucket that are at least so old.

    Args:
        uri: ``gs://bucket``.
        config: how to talk to the server.
        older_than: the least age.
        run_id: of the one run whose composites are meant; empty means all.

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
            prefix=composite_prefix(run_id),
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


def sweep_run(bucket_uris: Iterable[str], run_id: str, config: StoreConfig, *, settle_s: float = 1.0) -> int:
    """Delete what a run's killed processes left; those of other runs are not touched.

    To be called when the run's processes have ended. A request that was on its way when its process was killed may
    still be done by the server: where anything is found, the bucket is listed again after a while, until nothing is.
    Whatever cannot be done is logged, and not raised: this is the end of a run, which has its own outcome.

    Args:
        bucket_uris: ``gs://bucket`` or places in it; each bucket is swept once.
        run_id: as in the `StoreConfig` of the run's stores.
        config: how to talk to the server.
        settle_s: the while.

    Returns:
        How many composites were deleted.
    """
    if not run_id:
        raise ConfigError("expected the id of the run whose composites are to be swept, found an empty one")
    swept = 0
    for bucket in sorted({GCSStore(uri, config).bucket for uri in bucket_uris}):
        uri = f"gs://{bucket}"
        try:
            for number in range(_PASSES):
                if number:
                    time.sleep(settle_s)
                found = list_composites(uri, config, run_id=run_id)
                swept += sum(delete_composite(uri, composite, config) for composite in found)
                if not found:
                    break
        except StoreError as error:
            logger.warning(
                "expected to sweep the composites of this run in %s, found that it cannot be done (%s); "
                "`voxflux clean %s --older-than 1h --dry-run` tells what is left",
                uri,
                error,
                uri,
            )
    if swept:
        logger.info("%d composites of processes that were killed are deleted", swept)
    return swept
