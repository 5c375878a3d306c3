"""Jobs on a real `ray start --head` with a token: submitted, followed, listed, asked after, stopped."""

import os
import platform
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ingest.stores import open_store
from ingest.testing import make_cases
from tests.integration.ray_head import Head, ray_head

SMALL = [
    *("--data.crop.patch", "8", "8", "8", "--window.roi", "8", "8", "8", "--model.filters", "4", "8"),
    *("--model.bottleneck", "8", "--trainer.num-workers", "1", "--trainer.evaluate-every", "0"),
    *("--data.task-cpus", "0.5"),
]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with ray_head(tmp_path_factory.mktemp("head")) as started:
        yield started


def train(head: Head, command: str, *arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    call = [sys.executable, "-m", "train", command, *arguments, "--address", head.address]
    done = subprocess.run(call, env=head.env | (env or {}), capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


def test_a_demo_runs_as_a_job_to_its_end_and_is_asked_after(head):
    options = [*SMALL, "--demo.cases", "24", "--demo.shape", "16", "16", "16", "--trainer.epochs", "1"]
    options += ["--submission-id", "first", "--metadata", "team=imaging"]
    status, printed = train(head, "submit", "demo", *options, "--follow")
    assert status == 0, printed
    assert "epoch 1/1: loss" in printed
    assert "job first: SUCCEEDED" in printed
    assert "Running Dataset" not in printed
    assert "RayTrainWorker" not in printed
    assert (Path(head.env["HOME"]) / "voxflux/runs/first/metrics.json").exists()
    status, printed = train(head, "status", "first")
    assert status == 0
    for part in ("first: SUCCEEDED", "team: imaging", "recipe: demo", "run_dir: ~/voxflux/runs/first"):
        assert part in printed
    status, printed = train(head, "list")
    assert status == 0
    assert any("first" in line and "SUCCEEDED" in line and "demo" in line for line in printed.splitlines())
    status, printed = train(head, "submit", "demo", *options)
    assert status == 1
    assert "found a job first; choose another" in printed


def test_a_command_beside_a_cluster_starts_a_ray_of_its_own_unless_it_is_told_of_the_cluster(head):
    script = "import ray; from ingest.cluster import connected_ray\n"
    script += "with connected_ray() as here: print(here, ray.get_runtime_context().gcs_address)"
    # What `ray start` leaves for others to find, at the place where it leaves it by itself.
    found = Path("/tmp/ray/ray_current_cluster")
    before = found.read_text() if found.exists() else None
    found.parent.mkdir(exist_ok=True)
    found.write_text(head.gcs)
    try:
        printed = [
            subprocess.run(
                [sys.executable, "-c", script], env=head.env | told, capture_output=True, text=True, timeout=240
            ).stdout.splitlines()[-1]
            for told in ({}, {"RAY_ADDRESS": head.gcs})
        ]
    finally:
        found.unlink() if before is None else found.write_text(before)
    port = head.gcs.partition(":")[2]  # Ray says another address of this machine
    assert printed[0].startswith("True ")
    assert not printed[0].endswith(f":{port}")
    assert printed[1].startswith("False ")
    assert printed[1].endswith(f":{port}")


PAGE_FAULTS = """
import resource
import ray
from ingest.cluster import connected_ray

@ray.remote
def page_faults():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [b"x" * (16 * 2**20) for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with connected_ray():
    print(ray.get(page_faults.remote()))
"""


def test_a_demo_for_which_a_cluster_has_no_cpu_is_refused_before_its_data_is_made(head, tmp_path):
    options = ["--trainer.num-workers", "64", "--run-dir", str(tmp_path / "run")]
    call = [sys.executable, "-m", "train", "run", "demo", *options]
    done = subprocess.run(call, env=head.env | {"RAY_ADDRESS": head.gcs}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "CPUs" in done.stderr
    assert "serving" not in done.stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_workers_keep_the_memory_that_they_free_unless_the_user_tunes_the_allocator(head):
    kept, tuned_by_user = (
        int(
            subprocess.run(
                [sys.executable, "-c", PAGE_FAULTS],
                env=head.env | {"RAY_ADDRESS": head.gcs} | told,
                capture_output=True,
                text=True,
                timeout=240,
            ).stdout.splitlines()[-1]
        )
        for told in ({}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=0"})
    )
    assert kept < 1000
    assert tuned_by_user > 10_000  # of the 16,384 pages of 64 MB


def test_a_cluster_with_a_token_refuses_another_one(head, tmp_path):
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    status, printed = train(head, "list", env={"RAY_AUTH_TOKEN_PATH": str(wrong)})
    assert status == 1
    assert "found another one (403)" in printed
    status, printed = train(head, "list", env={"RAY_AUTH_MODE": "disabled"})
    assert status == 1
    assert "found none (401)" in printed


def interrupted(head: Head, *command: str, typed: bytes | None) -> tuple[int, str]:
    """A command that follows a job, which gets Ctrl-C in the second epoch; its status and what it printed.

    Args:
        head: has the job.
        command: to run.
        typed: at a terminal, as the answer; None is without a terminal.
    """
    terminal, theirs = pty.openpty()
    # A process that a shell has started in the background ignores SIGINT, and hands that on.
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script = listening + "import sys; from train.__main__ import main; sys.exit(main(sys.argv[1:]))"
    call = [sys.executable, "-c", script, *command, "--follow", "--address", head.address]
    stdin = subprocess.DEVNULL if typed is None else theirs
    process = subprocess.Popen(call, env=head.env, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    os.close(theirs)
    assert process.stdout is not None
    lines, sent = [], False
    for line in process.stdout:
        lines.append(line.decode())
        if "epoch 2/" in lines[-1] and not sent:
            sent = True
            process.send_signal(signal.SIGINT)
            os.write(terminal, typed or b"")
    process.stdout.close()
    status = process.wait(timeout=240)
    os.close(terminal)
    return status, "".join(lines)


@pytest.mark.crash  # not for crashes: it takes two minutes
def test_a_job_goes_on_after_ctrl_c_without_a_terminal_and_y_at_one_stops_it_when_it_has_saved(head, tmp_path):
    make_cases(open_store(f"{tmp_path}/images/"), open_store(f"{tmp_path}/labels/"), 24, shape=(12, 12, 12))
    data = ["--data.images", f"{tmp_path}/images", "--data.labels", f"{tmp_path}/labels"]
    python = tmp_path / "their python"
    python.write_text(f'#!/bin/sh\necho the given python, in $(ls).\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    # Without a package the head's own voxflux is used: here the one that the tests run.
    job = [*SMALL, *data, "--trainer.epochs", "100000", "--no-package", "--python", str(python)]
    status, printed = interrupted(head, "submit", "demo", *job, "--submission-id", "long", typed=None)
    assert status == 130, printed
    assert "stop job" not in printed
    assert "job long goes on" in printed
    assert "the given python, in job.sh recipe.json." in printed

    status, printed = interrupted(head, "logs", "long", typed=b"y\n")
    assert status == 130, printed
    assert "stop job long? y stops it" in printed
    assert "job long: STOPPED" in printed
    assert "stopped and saved; go on with --trainer.resume" in printed
    assert printed.count("epoch 1/100000: loss") == 1

    status, printed = train(head, "submit", "demo", *job, "--submission-id", "brief")
    assert status == 0, printed
    status, printed = train(head, "stop", "brief")
    assert status == 0, printed
    assert "brief: STOPPED" in printed
    status, printed = train(head, "logs", "long")
    assert status == 0
    assert "epoch 1/100000: loss" in printed
