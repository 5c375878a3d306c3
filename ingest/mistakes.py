"""Recognises common mistakes in arrays by their shapes and values, and gives advice that loses no data.

A message cannot know the meaning of a value, so its advice says what to check before a change. In its expressions
`image` and `label` are the array as it was saved, and `np` is NumPy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

CHUNK = 1 << 20
"""Voxels per step of `look_at`: the intermediate arrays of a whole volume could be larger than a worker's memory."""

NEARLY_WHOLE = 1e-3
"""Bound for the distance to a whole number: rounding errors stay below it, values of an interpolated label do not."""

MOST_CHANNELS = 4
"""Longest last axis that is taken for the channels. The first axis must be longer."""

NOT_FINITE = (
    "find out where they come from before you replace them: give voxels beyond the scan the background's value, and "
    "repeat a conversion that failed; np.nan_to_num alone would turn infinity into 3e38"
)
IN_ONE_TABLE = "map each value to its class, by one table for all cases"


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """A summary of an array's values.

    Attributes:
        low: the smallest finite value; None if there is no finite value.
        high: the largest finite value; None if there is no finite value.
        apart: the largest distance of a finite value from its nearest whole number.
        not_finite: number of values that are NaN or infinite.
        values: the distinct finite values, rounded; None if one of them is below -1 or above 255 after rounding.
    """

    low: Any
    high: Any
    apart: float
    not_finite: int
    values: tuple[int, ...] | None

    def __str__(self) -> str:
        bad = f", and {self.not_finite:,} that are NaN or infinite" if self.not_finite else ""
        return ("no finite values" if self.low is None else f"values from {self.low!s} to {self.high!s}") + bad


def look_at(values: npt.NDArray[Any]) -> Seen:
    """Summarise an array of booleans, integers or floating-point numbers, a chunk at a time."""
    flat = values.reshape(-1, order="A")
    low = high = None
    apart, not_finite, small = 0.0, 0, True
    counts = np.zeros(257, np.int64)
    for start in range(0, flat.size, CHUNK):
        chunk = flat[start : start + CHUNK]
        if chunk.dtype.kind == "f":
            finite = chunk[np.isfinite(chunk)]
            not_finite += chunk.size - finite.size
            chunk = finite
        if chunk.size == 0:
            continue
        least, most = chunk.min(), chunk.max()
        low = least if low is None or least < low else low
        high = most if high is None or most > high else high
        if chunk.dtype.kind == "f":
            apart = max(apart, float(np.abs(chunk - np.rint(chunk)).max()))
        small = small and least > -1.5 and most < 255.5
        if small:
            counts += np.bincount(np.rint(chunk.astype(np.float64)).astype(np.int64) + 1, minlength=257)
    return Seen(low, high, apart, not_finite, tuple((np.flatnonzero(counts) - 1).tolist()) if small else None)


def image_dtype_advice(seen: Seen | None, dtype: np.dtype[Any]) -> str:
    """Return advice about an image that is not float32.

    Args:
        seen: its values; None if they are not real numbers, or cannot be read.
        dtype: the dtype that it has.
    """
    if seen is None and dtype.kind in "biuf":
        return "its values cannot be read, because the file is empty, damaged or too large: make it anew, as float32"
    if seen is None:
        return "save its intensities as real numbers; if they are complex, choose the magnitude or the phase"
    advice = f"check that its {seen} are the intensities that you mean"
    if dtype.kind == "u" and dtype.itemsize > 1 and seen.high is not None and seen.high > 0.9 * np.iinfo(dtype).max:
        advice += " (the largest ones may be negative ones that wrapped: see how the array was made)"
    if seen.not_finite:
        return f"{advice}; some are not finite: {NOT_FINITE}; then save image.astype('float32')"
    largest = max(abs(float(seen.low)), abs(float(seen.high)))
    if largest > float(np.finfo(np.float32).max):
        return f"{advice}, and rescale them before image.astype('float32'), which would make infinities of them"
    if dtype.kind in "iu" and largest > 2**24:
        return f"{advice}, and rescale them before image.astype('float32'), which is exact up to 16,777,216 only"
    return f"{advice}, then save image.astype('float32')"


def label_advice(seen: Seen, num_classes: int | None = None, *, fixed: bool = False) -> str:
    """Return advice about a label that is not uint8, or has values outside the classes.

    Args:
        seen: its values.
        num_classes: the number of classes; None if it is not known.
        fixed: whether the number of classes is fixed, so that no setting is advised.
    """
    if seen.not_finite:
        return f"{seen.not_finite:,} voxels are NaN or infinite: find out why, and give each of them a class first"
    if seen.apart > NEARLY_WHOLE:
        return (
            "values between whole numbers are no classes: resample an interpolated label anew from its original, by "
            "the nearest voxel; threshold a map of probabilities where you choose"
        )
    label = "np.rint(label)" if seen.apart else "label"
    first = ""
    if seen.apart:
        first = f"each value is within {seen.apart:.1g} of a whole number, so it has to be rounded, not cut; "
    if seen.values is None:
        wraps = f" (.astype('uint8') alone would make {int(np.rint(seen.high)) % 256} of {seen.high})"
        return f"{first}{IN_ONE_TABLE}, before .astype('uint8')" + (wraps if seen.high > 255 else "")
    if seen.values[0] == -1:
        return (
            f"{first}find out what -1 means: some data sets mark unlabelled voxels with it; if it is background "
            f"here, save np.where({label} == -1, 0, {label}).astype('uint8') (.astype alone would make 255 of it)"
        )
    if seen.values in ((0, 255), (255,)):
        return (
            f"{first}it is a mask of 0 and 255: if 255 marks the one structure, save "
            f"({label} == 255).astype('uint8'), which makes it class 1"
        )
    return first + _about_classes(label, seen.values, num_classes, fixed)


def _about_classes(label: str, values: tuple[int, ...], num_classes: int | None, fixed: bool) -> str:
    if num_classes is None or values[-1] < num_classes:
        return (
            "all values of this file are from 0 to 255, which uint8 keeps: check the same of every file, and save "
            f"{label}.astype('uint8')"
        )
    if values[-1] == 255 and (len(values) == 1 or values[-2] < num_classes):
        return (
            "find out what 255 means: -1 becomes 255 as uint8, and some data sets mark unlabelled voxels with it; if "
            f"it is background here, save np.where({label} == 255, 0, {label}).astype('uint8')"
        )
    if values[0] >= 1 and values[-1] == num_classes:
        return (
            f"it has no 0: if its classes are counted from 1 and 1 is the background, save ({label} - 1)"
            ".astype('uint8'), and do the same with all cases"
        )
    if fixed:
        return f"find out what they mean, and {IN_ONE_TABLE}"
    wanted = values[-1] + 1
    return (
        f"if {values[-1]} is a class, set --data.decode.num-classes {wanted} (a run also needs --model.num-classes "
        f"{wanted}); if not, {IN_ONE_TABLE}"
    )


def rank_advice(shape: Sequence[int], array: str) -> str:
    """Return advice about an array that is not (C, D, H, W), or has an empty axis.

    Args:
        shape: the shape that it has.
        array: its name in expressions, "image" or "label".
    """
    if 0 in shape:
        return "it has no voxels: look for a crop or a mask that is empty where it was made, and make it anew"
    if len(shape) == 3:
        return (
            f"the channel axis is missing: if the axes are D, H and W in this order, save np.expand_dims({array}, 0), "
            f"which is {(1, *shape)}"
        )
    if len(shape) == 2:
        return "it is one slice: stack the slices of a volume along D, in their order, and put a channel axis before"
    if len(shape) == 5 and shape[0] == 1:
        return f"the first axis seems to be a batch of one: save {array}[0], which is {tuple(shape[1:])}"
    return "find out what each axis is, and save one volume a file"


def channels_last(shape: Sequence[int], wanted: int) -> int | None:
    """Return the number of channels of a 4-D array (D, H, W, C); None if it seems to be (C, D, H, W).

    Args:
        shape: of the array.
        wanted: number of channels that is expected. If the first axis has this length, it is the channel axis.
    """
    first, last = shape[0], shape[-1]
    if first == wanted:
        return None
    return last if last == wanted or last <= MOST_CHANNELS < first else None


def channels_last_advice(shape: Sequence[int], array: str) -> str:
    """Return advice about an array whose channel axis is the last one, as `channels_last` recognises it."""
    return (
        f"the channels seem to stand last: if the axes are D, H, W and C, save np.moveaxis({array}, -1, 0), which is "
        f"{(shape[-1], *shape[:-1])}"
    )


def image_channels_advice(shape: Sequence[int], wanted: int) -> str:
    """Return advice about an image (C, D, H, W) whose number of channels is not `wanted`."""
    last = channels_last(shape, wanted)
    channels = last or shape[0]
    setting = f"--data.decode.channels {channels} (a run also needs --model.in-channels {channels})"
    if last is not None:
        more = f", and set {setting}" if last != wanted else ""
        return channels_last_advice(shape, "image") + more
    return (
        f"if every image has {channels} channels, set {setting}; if {wanted} of them are wanted, save these and keep "
        "the channel axis, as image[:1] does"
    )


def label_channels_advice(label_CDHW: npt.NDArray[np.uint8], volume_DHW: Sequence[int]) -> str:
    """Return advice about a label of several channels: with the channels last, one-hot, or of several maps.

    Args:
        label_CDHW: (C, D, H, W) or (D, H, W, C) uint8.
        volume_DHW: shape of its image.
    """
    shape, volume = label_CDHW.shape, tuple(volume_DHW)
    if shape[-1] == 1 and shape[1:] != volume:
        return channels_last_advice(shape, "label")
    last = shape[:3] == volume and shape[1:] != volume
    axis, classes = (-1, shape[-1]) if last else (0, shape[0])
    label = "np.moveaxis(label, -1, 0)" if last else "label"
    top = int(label_CDHW.max())
    if classes > 256 or top > 1:
        return f"it is not one-hot, because it has values up to {top}: find out what its axes are, and save one map"
    set_in = label_CDHW.sum(axis=axis, dtype=np.uint16)
    several = int(np.count_nonzero(set_in > 1))
    if several:
        return (
            f"each of the {classes} channels seems to be a structure, and {several:,} voxels are in more than one: "
            "decide which class each of these has, and save one map of classes"
        )
    if (set_in == 1).all():
        return (
            f"it seems one-hot, with one channel for each class: if channel 0 is background and the others are in "
            f"the order of the classes, save {label}.argmax(axis=0, keepdims=True).astype('uint8')"
        )
    return (
        f"each of the {classes} channels seems to be a structure, without one for the background: if they are classes "
        f"1 to {classes} in this order, save ({label} * np.arange(1, {classes + 1})[:, None, None, None])"
        ".sum(axis=0, keepdims=True).astype('uint8')"
    )


def shapes_advice(image_DHW: Sequence[int], label_DHW: Sequence[int]) -> str:
    """Return advice about an image and a label of different shapes."""
    if sorted(image_DHW) == sorted(label_DHW):
        return (
            "their axes seem to be in different orders: look at both in a viewer, and transpose the label to its image"
        )
    return (
        "find out why: if the label belongs to another scan, find the right one; if it was drawn on "
        "another grid, resample it onto the image's by the affines of both, by the nearest voxel (never by shape alone)"
    )
