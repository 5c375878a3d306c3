"""Common mistakes in arrays: each is recognised, and its advice is followed here, as it stands in the message."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import numpy as np
import pytest

import ingest
from ingest.decode import DecodeConfig, decode_case
from ingest.errors import DecodeError
from ingest.mistakes import CHUNK, look_at

SHAPE = (7, 8, 9)
RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(1, *SHAPE)).astype(np.float32)
LABEL = RNG.integers(0, 3, (1, *SHAPE)).astype(np.uint8)
MASK = (LABEL > 0).astype(np.uint8)
HOT = np.eye(3, dtype=np.uint8)[LABEL[0]]  # (D, H, W, 3)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def refusal(image: np.ndarray, label: np.ndarray, config: DecodeConfig | None = None) -> str | None:
    """Return the error's message about a case, None if the case is good."""
    try:
        decode_case(npy(image), npy(label), config or DecodeConfig(), image_name="a_x.npy", label_name="a_y.npy")
    except DecodeError as error:
        return str(error)
    return None


def follow(message: str, expression: str, **array: np.ndarray) -> np.ndarray:
    """Evaluate the expression that the message advises."""
    assert f"save {expression}" in message, message
    done: np.ndarray = eval(expression, {"np": np, **array})
    return done


LABELS = {
    "a mask of 0 and 255": (MASK * 255, "(label == 255).astype('uint8')", MASK, "a mask of 0 and 255"),
    "a mask of 0 and 255 in float64": (MASK * 255.0, "(label == 255).astype('uint8')", MASK, "a mask of 0 and 255"),
    "-1": (
        np.where(LABEL == 0, -1, LABEL.astype(np.int16)),
        "np.where(label == -1, 0, label).astype('uint8')",
        LABEL,
        "find out what -1 means",
    ),
    "-1, nearly": (
        np.where(LABEL == 0, -1, LABEL.astype(np.float32)) * np.float32(0.9999999),
        "np.where(np.rint(label) == -1, 0, np.rint(label)).astype('uint8')",
        LABEL,
        "find out what -1 means",
    ),
    "-1 that became 255": (
        np.where(LABEL == 0, 255, LABEL).astype(np.uint8),
        "np.where(label == 255, 0, label).astype('uint8')",
        LABEL,
        "find out what 255 means: -1 becomes 255",
    ),
    "just below a whole number": (
        LABEL * np.float32(0.99999994),
        "np.rint(label).astype('uint8')",
        LABEL,
        "to be rounded, not cut",
    ),
    "whole numbers of another dtype": (LABEL.astype(np.int64), "label.astype('uint8')", LABEL, "check the same of"),
    "truth values": (MASK.astype(bool), "label.astype('uint8')", MASK, "expected dtype uint8, found bool"),
    "classes from 1": (LABEL + np.uint8(1), "(label - 1).astype('uint8')", LABEL, "counted from 1"),
    "without a channel axis": (LABEL[0], "np.expand_dims(label, 0)", LABEL, "the channel axis is missing"),
    "with a batch axis": (LABEL[np.newaxis], "label[0]", LABEL, "seems to be a batch of one"),
    "channels last": (LABEL[0][..., np.newaxis], "np.moveaxis(label, -1, 0)", LABEL, "found 7 in shape (7, 8, 9, 1)"),
    "one-hot": (
        np.moveaxis(HOT, -1, 0),
        "label.argmax(axis=0, keepdims=True).astype('uint8')",
        LABEL,
        "it seems one-hot, with one channel for each class",
    ),
    "one-hot, channels last": (
        HOT,
        "np.moveaxis(label, -1, 0).argmax(axis=0, keepdims=True).astype('uint8')",
        LABEL,
        "it seems one-hot, with one channel for each class",
    ),
    "one-hot without background": (
        np.moveaxis(HOT, -1, 0)[1:],
        "(label * np.arange(1, 3)[:, None, None, None]).sum(axis=0, keepdims=True).astype('uint8')",
        LABEL,
        "without one for the background",
    ),
}


@pytest.mark.parametrize("name", list(LABELS))
def test_a_label_is_good_and_means_the_same_once_the_advice_is_followed(name):
    label, expression, meant, recognised = LABELS[name]
    message = refusal(IMAGE, label)
    assert message.startswith("a_y.npy: ")
    assert recognised in message
    mended = follow(message, expression, label=label)
    assert refusal(IMAGE, mended) is None
    np.testing.assert_array_equal(mended, meant)


WIDE = RNG.normal(size=(40, 16, 24, 1)).astype(np.float32)
IMAGES = {
    "channels last": (WIDE, "np.moveaxis(image, -1, 0)", "found 40 channels in shape (40, 16, 24, 1)"),
    "without a channel axis": (WIDE[..., 0], "np.expand_dims(image, 0)", "the channel axis is missing"),
    "float64": (WIDE[None, ..., 0].astype(np.float64), "image.astype('float32')", "are the intensities that you mean"),
    "int16": ((WIDE[None, ..., 0] * 1000).astype(np.int16), "image.astype('float32')", "values from -"),
    "big-endian": (WIDE[None, ..., 0].astype(">f4"), "image.astype('float32')", "expected dtype float32, found >f4"),
}


@pytest.mark.parametrize("name", list(IMAGES))
def test_an_image_is_good_and_has_the_same_values_once_the_advice_is_followed(name):
    image, expression, recognised = IMAGES[name]
    label = np.zeros((1, 40, 16, 24), np.uint8)
    message = refusal(image, label)
    assert message.startswith("a_x.npy: ")
    assert recognised in message
    mended = follow(message, expression, image=image)
    assert refusal(mended, label) is None
    np.testing.assert_array_equal(mended.ravel(), image.ravel())


def test_several_channels_last_are_moved_and_the_settings_say_how_many():
    image = RNG.normal(size=(40, 16, 24, 2)).astype(np.float32)
    label = np.zeros((1, 40, 16, 24), np.uint8)
    message = refusal(image, label)
    assert "--data.decode.channels 2 (a run also needs --model.in-channels 2)" in message
    mended = follow(message, "np.moveaxis(image, -1, 0)", image=image)
    assert refusal(mended, label, DecodeConfig(channels=2)) is None


def test_a_class_beyond_the_last_is_a_setting_or_a_table_and_the_setting_works():
    label = LABEL.copy()
    label[0, 0, 0, 0] = 4
    message = refusal(IMAGE, label)
    assert (
        "if 4 is a class, set --data.decode.num-classes 5 (a run also needs --model.num-classes 5); if not, map"
        in message
    )
    assert refusal(IMAGE, label, DecodeConfig(num_classes=5)) is None


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (np.where(LABEL == 1, 1605, 0), "would make 69 of 1605"),
        (LABEL - 1000.0, "map each value to its class"),
        (LABEL * 0.4, "values between whole numbers are no classes"),
        (np.where(LABEL == 1, np.nan, LABEL), "voxels are NaN or infinite"),
        (np.full((1, *SHAPE), np.nan), "no finite values"),
        (LABEL.astype(complex), "map each value to its class"),
        (LABEL[:, :0], "look for a crop or a mask that is empty"),
        (np.moveaxis(np.maximum(HOT, 1), -1, 0), f"{MASK.size} voxels are in more than one"),
        (np.concatenate([LABEL, LABEL]), "it is not one-hot, because it has values up to 2"),
        (LABEL.transpose(0, 3, 2, 1), "their axes seem to be in different orders"),
        (LABEL[:, 1:], "never by shape alone"),
    ],
)
def test_where_no_cast_keeps_what_is_meant_none_is_advised(label, said):
    message = refusal(IMAGE, label)
    assert said in message
    assert "save label.astype" not in message
    assert "save np.rint" not in message


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.where(IMAGE > 1, 1e300, IMAGE.astype(float)), "rescale them before image.astype('float32'), which would"),
        (np.full((1, *SHAPE), 2**40 + 1), "exact up to 16,777,216 only"),
        (np.full((1, *SHAPE), -1000).astype(np.uint16), "negative ones that wrapped"),
        (np.where(IMAGE > 1, np.inf, IMAGE.astype(float)), "find out where they come from before you replace them"),
        (np.where(IMAGE > 1, np.inf, IMAGE), "find out where they come from before you replace them"),
        (IMAGE.astype(complex), "choose the magnitude or the phase"),
        (np.concatenate([IMAGE, IMAGE]), "if every image has 2 channels, set --data.decode.channels 2"),
        (IMAGE[0, 0], "it is one slice"),
    ],
)
def test_of_an_image_the_message_says_what_to_check_first(image, said):
    assert said in refusal(image, LABEL)


def test_an_image_of_another_type_that_is_cut_is_to_be_made_anew_and_not_called_complex():
    whole = npy((IMAGE * 1000).astype(np.int16))
    with pytest.raises(DecodeError, match="found int16; its values cannot be read, because the file is empty, damaged"):
        decode_case(whole[:-9], npy(LABEL), DecodeConfig(), image_name="a_x.npy", label_name="a_y.npy")


def test_values_beyond_the_first_chunk_are_looked_at_too():
    values = np.zeros(CHUNK + 5, np.float32)
    values[-1] = 254.5
    seen = look_at(values)
    assert (seen.high, seen.apart) == (254.5, 0.5)
    values[-1] = -1
    assert look_at(values.astype(np.int8)).values == (-1, 0)


def test_a_cast_is_advised_by_the_module_that_looks_at_the_values_and_nowhere_else():
    root = Path(ingest.__file__).parent.parent
    files = [file for package in ("ingest", "train") for file in (root / package).rglob("*.py")]
    casts = {
        file.name
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and ".astype(" in node.value
    }
    assert casts == {"mistakes.py"}
