"""The Ray that a command runs on: the one there is, or a quiet one of this machine's own for as long as it lasts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.data
import ray.exceptions

from . import signals
from .errors import ClusterError, IngestError
from .foreign_names import refuse_foreign_modules
from .machine import check_machine, session_root
from .ray_address import check_address, refused
from .ray_compat import end_half_started, without_raylet_log
from .ray_token import check_token_path, token_of_own_ray

PASSED_ON = ("STORAGE_EMULATOR_HOST",)  # workers of a running cluster do not inherit these from us
# A worker frees and takes the same buffers for every chunk and block. glibc gives them back to the kernel each time,
# which zeroes them again page by page; so told, it keeps them, in huge pages where the kernel has these on request.
# Buffers of over 32 MB, the most that glibc takes for a threshold, still go back. Names: the glibc manual, "Memory
# Allocation Tunables"; other C libraries ignore the variable. It gave a tenth of the CPU time of a sample that is read
# from local files (README).
TUNED = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=1073741824"
    ":glibc.malloc.mmap_threshold=33554432"
}


@contextlib.contextmanager
def connected_ray() -> Iterator[bool]:
    """Connect to Ray, and disconnect again where it was not connected before.

    An initialised Ray is taken as it is. If RAY_ADDRESS names a cluster, this process joins it. If RAY_ADDRESS is not
    set, or is `local`, Ray starts here. It stays quiet: its logs lie in its session folder (/tmp/ray) and on the
    dashboard, and errors come as exceptions. Workers' allocators are tuned (`TUNED`), unless GLIBC_TUNABLES is set here
    or for the job.

    Yields:
        Whether Ray was started here.

    Raises:
        ConfigError: RAY_ADDRESS or RAY_AUTH_TOKEN_PATH cannot work, or Ray cannot start on this machine.
        DiskFullError: the disk of Ray's session has too little room.
        ClusterError: the cluster cannot be reached or refuses us, or Ray did not start here.
    """
    if ray.is_initialized():
        yield False
        return
    refuse_foreign_modules()
    given = _given_to_job()
    wanted = TUNED | {name: os.environ[name] for name in (*PASSED_ON, *TUNED) if name in os.environ}
    passed = {name: value for name, value in wanted.items() if name not in given}
    here = starts_here()
    check_before_ray()
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Ray Data prints with a traceback what it raises, and we print what is raised.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        if here:
            # Workers of a Ray that starts here inherit our environment. With a runtime environment each of them would
            # load Ray twice, and those that Ray starts in advance would be of no use.
            passed |= stack.enter_context(token_of_own_ray())
            with environment(passed), signals.kept():
                stack.enter_context(without_raylet_log())
                # Without "local" Ray would join whatever cluster was started last on this machine.
                start_ray(
                    address="local",
                    include_dashboard=False,
                    runtime_env=runtime_env_of(sys.executable),
                    _temp_dir=str(session_root()),
                )
        else:
            with signals.kept():
                join_ray(address=None, runtime_env={"env_vars": passed})
        stack.callback(ray.shutdown)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield here


def starts_here() -> bool:
    """Return whether this process starts a Ray of its own, because RAY_ADDRESS names no cluster."""
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")


def check_before_ray() -> None:
    """Check what can be known before Ray starts or is joined, in seconds; see `connected_ray` for what it raises."""
    if starts_here():
        check_machine()
    else:
        check_token_path()
        check_address(os.environ["RAY_ADDRESS"])


def runtime_env_of(executable: str) -> dict[str, Any] | None:
    """The runtime environment of a Ray that starts here: none, unless the interpreter's path needs quotes.

    Ray starts workers that have a runtime environment, as Ray Train's have, by a line of a shell, and leaves the
    interpreter's path in it unquoted. Without quotes, workers of `/home/u/My Projects/.venv/bin/python` never start.
    """
    quoted = shlex.quote(executable)
    return None if quoted == executable else {"py_executable": quoted}


QUIET = {
    # The output of workers, above all progress bars, would bury the run's own lines, in a job's log too.
    "log_to_driver": False,
    "logging_level": logging.ERROR,
}


def start_ray(init: Callable[..., object] = ray.init, *, again: bool = True, **settings: Any) -> None:
    """Start Ray here, and once more where its node was too slow.

    Ray gives its node 30 s, which a busy machine exceeds. The second start finds Ray's files in memory.

    Raises:
        ClusterError: it did not start.
    """
    try:
        init(**QUIET, **settings)
    except IngestError:
        raise
    except Exception as error:  # Ray raises a bare Exception where its node is slow
        end_half_started(error)
        slow = _slow(error)
        if not (slow and again):
            advice = "it had 30 s twice: try again when the machine has less to do" if slow else "mend that, try again"
            raise ClusterError(
                f"expected Ray to start on this machine, found: {_last_line(error)}; its logs are in "
                f"{session_root()}/session_latest/logs; {advice}"
            ) from error
    else:
        return
    start_ray(init, again=False, **settings)


def _slow(error: BaseException) -> bool:
    return any(words in str(error).lower() for words in ("timed out", "timeout"))


def join_ray(init: Callable[..., object] = ray.init, **settings: Any) -> None:
    """Connect to the cluster that RAY_ADDRESS names.

    Raises:
        ClusterError: it refuses us, is of another version, or has no node here.
    """
    address = os.environ.get("RAY_ADDRESS")
    try:
        init(**QUIET, **settings)
    except IngestError:
        raise
    except Exception as error:
        if _refused(error):
            raise refused(str(address)) from error
        raise ClusterError(
            f"expected to join the Ray cluster at RAY_ADDRESS={address}, found: {_last_line(error)}; check the address "
            f"and that the cluster's Ray is version {ray.__version__}, as here"
        ) from error


def _refused(error: BaseException) -> bool:
    each: BaseException | None = error
    while each is not None:
        words = str(each)
        if isinstance(each, ray.exceptions.AuthenticationError) or "Unauthenticated" in words or "InvalidAuth" in words:
            return True
        each = each.__cause__ or each.__context__
    return False


def _last_line(error: BaseException) -> str:
    """Return the last line of the innermost cause, which says the most."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:500]}" if lines else type(error).__name__


def _given_to_job() -> dict[str, str]:
    """The variables that the job we run in was submitted with: Ray passes these on, and takes none of them twice."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    variables: dict[str, str] = (job.get("runtime_env") or {}).get("env_vars") or {}
    return variables


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables, and put back what was there."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
