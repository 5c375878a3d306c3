"""The ledger: where it lies, and that what a crash loses of it is never what a checkpoint covers."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ingest.errors import ConfigError, StoreError
from ingest.stores import open_store
from train import launch
from train.audit import read_attempts
from train.ledger import Ledger, attempt_name
from train.recipes import DEMO


def begin(folder: str | None, attempt: str = "a", rank: int = 0, step: int = 0) -> Ledger:
    return Ledger(folder, attempt=attempt, rank=rank, world_size=2, batch_size=1, step=step, checkpoint=None)


def record(ledger: Ledger, *steps: int) -> None:
    for step in steps:
        ledger.append(epoch=0, step=step, indices=np.array([step]))


@pytest.fixture(params=["local", "gs"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "ledger")
    return f"gs://{request.getfixturevalue('bucket')}/ledger"


def test_an_audit_reads_the_steps_of_all_ranks_and_attempts_in_order(folder):
    for attempt, start in (("1", 0), ("2", 3)):
        for rank in (0, 1):
            with begin(folder, attempt, rank, start) as ledger:
                record(ledger, start + 1)
                ledger.sync()
                ledger.sync()  # nothing more to write
                record(ledger, start + 2, start + 3)
    found = read_attempts(folder)
    assert [(attempt.start_step, attempt.step_cases) for attempt in found] == [(0, 2), (3, 2)]
    assert found[1].steps == {step: [(0, [step]), (0, [step])] for step in (4, 5, 6)}


def test_starts_are_in_order_though_the_clock_was_put_back_between_them(folder):
    for clock_ns, start in ((2_000, 0), (1_000, 3), (1_000, 5)):
        with begin(folder, attempt_name(folder, lambda now=clock_ns: now), step=start) as ledger:
            record(ledger, start + 1)
    assert [attempt.start_step for attempt in read_attempts(folder)] == [0, 3, 5]


def test_a_process_that_is_killed_loses_no_step_that_a_checkpoint_covers(folder):
    ledger = begin(folder)
    record(ledger, 1, 2)
    ledger.sync()  # before the checkpoint of step 2 is reported
    record(ledger, 3)
    (found,) = read_attempts(folder)  # the ledger is never closed
    assert {1, 2} <= set(found.steps)
    ledger.__exit__(None, None, None)


def test_a_part_that_could_not_be_written_is_written_with_the_next(bucket):
    class Failing:
        def __init__(self, store) -> None:
            self.store, self.failures = store, 1

        def put(self, name: str, data: bytes) -> None:
            self.failures -= 1
            if self.failures >= 0:
                raise StoreError("no luck")
            self.store.put(name, data)

    folder = f"gs://{bucket}/ledger"
    ledger = begin(folder)
    ledger._store = Failing(ledger._store)
    record(ledger, 1)
    with pytest.raises(StoreError):
        ledger.sync()
    record(ledger, 2)
    ledger.__exit__(None, None, None)
    assert sorted(read_attempts(folder)[0].steps) == [1, 2]


def test_a_missing_part_is_named(bucket):
    folder = f"gs://{bucket}/ledger"
    with begin(folder) as ledger:
        record(ledger, 1)
    store = open_store(folder)
    store.put("attempt-a-rank-00000-part-00003.jsonl", b"")
    with pytest.raises(ConfigError, match="found no part 2"):
        read_attempts(folder)


def test_a_place_that_may_not_be_written_is_found_at_the_start(bucket):
    with pytest.raises(StoreError):
        begin("gs://no-such-bucket-of-ours/ledger")


def test_a_relative_folder_is_refused_by_a_rank():
    with pytest.raises(ConfigError, match=r"absolute path or a gs:// place.*--trainer\.ledger /"):
        begin("ledger")


@pytest.mark.parametrize("damage", ["[1]\n[2]\n", "5\n6\n", '{"rank": 0}\n{"x": 1}\n'])
def test_lines_that_no_run_wrote_are_named(tmp_path, damage):
    (tmp_path / "attempt-a-rank-00000.jsonl").write_text(damage)
    with pytest.raises(ConfigError, match="attempt-a-rank"):
        read_attempts(str(tmp_path))
    (tmp_path / "attempt-a-rank-00000.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="found no text"):
        read_attempts(str(tmp_path))


def test_a_run_hands_its_ranks_an_absolute_ledger(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handed: list[str | None] = []

    class SeenError(Exception):
        pass

    @contextlib.contextmanager
    def seen(recipe, _console, _vitals):
        handed.append(recipe.trainer.ledger)
        raise SeenError
        yield

    monkeypatch.setattr(launch, "data_of", seen)  # what comes after it starts Ray
    for given in ("ledger", "gs://bucket/ledger"):
        trainer = dataclasses.replace(DEMO.trainer, ledger=given, check_resources=False)
        with pytest.raises(SeenError):
            launch.run(dataclasses.replace(DEMO, trainer=trainer, run_dir=str(tmp_path / "run")), "x", Console())
    assert handed == [str(tmp_path / "ledger"), "gs://bucket/ledger"]
