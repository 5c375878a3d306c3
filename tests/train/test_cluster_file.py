"""cluster.yaml: filled, taken by Ray's schema and by Ray's own bootstrap, and made of what Google's API knows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import googleapiclient.discovery_cache.documents
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from ingest.errors import ConfigError
from tests.train.fake_cloud import ACCOUNT, PROJECT, FakeCloud
from train.__main__ import main
from train.cluster_file import CLUSTER_FILE, ClusterConfig, filled

ZONE = "us-central1-a"
SCOPES = "https://www.googleapis.com/auth/"


def cluster(**fields: Any) -> dict[str, Any]:
    """The file as Ray loads it, filled."""
    loaded: dict[str, Any] = yaml.safe_load(filled(ClusterConfig(project=PROJECT, zone=ZONE, **fields)))
    return loaded


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[FakeCloud]:
    with FakeCloud(str(tmp_path)) as cloud:
        yield cloud


def faults(value: Any, schema: dict[str, Any], schemas: dict[str, Any], at: str) -> list[str]:
    """Where a value is not what a schema of Google's discovery documents says."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    kind = schema.get("type")
    if kind == "object" and isinstance(value, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties")
        found = [f"{at}.{key}: no such field" for key in value if key not in known and more is None]
        for key, part in value.items():
            if key in known or more is not None:
                found += faults(part, known.get(key, more), schemas, f"{at}.{key}")
        return found
    if kind == "array" and isinstance(value, list):
        return [fault for part in value for fault in faults(part, schema["items"], schemas, f"{at}[]")]
    types = {"string": str, "boolean": bool, "integer": int, "number": (int, float)}
    # Of 64-bit numbers, which the API writes as strings, Google's client takes both.
    numeric = schema.get("format") in ("int64", "uint64") and isinstance(value, int)
    if kind not in types or not (isinstance(value, types[kind]) or numeric):
        return [f"{at}: expected {kind}, found {value!r}"]
    return [] if value in schema.get("enum", [value]) else [f"{at}: {value!r} is none of {schema['enum']}"]


def test_the_file_as_it_is_and_filled_is_what_rays_schema_asks_for() -> None:
    for text in (CLUSTER_FILE.read_text(), filled(ClusterConfig(project=PROJECT, zone=ZONE, data_workers=3))):
        validate_config(prepare_config(yaml.safe_load(text)))


def test_filling_leaves_no_placeholder_and_changes_nothing_but_the_lines_on_top() -> None:
    before = CLUSTER_FILE.read_text().splitlines()
    after = filled(ClusterConfig(project=PROJECT, zone=ZONE)).splitlines()
    assert "YOUR-" not in "\n".join(after)
    changed = [number for number, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert before[min(changed) - 1] == "metadata:"
    assert (
        before[changed[0] : changed[-1] + 1]
        == [line for line in before if re.match(r"  \w+: &\w+ ", line)][: changed[-1] + 1 - changed[0]]
    )
    provider = cluster()["provider"]
    assert (provider["project_id"], provider["region"], provider["availability_zone"]) == (PROJECT, "us-central1", ZONE)


def test_data_workers_are_as_many_as_asked_for_and_then_alone_read() -> None:
    some, none = cluster(data_workers=3, gpu_workers=5), cluster()
    workers = some["available_node_types"]
    assert (workers["data_worker"]["min_workers"], workers["data_worker"]["max_workers"]) == (3, 6)
    assert workers["data_worker"]["labels"] == {"ray-subcluster": "data"}
    assert "GPU" not in workers["data_worker"]["resources"]
    assert workers["gpu_worker"]["min_workers"] == 5
    assert some["max_workers"] == 11
    assert none["available_node_types"]["data_worker"]["min_workers"] == 0
    assert none["available_node_types"]["data_worker"]["labels"] == {}


def test_the_container_has_our_ray_and_our_python() -> None:
    image = cluster()["docker"]["image"]
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    pinned = re.search(r"^ray==(\S+)", (CLUSTER_FILE.parent / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert pinned.group(1) == metadata.version("ray")
    assert image.startswith(f"rayproject/ray:{pinned.group(1)}-py3")
    if sys.version_info[:2] == (3, 11):  # that the constraints are of
        assert f"-{python}-" in image


def test_all_nodes_install_this_project_by_its_constraints() -> None:
    config = cluster()
    gpu_worker = config["available_node_types"]["gpu_worker"]
    for commands in (
        config["head_setup_commands"],
        config["worker_setup_commands"],
        gpu_worker["worker_setup_commands"],
    ):
        (install,) = commands
        assert "--constraint /home/ray/voxflux/constraints.txt" in install
        assert "/home/ray/voxflux[demo]" in install
    assert config["file_mounts"]["/home/ray/voxflux"] == str(CLUSTER_FILE.parent)


def test_only_the_head_may_make_machines() -> None:
    for name, node in cluster()["available_node_types"].items():
        (account,) = node["node_config"]["serviceAccounts"]
        assert account["email"] == ACCOUNT
        assert f"{SCOPES}cloud-platform" not in account["scopes"]
        assert (f"{SCOPES}compute" in account["scopes"]) == (name == "head")


BOOTSTRAP = """
import json, sys, yaml
from ray.autoscaler._private.gcp.config import bootstrap_gcp
from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME

config = prepare_config(yaml.safe_load(sys.stdin.read()))
config["provider"]["gcp_credentials"] = {"type": "credentials_token", "credentials": "a-token"}
ready = bootstrap_gcp(config)
provider = GCPNodeProvider(ready["provider"], ready["cluster_name"])
for name, node in ready["available_node_types"].items():
    kind = "head" if name == ready["head_node_type"] else "worker"
    provider.create_node(node["node_config"], {TAG_RAY_NODE_KIND: kind, TAG_RAY_NODE_NAME: name.replace("_", "-")}, 1)
print(ready["auth"]["ssh_private_key"])
"""


def test_rays_own_bootstrap_takes_it_and_asks_google_for_machines_of_fields_that_exist(
    cloud: FakeCloud, tmp_path: Path
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", BOOTSTRAP],  # since Google's client reads its environment when it is imported
        input=filled(ClusterConfig(project=PROJECT, zone=ZONE, data_workers=2)),
        env=os.environ | cloud.env | {"HOME": str(tmp_path)},  # below which Ray makes a key pair
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.splitlines()[-1].startswith(str(tmp_path))
    (account,) = cloud.bodies("POST", f"/projects/{PROJECT}/serviceAccounts")
    assert ACCOUNT.startswith(account["accountId"])
    made = cloud.bodies("POST", f"/zones/{ZONE}/instances")
    machines = [body["machineType"].rpartition("/")[2] for body in made]
    assert machines == ["n2-standard-8", "g2-standard-48", "n2-standard-32"]
    document = Path(googleapiclient.discovery_cache.documents.__path__[0]) / "compute.v1.json"
    schemas = json.loads(document.read_text())["schemas"]
    for body in made:
        assert faults(body, {"$ref": "Instance"}, schemas, "instance") == []
        assert body["networkInterfaces"][0]["subnetwork"].endswith("/default")
    assert [body.get("scheduling", {}).get("provisioningModel") for body in made] == [None, "SPOT", "SPOT"]


def test_a_field_that_google_does_not_know_is_found() -> None:
    schemas = {"Instance": {"type": "object", "properties": {"machineType": {"type": "string"}}}}
    assert faults({"machineType": "n2", "preemptable": True}, {"$ref": "Instance"}, schemas, "instance") == [
        "instance.preemptable: no such field"
    ]


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"project": "My Project", "zone": ZONE}, "My Project"),
        ({"project": PROJECT, "zone": "us-central1"}, "us-central1"),
        ({"project": PROJECT, "zone": ZONE, "gpu_workers": 0}, "got 0"),
        ({"project": PROJECT, "zone": ZONE, "data_workers": 5, "most_data_workers": 3}, "got 3"),
    ],
)
def test_what_cannot_be_filled_in_is_refused(fields: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        ClusterConfig(**fields)


@pytest.mark.parametrize("source", ["~", "- x", "a: b # c", "back\\slash"])
def test_a_folder_of_whatever_name_is_kept_as_it_is(source: str) -> None:
    assert cluster(source=source)["file_mounts"]["/home/ray/voxflux"] == source


def test_the_command_prints_a_file_that_ray_loads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "--project", PROJECT, "--zone", ZONE, "--data-workers", "1"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["provider"]["project_id"] == PROJECT


def test_without_the_projects_folder_the_command_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run the command from its folder"):
        filled(ClusterConfig(project=PROJECT, zone=ZONE), tmp_path / "cluster.yaml")
