"""What an actor of ours can know of itself."""

from __future__ import annotations

import ray


def started_again() -> bool:
    """Whether this process is an actor that Ray has started again after it died; False in any other process."""
    if not ray.is_initialized():
        return False
    context = ray.get_runtime_context()
    return context.get_actor_id() is not None and context.was_current_actor_reconstructed
