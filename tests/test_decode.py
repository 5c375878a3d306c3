"""Decoding: views of checked bytes, and a clear reason for everything that is not a case."""

import io
import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ingest.decode import DecodeConfig, decode_case, parse_npy, read_array
from ingest.errors import ConfigError, DecodeError
from ingest.slab import names_fault

IMAGE = np.arange(4 * 5 * 6, dtype=np.float32).reshape(1, 4, 5, 6)
LABEL = (IMAGE % 3).astype(np.uint8)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=array.dtype.hasobject)
    return file.getvalue()


def decode(image=None, label=None, config=None, smallest=None):
    return decode_case(
        npy(IMAGE) if image is None else image,
        npy(LABEL) if label is None else label,
        config or DecodeConfig(),
        image_name="gs://b/c_x.npy",
        label_name="gs://b/c_y.npy",
        smallest=smallest,
    )


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_case_comes_back_as_saved_in_either_memory_order(order):
    image, label = decode(npy(np.asarray(IMAGE, order=order)), npy(np.asarray(LABEL, order=order)))
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(label, LABEL)


def test_decoding_copies_nothing_and_the_views_cannot_be_written_to():
    data = npy(IMAGE)
    image = read_array(data, "c", np.dtype(np.float32))
    assert np.shares_memory(image, np.frombuffer(data, np.uint8))
    assert not image.flags.writeable


def with_header(text: str, body: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1") + body


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 4, 5, 6), }"


@pytest.mark.parametrize(
    ("image", "label", "reason", "message"),
    [
        (b"PK\x03\x04 a zip", None, "not-npy", "expected an .npy file, found one that starts with"),
        (b"", None, "not-npy", "expected an .npy file"),
        (b"\x93NUMPY\x09\x00" + b" " * 20, None, "not-npy", r"expected .npy format 1.0, 2.0 or 3.0"),
        (with_header(HEADER)[:30], None, "truncated", "header"),
        (with_header("{'descr': __import__('os')}"), None, "not-npy", "does not parse"),
        (with_header("{'descr': '<f4'}"), None, "not-npy", "does not parse"),
        (with_header(HEADER.replace("(1, 4", "(-1, 4")), None, "not-npy", "does not parse"),
        (npy(np.array([{"a": 1}], dtype=object)), None, "pickled", "never loaded"),
        (npy(IMAGE.astype(np.float64)), None, "dtype", "expected dtype float32, found float64"),
        (npy(IMAGE[0]), None, "rank", r"expected 4 axes \(C, D, H, W\)"),
        (npy(IMAGE[:, :0]), None, "rank", "none empty"),
        (npy(IMAGE)[:-1], None, "truncated", "expected 608 bytes for shape"),
        (npy(IMAGE) + b"x", None, "truncated", "found 609"),
        (with_header(HEADER.replace("5, 6", "10**6, 10**6")), None, "not-npy", "does not parse"),
        (with_header(HEADER.replace("5, 6", f"{10**6}, {10**6}")), None, "truncated", "expected 16000000000"),
        (npy(np.concatenate([IMAGE, IMAGE])), None, "shape-mismatch", "expected 1 image channels"),
        (None, npy(LABEL[:, :3]), "shape-mismatch", r"found \(4, 5, 6\) and \(3, 5, 6\) in gs://b/c_y.npy"),
        (None, npy(LABEL.astype(np.int16)), "dtype", "expected dtype uint8, found int16"),
        (None, npy(LABEL + np.uint8(5)), "label-value", "expected label values 0 to 2, found 7"),
        (
            npy(np.where(IMAGE == 3, np.nan, IMAGE).astype(np.float32)),
            None,
            "non-finite",
            "found 1 that are NaN",
        ),
        (npy(np.where(IMAGE > 117, np.inf, IMAGE).astype(np.float32)), None, "non-finite", "found 2 that"),
    ],
)
def test_every_bad_case_gets_its_reason_and_a_message_that_names_the_object(image, label, reason, message):
    with pytest.raises(DecodeError, match=message) as caught:
        decode(image, label)
    assert caught.value.reason == reason
    assert "gs://b/c_" in str(caught.value)


def test_a_label_of_two_channels_is_the_labels_fault_and_not_its_images():
    with pytest.raises(DecodeError, match=r"^gs://b/c_y\.npy: expected 1 label channel, found 2 in shape") as caught:
        decode(label=npy(np.concatenate([LABEL, LABEL])))
    assert caught.value.reason == "shape-mismatch"
    assert names_fault(caught.value, "gs://b/c_y.npy")


def test_infinities_of_both_signs_do_not_cancel():
    image = IMAGE.copy()
    image[0, 0, 0, :2] = np.inf, -np.inf
    with pytest.raises(DecodeError, match="found 2 that are NaN or infinite"):
        decode(npy(image))


def test_a_volume_smaller_than_the_patch_is_refused():
    with pytest.raises(DecodeError, match=r"at least the patch \(4, 6, 6\), found \(4, 5, 6\)"):
        decode(smallest=(4, 6, 6))


def test_unpickling_never_happens(tmp_path):
    marker = tmp_path / "run"

    class Payload:
        def __reduce__(self):
            return (marker.write_text, ("ran",))

    body = pickle.dumps(Payload())
    header = with_header("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 1, 1), }", body)
    with pytest.raises(DecodeError, match="pickled Python objects"):
        decode(header)
    assert not marker.exists()


def test_a_decode_error_survives_the_trip_between_processes():
    error = pickle.loads(pickle.dumps(DecodeError("what happened", "dtype")))  # noqa: S301  our own bytes
    assert (str(error), error.reason) == ("what happened", "dtype")


@given(st.binary(max_size=200))
@example(with_header("(" * 200))
@settings(max_examples=300)
def test_any_bytes_are_either_a_header_or_a_decode_error(data):
    for candidate in (data, b"\x93NUMPY\x01\x00" + data):
        try:
            header, offset = parse_npy(candidate, "object")
        except DecodeError:
            continue
        assert offset <= len(candidate)
        assert isinstance(header.shape, tuple)


@pytest.mark.parametrize("settings_", [{"num_classes": 1}, {"num_classes": 300}, {"channels": 0}])
def test_decode_config_rejects_what_no_label_can_be(settings_):
    with pytest.raises(ConfigError):
        DecodeConfig(**settings_)
