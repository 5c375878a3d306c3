"""Follows a job's log until it ends, over lost connections and Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console

from ingest.signals import came

from .job_cluster import JobError, patiently, refused

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

EXIT_STATUS = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 130}
LOST_TRIES = 10
POLL_S = 0.5
PENDING_S = 30.0
"""Seconds that a job may take to start before the reason is asked; its environment is unpacked first."""


def details_of(client: JobSubmissionClient, submission_id: str) -> JobDetails:
    """What the cluster knows of a job.

    Raises:
        JobError: it knows none of this id, refuses us, or does not answer.
    """
    from ray.exceptions import AuthenticationError

    address = client.get_address()
    try:
        return patiently(client.get_job_info, submission_id)
    except AuthenticationError as error:
        raise refused(address, error) from error
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise JobError(f"expected {address} to tell of job {submission_id}, found: {_last_line(error)}") from error
        raise JobError(f"expected a job {submission_id!r} at {address}, found none; see `voxflux list`") from error
    except OSError as error:
        raise JobError(
            f"expected {address} to tell of job {submission_id}, found no connection ({error}); try again"
        ) from error


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2]


def tell_to_stop(client: JobSubmissionClient, submission_id: str) -> bool:
    """Tell the cluster to stop a job. To tell it twice does no harm.

    Returns:
        Whether Ray knows a process of the job.

    Raises:
        JobError: the cluster does not take the order.
    """
    try:
        return bool(patiently(client.stop_job, submission_id))
    except (RuntimeError, OSError) as error:
        raise JobError(
            f"expected {client.get_address()} to take the order to stop {submission_id}, found: {_last_line(error)}; "
            f"see `voxflux status {submission_id}`, and try again"
        ) from error


def wait_for_end(client: JobSubmissionClient, submission_id: str, limit_s: float) -> str:
    """The job's status once it has ended, or after a time limit the one it has."""
    deadline = time.monotonic() + limit_s
    while True:
        status = details_of(client, submission_id).status
        if status.is_terminal() or time.monotonic() > deadline:
            return str(status.value)
        time.sleep(POLL_S)


def waiting_reason(job: JobDetails) -> str:
    """Why a job that is PENDING has not started, as far as Ray knows, and where to look, in one line."""
    seconds = time.time() - (job.start_time or time.time() * 1000) / 1000
    said = " ".join((job.message or "Ray gives no reason").split()).rstrip(".")
    return (
        f"the job is PENDING for {max(0.0, seconds):.0f} s: {said}; a head whose RAY_AUTH_TOKEN_PATH is relative, or "
        "whose workers cannot start, leaves it so: see the newest runtime_env_*.log and raylet.out among the head's "
        "logs in Ray's session folder"
    )


async def tell_if_pending(client: JobSubmissionClient, submission_id: str, console: Console) -> None:
    """After a while, say why a job that is followed has not started. Its log gives nothing before it starts."""
    await asyncio.sleep(PENDING_S)
    with contextlib.suppress(JobError):  # the connection is lost: the log's own loop says so
        job = await asyncio.to_thread(details_of, client, submission_id)
        if job.status.value == "PENDING":
            console.print(waiting_reason(job), markup=False, highlight=False)


def follow(client: JobSubmissionClient, submission_id: str, console: Console) -> int:
    """Print a job's log as it comes; Ctrl-C asks, at a terminal, whether to stop the job.

    Returns:
        The exit status: 0 for SUCCEEDED, 1 for FAILED, 130 for STOPPED or where the job is left running.
    """
    shown = 0
    asked = False
    while True:
        try:
            shown = _print_log(client, submission_id, shown, console)
            break
        except InterruptedLogError as interrupted:
            shown = interrupted.shown
            if asked or not _asks_to_stop(submission_id, console):
                console.print(
                    f"\njob {submission_id} goes on; follow it again by `voxflux logs {submission_id} --follow "
                    f"--address {client.get_address()}`"
                )
                return 130
            asked = True
            tell_to_stop(client, submission_id)
            console.print(f"stopping {submission_id}: it saves after its step; Ctrl-C again leaves it to itself")
    ended = details_of(client, submission_id)
    console.print(f"job {submission_id}: {ended.status.value}")
    if ended.status.value == "FAILED" and not shown and ended.message:
        console.print(ended.message, markup=False, highlight=False)
    return EXIT_STATUS.get(ended.status.value, 1)


class InterruptedLogError(Exception):
    """Ctrl-C, with the number of characters of the log shown so far."""

    def __init__(self, shown: int) -> None:
        super().__init__(shown)
        self.shown = shown


def _print_log(client: JobSubmissionClient, submission_id: str, shown: int, console: Console) -> int:
    """Print what of the log is not shown yet, until the job has ended; characters of it that are shown.

    Ray gives a log from its start at each connection.
    """
    count = [shown]

    async def tail() -> None:
        skip = count[0]
        pending = asyncio.create_task(tell_if_pending(client, submission_id, console))
        try:
            async for text in client.tail_job_logs(submission_id):
                pending.cancel()
                fresh, skip = text[skip:], max(skip - len(text), 0)
                sys.stdout.write(fresh)
                sys.stdout.flush()
                count[0] += len(fresh)
        finally:
            pending.cancel()

    lost = 0
    while True:
        before = count[0]
        reason = "the connection was closed"
        try:
            asyncio.run(tail())
        except KeyboardInterrupt:
            raise InterruptedLogError(count[0]) from None
        except (RuntimeError, OSError, asyncio.TimeoutError) as error:  # aiohttp's are RuntimeError or OSError, or:
            reason = str(error)
        except Exception as error:
            if not type(error).__module__.startswith("aiohttp"):
                raise
            reason = str(error)
        try:
            with contextlib.suppress(JobError):
                if wait_for_end(client, submission_id, 2 * POLL_S) in EXIT_STATUS:
                    return count[0]
            lost = 0 if count[0] > before else lost + 1
            if lost > LOST_TRIES:
                raise JobError(
                    f"expected the log of {submission_id} from {client.get_address()}, found none in {lost} tries "
                    f"({reason}); the job may still run: ask by `voxflux status {submission_id}`"
                )
            time.sleep(POLL_S * lost)
        except KeyboardInterrupt:
            raise InterruptedLogError(count[0]) from None


def _asks_to_stop(submission_id: str, console: Console) -> bool:
    """Whether the user wants the job stopped. It goes on where nobody can be asked: no terminal, or a closed one."""
    if came() or not sys.stdin.isatty():
        return False
    console.print(f"\nstop job {submission_id}? y stops it, anything else leaves it running: ", end="")
    try:
        return input().strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False
