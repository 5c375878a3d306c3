"""Data workers and data nodes that die: Ray reads their shards again, and the samples are the same."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ingest.digest import combine, digest_batches
from tests.integration.test_pipeline import configure, dataset, fingerprint

pytestmark = [pytest.mark.usefixtures("ray_here"), pytest.mark.timeout(200)]


def reading_processes() -> list[int]:
    """Processes below this one that run a read task just now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::ReadPairedVolume") and is_ours(int(folder.name)):
                found.append(int(folder.name))
    return found


def is_ours(pid: int) -> bool:
    """Whether a process descends from this one: another Ray of this machine is none of our business."""
    while pid > 1 and pid != os.getpid():
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    return pid == os.getpid()


def test_ten_killed_data_workers_change_no_sample(places):
    config = configure(places.local, shard_cases=1)
    killed: list[int] = []
    stop = threading.Event()

    def kill_ten() -> None:
        while len(killed) < 10 and not stop.is_set():
            for pid in reading_processes()[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.1)

    killer = threading.Thread(target=kill_ten)
    killer.start()
    samples = dataset(config, batch=1)
    found, epochs = {}, 0
    while epochs < 3 or (len(killed) < 10 and epochs < 30):
        found |= digest_batches(samples.iter_batches(batch_size=None, batch_format="numpy"))
        epochs += 1
    stop.set()
    killer.join()
    assert len(killed) == 10
    assert len(found) == 65 * epochs
    assert combine(found) == fingerprint(configure(places.local), epochs=epochs)[0]


@pytest.mark.crash
def test_a_lost_data_node_and_a_new_one_change_no_sample(places):
    expected, count = fingerprint(configure(places.local), epochs=3)
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_RAYLET_PID")}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.integration.lose_node", places.local],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    # Ray may print the log of the node that it has lost, before or after.
    said = [line for line in ran.stdout.splitlines() if line.startswith("digest ")]
    assert said == [f"digest {expected} samples {count} nodes 4"]
