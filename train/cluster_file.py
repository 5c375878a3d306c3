"""The command `cluster`: this project's cluster.yaml with its placeholders filled, for `ray up`."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import tyro

from ingest.errors import ConfigError

from .nodes import DATA_WORKERS

CLUSTER_FILE = Path(__file__).resolve().parent.parent / "cluster.yaml"
GPUS_PER_WORKER = 4
CPUS_PER_GPU_WORKER = 48
CPUS_PER_DATA_WORKER = 32
SERVICE_ACCOUNT = "ray-autoscaler-sa-v1@{project}.iam.gserviceaccount.com"

# https://cloud.google.com/resource-manager/docs/creating-managing-projects#before_you_begin
_PROJECT = re.compile(r"[a-z][a-z0-9-]{4,28}[a-z0-9]")
_ZONE = re.compile(r"([a-z]+-[a-z]+[0-9]+)-[a-z]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Print a cluster file for `ray up`."""

    project: str
    """The Google Cloud project's id."""

    zone: str
    """Where the machines stand, as us-central1-a; near the bucket."""

    gpu_workers: int = 2
    """Machines of four L4 each."""

    data_workers: int = 0
    """Machines of 32 CPUs that only read and transform, at the least; `voxflux size` says how many a job calls
    for. With one or more, the GPU workers read nothing; with none, they read with the CPUs that the ranks leave."""

    most_data_workers: int | None = None
    """As many may come when Ray Data asks for more; None is twice the least, and 4 at the least."""

    service_account: str | None = None
    """Of the machines; None is the one that `ray up` makes."""

    source: str | None = None
    """This project's folder on your machine; None is where this command runs from."""

    def __post_init__(self) -> None:
        if not _PROJECT.fullmatch(self.project):
            raise ConfigError(f"expected a project's id, as my-project-123, found {self.project!r}; check --project")
        if not _ZONE.fullmatch(self.zone):
            raise ConfigError(f"expected a zone, as us-central1-a, found {self.zone!r}; check --zone")
        if self.gpu_workers < 1 or self.data_workers < 0:
            raise ConfigError(
                f"gpu_workers must be 1 or more and data_workers 0 or more; got {self.gpu_workers} and "
                f"{self.data_workers}"
            )
        if self.most < max(1, self.data_workers):
            raise ConfigError(
                f"most_data_workers must be 1 or more and not below data_workers, {self.data_workers}; got {self.most}"
            )

    @property
    def most(self) -> int:
        """Data workers at the most."""
        return max(4, 2 * self.data_workers) if self.most_data_workers is None else self.most_data_workers


def print_cluster(arguments: list[str]) -> int:
    """`voxflux cluster --project PROJECT --zone ZONE > my-cluster.yaml`."""
    config = tyro.cli(ClusterConfig, prog="voxflux cluster", args=arguments)
    print(filled(config), end="")
    return 0


def filled(config: ClusterConfig, template: Path = CLUSTER_FILE) -> str:
    """The cluster file with what the configuration says.

    Raises:
        ConfigError: the file is not there, as in an installation without this project's folder, or has no such lines.
    """
    zone = _ZONE.fullmatch(config.zone)
    assert zone is not None  # the configuration was checked
    labels = ", ".join(f"{key}: {value}" for key, value in DATA_WORKERS.items())
    values = {
        "project": json.dumps(config.project),
        "region": zone.group(1),
        "zone": config.zone,
        "disk_type": f"projects/{config.project}/zones/{config.zone}/diskTypes/pd-balanced",
        "service_account": json.dumps(config.service_account or SERVICE_ACCOUNT.format(project=config.project)),
        "source": json.dumps(config.source or str(template.parent)),
        "gpu_workers": str(config.gpu_workers),
        "least_data_workers": str(config.data_workers),
        "most_data_workers": str(config.most),
        "most_workers": str(config.gpu_workers + config.most),
        "data_worker_labels": f"{{{labels}}}" if config.data_workers else "{}",
    }
    try:
        text = template.read_text()
    except OSError as error:
        raise ConfigError(
            f"expected this project's cluster.yaml at {template}, found none ({error}); run the command from its folder"
        ) from error
    for name, value in values.items():
        line = re.compile(rf"^(  {name}: &{name}) .*?(  #.*)?$", re.MULTILINE)
        count = len(line.findall(text))
        if count != 1:
            raise ConfigError(f"expected one line `  {name}: &{name} …` in {template}, found {count}; restore the file")
        text = line.sub(functools.partial(_with_value, value), text)
    return text


def _with_value(value: str, line: re.Match[str]) -> str:
    return f"{line[1]} {value}{line[2] or ''}"
