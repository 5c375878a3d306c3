"""Ends what is left of a Ray of our own that lost a part it cannot live without.

It uses what is private to Ray 2.60, and imports no torch.
"""

from __future__ import annotations

import weakref
from typing import Any

import ray._private.worker

_ENDED: weakref.WeakSet[Any] = weakref.WeakSet()


def end_own_ray() -> None:
    """End what is left of the Ray that this process started, when a part of it died that it cannot live without.

    While its GCS lives, it tells this process in some seconds that the node died, and Ray's library then ends this
    process without a word, as the connection to the object store is gone.
    Test: `test_what_a_run_cannot_live_without_is_named_when_it_is_killed`.
    """
    node = getattr(ray._private.worker, "_global_node", None)
    if node is not None:
        _ENDED.add(node)
        node.kill_all_processes(check_alive=False, allow_graceful=False)


def own_ray_ended() -> bool:
    """Whether `end_own_ray` has ended the Ray that this process is connected to, which answers no more."""
    node = getattr(ray._private.worker, "_global_node", None)
    return node is not None and node in _ENDED
