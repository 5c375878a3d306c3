"""Tells an actor about its own restarts."""

from __future__ import annotations

import ray


def started_again() -> bool:
    """Return whether this process is an actor that died and was started again by Ray."""
    if not ray.is_initialized():
        return False
    context = ray.get_runtime_context()
    return context.get_actor_id() is not None and context.was_current_actor_reconstructed
