"""Parts of objects: joined into few reads, and the same bytes under faults."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.errors import UnreachableError
from ingest.store_contract import pieces_of
from ingest.stores import ObjectMeta, StoreConfig, open_store
from ingest.stores.base import RangeRequest, joined
from ingest.testing import Fault, FaultProxy

from .gcs_place import GCSPlace

LAZY = {"retry_first_s": 0.01, "retry_longest_s": 0.05, "read_timeout_s": 0.5}


@given(
    requests=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 90), st.integers(1, 10)), max_size=12),
    gap=st.integers(0, 20),
    most=st.integers(1, 60),
)
def test_joined_requests_are_all_there_in_order_and_within_the_limits(requests, gap, most):
    asked = [RangeRequest(ObjectMeta(name, 100), start, start + length) for name, start, length in requests]
    runs = joined(asked, gap, most)
    assert [request for run in runs for request in run] == asked
    for run in runs:
        assert len({request.meta for request in run}) == 1
        assert all(0 <= b.start - a.stop <= gap for a, b in itertools.pairwise(run))
        assert len(run) == 1 or run[-1].stop - run[0].start <= most


@pytest.mark.parametrize(
    "fault",
    [
        Fault(kind="status", status=503, probability=0.3, request="read"),
        Fault(kind="status", status=404, probability=0.3, request="read"),
        Fault(kind="reset", probability=0.3, request="read"),
        Fault(kind="truncate", probability=0.3, request="read"),
        Fault(kind="stall", probability=0.1, request="read", seconds=1.0),
    ],
    ids=lambda fault: f"{fault.kind}{fault.status if fault.kind == 'status' else ''}",
)
def test_passing_faults_change_no_byte_of_a_range(gcs_server, bucket, monkeypatch, fault):
    body = bytes(range(256)) * 400
    with FaultProxy(gcs_server.url, seed=3) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        store = open_store(f"gs://{bucket}", StoreConfig(range_gap_bytes=1, transport="auto", **LAZY))
        GCSPlace(store, gcs_server.url).write("a", body)
        (meta,) = store.list()
        asked = [RangeRequest(meta, at, at + 500) for at in range(0, 100_000, 2500)]
        proxy.faults = [fault]
        for _ in range(2):
            assert [bytes(piece) for piece in pieces_of(store, asked)] == [body[r.start : r.stop] for r in asked]
        assert sum(proxy.injected.values()) > 0


def test_a_range_of_a_server_that_stays_down_ends_in_unreachable(gcs_server, bucket, monkeypatch):
    with FaultProxy(gcs_server.url, [Fault(kind="status", status=503, request="read")]) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        store = open_store(f"gs://{bucket}", StoreConfig(**LAZY | {"retry_deadline_s": 0.3, "read_timeout_s": 30.0}))
        with pytest.raises(UnreachableError, match="503"):
            store.fetch_ranges([RangeRequest(ObjectMeta("a", 10, 1), 0, 5)])
