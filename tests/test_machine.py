"""What Ray needs of a machine is checked before it starts, with the way out in the message."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import ray._private.worker

from ingest import machine
from ingest.cluster import runtime_env_of
from ingest.errors import ConfigError, DiskFullError
from ingest.machine import SOCKET_BYTES, check_machine, longest_socket, session_root
from ingest.ray_compat import without_raylet_log

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(machine, "_SAID", set())
    monkeypatch.setenv("TMPDIR", "/tmp")


def folder_of(length: int, below: Path) -> Path:
    """A path of so many bytes."""
    return below / ("x" * (length - len(os.fsencode(below)) - 1))


def test_a_tmpdir_is_refused_from_the_byte_on_at_which_ray_could_make_no_socket(monkeypatch, tmp_path):
    from ray._private.utils import validate_socket_filepath

    below = Path("/tmp")
    most = SOCKET_BYTES - (longest_socket(below / "ray") - len("/tmp"))
    fits, too_long = folder_of(most, below), folder_of(most + 1, below)
    # Ray's own names: of the session, as in `ray._private.node.Node`, and of its longest socket.
    of_session = f"ray/session_2026-11-29_12-42-00_140095_{os.getpid()}/sockets/plasma_store"
    validate_socket_filepath(str(fits / of_session))
    with pytest.raises(OSError, match="AF_UNIX"):
        validate_socket_filepath(str(too_long / of_session))
    monkeypatch.setenv("TMPDIR", str(too_long))
    with pytest.raises(ConfigError, match=rf"at most {most} bytes in TMPDIR.*found {most + 1} bytes.*set RAY_TMPDIR"):
        check_machine()
    assert not too_long.exists()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    if len(os.fsencode(tmp_path)) <= most:
        check_machine()


def test_an_empty_and_a_relative_tmpdir_lead_to_an_absolute_folder(monkeypatch):
    monkeypatch.setenv("TMPDIR", "")
    assert session_root() == Path("/tmp/ray")
    monkeypatch.setenv("TMPDIR", "below")
    assert session_root() == Path.cwd() / "below/ray"


def test_a_session_folder_that_cannot_be_written_is_refused(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file"))
    monkeypatch.setattr(machine, "longest_socket", lambda folder: 0)
    with pytest.raises(ConfigError, match=r"that Ray can write its session to, found: Not a directory; set RAY_TMPDIR"):
        check_machine()


def test_a_disk_too_small_for_a_session_is_refused_with_the_room_that_is_needed(monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: Usage(2**20, 0, 2**20))
    with pytest.raises(
        DiskFullError, match=r"expected 100 MiB free .* in /tmp/ray, found 1 MiB; .*set RAY_TMPDIR"
    ) as at:
        check_machine()
    assert at.value.place == "/tmp/ray"


def test_a_small_shared_memory_is_said_once_and_refused_where_the_disk_cannot_take_its_place(monkeypatch, caplog):
    monkeypatch.setattr("ingest.ray_compat.get_shared_memory_bytes", lambda: 64 * 2**20)
    free = iter([20 * 2**30, 19 * 2**30, 20 * 2**30])  # it is another at each look
    monkeypatch.setattr("ingest.ray_compat.estimate_available_memory", lambda: next(free))
    with caplog.at_level(logging.WARNING):
        check_machine()
        check_machine()
    (said,) = caplog.messages
    assert "/dev/shm has 64 MiB, and Ray wants 6,144 MiB" in said
    assert "--shm-size=6g" in said
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: Usage(2**32, 0, 2**31))
    with pytest.raises(DiskFullError, match=r"expected 6,144 MiB in /dev/shm .* found 64 MiB and 2,048 MiB"):
        check_machine()


LIMITS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
from ingest.errors import ConfigError
from ingest.machine import raise_file_limit
try:
    raise_file_limit()
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
except ConfigError as error:
    print(error)
"""


def limited(soft: int, hard: int) -> str:
    call = [sys.executable, "-c", LIMITS, str(soft), str(hard)]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()


def test_a_soft_limit_of_open_files_is_raised_to_the_hard_one():
    assert limited(64, 4096) == "4096"


def test_a_hard_limit_of_open_files_that_ray_cannot_live_with_is_refused():
    assert limited(64, 64).startswith(f"expected that a process may open {machine.FILES} files")
    assert "found a hard limit of 64; raise it" in limited(64, 64)


@pytest.mark.parametrize(
    ("executable", "wanted"),
    [
        ("/home/u/vox/.venv/bin/python", None),
        ("/home/u/My Projects/.venv/bin/python", {"py_executable": "'/home/u/My Projects/.venv/bin/python'"}),
        ("/data/a&b(1)/bin/python", {"py_executable": "'/data/a&b(1)/bin/python'"}),
    ],
)
def test_an_interpreter_whose_path_a_shell_would_split_is_quoted_for_ray(executable, wanted):
    assert runtime_env_of(executable) == wanted


def test_of_what_ray_prints_only_the_end_of_its_raylet_s_log_is_left_out(monkeypatch):
    printed: list[str] = []

    def keep(data: dict[str, list[str]], ignore_prefix: bool) -> None:
        printed.extend(data["lines"])

    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", keep)
    with without_raylet_log():
        for line in ("Raylet is terminated. Termination is unexpected.\n    [state-dump] 1", "A worker died"):
            ray._private.worker.print_to_stdstream({"lines": [line]}, ignore_prefix=False)
    assert printed == ["A worker died"]
    assert ray._private.worker.print_to_stdstream is keep
