"""The embedded server: starts, serves a folder, ends with us."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ingest.emulator import EmbeddedServer, serve
from ingest.errors import ConfigError, UnreachableError
from ingest.stores import open_store
from ingest.testing import make_cases


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(") ")[2][0] != "Z"


def test_a_folder_is_served_and_the_process_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = open_store(str(tmp_path / "cases-bucket" / "images"))
    make_cases(local, local, 3, (4, 4, 4))
    with EmbeddedServer(data=tmp_path) as server:
        pid = server.pid
        assert pid is not None
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.env()["STORAGE_EMULATOR_HOST"])
        remote = open_store("gs://cases-bucket/images")
        assert [meta[:2] for meta in remote.list()] == [meta[:2] for meta in local.list()]
        assert remote.fetch(list(remote.list())) == local.fetch(list(local.list()))
    assert not alive(pid)


def test_two_servers_run_side_by_side() -> None:
    with EmbeddedServer() as one, EmbeddedServer() as other:
        assert one.url != other.url


def test_a_taken_port_is_an_error() -> None:
    with EmbeddedServer() as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(UnreachableError, match=f"expected port {port}"):
            EmbeddedServer(port=port).start()


def test_a_missing_data_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a folder"):
        EmbeddedServer(data=tmp_path / "none")


def test_the_server_ends_when_its_owner_is_killed() -> None:
    code = "from ingest.emulator import EmbeddedServer\ns = EmbeddedServer().start()\nprint(s.pid, flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert alive(pid)
        owner.kill()
    deadline = time.monotonic() + 240
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def test_serve_runs_a_command_and_returns_its_status(tmp_path: Path) -> None:
    code = (
        "import os, sys, urllib.request\n"
        "urllib.request.urlopen(os.environ['STORAGE_EMULATOR_HOST'] + '/storage/v1/b').close()\n"
        "sys.exit(7)"
    )
    assert serve(tmp_path, 0, [sys.executable, "-c", code]) == 7


def test_serve_refuses_a_command_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="no-such-command"):
        serve(command=["no-such-command"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_serve_passes_signals_on_to_its_command(number: signal.Signals) -> None:
    inner = (
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(9))\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    code = f"import sys\nfrom ingest.emulator import serve\nsys.exit(serve(command=[sys.executable, '-c', {inner!r}]))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as outer:
        assert outer.stdout is not None
        assert outer.stdout.readline() == "ready\n"
        outer.send_signal(number)
        assert outer.wait(20) == 9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_serve_without_a_command_says_how_to_use_it_until_interrupted(number: signal.Signals) -> None:
    code = "import sys\nfrom ingest.emulator import serve\nsys.exit(serve())"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("export STORAGE_EMULATOR_HOST=http://127.0.0.1:")
        server.send_signal(number)
        assert server.wait(20) == 0
