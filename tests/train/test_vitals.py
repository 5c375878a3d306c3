"""The driver looks at what its run cannot live without, and ends with the message of what died."""

from __future__ import annotations

import os
import signal
import socket
import threading
from types import SimpleNamespace

import pytest
import ray

from ingest.emulator import EmbeddedServer
from ingest.errors import ClusterError, IngestError, UnreachableError
from ingest.ray_compat import own_ray_ended
from train.monitor import Monitor
from train.ray_compat import own_dead_processes
from train.stop import in_thread
from train.vitals import LOOK_S, SILENT_S, Head, OwnRay, Vitals, ended, guarded


def test_a_server_that_is_killed_ends_a_fit_that_would_go_on_for_ever():
    goes_on = threading.Event()
    started = threading.Event()

    def fit() -> None:
        started.set()
        goes_on.wait(100)

    with EmbeddedServer() as server:
        vitals = Vitals()
        vitals.watch(lambda: server.check("go on with --trainer.resume /runs/a"))

        def look() -> None:
            if started.is_set() and server.pid is not None:
                os.kill(server.pid, signal.SIGKILL)
                started.clear()
            vitals.look()

        with pytest.raises(
            UnreachableError, match=r"found it ended with status -9; .*; go on with --trainer.resume /r"
        ):
            in_thread(fit, look)
        assert not goes_on.is_set()
    goes_on.set()


def test_a_fit_that_fails_for_what_died_ends_with_the_message_of_what_died():
    def fit() -> None:
        raise ray.exceptions.ActorDiedError()

    vitals = Vitals()
    with pytest.raises(ray.exceptions.ActorDiedError):
        guarded(fit, vitals)
    vitals.watch(OwnRay("/runs/a", lambda: [("raylet", 77, -9)], lambda: None))
    with pytest.raises(IngestError, match="expected Ray's raylet"):
        guarded(fit, vitals)
    assert guarded(lambda: 3, vitals) == 3


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_process_of_ray_without_which_nothing_goes_on_is_named_with_how_it_ended(name):
    with pytest.raises(
        IngestError,
        match=rf"expected Ray's {name} to live .*found that pid 77 was killed by signal 9 \(SIGKILL\).*/runs/a",
    ):
        OwnRay("/runs/a", lambda: [("log_monitor", 5, 1), (name, 77, -9)], lambda: None)()


def test_processes_of_ray_that_only_log_and_show_end_no_run():
    OwnRay("/runs/a", lambda: [("log_monitor", 5, 1), ("dashboard", 6, -15)], pytest.fail)()


def test_where_no_ray_was_started_nothing_of_it_is_dead(monkeypatch):
    monkeypatch.setattr("ray._private.worker._global_node", None)
    assert own_dead_processes() == []


def test_the_ways_a_process_ends_in_words():
    assert ended(1) == "ended with status 1"
    assert ended(-11) == "was killed by signal 11 (SIGSEGV)"
    assert ended(-99) == "was killed by signal 99"


def test_a_head_may_be_away_for_a_while_and_ends_the_run_before_ray_ends_the_driver():
    now = [0.0]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        look = Head("/runs/a", address, lambda: now[0])
        now[0] = LOOK_S
        look()
    for _ in range(int(SILENT_S / LOOK_S)):
        now[0] += LOOK_S
        look()
    now[0] += LOOK_S
    with pytest.raises(ClusterError, match=rf"{address} to live .*no connection for 45 s .*--trainer.resume /runs/a"):
        look()
    assert SILENT_S + 2 * LOOK_S < 60  # of Ray's gcs_rpc_server_reconnect_timeout_s


def test_a_head_that_is_back_in_time_is_forgiven():
    now = [0.0]
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    listening.close()
    look = Head("/runs/a", f"127.0.0.1:{port}", lambda: now[0])
    now[0] = SILENT_S - LOOK_S
    look()
    with socket.create_server(("127.0.0.1", port)):
        now[0] = SILENT_S
        look()
    now[0] = 2 * SILENT_S
    look()


class Node:
    """Stands for Ray's: of those of its processes that it killed itself, it says nothing."""

    def __init__(self) -> None:
        self.dead = [("raylet", SimpleNamespace(pid=77, returncode=-9))]

    def dead_processes(self) -> list[tuple[str, SimpleNamespace]]:
        return self.dead

    def kill_all_processes(self, *, check_alive: bool, allow_graceful: bool) -> None:
        self.dead = []


def test_what_is_left_of_ray_is_ended_once_and_nobody_asks_it_any_more(monkeypatch):
    monkeypatch.setattr("ray._private.worker._global_node", Node())
    look = OwnRay("/runs/a")
    assert not own_ray_ended()
    for _ in range(2):  # the main thread, and the one that trains
        with pytest.raises(IngestError, match="expected Ray's raylet"):
            look()
    assert own_ray_ended()
    monitor = Monitor("nobody", "nowhere", keeper=object())  # an ask would raise: it is no actor
    assert monitor.ask("progress") is None
    assert monitor.death() is None
    monitor.tell("event", "fault", "x")
    monkeypatch.setattr("ray._private.worker._global_node", Node())
    assert not own_ray_ended()
