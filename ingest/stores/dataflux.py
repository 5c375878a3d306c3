"""Google's Dataflux (`gcs-torch-dataflux`): whether it is installed, and the names of its composites."""

from __future__ import annotations

import importlib.util

COMPOSED_PREFIX = "dataflux-composed-objects/"
"""Prefix of the names of composites: `dataflux_core.download.COMPOSED_PREFIX`. Buckets may hold composites that were
made elsewhere, so the name is known here without Dataflux, too."""


def missing() -> str | None:
    """Return why composed reads and Dataflux's listing cannot be had; None where Dataflux is installed."""
    if importlib.util.find_spec("dataflux_core") is not None:
        return None
    return "gcs-torch-dataflux is not installed (it has no release for Python 3.13 or newer)"


def composite_prefix(run_id: str) -> str:
    """Return the prefix of the names of a run's composites; without a run, Dataflux's own prefix."""
    return f"{COMPOSED_PREFIX}{run_id}/" if run_id else COMPOSED_PREFIX


def is_composite(key: str) -> bool:
    """Return whether a bucket's key is one of Dataflux's composites."""
    return key.startswith(COMPOSED_PREFIX)
