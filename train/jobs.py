"""The commands `status`, `logs`, `stop` and `list`: jobs of a Ray cluster that were submitted."""

from __future__ import annotations

import dataclasses
import sys
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import tyro
from rich.table import Table

from ingest.terminal import literal, plain_console

from .job_cluster import JobError, connect, patiently, refused
from .job_follow import details_of, follow, tell_to_stop, wait_for_end, waiting_reason

if TYPE_CHECKING:
    from ray.job_submission import JobDetails


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """A cluster's jobs."""

    address: str | None = None
    """Of the cluster's dashboard; None takes RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or http://127.0.0.1:8265."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig(ClusterConfig):
    """One job."""

    submission_id: tyro.conf.Positional[str]
    """As `submit` printed it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogsConfig(JobConfig):
    """A job's log."""

    follow: bool = False
    """Go on until the job ends, and end with its status: 0 succeeded, 1 failed, 130 stopped."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopConfig(JobConfig):
    """Stop a job: it saves after the step under way, and ends."""

    wait_s: float = 90.0
    """Seconds to wait for its end."""


def job_status(arguments: list[str]) -> int:
    """`voxflux status SUBMISSION_ID`."""
    config = tyro.cli(JobConfig, prog="voxflux status", args=arguments)
    client = connect(config.address)
    job = details_of(client, config.submission_id)
    console = plain_console()
    console.print(f"{config.submission_id}: {job.status.value}")
    if job.start_time:
        console.print(f"started {_clock(job.start_time)}, {'took' if job.end_time else 'running for'} {_took(job)}")
    for key, value in sorted((job.metadata or {}).items()):
        console.print(f"{key}: {value}", markup=False, highlight=False)
    if job.message:
        console.print(job.message, markup=False, highlight=False)
    return 0


def job_logs(arguments: list[str]) -> int:
    """`voxflux logs SUBMISSION_ID`."""
    config = tyro.cli(LogsConfig, prog="voxflux logs", args=arguments)
    client = connect(config.address)
    details_of(client, config.submission_id)  # says clearly that there is no such job
    if config.follow:
        return follow(client, config.submission_id, plain_console())
    try:
        sys.stdout.write(patiently(client.get_job_logs, config.submission_id))
    except (RuntimeError, OSError) as error:
        raise JobError(
            f"expected the log of {config.submission_id}, found: {str(error).strip().rpartition(chr(10))[2]}; try again"
        ) from error
    return 0


def stop_job(arguments: list[str]) -> int:
    """`voxflux stop SUBMISSION_ID`."""
    config = tyro.cli(StopConfig, prog="voxflux stop", args=arguments)
    console = plain_console()
    client = connect(config.address)
    before = details_of(client, config.submission_id).status
    if before.is_terminal():
        console.print(f"{config.submission_id} had ended already: {before.value}")
        return 0
    known = tell_to_stop(client, config.submission_id)
    name = config.submission_id
    if before.value != "PENDING":
        console.print(f"stopping {name}: it saves after the step under way")
    elif known:
        console.print(f"stopping {name}: it has not started, and Ray stops it as soon as it does")
    else:
        console.print(f"{name} has not started, and Ray has no process of it yet that could be told to stop")
    status = wait_for_end(client, name, config.wait_s)
    console.print(f"{name}: {status}")
    if status == "PENDING":
        console.print(f"{waiting_reason(details_of(client, name))}; {after_stop(name, known=known)}")
    return 0 if status in ("STOPPED", "SUCCEEDED", "FAILED") else 1


def after_stop(submission_id: str, *, known: bool) -> str:
    """What becomes of a job that is told to stop and has not started."""
    if known:
        return "Ray keeps the order to stop: the job ends as soon as it starts, or fails if it does not start in time"
    return f"no order to stop was kept: give `voxflux stop {submission_id}` again in a minute"


def list_jobs(arguments: list[str]) -> int:
    """`voxflux list`."""
    config = tyro.cli(ClusterConfig, prog="voxflux list", args=arguments)
    client = connect(config.address)
    from ray.exceptions import AuthenticationError

    try:
        jobs = [job for job in patiently(client.list_jobs) if job.submission_id]
    except AuthenticationError as error:
        raise refused(client.get_address(), error) from error
    except (RuntimeError, OSError) as error:
        raise JobError(f"expected {client.get_address()} to list its jobs, found: {error}; try again") from error
    console = plain_console()
    if not jobs:
        console.print(f"no jobs at {client.get_address()} yet")
        return 0
    table = Table(title=literal(f"Jobs at {client.get_address()}"))
    for column in ("job", "status", "started", "took", "recipe", "run folder"):
        table.add_column(column, overflow="fold")
    for job in sorted(jobs, key=lambda job: job.start_time or 0):
        kept = job.metadata or {}
        started = _clock(job.start_time) if job.start_time else "-"
        cells = (job.submission_id, job.status.value, started, _took(job), kept.get("recipe"), kept.get("run_dir"))
        table.add_row(*(literal(cell or "-") for cell in cells))
    # As wide as it needs where nobody's terminal sets a width, so that a script can read it.
    plain_console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


def _clock(milliseconds: int) -> str:
    return f"{datetime.fromtimestamp(milliseconds / 1000):%Y-%m-%d %H:%M:%S}"


def _took(job: JobDetails) -> str:
    if not job.start_time:
        return "-"
    end = job.end_time or datetime.now().timestamp() * 1000
    return str(timedelta(seconds=round(max(end - job.start_time, 0) / 1000)))
