"""Bad cases on a real Ray: all named, all others delivered, none read again, and the budget kept."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import ray.data

from ingest.crop import CropConfig
from ingest.errors import IngestError, QuarantineBudgetError, StoreError
from ingest.index import index_cases
from ingest.manifest import Manifest
from ingest.pipeline import DataConfig, training_dataset
from ingest.plan import ShardConfig, epoch_order
from ingest.quarantine import BadCaseConfig, QuarantineEntry, load_entries, summary
from ingest.quarantine_actor import QuarantineHandle, start_quarantine
from ingest.unwrap import own_error
from tests.ruined import AFTER_LISTING, REASONS, copy_set, make_set, ruin, trip

pytestmark = pytest.mark.usefixtures("ray_here")

CASES = 1000
BATCH = 8
ISSUE = {17: "gone", 202: "truncated", 333: "not-npy", 555: "nan", 999: "label-seven"}
FURTHER = {0: "wrong-dtype", 50: "shape-mismatch", 51: "too-small", 77: "pickled", 99: "overwritten"}


@pytest.fixture(scope="module")
def good_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    make_set(root, CASES)
    return root


def listed_then_ruined(root: Path, kinds: dict[int, str]) -> Manifest:
    """The manifest as it was when those that go bad afterwards were still good."""
    for number, kind in kinds.items():
        if kind not in AFTER_LISTING:
            ruin(root, number, kind)
    manifest = index_cases(f"{root}/images", f"{root}/labels").manifest
    for number, kind in kinds.items():
        if kind in AFTER_LISTING:
            ruin(root, number, kind)
    return manifest


def policy(budget: int = 5) -> BadCaseConfig:
    return BadCaseConfig(on_bad="quarantine", on_stale="quarantine", budget_cases=budget)


def dataset(
    manifest: Manifest, handle: QuarantineHandle | None, *, bad: BadCaseConfig | None = None, **options
) -> ray.data.Dataset:
    config = DataConfig(
        seed=7,
        holdout_fraction=0.0,
        task_cpus=0.5,
        crop=CropConfig(patch=(8, 8, 8)),
        shards=ShardConfig(shard_cases=options.pop("shard_cases", 250)),
        bad=bad or policy(),
    )
    return training_dataset(manifest, config, quarantine=handle, **({"batch": BATCH} | options))


def epoch_of(samples) -> list[int]:
    batches = samples.iter_batches(batch_size=None, batch_format="numpy")
    return [int(index) for batch in batches for index in batch.get("index", ())]


def good_order(epoch: int, bad: dict[int, str], cases: int = CASES) -> list[int]:
    return [index for index in epoch_order(7, epoch, cases).tolist() if index not in bad]


@pytest.mark.parametrize(("kinds", "cases"), [(ISSUE, CASES), (FURTHER, 100)], ids=["issue", "further"])
def test_five_bad_cases_are_named_and_all_others_delivered_in_every_epoch(good_set, tmp_path, kinds, cases):
    root = copy_set(good_set, tmp_path / "set", cases)
    manifest = listed_then_ruined(root, kinds)
    run_dir = tmp_path / "run"
    handle = start_quarantine(str(run_dir), policy(), len(manifest))
    samples = dataset(manifest, handle)
    assert epoch_of(samples) == good_order(0, kinds, cases)
    found = handle.entries()
    assert {entry.index: entry.reason for entry in found} == {number: REASONS[kind] for number, kind in kinds.items()}
    assert {entry.case_id for entry in found} == {f"case_{number:05d}" for number in kinds}
    assert all(Path(entry.uri).parts[-3:-1][0] == "set" and entry.epoch == 0 for entry in found)
    assert handle.indices().tolist() == sorted(kinds)
    for number in kinds:
        trip(root, number)  # whoever reads one of the five from now on ends the run
    assert epoch_of(samples) == good_order(1, kinds, cases)
    saved = pq.read_table(run_dir / "quarantine.parquet")
    assert saved.schema.names == ["uri", "case_id", "index", "reason", "message", "epoch"]
    assert sorted(saved["index"].to_pylist()) == sorted(kinds)
    assert "5 cases quarantined" in summary(found, handle.run_dir)
    # Another start of the run, at a later epoch, knows them from the folder.
    later = dataset(manifest, start_quarantine(str(run_dir), policy(), len(manifest)), first_epoch=3)
    assert epoch_of(later) == good_order(3, kinds, cases)


def test_over_the_budget_the_run_fails_and_names_the_cases(good_set, tmp_path):
    root = copy_set(good_set, tmp_path / "set")
    manifest = listed_then_ruined(root, ISSUE)
    handle = start_quarantine(str(tmp_path / "run"), policy(2), len(manifest))
    with pytest.raises(Exception) as caught:  # noqa: PT011  Ray's class depends on where it broke
        epoch_of(dataset(manifest, handle, bad=policy(2)))
    ours = own_error(caught.value)
    assert isinstance(ours, QuarantineBudgetError)
    assert "expected at most 2 bad cases, found " in str(ours)
    named = {number for number in ISSUE if f"case_{number:05d} ({REASONS[ISSUE[number]]}: " in str(ours)}
    assert len(named) >= 3
    taken = handle.indices().tolist()
    assert len(taken) == 2
    assert set(taken) < named
    assert sorted(entry.index for entry in load_entries(str(tmp_path / "run"))) == taken
    with pytest.raises(QuarantineBudgetError, match="found 2"):
        start_quarantine(str(tmp_path / "run"), policy(1), len(manifest))


def test_an_error_that_is_no_cases_fault_ends_the_run_and_never_in_quarantine(tmp_path):
    make_set(tmp_path / "set", 20)
    manifest = index_cases(f"{tmp_path}/set/images", f"{tmp_path}/set/labels").manifest
    trip(tmp_path / "set", 3)
    handle = start_quarantine(str(tmp_path / "run"), policy(20), len(manifest))
    with pytest.raises(Exception) as caught:  # noqa: PT011
        epoch_of(dataset(manifest, handle))
    ours = own_error(caught.value)
    assert type(ours) is StoreError
    assert "case_00003" in str(ours)
    assert handle.entries() == []


def test_stale_objects_are_read_as_they_are_now_in_every_epoch_when_the_policy_is_refresh(good_set, tmp_path):
    root = copy_set(good_set, tmp_path / "set", 16)
    manifest = index_cases(f"{root}/images", f"{root}/labels").manifest
    for number in (3, 9):
        ruin(root, number, "overwritten")  # each voxel one more than before
    samples = dataset(manifest, None, bad=BadCaseConfig(on_stale="refresh"))
    fresh = dataset(index_cases(f"{root}/images", f"{root}/labels").manifest, None, bad=BadCaseConfig())
    for epoch in range(2):
        batches, wanted = (list(each.iter_batches(batch_size=None, batch_format="numpy")) for each in (samples, fresh))
        for column in ("index", "image", "label"):
            found, expected = (np.concatenate([batch[column] for batch in part]) for part in (batches, wanted))
            assert np.array_equal(found, expected)
        assert [int(index) for batch in batches for index in batch["index"]] == epoch_order(7, epoch, 16).tolist()


def test_ranks_get_equally_many_rows_in_the_epoch_that_finds_bad_cases_and_after(good_set, tmp_path):
    root = copy_set(good_set, tmp_path / "set")
    manifest = listed_then_ruined(root, ISSUE)
    handle = start_quarantine(str(tmp_path / "run"), policy(), len(manifest))
    samples = dataset(manifest, handle, multiple=2 * BATCH, ranks=2)
    splits = samples.streaming_split(2, equal=True)

    def read(split) -> list[list[int]]:
        return [epoch_of(split) for _ in range(2)]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(read, splits)
    good = [index for index in epoch_order(7, 0, CASES)[: CASES - CASES % (2 * BATCH)].tolist() if index not in ISSUE]
    assert handle.indices().tolist() == sorted(ISSUE)
    assert len(first[0]) == len(second[0]) == len(good) // 2
    assert len(set(first[0] + second[0])) == 2 * (len(good) // 2)
    assert set(first[0] + second[0]) <= set(good)
    # From the second epoch on the plan itself is without them, and the ranks get its batches in turn again.
    order = good_order(1, ISSUE)[: 995 - 995 % (2 * BATCH)]
    blocks = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    assert first[1] == [index for block in blocks[::2] for index in block]
    assert second[1] == [index for block in blocks[1::2] for index in block]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_whole_shard_of_bad_cases_and_a_whole_epoch_of_them_break_nothing(tmp_path, ranks):
    make_set(tmp_path / "set", 24)
    manifest = index_cases(f"{tmp_path}/set/images", f"{tmp_path}/set/labels").manifest
    order = epoch_order(7, 0, 24).tolist()
    handle = start_quarantine(str(tmp_path / "run"), policy(24), len(manifest))
    samples = dataset(manifest, handle, shard_cases=8)
    for index in order[:8]:
        ruin(tmp_path / "set", index, "gone")
    splits = samples.streaming_split(ranks, equal=True)

    def epoch() -> list[list[int]]:
        with concurrent.futures.ThreadPoolExecutor(ranks) as pool:
            return list(pool.map(epoch_of, splits))

    assert sorted(index for rank in epoch() for index in rank) == sorted(order[8:])
    for index in order[8:]:
        ruin(tmp_path / "set", index, "nan")
        file = tmp_path / "set" / "images" / f"case_{index:05d}_x.npy"
        assert np.isnan(np.load(file)).any()
    assert epoch() == [[]] * ranks
    assert len(handle.entries()) == 24


def test_a_data_worker_that_is_killed_after_its_report_gives_every_other_case_once(good_set, tmp_path):
    root = copy_set(good_set, tmp_path / "set")
    kinds = {int(index): ("nan", "gone")[n % 2] for n, index in enumerate(epoch_order(7, 0, CASES)[3:200:20])}
    manifest = listed_then_ruined(root, kinds)
    handle = start_quarantine(str(tmp_path / "run"), policy(10), len(manifest))
    samples = dataset(manifest, handle, bad=policy(10), shard_cases=500)
    indices, killed = [], None
    for batch in samples.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        indices += batch["index"].tolist()
        if killed is None and handle.entries():
            killed = kill_a_reader()
    assert killed is not None
    assert indices == good_order(0, kinds)


def kill_a_reader() -> int | None:
    """Kill a Ray worker of this machine's that is reading, as its process title says."""
    for raylet in children(os.getpid()):
        for worker in children(raylet):
            if Path(f"/proc/{worker}/cmdline").read_bytes().startswith(b"ray::ReadPairedVolume"):
                os.kill(worker, signal.SIGKILL)
                return worker
    return None


def children(pid: int) -> list[int]:
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def test_the_book_outlives_its_process_and_says_so(tmp_path):
    told = tmp_path / "told"
    handle = start_quarantine(str(tmp_path), policy(), 100, told.write_text)
    entry = QuarantineEntry(4, "case_00004", "gs://b/case_00004_x.npy", "missing", "it is gone", 2)
    handle.report(entry)
    actor = ray.get_actor(handle.name, namespace=handle.namespace)
    ray.kill(actor, no_restart=False)
    assert handle.entries() == [entry]
    handle.report(entry)
    assert handle.indices().tolist() == [4]
    assert "quarantine died and was started again" in told.read_text()


def test_a_copy_of_the_handle_works_in_a_worker_and_says_so_when_the_run_is_over(tmp_path):
    handle = start_quarantine(str(tmp_path), policy(), 100)

    def report(copy: QuarantineHandle) -> list[int]:
        copy.report(QuarantineEntry(4, "case_00004", "gs://b/case_00004_x.npy", "missing", "it is gone", 2))
        return copy.indices().tolist()

    assert ray.get(ray.remote(num_cpus=0)(report).remote(handle)) == [4]
    copy = QuarantineHandle(handle.name, handle.namespace, handle.run_dir)
    del handle
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        try:
            copy.entries()
        except (IngestError, ray.exceptions.ActorDiedError):
            break
        time.sleep(0.1)
    with pytest.raises(IngestError, match="expected the run's quarantine"):
        copy.entries()
