"""Sweeps the composites that killed processes left: `voxflux clean`, and the end of each run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from datetime import timedelta

import tyro
from rich.console import Console

from .errors import ConfigError
from .stores.base import StoreConfig

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_age(text: str) -> timedelta:
    """An age such as 90s, 30m, 1h or 2d.

    Raises:
        ConfigError: it is not one.
    """
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if match is None:
        raise ConfigError(f"expected an age such as 90s, 30m, 1h or 2d, found {text!r}; give --older-than 1h")
    return timedelta(**{UNITS[match[2]]: int(match[1])})


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """Delete Dataflux's composites that are left in a bucket; those of running jobs are young, and stay."""

    bucket: tyro.conf.Positional[str]
    """gs://bucket"""

    older_than: str = "1h"
    """Least age: 90s, 30m, 1h, 2d."""

    dry_run: bool = False
    """Say what would be deleted, and delete nothing."""

    store: StoreConfig = dataclasses.field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        parse_age(self.older_than)


def clean(config: CleanConfig, console: Console) -> int:
    """Sweep, and say how many composites of how many bytes are gone."""
    from .stores.gcs_clean import delete_composite, list_composites

    found = list_composites(config.bucket, config.store, older_than=parse_age(config.older_than))
    swept = []
    for composite in found:
        if config.dry_run:
            minutes = composite.age.total_seconds() / 60
            console.print(f"{composite.name}: {composite.size_bytes:,} bytes, {minutes:,.1f} min old", markup=False)
        if config.dry_run or delete_composite(config.bucket, composite, config.store):
            swept.append(composite)
    size_bytes = sum(composite.size_bytes for composite in swept)
    console.print(f"{'would delete' if config.dry_run else 'deleted'} {len(swept)} composites, {size_bytes:,} bytes")
    return 0


def sweep_run(uris: Iterable[str], run_id: str, config: StoreConfig) -> int:
    """Delete the composites that killed processes of one run left, at its end; raises no `StoreError`.

    Args:
        uris: the run's places; those that are no ``gs://`` ones have no composites.
        run_id: as in the `StoreConfig` of the run's stores.
        config: how to talk to the server.

    Returns:
        How many there were.
    """
    buckets = [uri for uri in uris if uri.startswith("gs://")]
    if not buckets:
        return 0
    from .stores import gcs_clean

    return gcs_clean.sweep_run(buckets, run_id, config)
