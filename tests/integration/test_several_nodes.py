"""A cluster of a head, a node that stands for GPUs, and two data nodes: who reads, who trains, and what is refused."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.crash, pytest.mark.timeout(300)]  # not for crashes: they take two minutes


@pytest.fixture(scope="module")
def found(places, gcs_server, tmp_path_factory):
    """What one process on such a cluster saw; see several_nodes."""
    gcs_server.create_bucket("several-nodes")
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_RAYLET_PID")}
    folder = tmp_path_factory.mktemp("several-nodes")
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "tests.integration.several_nodes", places.gs, places.local),
            *("gs://several-nodes/runs/", f"{folder}/"),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment | gcs_server.env(),
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.strip().splitlines()[-1])


def test_data_nodes_read_and_the_gpu_node_trains(found):
    assert found["nodes"]["read"] == found["data"]
    assert set(found["nodes"]["scored"]) <= set(found["data"])
    assert found["nodes"]["trained"] == found["gpu"]


def test_the_nodes_of_the_ranks_are_watched_for_their_loss_where_there_are_several(found):
    assert len(found["nodes"]["watched_from"]) == 1


def test_a_run_of_several_nodes_reads_a_bucket_and_files_and_keeps_its_checkpoints_in_the_bucket(found):
    assert found["run"]["epochs"] == 2
    assert 0 <= found["run"]["dice"] <= 1
    assert "several-nodes/runs/" in found["run"]["checkpoint"]


def test_an_epoch_larger_than_the_object_stores_passes_through_them_without_spilling(found):
    memory = found["memory"]
    assert memory["samples"] == 400
    assert memory["epoch_bytes"] > memory["store_bytes"]
    assert memory["spilled_bytes"] == 0
    assert 0 < memory["peak_bytes"] < 0.25 * memory["store_bytes"]  # half of what the two that read have


def test_data_nodes_without_a_free_cpu_are_an_error(found):
    assert "free CPUs" in found["held"]["refused"]
    assert "ray-subcluster=data" in found["held"]["refused"]


def test_free_cpus_that_lie_where_no_rank_can_go_are_not_counted_on(found):
    assert "expected 2 free places for ranks with 1 CPU and 1 accelerator, found 1" in found["scattered"]["refused"]


def test_ranks_that_no_node_has_room_for_are_an_error(found):
    assert "expected 2 accelerator for each of 2 ranks, found enough for 1" in found["too_few"]["refused"]
