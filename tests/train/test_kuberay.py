"""The RayJob in the README: of fields that KubeRay has, with our Ray, and with an entrypoint that our command takes."""

from __future__ import annotations

import re
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from train.commands import chosen_recipe
from train.config import Recipe
from train.nodes import DATA_WORKERS

# KubeRay's ray-operator/apis/ray/v1/rayjob_types.go and raycluster_types.go, whose CRD schema is made of them; of a
# pod's own fields (Kubernetes core/v1) those that stand here. A trailing ! marks what must be there.
POD = {
    "spec!": {
        "containers!": [
            {"name!": str, "image": str, "resources": {"limits": {str: str}, "requests": {str: str}}, "env": list}
        ]
    }
}
RAY_JOB = {
    "apiVersion!": "ray.io/v1",
    "kind!": "RayJob",
    "metadata!": {"name!": str, "namespace": str},
    "spec!": {
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "entrypoint": str,
        "entrypointNumCpus": float,
        "runtimeEnvYAML": str,
        "jobId": str,
        "metadata": {str: str},
        "submissionMode": str,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "suspend": bool,
        "rayClusterSpec": {
            "rayVersion": str,
            "enableInTreeAutoscaling": bool,
            "autoscalerOptions": {"idleTimeoutSeconds": int, "upscalingMode": str},
            "headGroupSpec!": {"rayStartParams!": {str: str}, "serviceType": str, "template!": POD},
            "workerGroupSpecs": [
                {
                    "groupName!": str,
                    "replicas": int,
                    "minReplicas!": int,
                    "maxReplicas!": int,
                    "idleTimeoutSeconds": int,
                    "numOfHosts": int,
                    "rayStartParams!": {str: str},
                    "template!": POD,
                }
            ],
        },
    },
}


def faults(value: Any, shape: Any, at: str = "") -> list[str]:
    """Where a value is not of that shape."""
    if isinstance(shape, type):
        return [] if isinstance(value, shape) and not (shape is int and value is True) else [f"{at}: {value!r}"]
    if isinstance(shape, str):
        return [] if value == shape else [f"{at}: {value!r} instead of {shape}"]
    if isinstance(shape, list):
        return [fault for part in value for fault in faults(part, shape[0], f"{at}[]")]
    if not isinstance(value, dict):
        return [f"{at}: {value!r} is no mapping"]
    if set(shape) == {str}:
        return [fault for key, part in value.items() for fault in faults(part, shape[str], f"{at}.{key}")]
    known = {name.rstrip("!"): inner for name, inner in shape.items()}
    found = [f"{at}.{name.rstrip('!')}: missing" for name in shape if name.endswith("!") and name[:-1] not in value]
    for key, part in value.items():
        found += faults(part, known[key], f"{at}.{key}") if key in known else [f"{at}.{key}: no such field"]
    return found


@pytest.fixture
def job() -> dict[str, Any]:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = re.findall(r"```yaml\n(apiVersion: ray\.io.*?)```", readme, re.DOTALL)
    loaded: dict[str, Any] = yaml.safe_load(block)
    return loaded


def test_the_job_has_the_fields_of_kuberays_ray_job_and_no_other(job: dict[str, Any]) -> None:
    assert faults(job, RAY_JOB) == []


def test_a_wrong_field_and_a_missing_one_are_found(job: dict[str, Any]) -> None:
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    group["minReplica"] = group.pop("minReplicas")
    at = ".spec.rayClusterSpec.workerGroupSpecs[]"
    assert faults(job, RAY_JOB) == [f"{at}.minReplicas: missing", f"{at}.minReplica: no such field"]


def test_it_runs_our_ray_and_data_workers_carry_the_label_that_a_run_looks_for(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == metadata.version("ray")
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    labels = ",".join(f"{key}={value}" for key, value in DATA_WORKERS.items())
    assert groups["data"]["rayStartParams"] == {"labels": labels}
    assert "labels" not in groups["gpu"]["rayStartParams"]


def test_its_entrypoint_is_a_run_that_the_gpus_are_enough_for(job: dict[str, Any]) -> None:
    program, command, *rest = shlex.split(job["spec"]["entrypoint"])
    assert (program, command) == ("voxflux", "run")
    recipe, name = chosen_recipe(rest)
    assert isinstance(recipe, Recipe)
    assert name == "kits19-small"
    gpus = [
        group["replicas"]
        * int(group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))
        for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    ]
    assert sum(gpus) == recipe.trainer.num_workers
