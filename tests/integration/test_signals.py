"""A signal that comes while Ray is up, and before the command has handlers of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

CODE = """
import os, sys, time
from ingest.cluster import connected_ray
from ingest.command import run_command
from ingest.emulator import EmbeddedServer
def work():
    with EmbeddedServer() as server, connected_ray():
        print(server.pid, flush=True)
        time.sleep(300)
sys.exit(run_command(work))
"""


def below(pid: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *below(int(child))]
    return found


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_sigterm_after_rays_start_ends_the_command_with_one_line_and_leaves_no_process_behind() -> None:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(
        [sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as command:
        assert command.stdout is not None
        server = int(command.stdout.readline())
        processes = below(command.pid)
        assert server in processes
        assert len(processes) > 3  # Ray's too
        command.send_signal(signal.SIGTERM)
        _, said = command.communicate(timeout=200)
    assert command.returncode == 128 + signal.SIGTERM
    assert said.endswith("ended by SIGTERM\n")
    assert "SIGTERM received" not in said  # the stack that Ray's own handler prints
    assert "Traceback" not in said
    deadline = time.monotonic() + 240
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in processes if is_alive(pid)]
