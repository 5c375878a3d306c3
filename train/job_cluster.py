"""The cluster that jobs are submitted to: reached or not, of our versions or not, large enough or not."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import tenacity

from ingest.errors import ConfigError, IngestError
from ingest.proxies import bypass_for_loopback, through

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from .config import Recipe

T = TypeVar("T")

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TIMEOUT_S = 10.0


class JobError(IngestError):
    """The cluster that jobs run on cannot be reached, refuses us, or does not know the job."""


def address_of(given: str | None) -> str:
    """The dashboard's address: the given one, else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine's.

    Raises:
        ConfigError: it is not http:// or https://.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    address = given or os.environ.get("RAY_API_SERVER_ADDRESS") or (named if named.startswith("http") else "")
    address = (address or DEFAULT_ADDRESS).rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"expected the dashboard's address, as {DEFAULT_ADDRESS}, found {address!r}; check --address")
    return address


def connect(given: str | None) -> JobSubmissionClient:
    """A client of Ray's Jobs API.

    Raises:
        ConfigError: the address is none.
        JobError: nothing answers there, something else than Ray does, or it refuses our token.
    """
    address = address_of(given)
    bypass_for_loopback()
    probe(address)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard", "ray._private.runtime_env"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
    # Ray's client takes these variables before its argument.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise refused(address, error) from error
    except ConnectionError as error:
        raise nobody(address, error) from error
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise JobError(
            f"expected Ray's dashboard at {address}, found something else ({error}); check --address"
        ) from error


def probe(address: str) -> None:
    """Ray's client waits without end for a server that does not answer: ask once, with a limit.

    Raises:
        JobError: nothing answers.
    """
    try:
        # A new opener goes by the proxies of now; `urlopen` keeps those of its first call.
        with urllib.request.build_opener().open(f"{address}/api/version", timeout=TIMEOUT_S):
            return
    except urllib.error.HTTPError:
        return  # it answers; what it says of our token is told by Ray's client
    except (OSError, ValueError) as error:
        raise nobody(address, error) from error


def nobody(address: str, error: Exception) -> JobError:
    """The error of an address where nothing answers."""
    reason = getattr(error, "reason", error)
    return JobError(
        f"expected a Ray cluster's dashboard at {address}, found none{through(address)} ({reason}); start one with "
        "`ray start --head`, open a tunnel with `ray dashboard cluster.yaml`, or give another --address"
    )


def refused(address: str, error: Exception) -> JobError:
    """The error of a token that is missing (401) or wrong (403)."""
    wrong = "failed" in str(error).partition(":")[0]
    found = "another one (403)" if wrong else "none (401)"
    return JobError(
        f"expected the token of the cluster at {address}, found {found}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN "
        "or RAY_AUTH_TOKEN_PATH to the same token that the head was started with"
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClusterFacts:
    """What a cluster says of itself.

    Attributes:
        ray_version: of the head.
        python_version: of the head.
        cpus: of all nodes that are alive.
        gpus: of all nodes that are alive.
        node_ips: of the nodes that are alive, the head's first.
    """

    ray_version: str
    python_version: str
    cpus: float
    gpus: float
    node_ips: list[str]


def ask_cluster(client: JobSubmissionClient) -> ClusterFacts:
    """Ask the dashboard for versions and resources.

    Raises:
        JobError: it gives no such answer.
    """
    try:
        ray_version = str(_get(client, "/api/version")["ray_version"])
        python_version = str(_get(client, "/api/v0/cluster_metadata")["data"]["pythonVersion"])
        nodes = _get(client, "/api/v0/nodes?detail=1&limit=10000")["data"]["result"]["result"]
        alive = [node for node in nodes if node["state"] == "ALIVE"]
        alive.sort(key=lambda node: not node["is_head_node"])
        cpus, gpus = (sum(float(node["resources_total"].get(kind, 0.0)) for node in alive) for kind in ("CPU", "GPU"))
        return ClusterFacts(
            ray_version=ray_version,
            python_version=python_version,
            cpus=cpus,
            gpus=gpus,
            node_ips=[str(node["node_ip"]) for node in alive],
        )
    except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        raise JobError(
            f"expected the cluster at {client.get_address()} to say its versions and resources, found "
            f"{type(error).__name__}: {error}; if you know them, give --no-check"
        ) from error


def patiently(ask: Callable[..., T], *arguments: Any, **settings: Any) -> T:
    """Ask a dashboard, and ask again if the connection fails: a busy dashboard closes one now and then.

    Only for requests that may arrive twice.

    Raises:
        OSError: the connection failed four times.
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(OSError),
        stop=tenacity.stop_after_attempt(4),
        wait=tenacity.wait_fixed(0.5),
        reraise=True,
    )
    return retrying(ask, *arguments, **settings)


def _get(client: JobSubmissionClient, path: str) -> Any:
    # Ray's own request, for its token and its errors; the paths are those that its dashboard page asks.
    answer = patiently(client._do_request, "GET", path, timeout=TIMEOUT_S)
    if answer.status_code != 200:
        raise ValueError(f"{path} gave status {answer.status_code}")
    return json.loads(answer.text)


def check_versions(facts: ClusterFacts) -> None:
    """The cluster's Ray and Python must be those that we are tested with: ours, to the minor version.

    Raises:
        JobError: they are others.
    """
    import ray

    for what, ours, theirs in (
        ("Ray", ray.__version__, facts.ray_version),
        ("Python", platform.python_version(), facts.python_version),
    ):
        if ours.split(".")[:2] != theirs.split(".")[:2]:
            raise JobError(
                f"expected {what} {'.'.join(ours.split('.')[:2])} on the cluster, as here, found {theirs}; install "
                f"the cluster's {what} here, or ours there (constraints.txt), or give --no-check to try all the same"
            )


def check_resources(recipe: Recipe, facts: ClusterFacts) -> None:
    """The same checks as the run's own, before it is submitted.

    Raises:
        ConfigError: the cluster lacks CPUs or GPUs.
    """
    from .preflight import check_cpus, check_gpus

    try:
        check_cpus(recipe, facts.cpus)
        check_gpus(recipe, facts.gpus)
    except ConfigError as error:
        raise ConfigError(f"{error}; on a cluster that grows on demand, give --no-check") from error
