"""Damaged bytes: decoding and loading a manifest either work or say what is wrong, and take no memory for it.

`VOXFLUX_FUZZ=50000` sets the number of inputs of each test; CI takes fewer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingest.decode import DecodeConfig, decode_case
from ingest.errors import DecodeError, ManifestError
from ingest.manifest import SEAL, Manifest, seal
from ingest.pairing import Case
from ingest.stores import ObjectMeta
from ingest.testing import make_case, npy_bytes

INPUTS = int(os.environ.get("VOXFLUX_FUZZ", "1500"))
many = settings(
    max_examples=INPUTS, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
)

IMAGE, LABEL = (npy_bytes(array) for array in make_case((6, 7, 8), np.random.default_rng(1)))
MANIFEST = Manifest.from_cases(
    [
        Case(f"c{n:03d}", ObjectMeta(f"c{n}_x.npy", 100 + n, 10**15 + n, n), ObjectMeta(f"c{n}_y.npy", 50, None, None))
        for n in range(40)
    ],
    images_uri="gs://b/images/",
    labels_uri="gs://b/labels/",
).to_bytes()
_at = MANIFEST.index(SEAL)
UNSEALED = MANIFEST[:_at] + MANIFEST[_at + len(SEAL) + 4 :]
EXTREME = [
    b"\xff" * 8,
    b"\x00" * 8,
    b"\xff\xff\xff\x7f",
    b"\xff" * 7 + b"\x7f",
    b"999999999999",
    b"(10000, 10000, 10000)",
]
SHAPES = [b"(10000, 10000, 10000)", b"(1, 1000000000000, 1, 1)", b"(1, -6, 7, 8)", b"((((", b"1" * 40]

places = st.floats(0, 1, exclude_max=True)
head_places = places.map(lambda at: at * 0.1)
change = st.one_of(
    st.tuples(st.just("set"), st.one_of(places, head_places), st.binary(min_size=1, max_size=4)),
    st.tuples(st.just("set"), st.one_of(places, head_places), st.sampled_from(EXTREME)),
    st.tuples(st.just("insert"), st.one_of(places, head_places), st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("cut"), places, st.integers(1, 64).map(bytes)),
    st.tuples(st.just("end"), places, st.just(b"")),
    st.tuples(st.just("shape"), places, st.sampled_from(SHAPES)),
    st.tuples(st.just("repeat"), places, st.integers(1, 200).map(bytes)),
)


def damaged(whole: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    """The bytes after some changes; the place of each is a share of the length."""
    body = bytearray(whole)
    for what, share, value in changes:
        at = int(share * len(body))
        if what == "set":
            body[at : at + len(value)] = value
        elif what == "insert":
            body[at:at] = value
        elif what == "cut":
            del body[at : at + len(value)]
        elif what == "end":
            del body[at:]
        elif what == "shape":
            body = body.replace(b"(1, 6, 7, 8)", value)
        else:
            body[at:at] = body[at : at + len(value)]
    return bytes(body)


@given(st.lists(change, max_size=3), st.lists(change, max_size=3))
@many
def test_a_damaged_case_is_decoded_or_refused_and_nothing_is_allocated_for_it(image_changes, label_changes):
    image, label = damaged(IMAGE, image_changes), damaged(LABEL, label_changes)
    tracemalloc.start()
    try:
        image_CDHW, label_1DHW = decode_case(
            image, label, DecodeConfig(), image_name="c_x.npy", label_name="c_y.npy", smallest=(4, 4, 4)
        )
    except DecodeError as error:
        said = str(error)
    else:
        assert image_CDHW.nbytes + label_1DHW.nbytes <= len(image) + len(label)
        assert np.isfinite(image_CDHW).all()
        said = "c_x.npy: good"
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert said.startswith(("c_x.npy: ", "c_y.npy: "))
    # Arrays are views. What is allocated are headers, messages, and the parser's own.
    assert peak_bytes < 2**20 + 4 * (len(image) + len(label))


@given(st.lists(change, min_size=1, max_size=4), st.booleans())
@many
def test_a_damaged_manifest_is_loaded_or_refused_and_takes_no_memory(changes, sealed):
    data = seal(damaged(UNSEALED, changes)) if sealed else damaged(MANIFEST, changes)
    before = pa.total_allocated_bytes()
    try:
        said = f"m.parquet: expected a manifest, found one of {len(Manifest.from_bytes(data, name='m.parquet'))} cases"
    except ManifestError as error:
        said = str(error)
    assert said.startswith("m.parquet: expected")
    assert pa.total_allocated_bytes() - before < 2**20


PEAK = """
import contextlib, pyarrow
from ingest.errors import ManifestError
from ingest.manifest import Manifest, seal
from tests.test_fuzz import UNSEALED, damaged
for at in range(0, len(UNSEALED), 3):
    with contextlib.suppress(ManifestError):
        Manifest.from_bytes(seal(damaged(UNSEALED, [("set", at / len(UNSEALED), b"\\xff\\xff\\xff\\x7f")])))
print(pyarrow.default_memory_pool().max_memory())
"""


def test_a_manifest_whose_lengths_lie_takes_no_memory_while_it_is_read():
    ran = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 2**20


@pytest.mark.parametrize("voxels", ["(10000, 10000, 10000, 1)", "(1, 1, 1, 1000000000000)"])
def test_a_header_that_claims_a_million_million_voxels_is_refused_before_anything_is_allocated(voxels):
    lying = IMAGE.replace(b"(1, 6, 7, 8), }         ", f"{voxels}, }}".encode().ljust(24))
    tracemalloc.start()
    with pytest.raises(DecodeError, match=r"expected 4000000000\d+ bytes for shape"):
        decode_case(lying, LABEL, DecodeConfig(), image_name="c_x.npy", label_name="c_y.npy")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2**20
