"""One run at a time holds a run folder. Time, and whether a holder is alive, are handed in: no test waits for them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from ingest.emulator import EmbeddedServer
from ingest.errors import ConfigError, StoreError
from ingest.fault_proxy import FaultProxy
from ingest.stores import Store, open_store
from ingest.stores.local import LocalStore
from ingest.testing import MemoryStore
from tests.train.test_page import whole_run
from train.__main__ import main
from train.config import Recipe, TrainerConfig
from train.launch import run
from train.lease import (
    GIVE_UP_S,
    LEASE_FILE,
    STALE_S,
    Holder,
    Lease,
    LeaseGuard,
    LeaseLostError,
    held,
    is_alive,
    read_lease,
    require_held,
    take,
)
from train.recipes import RECIPES
from train.run_folder import make_folder, run_folder

DEMO = RECIPES["demo"][1]


class Time:
    """A clock that moves when somebody waits. `then` is called after each wait."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.now_s, self.then = 1000.0, then

    def __call__(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.then()


class Troubled(MemoryStore):
    """A place in memory that does something before or after each put."""

    before: Callable[[], object] = staticmethod(lambda: None)
    after: Callable[[], object] = staticmethod(lambda: None)

    def put(self, name: str, data: bytes, if_generation: int | None = None) -> int:
        self.before()
        generation = super().put(name, data, if_generation)
        self.after()
        return generation

    def list(self, prefix: str = "") -> Iterator:
        self.before()
        return super().list(prefix)


def fail() -> None:
    raise StoreError("expected an answer, found none")


@pytest.fixture
def store(request: pytest.FixtureRequest) -> Troubled:
    place = Troubled(f"memory://{request.node.nodeid}")
    place.create()
    return place


def taken(store: Store, time: Time | None = None, *, alive: bool | None = None) -> Lease:
    time = time or Time()
    return take(store, say=lambda words: None, clock=time, wait=time.wait, alive=lambda holder: alive)


def test_a_free_folder_is_taken_and_its_lease_names_host_pid_and_start(store):
    lease = taken(store)
    about = json.loads(store.fetch(list(store.list()))[0])
    assert (about["host"], about["pid"]) == (socket.gethostname(), os.getpid())
    assert abs(datetime.now().astimezone() - datetime.fromisoformat(about["started"])) < timedelta(minutes=1)
    lease.release()
    assert list(store.list()) == []
    taken(store)


def test_a_second_run_is_refused_at_once_and_told_who_holds_the_folder_and_what_to_do(store):
    time = Time()
    first = taken(store).holder
    with pytest.raises(ConfigError) as refused:
        taken(store, time, alive=True)
    for words in (store.uri, f"pid {first.pid} on {first.host}, started {first.started}", "kill -TERM", "--run-dir"):
        assert words in str(refused.value)
    assert time.now_s == 1000.0
    assert read_lease(store).holder == first


def test_a_holder_of_unknown_fate_that_renews_its_lease_is_alive(store):
    first = taken(store)
    time = Time(then=first.renew)
    with pytest.raises(ConfigError, match=rf"found one that does: pid {first.holder.pid} "):
        taken(store, time)
    assert time.now_s < 1000 + STALE_S
    first.require()


def test_a_lease_that_does_not_change_for_a_minute_of_the_watchers_clock_is_taken_over(store):
    told: list[str] = []
    theirs, time = Time(), Time()
    theirs.now_s = 5e9  # no matter what another machine's clock says
    first = taken(store, theirs)
    second = take(store, say=told.append, clock=time, wait=time.wait, alive=lambda holder: None)
    assert 1000 + STALE_S <= time.now_s < 1000 + STALE_S + 10
    assert len(told) == 1
    assert str(first.holder) in told[0]
    assert not first.renew()
    assert str(second.holder) in first.lost
    first.release()
    assert read_lease(store).holder == second.holder


def test_a_dead_holder_is_not_waited_for(store):
    time = Time()
    taken(store)
    second = taken(store, time, alive=False)
    assert time.now_s == 1000.0
    assert read_lease(store).holder == second.holder


def test_of_two_runs_that_take_over_the_same_lease_one_is_refused(store):
    taken(store)
    faster: list[Lease] = []

    def first_another() -> None:
        store.before = lambda: None
        faster.append(taken(store, alive=False))

    def before_the_take_over() -> None:
        if time.now_s >= 1000 + STALE_S:
            looks.append(1)
            if len(looks) == 2:  # the look that finds the lease stale, then the write
                first_another()

    time, looks = Time(), []
    store.before = before_the_take_over
    with pytest.raises(ConfigError, match="found one that does"):
        taken(store, time)
    assert read_lease(store).holder == faster[0].holder


def test_of_many_runs_that_begin_at_once_in_one_folder_one_is_accepted(tmp_path):
    barrier = threading.Barrier(8)

    def begin(_: int) -> Lease | None:
        barrier.wait()
        with contextlib.suppress(ConfigError):
            return taken(LocalStore(str(tmp_path)), alive=True)
        return None

    with ThreadPoolExecutor(8) as pool:
        assert sum(lease is not None for lease in pool.map(begin, range(8))) == 1


def test_a_damaged_lease_is_watched_and_then_taken_over(store):
    for damage in (b"", b"[1]", b"{", b'{"pid": "x"}', b"\xff", b'{"other": 1}'):
        store.put(LEASE_FILE, damage)
        time = Time()
        lease = take(store, say=lambda words: None, clock=time, wait=time.wait)
        assert time.now_s >= 1000 + STALE_S
        lease.release()


@pytest.fixture
def process() -> Iterator[subprocess.Popen]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        yield running
        running.kill()


def test_a_process_of_this_machine_is_known_to_be_alive_or_dead(process):
    holder = Holder.here(process.pid)
    assert is_alive(holder) is True
    assert is_alive(dataclasses.replace(holder, process_start="1")) is False, "its pid is another process's now"
    assert is_alive(dataclasses.replace(holder, machine="another boot")) is None
    assert is_alive(Holder.here()) is None, "an earlier run of this process may have failed to release"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert is_alive(holder) is False, "a zombie runs nothing"
    process.wait()
    assert is_alive(holder) is False


def test_a_place_that_fails_loses_the_lease_only_after_a_while_and_before_another_run_would_take_it(store):
    time = Time()
    lease = taken(store, time)
    store.before = fail
    time.now_s += GIVE_UP_S - 1
    assert not lease.renew()
    lease.require()
    store.before = lambda: None
    assert lease.renew()
    store.before = fail
    time.now_s += GIVE_UP_S
    assert GIVE_UP_S < STALE_S
    assert not lease.renew()
    with pytest.raises(LeaseLostError, match=r"could not be renewed for 45 s: expected an answer.* --trainer\.resume"):
        lease.require()


def test_a_renewal_whose_answer_was_an_error_is_recognised_as_written(store):
    lease = taken(store)
    store.after = fail
    assert not lease.renew()
    store.after = lambda: None
    assert not lease.renew()
    lease.require()
    assert lease.renew()
    lease.release()
    assert list(store.list()) == []


def test_a_lease_that_was_deleted_is_lost(store):
    lease = taken(store)
    store.delete(LEASE_FILE)
    assert not lease.renew()
    with pytest.raises(LeaseLostError, match="it was deleted"):
        lease.require()


def another(run_dir: Path) -> Holder:
    """Another machine's run takes a folder over."""
    holder = dataclasses.replace(Holder.here(), host="elsewhere", machine="another boot")
    open_store(str(run_dir)).put(LEASE_FILE, holder.to_bytes())
    return holder


def test_a_run_whose_folder_is_taken_over_is_asked_once_to_save_and_then_ends_in_an_error(tmp_path):
    asked: list[str] = []
    heard = threading.Event()

    def ask(why: str) -> None:
        asked.append(why)
        heard.set()

    def lose() -> None:
        with held(str(tmp_path), print, renew_s=0.01) as lease, lease.on_loss(ask):
            others.append(another(tmp_path))
            assert heard.wait(60)

    others: list[Holder] = []
    with pytest.raises(LeaseLostError, match=r"taken over by pid \d+ on elsewhere"):
        lose()
    (other,) = others
    assert len(asked) == 1
    assert read_lease(open_store(str(tmp_path))).holder == other


def test_a_run_that_is_to_begin_after_its_lease_was_lost_does_not(tmp_path):
    began = []

    def begin() -> None:
        with held(str(tmp_path), print, renew_s=600) as lease:
            another(tmp_path)
            assert not lease.renew()
            with lease.on_loss(print):
                began.append(lease)

    with pytest.raises(LeaseLostError, match="elsewhere"):
        begin()
    assert began == []


def test_a_take_over_that_no_renewal_saw_is_found_at_the_end(tmp_path):
    with pytest.raises(LeaseLostError, match="elsewhere"), held(str(tmp_path), print, renew_s=600):
        another(tmp_path)


def test_what_a_run_without_its_lease_failed_of_is_told_too(tmp_path):
    def fail_without_it() -> None:
        with held(str(tmp_path), print, renew_s=600) as lease:
            another(tmp_path)
            lease.renew()
            raise ValueError("no such checkpoint")

    with pytest.raises(LeaseLostError, match=r"on elsewhere, .*; the run then failed: no such checkpoint"):
        fail_without_it()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_a_run_that_ends_in_any_way_frees_its_folder(tmp_path, error):
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        with held(str(tmp_path), print):
            assert (tmp_path / LEASE_FILE).exists()
            if error is not None:
                raise error
    assert list(tmp_path.iterdir()) == []


def test_the_controller_names_no_checkpoint_in_a_folder_that_is_not_its_own(tmp_path):
    lease = taken(open_store(str(tmp_path)))
    guard = LeaseGuard(str(tmp_path), lease.holder.holder)
    guard.after_report(None, [], None)
    lease.renew()
    guard.after_report(None, [], None)
    other = another(tmp_path)
    with pytest.raises(LeaseLostError, match=f"taken over by pid {other.pid} on elsewhere"):
        guard.after_report(None, [], None)
    (tmp_path / LEASE_FILE).unlink()
    with pytest.raises(LeaseLostError, match="deleted"):
        guard.after_report(None, [], None)


def test_a_lease_that_cannot_be_read_now_ends_no_run(store):
    lease = taken(store)
    store.before = fail
    require_held(store, lease.holder.holder)


def test_a_run_folder_in_a_bucket_is_held_by_one_run(
    gcs_server: EmbeddedServer, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(gcs_server.url) as proxy:  # it enforces preconditions, as GCS does
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        run_dir = f"gs://{bucket}/runs/one"
        with held(run_dir, print, renew_s=0.01) as lease:
            with pytest.raises(ConfigError, match=f"pid {os.getpid()} on"):
                take(open_store(run_dir), say=print, alive=lambda holder: True)
            assert lease.renew()
        assert list(open_store(f"gs://{bucket}").list()) == []


def quiet() -> Console:
    return Console(quiet=True)


def test_a_run_in_a_folder_that_another_run_holds_is_refused_and_changes_nothing(process, tmp_path, capfd):
    holder = Holder.here(process.pid)
    (tmp_path / LEASE_FILE).write_bytes(holder.to_bytes())
    with pytest.raises(ConfigError, match=f"pid {process.pid} on {socket.gethostname()}, started 20"):
        run(dataclasses.replace(DEMO, run_dir=str(tmp_path)), "demo", quiet())
    assert main(["run", "demo", "--run-dir", str(tmp_path)]) == 1
    assert f"pid {process.pid} on" in capfd.readouterr().err
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {LEASE_FILE: holder.to_bytes()}


def test_a_second_resume_is_refused_before_the_folder_is_checked_and_accepted_when_the_first_has_died(
    process, tmp_path
):
    run_dir = tmp_path / "run"
    whole_run(run_dir, epochs=2)
    (run_dir / "latest.json").write_text("half wri")  # as a run that goes on there may leave it for a moment
    (run_dir / LEASE_FILE).write_bytes(Holder.here(process.pid).to_bytes())
    before = {file.name for file in run_dir.iterdir()}
    recipe = Recipe(trainer=TrainerConfig(resume=str(run_dir)))
    with pytest.raises(ConfigError, match=rf"found one that does: pid {process.pid} on"):
        run(recipe, "demo", quiet())
    process.kill()
    process.wait()
    with pytest.raises(ConfigError, match=r"latest\.json"):
        run(recipe, "demo", quiet())
    assert {file.name for file in run_dir.iterdir()} == before - {LEASE_FILE}


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    now = datetime.now()
    taken = [tmp_path / f"runs/demo-{now + timedelta(seconds=later):%Y%m%d-%H%M%S}" for later in range(120)]
    for folder in taken:
        folder.mkdir(parents=True)
    with run_folder(DEMO, "demo") as second, run_folder(DEMO, "demo") as third:
        assert Path(second).parent == Path(third).parent == tmp_path / "runs"
        assert second.endswith("-2")
        assert third != second
        assert Path(third).is_dir()
    assert sorted((tmp_path / "runs").iterdir()) == sorted(taken)


def test_a_taken_default_name_gets_the_first_free_suffix(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make_folder, [tmp_path / "runs/demo"] * 8))
    assert {folder.name for folder in made} == {"demo", *(f"demo-{number}" for number in range(2, 9))}
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"expected to make the run folder .*file/demo, found .*--run-dir"):
        make_folder(tmp_path / "file" / "demo")


def test_a_run_that_is_refused_leaves_no_folder_that_was_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in (None, "new/one", (tmp_path / "new" / "one").as_uri()):
        recipe = Recipe(run_dir=given)  # names no data
        with pytest.raises(ConfigError, match="expected two URIs"):
            run(dataclasses.replace(recipe, trainer=TrainerConfig(check_resources=False)), "mine", quiet())
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="expected two URIs"):
        run(Recipe(run_dir="empty", trainer=TrainerConfig(check_resources=False)), "mine", quiet())
    assert list((tmp_path / "empty").iterdir()) == []
    shutil.rmtree(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"found no recipe\.json; check --trainer\.resume"):
        run(Recipe(trainer=TrainerConfig(resume="nowhere")), "mine", quiet())
    assert list(tmp_path.iterdir()) == []
