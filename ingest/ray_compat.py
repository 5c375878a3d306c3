"""Uses of Ray that are private to Ray 2.60, which is pinned: each with its reason and the test that sees it.

Those of Ray Train stand in `train/ray_compat.py`, and the callbacks of Ray Data in `ingest/execution.py`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import ray._private.node
import ray._private.worker
from ray._private.authentication.grpc_authentication_client_interceptor import _get_authentication_metadata_tuple
from ray._private.services import canonicalize_bootstrap_address, find_gcs_addresses, find_node_ids
from ray._private.utils import estimate_available_memory, get_shared_memory_bytes, resolve_object_store_memory
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

_ENDED: weakref.WeakSet[Any] = weakref.WeakSet()


def address_here() -> str:
    """Return HOST:PORT of the cluster that runs on this machine.

    Ray resolves `auto` only within `ray.init`, and remembers what it found before.
    Test: `tests/test_ray_address.py`.

    Raises:
        ConnectionError: there is none.
    """
    find_gcs_addresses.cache_clear()  # type: ignore[attr-defined]
    return str(canonicalize_bootstrap_address("auto"))


def token_metadata() -> Any:
    """Return the gRPC metadata that carries our token.

    Ray has no public way to ask a head one question with the token. Test: `tests/test_ray_address.py`.

    Raises:
        ray.exceptions.AuthenticationError: a token is wanted, and this machine has none.
    """
    return _get_authentication_metadata_tuple()


def has_node_here() -> bool:
    """Return whether a node of some cluster runs on this machine. Test: `tests/test_ray_address.py`."""
    return bool(find_node_ids())  # type: ignore[no-untyped-call]


def shared_memory_bytes() -> int:
    """Return the size of /dev/shm, as Ray reads it. Test: `tests/test_machine.py`.

    Raises:
        OSError: there is no such folder.
    """
    return int(get_shared_memory_bytes())  # type: ignore[no-untyped-call]


def object_store_bytes() -> int:
    """Return the size that Ray gives its object store on this machine. Test: `tests/test_machine.py`."""
    memory = estimate_available_memory()  # type: ignore[no-untyped-call]
    return int(resolve_object_store_memory(memory, None))


def token_loader() -> Any:
    """Return the object that holds Ray's token in this process; its cache outlives one session.

    Test: `tests/integration/test_own_ray.py`.
    """
    return AuthenticationTokenLoader.instance()


def end_half_started(error: BaseException) -> None:
    """End the processes of a node that did not start: Ray leaves them to the end of this process.

    Only the frames that the error came through know the node. Test: `tests/integration/test_own_ray.py`.
    """
    trace = error.__traceback__
    while trace is not None:
        node = trace.tb_frame.f_locals.get("self")
        if isinstance(node, ray._private.node.Node):
            node.kill_all_processes(check_alive=False, allow_graceful=False)
            return
        trace = trace.tb_next


@contextlib.contextmanager
def without_raylet_log() -> Iterator[None]:
    """Keep Ray from printing the end of its raylet's log, twice, when the raylet of a Ray of ours dies.

    Ray prints such errors whether its workers' output is printed or not, and the log says nothing of a kill. The
    driver of a run says what died (`train.vitals`).
    Test: `test_what_a_run_cannot_live_without_is_named_when_it_is_killed`.
    """
    printed = ray._private.worker.print_to_stdstream

    def told(data: dict[str, Any], *arguments: Any, **settings: Any) -> None:
        if not any(str(line).startswith("Raylet is terminated.") for line in data.get("lines", ())):
            printed(data, *arguments, **settings)

    ray._private.worker.print_to_stdstream = told
    try:
        yield
    finally:
        ray._private.worker.print_to_stdstream = printed


def end_own_ray() -> None:
    """End the remaining processes of the Ray that this process started, after its raylet or its GCS died.

    While the GCS lives, it tells this process in some seconds that the node died. Ray's library then ends this process
    without a message, because the connection to the object store is gone.
    Test: `test_what_a_run_cannot_live_without_is_named_when_it_is_killed`.
    """
    node = getattr(ray._private.worker, "_global_node", None)
    if node is not None:
        _ENDED.add(node)
        node.kill_all_processes(check_alive=False, allow_graceful=False)


def own_ray_ended() -> bool:
    """Return whether `end_own_ray` has ended the Ray of this process, which answers no more."""
    node = getattr(ray._private.worker, "_global_node", None)
    return node is not None and node in _ENDED
