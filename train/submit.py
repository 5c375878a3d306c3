"""The command `submit`: a recipe as a job on a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from ingest.errors import ConfigError
from ingest.ray_token import check_token_path
from ingest.terminal import plain_console

from .config import Recipe
from .job_cluster import JobError, ask_cluster, check_resources, check_versions, connect, refused
from .job_follow import follow
from .job_package import ENTRYPOINT, job_package
from .job_places import place_warnings, placed
from .passwords import check_no_password
from .recipes import RECIPES

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


JUST_STARTED_S = 5.0  # the dashboard answers before it knows of the head's own CPUs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submission:
    """A recipe, and how it is submitted."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]

    address: str | None = None
    """Of the cluster's dashboard; None takes RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or http://127.0.0.1:8265."""

    submission_id: str | None = None
    """The job's name on the cluster, not used there before; None makes one of the recipe's name and the time."""

    metadata: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """KEY=VALUE, kept with the job and shown by `status`; may be repeated."""

    env: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """KEY=VALUE, an environment variable of the job and its workers; may be repeated."""

    follow: bool = False
    """Print the log until the job ends, and end with its status: 0 succeeded, 1 failed, 130 stopped."""

    package: bool = True
    """Send this voxflux along; --no-package sends the recipe only, for a cluster that has voxflux installed."""

    check: bool = True
    """Compare versions, CPUs and GPUs first; --no-check does not, nor does the run: it waits for what it needs."""

    python: str | None = None
    """Interpreter on the head; None takes the one that Ray's workers run on."""

    stop_wait_s: int = 60
    """Seconds that a job has to save and end when it is stopped, before it is killed."""


def submit_recipe(arguments: list[str]) -> int:
    """`voxflux submit RECIPE [overrides]`."""
    choices = {name: (about, Submission(recipe=recipe)) for name, (about, recipe) in RECIPES.items()}
    submission = tyro.extras.overridable_config_cli(choices, prog="voxflux submit", args=arguments)
    name = next(argument for argument in arguments if argument in RECIPES)
    console = plain_console()
    client, submission_id = submit(submission, name, console)
    return follow(client, submission_id, console) if submission.follow else 0


def submit(submission: Submission, name: str, console: Console) -> tuple[JobSubmissionClient, str]:
    """Submit a recipe's job, and print how to go on with it.

    Raises:
        ConfigError: the recipe, an option or RAY_AUTH_TOKEN_PATH cannot work, the package is too large, or the cluster
            too small.
        JobError: the cluster cannot be reached, refuses us, is of other versions, or has a job of this id.
    """
    submission_id = submission.submission_id or f"{name}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", submission_id):
        raise ConfigError(
            f"expected a --submission-id of letters, digits, '-', '_' and '.', found {submission_id!r}; choose another"
        )
    check_token_path()
    metadata = {"recipe": name} | pairs("--metadata", submission.metadata)
    # Ray kills a stopped job after 3 s unless told otherwise: too short to save.
    env = {"RAY_JOB_STOP_WAIT_TIME_S": str(submission.stop_wait_s)} | pairs("--env", submission.env)
    recipe = placed(submission.recipe, submission_id)
    resumed = recipe.trainer.resume and recipe.demo is None  # the run's folder names the data
    named = recipe.data.manifest or (recipe.data.images and recipe.data.labels) or resumed
    if not named and recipe.demo is None:
        raise ConfigError(
            f"expected two URIs, --data.images and --data.labels, found images {recipe.data.images!r} and labels "
            f"{recipe.data.labels!r}; give both, or a --data.manifest"
        )
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if named and emulator:  # a demo that makes its data serves it there, and tells its workers where
        env = {"STORAGE_EMULATOR_HOST": emulator} | env
    if not submission.check:
        recipe = dataclasses.replace(recipe, trainer=dataclasses.replace(recipe.trainer, check_resources=False))
    check_no_password(recipe)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(job_package(recipe, name, with_code=submission.package, python=submission.python))
        client = connect(submission.address)
        if submission.check:
            check_cluster(client, recipe, console)
        metadata["run_dir"] = recipe.run_dir or str(recipe.trainer.resume)
        send(client, submission_id, folder, metadata, env)
    print_next_steps(client, submission_id, metadata["run_dir"], console)
    return client, submission_id


def check_cluster(client: JobSubmissionClient, recipe: Recipe, console: Console) -> None:
    """Versions, resources and the network's shape; then warn of places that the cluster may not see.

    Raises:
        ConfigError, JobError: what would fail there.
    """
    import ray.util

    from .preflight import check_model

    check_model(recipe)
    facts = ask_cluster(client)
    deadline = time.monotonic() + JUST_STARTED_S
    while not facts.cpus and time.monotonic() < deadline:
        time.sleep(0.5)
        facts = ask_cluster(client)
    check_versions(facts)
    check_resources(recipe, facts)
    here: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    for warning in place_warnings(recipe, here, facts.node_ips):
        console.print(f"warning: {warning}")


def send(
    client: JobSubmissionClient, submission_id: str, folder: Path, metadata: dict[str, str], env: dict[str, str]
) -> None:
    """Upload the folder and submit the job.

    Raises:
        JobError: the cluster does not take it.
    """
    from ray.exceptions import AuthenticationError

    runtime_env = {"working_dir": str(folder), "env_vars": env}
    address = client.get_address()
    try:
        client.submit_job(
            entrypoint=ENTRYPOINT, submission_id=submission_id, runtime_env=runtime_env, metadata=metadata
        )
    except AuthenticationError as error:
        raise refused(address, error) from error
    except (RuntimeError, OSError) as error:
        if "already exists" in str(error):
            raise JobError(
                f"expected a --submission-id that is not used yet at {address}, found a job {submission_id}; choose "
                "another, or leave it out"
            ) from error
        reason = str(error).strip().rpartition("\n")[2]
        raise JobError(
            f"expected {address} to take job {submission_id}, found: {reason}; the head's logs say more, in "
            "dashboard.log of Ray's session folder"
        ) from error


def pairs(flag: str, given: tuple[str, ...]) -> dict[str, str]:
    """KEY=VALUE options as a dictionary.

    Raises:
        ConfigError: one has no key or no `=`.
    """
    found = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise ConfigError(f"expected {flag} KEY=VALUE, found {item!r}")
        found[key] = value
    return found


def print_next_steps(client: JobSubmissionClient, submission_id: str, run_dir: str, console: Console) -> None:
    """How to watch the job and stop it."""
    address = client.get_address()
    console.print(f"submitted {submission_id} to {address}; its run folder on the cluster: {run_dir}")
    steps = {
        "status": f"voxflux status {submission_id} --address {address}",
        "log": f"voxflux logs {submission_id} --follow --address {address}",
        "stop": f"voxflux stop {submission_id} --address {address}",
        "dashboard": f"{address}/#/jobs/{submission_id}",
    }
    for what, how in steps.items():
        console.print(f"  {what + ':':<10} {how}", highlight=False)
