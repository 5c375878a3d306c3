"""Whole epochs through the fault proxy: the samples are the same, and no composite outlives its run."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ingest.__main__ import main
from ingest.emulator import EmbeddedServer
from ingest.fault_proxy import Fault, FaultProxy, every_fault
from ingest.stores import open_store
from ingest.testing import make_cases
from tests.gcs_place import GCSPlace
from tests.integration.test_data_worker_loss import reading_processes
from tests.needs import COMPOSE, needs_dataflux

pytestmark = [pytest.mark.crash, pytest.mark.timeout(250)]

CASES = 600
KINDS = {"latency", "status-429", "status-503", "status-404", "reset", "stall", "truncate", "flip"}


@pytest.fixture(scope="module")
def many_cases(gcs_server: EmbeddedServer) -> str:
    """The URI of 600 small cases in a bucket of their own."""
    gcs_server.create_bucket("faults")
    root = "gs://faults/set/"
    make_cases(open_store(f"{root}images/"), open_store(f"{root}labels/"), CASES, shape=(8, 8, 8), seed=2)
    return root


def arguments(root: str) -> list[str]:
    return [
        *("digest", "--images", f"{root}images", "--labels", f"{root}labels", "--epochs", "2"),
        *("--patch", "8", "8", "8", "--seed", "7", "--store.retry-first-s", "0.02", "--store.retry-longest-s", "0.2"),
    ]


def digest(root: str, server_url: str, *options: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "ingest", *arguments(root), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"STORAGE_EMULATOR_HOST": server_url},
    )


def last_line(process: subprocess.Popen[str]) -> str:
    printed, said = process.communicate(timeout=200)
    assert process.returncode == 0, said[-4000:]
    return printed.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def undisturbed(many_cases: str, ray_here: None) -> str:
    """The digest of both epochs without any fault, on the Ray of this process."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([*arguments(many_cases), "--transport", "direct"]) == 0
    line = printed.getvalue().strip().splitlines()[-1]
    assert re.fullmatch(rf"digest [0-9a-f]{{64}} samples {2 * CASES}", line)
    return line


@pytest.fixture
def through(gcs_server: EmbeddedServer) -> Iterator[Any]:
    """Puts a proxy with these faults in front of the server."""
    with contextlib.ExitStack() as stack:
        yield lambda faults: stack.enter_context(FaultProxy(gcs_server.url, faults, seed=5))


def keys(gcs_server: EmbeddedServer) -> list[str]:
    return GCSPlace(open_store("gs://faults"), gcs_server.url).keys()


@pytest.mark.parametrize("transport", [COMPOSE, "direct"])
def test_one_fault_in_twenty_of_every_kind_at_once_changes_no_sample(
    many_cases, undisturbed, through, gcs_server, transport
):
    proxy = through(every_fault(0.05, stall_s=1.0))
    line = last_line(digest(many_cases, proxy.url, "--transport", transport, "--store.read-timeout-s", "0.5"))
    assert line == undisturbed
    wanted = KINDS | ({"status-403"} if transport == "compose" else set())
    assert wanted <= {kind for kind, times in proxy.injected.items() if times}, proxy.injected
    assert not proxy.composites_alive
    assert len(keys(gcs_server)) == 2 * CASES


@needs_dataflux
def test_a_worker_killed_between_compose_and_delete_leaves_no_composite_behind_the_run(
    many_cases, undisturbed, through, gcs_server
):
    proxy = through([Fault(kind="stall", request="read", object_pattern="dataflux-composed", seconds=120.0, times=1)])
    process = digest(many_cases, proxy.url, "--transport", "compose", "--blocks-in-flight", "1")
    deadline = time.monotonic() + 240
    while not proxy.injected.get("stall"):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    assert proxy.composites_alive
    for pid in reading_processes():
        os.kill(pid, signal.SIGKILL)
    assert last_line(process) == undisturbed
    assert not proxy.composites_alive
    assert len(keys(gcs_server)) == 2 * CASES
