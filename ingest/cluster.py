"""The Ray that a command runs on: the one there is, or a quiet one of this machine's own for as long as it lasts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator

import ray
import ray.data

from . import signals

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

    An initialised Ray is taken as it is; RAY_ADDRESS names a cluster; else Ray starts here. It stays quiet: its logs
    lie in its session folder (/tmp/ray) and on the dashboard, and errors come as exceptions. Workers' allocators are
    tuned (`TUNED`), unless GLIBC_TUNABLES is set here or for the job.

    Yields:
        Whether Ray was started here.
    """
    if ray.is_initialized():
        yield False
        return
    given = _given_to_job()
    wanted = TUNED | {name: os.environ[name] for name in (*PASSED_ON, *TUNED) if name in os.environ}
    passed = {name: value for name, value in wanted.items() if name not in given}
    here = not os.environ.get("RAY_ADDRESS")
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Ray Data prints with a traceback what it raises, and we print what is raised.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # Workers of a Ray that starts here inherit our environment. With a runtime environment each of them would load Ray
    # twice, and those that Ray starts in advance would be of no use.
    with environment(passed if here else {}), signals.kept():
        ray.init(
            # Without "local" Ray would join whatever cluster was started last on this machine.
            address="local" if here else None,
            include_dashboard=False if here else None,
            # What workers print, progress bars above all, would bury the run's own lines, in a job's log too.
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=None if here else {"env_vars": passed},
        )
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield here
    finally:
        ray.shutdown()


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
