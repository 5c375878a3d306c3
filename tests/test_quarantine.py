"""Bad cases: the policy, the budget, the book, and what reading and decoding make of each kind."""

import concurrent.futures
import logging
import math
import pickle
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from ingest.augment import AugmentConfig, PatchSampler
from ingest.crop import CropConfig
from ingest.decode import DecodeConfig
from ingest.emulator import EmbeddedServer
from ingest.errors import (
    ConfigError,
    CorruptObjectError,
    DecodeError,
    EncodingError,
    IngestError,
    ManifestError,
    ObjectError,
    ObjectNotFoundError,
    PermissionDeniedError,
    QuarantineBudgetError,
    StaleManifestError,
    StoreError,
    UnreachableError,
)
from ingest.fetch import FetchConfig, ShardSpec, _with_advice, read_shard
from ingest.index import index_cases
from ingest.pipeline import DataConfig, sample_patches, training_dataset
from ingest.quarantine import (
    WRITE_EVERY_S,
    BadCaseConfig,
    QuarantineBook,
    QuarantineEntry,
    load_entries,
    summary,
)
from ingest.quarantine_actor import QuarantineHandle
from ingest.stores import StoreConfig, open_store
from ingest.testing import Fault, FaultProxy, make_cases

from .gcs_place import GCSPlace
from .ruined import AFTER_LISTING, REASONS, files_of, make_set, ruin, trip

BATCH = 4
PATCH = (8, 8, 8)
TAKES_ALL = BadCaseConfig(on_bad="quarantine", on_stale="quarantine")


def entry(index: int, reason: str = "missing", epoch: int = 0) -> QuarantineEntry:
    return QuarantineEntry(index, f"case_{index:05d}", f"gs://b/case_{index:05d}_x.npy", reason, "it is gone", epoch)


def shard(root, *, bad=TAKES_ALL, book=None, store=None, manifest=None, epoch=0) -> ShardSpec:
    store = store or StoreConfig()
    manifest = manifest or index_cases(f"{root}/images", f"{root}/labels", store).manifest
    return ShardSpec(
        images_uri=manifest.images_uri,
        labels_uri=manifest.labels_uri,
        store=store,
        fetch=FetchConfig(chunk_cases=2 * BATCH, chunks_ahead=1),
        epochs=np.full(len(manifest), epoch),
        block=BATCH,
        rows=manifest.table,
        indices=np.arange(len(manifest), dtype=np.int64),
        bad=bad,
        quarantine=book,
    )


def samples_of(spec: ShardSpec) -> list[dict[str, np.ndarray]]:
    """What the read and the map step together give, table by table."""
    sampler = PatchSampler(crop=CropConfig(patch=PATCH), augment=AugmentConfig(), seed=1)
    book = spec.quarantine if spec.bad.on_bad == "quarantine" else None
    return [
        samples
        for raw in read_shard(spec)
        for samples in sample_patches(raw, sampler=sampler, decode=DecodeConfig(), batch=BATCH, quarantine=book)
    ]


def delivered(spec: ShardSpec) -> list[int]:
    return [int(index) for samples in samples_of(spec) for index in samples["index"]]


@pytest.mark.parametrize(
    "settings",
    [
        {"on_bad": "ignore"},
        {"on_stale": "ignore"},
        {"budget_fraction": -0.1},
        {"budget_fraction": 1.1},
        {"budget_fraction": math.nan},
        {"budget_cases": -1},
    ],
)
def test_the_policy_rejects_what_cannot_be_meant(settings):
    with pytest.raises(ConfigError, match=f"data.{next(iter(settings))} must be"):
        BadCaseConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "cases", "budget"),
    [
        ({}, 100_000, 100),
        ({}, 1000, 1),
        ({}, 10, 1),
        ({}, 1999, 1),
        ({"budget_fraction": 0.29}, 100, 29),
        ({"budget_fraction": 0.0}, 1000, 0),
        ({"budget_fraction": 1.0}, 7, 7),
        ({"budget_cases": 0}, 1000, 0),
        ({"budget_cases": 12, "budget_fraction": 0.5}, 1000, 12),
    ],
)
def test_the_budget_is_a_share_of_the_cases_and_at_least_one_unless_it_is_nought(settings, cases, budget):
    assert BadCaseConfig(**settings).budget(cases) == budget


@pytest.mark.parametrize("on_bad", ["fail", "quarantine"])
@pytest.mark.parametrize("on_stale", ["fail", "refresh", "quarantine"])
def test_the_stale_policy_alone_decides_about_stale_objects_unless_it_refreshes(on_bad, on_stale):
    config = BadCaseConfig(on_bad=on_bad, on_stale=on_stale)
    assert config.takes(StaleManifestError("x")) == (
        on_stale == "quarantine" or (on_stale == "refresh" and on_bad == "quarantine")
    )
    for error in (ObjectNotFoundError("x"), CorruptObjectError("x"), DecodeError("x", "dtype")):
        assert config.takes(error) == (on_bad == "quarantine")


def test_a_case_is_taken_in_once_and_its_first_entry_stays():
    book = QuarantineBook(None, budget=2)
    for epoch in range(3):
        book.report(entry(7, epoch=epoch))
    book.report(entry(3))
    assert book.entries() == [entry(7), entry(3)]
    assert book.indices().tolist() == [3, 7]
    assert book.indices().dtype == np.int64


def test_one_case_over_the_budget_is_refused_for_good_and_all_are_named():
    book = QuarantineBook(None, budget=2)
    book.report(entry(1))
    book.report(entry(2, "non-finite"))
    for _ in range(2):
        with pytest.raises(QuarantineBudgetError, match="expected at most 2 bad cases, found 3: ") as caught:
            book.report(entry(3, "dtype"))
        for case in ("case_00001 (missing: gs://b/case_00001_x.npy)", "case_00002 (non-finite", "case_00003 (dtype"):
            assert case in str(caught.value)
    with pytest.raises(QuarantineBudgetError, match="found 4"):
        book.report(entry(4))
    book.report(entry(1))
    assert book.indices().tolist() == [1, 2]


def test_a_run_that_wakes_up_in_a_folder_of_another_run_loses_none_of_its_bad_cases(tmp_path):
    run_dir = str(tmp_path / "run")
    slept = QuarantineBook(run_dir, budget=9)
    slept.report(entry(3))
    other = QuarantineBook(run_dir, budget=9)
    other.report(entry(5), entry(8))
    slept.report(entry(5, epoch=7), entry(6))
    assert load_entries(run_dir) == [entry(3), entry(5), entry(8), entry(6)]
    other.report(entry(1))
    assert [each.index for each in load_entries(run_dir)] == [3, 5, 8, 6, 1]


def test_an_entry_is_in_the_runs_folder_before_the_report_returns_and_is_there_for_the_next_start(tmp_path):
    run_dir = str(tmp_path / "run")
    book = QuarantineBook(run_dir, budget=3)
    assert book.entries() == []
    for index in (5, 2):
        book.report(entry(index, epoch=1))
        table = pq.read_table(tmp_path / "run" / "quarantine.parquet")
        assert table.schema.names == ["uri", "case_id", "index", "reason", "message", "epoch"]
        assert table["index"].to_pylist()[-1] == index
    again = QuarantineBook(run_dir, budget=3)
    assert again.entries() == book.entries() == [entry(5, epoch=1), entry(2, epoch=1)] == load_entries(run_dir)
    again.report(entry(9))
    with pytest.raises(QuarantineBudgetError, match="found 4"):
        again.report(entry(10))


def test_an_entry_that_cannot_be_written_is_not_taken_in(tmp_path):
    book = QuarantineBook(str(tmp_path / "run"), budget=3)
    assert book.entries() == []
    (tmp_path / "run").write_bytes(b"a file where the folder should be")
    with pytest.raises(StoreError):
        book.report(entry(1))
    assert book.entries() == []


def test_a_thousand_bad_cases_in_a_bucket_are_two_writes_a_second_apart_that_acknowledge_all_who_wait(bucket):
    run_dir = f"gs://{bucket}/run"
    slept: list[float] = []
    all_wait = threading.Event()

    def sleep(seconds: float) -> None:
        if seconds > 0:  # not before the first write
            assert all_wait.wait(60)
            slept.append(seconds)

    book = QuarantineBook(run_dir, budget=1000, clock=lambda: 0.0, sleep=sleep)
    book.report(entry(0))
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        reports = [pool.submit(book.report, *map(entry, range(1 + n, 1000, 20))) for n in range(20)]
        while book._open is None or len(book._open.entries) < 999:
            time.sleep(0.01)
        assert not any(report.done() for report in reports)
        assert book.indices().tolist() == [0]
        all_wait.set()
        for report in reports:
            report.result(60)
    assert slept == [WRITE_EVERY_S]
    assert sorted(case.index for case in load_entries(run_dir)) == list(range(1000))


def test_of_several_bad_cases_as_many_are_taken_in_as_the_budget_allows_and_the_rest_is_named():
    book = QuarantineBook(None, budget=3)
    book.report(entry(1), entry(4), entry(1, epoch=2))
    assert book.entries() == [entry(1), entry(4)]
    with pytest.raises(QuarantineBudgetError, match=r"found 5: .*case_00006.*case_00007"):
        book.report(entry(5), entry(6), entry(7))
    assert book.indices().tolist() == [1, 4, 5]


@pytest.mark.parametrize("body", [b"no parquet", None])
def test_a_file_of_that_name_that_is_no_quarantine_is_refused_and_named(tmp_path, body):
    if body is None:
        pq.write_table(pq.read_table(_manifest(tmp_path)), tmp_path / "quarantine.parquet")
    else:
        (tmp_path / "quarantine.parquet").write_bytes(body)
    with pytest.raises(ManifestError, match=r"quarantine.parquet: expected a Parquet file with the columns"):
        QuarantineBook(str(tmp_path), budget=1).indices()


def _manifest(tmp_path):
    make_set(tmp_path / "set", 2)
    index_cases(f"{tmp_path}/set/images", f"{tmp_path}/set/labels").manifest.save(f"{tmp_path}/manifest.parquet")
    return tmp_path / "manifest.parquet"


def test_the_summary_counts_by_reason_names_the_first_and_says_where_the_rest_is():
    entries = [entry(1), entry(2, "dtype"), entry(3), entry(4), entry(5)]
    assert summary(entries, "gs://b/run/") == (
        "5 cases quarantined (4 missing, 1 dtype): case_00001 (missing), case_00002 (dtype), case_00003 (missing) and "
        "2 more; all in gs://b/run/quarantine.parquet"
    )
    assert summary(entries[:1]) == "1 case quarantined (1 missing): case_00001 (missing)"
    assert summary([]) == "no case was quarantined"


def test_a_handle_pickles_as_plain_values():
    handle = QuarantineHandle("name", "namespace", "gs://b/run", keeper=open)
    copy = pickle.loads(pickle.dumps(handle))  # noqa: S301  our own bytes
    assert copy == handle
    assert copy.keeper is None


@pytest.mark.parametrize("kind", REASONS)
def test_a_bad_case_is_named_with_its_reason_and_its_neighbours_are_delivered(tmp_path, kind):
    make_set(tmp_path, 10)
    if kind not in AFTER_LISTING:
        file = ruin(tmp_path, 5, kind)
    manifest = index_cases(f"{tmp_path}/images", f"{tmp_path}/labels").manifest
    if kind in AFTER_LISTING:
        file = ruin(tmp_path, 5, kind)
    book = QuarantineBook(None, budget=1)
    assert delivered(shard(tmp_path, book=book, manifest=manifest, epoch=3)) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    (found,) = book.entries()
    assert (found.index, found.case_id, found.reason, found.epoch) == (5, "case_00005", REASONS[kind], 3)
    assert found.uri == str(file)
    assert str(file) in found.message
    with pytest.raises(IngestError, match=file.name):
        delivered(shard(tmp_path, bad=BadCaseConfig(), book=QuarantineBook(None, budget=1), manifest=manifest))


def test_samples_of_good_cases_are_the_same_with_and_without_bad_neighbours(tmp_path):
    make_set(tmp_path, 10)
    calm = {int(i): s["image"][n] for s in samples_of(shard(tmp_path)) for n, i in enumerate(s["index"])}
    for number in (4, 6, 7):
        ruin(tmp_path, number, "nan")
    for samples in samples_of(shard(tmp_path, book=QuarantineBook(None, budget=3))):
        assert samples["image"].flags.c_contiguous
        assert samples["image"].shape[0] == samples["label"].shape[0] == len(samples["case_id"])
        for position, index in enumerate(samples["index"].tolist()):
            assert np.array_equal(samples["image"][position], calm[index])


def test_a_task_that_runs_again_gives_the_same_tables_though_the_bad_objects_were_mended(tmp_path):
    make_set(tmp_path, 12)
    good = {number: files_of(tmp_path, number)[0].read_bytes() for number in (1, 6)}
    manifest = index_cases(f"{tmp_path}/images", f"{tmp_path}/labels").manifest
    ruin(tmp_path, 6, "gone")
    book = QuarantineBook(None, budget=2)
    spec = shard(tmp_path, book=book, manifest=manifest)
    book.report(entry(1, "non-finite"))  # as if an earlier run of the task had failed to decode it
    first, first_raw = samples_of(spec), list(read_shard(spec))
    files_of(tmp_path, 6)[0].write_bytes(good[6])
    second, second_raw = samples_of(spec), list(read_shard(spec))
    assert [s["index"].tolist() for s in first] == [[0, 2, 3], [4, 5, 7], [8, 9, 10, 11]]
    assert [s["index"].tolist() for s in second] == [s["index"].tolist() for s in first]
    # Ray cuts what is read by its bytes: they must not depend on what is left out, nor on when it was found bad.
    whole = list(read_shard(shard(tmp_path)))
    assert [raw.nbytes for raw in first_raw] == [raw.nbytes for raw in second_raw] == [raw.nbytes for raw in whole]


def test_a_known_bad_case_is_not_read(tmp_path):
    make_set(tmp_path, 6)
    manifest = index_cases(f"{tmp_path}/images", f"{tmp_path}/labels").manifest
    book = QuarantineBook(None, budget=2)
    book.report(entry(2))
    trip(tmp_path, 2)
    assert delivered(shard(tmp_path, book=book, manifest=manifest)) == [0, 1, 3, 4, 5]
    trip(tmp_path, 3)
    with pytest.raises(StoreError, match="case_00003"):
        delivered(shard(tmp_path, book=book, manifest=manifest))
    assert book.indices().tolist() == [2]


def test_a_table_whose_cases_are_all_bad_yields_nothing(tmp_path):
    make_set(tmp_path, 8)
    manifest = index_cases(f"{tmp_path}/images", f"{tmp_path}/labels").manifest
    for number in range(4):
        ruin(tmp_path, number, "gone")
    tables = samples_of(shard(tmp_path, book=QuarantineBook(None, budget=4), manifest=manifest))
    assert [samples["index"].tolist() for samples in tables] == [[4, 5, 6, 7]]


def test_a_stale_object_is_read_anew_and_said_so_when_the_policy_is_refresh(tmp_path, caplog):
    make_set(tmp_path, 6)
    manifest = index_cases(f"{tmp_path}/images", f"{tmp_path}/labels").manifest
    before = {int(i): s["image"][n] for s in samples_of(shard(tmp_path)) for n, i in enumerate(s["index"])}
    ruin(tmp_path, 2, "overwritten")
    (tmp_path / "images" / "case_00002_x.npy.backup").write_bytes(b"another object with that prefix")
    with caplog.at_level(logging.WARNING, "ingest.fetch"):
        found = samples_of(shard(tmp_path, bad=BadCaseConfig(on_stale="refresh"), manifest=manifest))
    after = {int(i): s["image"][n] for s in found for n, i in enumerate(s["index"])}
    assert sorted(after) == list(range(6))
    assert [i for i in range(6) if not np.array_equal(after[i], before[i])] == [2]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "case_00002_x.npy was overwritten since it was listed" in message


@pytest.mark.parametrize(
    ("kind", "advice", "policy", "left"),
    [
        ("overwritten", "--data.on-stale refresh", BadCaseConfig(on_stale="refresh"), [0, 1, 2, 3, 4, 5]),
        ("overwritten", "--data.on-stale quarantine", BadCaseConfig(on_stale="quarantine"), [0, 1, 3, 4, 5]),
        ("gone", "--data.on-bad quarantine", BadCaseConfig(on_bad="quarantine"), [0, 1, 3, 4, 5]),
    ],
)
def test_the_advice_for_an_object_that_changed_since_it_was_listed_lets_the_run_go_on(
    tmp_path, kind, advice, policy, left
):
    make_set(tmp_path, 6)
    manifest = index_cases(f"{tmp_path}/images", f"{tmp_path}/labels").manifest
    ruin(tmp_path, 2, kind)
    with pytest.raises(ObjectError, match=advice):
        delivered(shard(tmp_path, manifest=manifest))
    book = QuarantineBook(None, budget=1)
    assert delivered(shard(tmp_path, bad=policy, book=book, manifest=manifest)) == left


@pytest.mark.parametrize("kind", [CorruptObjectError, EncodingError, ObjectNotFoundError])
def test_each_error_of_one_object_that_ends_a_run_names_the_setting_that_leaves_its_case_out(kind):
    ended = _with_advice(kind("expected a"))
    assert type(ended) is kind
    assert str(ended) == "expected a, or go on with --data.on-bad quarantine, which leaves its case out"


def test_a_stale_object_that_is_refreshed_and_found_bad_goes_by_the_policy_for_bad_ones(tmp_path):
    make_set(tmp_path, 6)
    manifest = index_cases(f"{tmp_path}/images", f"{tmp_path}/labels").manifest
    ruin(tmp_path, 2, "nan")
    book = QuarantineBook(None, budget=1)
    policy = BadCaseConfig(on_bad="quarantine", on_stale="refresh")
    assert delivered(shard(tmp_path, bad=policy, book=book, manifest=manifest)) == [0, 1, 3, 4, 5]
    assert [found.reason for found in book.entries()] == ["non-finite"]
    with pytest.raises(DecodeError, match="case_00002"):
        delivered(shard(tmp_path, bad=BadCaseConfig(on_stale="refresh"), manifest=manifest))


def test_a_stale_object_is_quarantined_by_its_own_policy_though_bad_ones_fail(tmp_path):
    make_set(tmp_path, 6)
    manifest = index_cases(f"{tmp_path}/images", f"{tmp_path}/labels").manifest
    ruin(tmp_path, 2, "overwritten")
    book = QuarantineBook(None, budget=1)
    policy = BadCaseConfig(on_stale="quarantine")
    assert delivered(shard(tmp_path, bad=policy, book=book, manifest=manifest)) == [0, 1, 3, 4, 5]
    ruin(tmp_path, 3, "gone")
    with pytest.raises(ObjectNotFoundError, match="case_00003"):
        delivered(shard(tmp_path, bad=policy, book=book, manifest=manifest))
    with pytest.raises(StaleManifestError, match="case_00002"):
        delivered(shard(tmp_path, bad=BadCaseConfig(on_bad="quarantine"), book=None, manifest=manifest))


def test_a_stale_object_fails_the_run_by_default_even_where_bad_cases_are_quarantined(tmp_path):
    make_set(tmp_path, 3)
    manifest = index_cases(f"{tmp_path}/images", f"{tmp_path}/labels").manifest
    ruin(tmp_path, 2, "overwritten")
    book = QuarantineBook(None, budget=1)
    with pytest.raises(StaleManifestError, match="case_00002"):
        delivered(shard(tmp_path, bad=BadCaseConfig(on_bad="quarantine"), book=book, manifest=manifest))
    assert book.entries() == []


@pytest.mark.parametrize(
    ("fault", "raised"),
    [
        (Fault(kind="status", status=403, request="read", object_pattern="case_00002_x"), PermissionDeniedError),
        (Fault(kind="status", status=503, request="read", object_pattern="case_00002_x"), UnreachableError),
        (Fault(kind="reset", request="read", object_pattern="case_00002_y"), UnreachableError),
        (Fault(kind="flip", request="read", object_pattern="case_00002_x"), None),
    ],
    ids=["forbidden", "unavailable", "reset", "corrupt"],
)
def test_permission_and_network_errors_never_end_in_quarantine_and_corruption_does(
    gcs_server: EmbeddedServer, bucket: str, monkeypatch: pytest.MonkeyPatch, fault, raised
):
    make_cases(open_store(f"gs://{bucket}/images"), open_store(f"gs://{bucket}/labels"), 5, shape=PATCH)
    store = StoreConfig(transport="direct", retry_first_s=0.01, retry_longest_s=0.05, retry_deadline_s=1.0)
    book = QuarantineBook(None, budget=5)
    with FaultProxy(gcs_server.url, [fault]) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        spec = shard(f"gs://{bucket}", store=store, book=book)
        if raised is None:
            assert delivered(spec) == [0, 1, 3, 4]
            assert [(found.index, found.reason) for found in book.entries()] == [(2, "corrupt")]
        else:
            with pytest.raises(raised, match="case_00002"):
                delivered(spec)
            assert book.entries() == []


def test_missing_and_overwritten_objects_of_a_bucket_are_told_apart(gcs_server: EmbeddedServer, bucket: str):
    images, labels = open_store(f"gs://{bucket}/images"), open_store(f"gs://{bucket}/labels")
    make_cases(images, labels, 5, shape=PATCH)
    store = StoreConfig(transport="direct")
    manifest = index_cases(f"gs://{bucket}/images", f"gs://{bucket}/labels", store).manifest
    images.put("case_00001_x.npy", images.fetch([next(images.list("case_00001_x"))])[0])
    GCSPlace(labels, gcs_server.url).delete("case_00003_y.npy")
    book = QuarantineBook(None, budget=5)
    assert delivered(shard("", store=store, book=book, manifest=manifest)) == [0, 2, 4]
    assert {(found.index, found.reason, found.uri) for found in book.entries()} == {
        (1, "stale", f"gs://{bucket}/images/case_00001_x.npy"),
        (3, "missing", f"gs://{bucket}/labels/case_00003_y.npy"),
    }


def test_a_pipeline_that_is_to_quarantine_wants_a_quarantine(tmp_path):
    make_set(tmp_path, 2)
    manifest = index_cases(f"{tmp_path}/images", f"{tmp_path}/labels").manifest
    for bad in (BadCaseConfig(on_bad="quarantine"), BadCaseConfig(on_stale="quarantine")):
        with pytest.raises(ConfigError, match="expected a quarantine"):
            training_dataset(manifest, DataConfig(bad=bad))
