"""A Ray cluster of one node for tests, apart from any other Ray of this machine; ended by its own pids."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.integration.test_resume import alive, descendants


class Head(NamedTuple):
    """A running head: its dashboard's address, the environment that holds its token, and where clusters are joined."""

    address: str
    env: dict[str, str]
    gcs: str


@contextlib.contextmanager
def ray_head(folder: Path, cpus: int = 4) -> Iterator[Head]:
    """`ray start --head` with a minted token, on ports of its own; no interpreter of ours is on its PATH.

    Args:
        folder: for its home, token and output; its sessions go to a short path, since sockets have short names.
        cpus: that it says to have.
    """
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "STORAGE_"))}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "HOME": str(folder)}
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "PATH": "/usr/bin:/bin"}
    kinds = ["port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"]
    kinds += [
        "runtime-env-agent-port",
        "metrics-export-port",
        "node-manager-port",
        "object-manager-port",
        "ray-client-server-port",
    ]
    ports = dict(zip(kinds, free_ports(len(kinds)), strict=True))
    sessions = Path("/tmp") / f"vf-{secrets.token_hex(4)}"
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus", str(cpus)]
    command += ["--dashboard-host", "127.0.0.1", "--node-ip-address", "127.0.0.1", "--temp-dir", str(sessions)]
    command += ["--object-store-memory", str(200 * 2**20), "--disable-usage-stats"]
    command += [part for kind, port in ports.items() for part in (f"--{kind}", str(port))]
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        wait_for_dashboard(head, address, folder / "head.log")
        yield Head(address, env, f"127.0.0.1:{ports['port']}")
    finally:
        end(head)
        shutil.rmtree(sessions, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def wait_for_dashboard(head: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Until it answers at all: 401 will do."""
    deadline = time.monotonic() + 240
    while True:
        assert head.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5)
        except urllib.error.HTTPError:
            return
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


def end(head: subprocess.Popen[bytes]) -> None:
    """The head and every process that came of it."""
    started = descendants(head.pid)
    head.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(timeout=3)
    deadline = time.monotonic() + 2
    while alive(started) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in alive(started):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if head.poll() is None:
        head.kill()
    head.wait()
