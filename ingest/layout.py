"""Where a case's voxels lie in its objects, and where its foreground is: what a manifest may say beside their names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .crop import Box, Boxes, Shape
from .decode import IMAGE_DTYPE, LABEL_DTYPE, Buffer, parse_npy
from .errors import DecodeError

# A row has all of these or none. Boxes are seven numbers each: which of the present classes, then start and stop
# along D, H and W.
FIELDS = (
    pa.field("image_offset_bytes", pa.int64()),
    pa.field("label_offset_bytes", pa.int64()),
    pa.field("depth", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("width", pa.int32()),
    pa.field("boxes", pa.list_(pa.int32())),
)
NAMES = [field.name for field in FIELDS]
NUMBERS = 7


class Layout(NamedTuple):
    """A pair of C-ordered `.npy` objects: a float32 image and a uint8 label of one shape.

    Attributes:
        image_offset: bytes before the image's first voxel.
        label_offset: bytes before the label's.
        shape: (D, H, W).
    """

    image_offset: int
    label_offset: int
    shape: Shape


class Known(NamedTuple):
    """What is known of a case before it is read."""

    layout: Layout
    boxes: Boxes


def layout_of(image_head: Buffer, label_head: Buffer, image_bytes: int, label_bytes: int) -> Layout | None:
    """The layout, from the first bytes of both objects; None where anything is not as it should be.

    Whoever gets None reads the objects whole, and has `decode_case` say what is wrong.

    Args:
        image_head: the image's first bytes.
        label_head: the label's first bytes.
        image_bytes: length of the whole image.
        label_bytes: length of the whole label.
    """
    offsets: list[int] = []
    shapes: list[tuple[int, ...]] = []
    for head, size_bytes, dtype in ((image_head, image_bytes, IMAGE_DTYPE), (label_head, label_bytes, LABEL_DTYPE)):
        try:
            header, offset = parse_npy(head, "")
        except DecodeError:
            return None
        if header.dtype != dtype or header.fortran_order or len(header.shape) != 4 or 0 in header.shape:
            return None
        if offset + math.prod(header.shape) * dtype.itemsize != size_bytes:
            return None
        offsets.append(offset)
        shapes.append(header.shape)
    if shapes[0][1:] != shapes[1][1:] or shapes[1][0] != 1:
        return None
    depth, height, width = shapes[0][1:]
    return Layout(offsets[0], offsets[1], (depth, height, width))


def columns(known: Sequence[Known | None]) -> list[pa.Array]:
    """One array a field of `FIELDS`, a row a case."""
    rows = [
        (None,) * len(FIELDS) if row is None else (*row.layout[:2], *row.layout.shape, flat_boxes(row.boxes))
        for row in known
    ]
    return [pa.array([row[number] for row in rows], field.type) for number, field in enumerate(FIELDS)]


def known_of(rows: pa.Table) -> list[Known | None]:
    """What rows of a manifest say of their cases; None where a row, or the manifest, says nothing."""
    if NAMES[0] not in rows.column_names:
        return [None] * int(rows.num_rows)
    known: list[Known | None] = []
    for image, label, depth, height, width, boxes in zip(*(rows[name].to_pylist() for name in NAMES), strict=True):
        known.append(None if boxes is None else Known(Layout(image, label, (depth, height, width)), read_boxes(boxes)))
    return known


def flat_boxes(boxes: Boxes) -> list[int]:
    """Boxes as one list of numbers, as a manifest keeps them."""
    return [
        number
        for ordinal, found in enumerate(boxes)
        for box in found
        for number in (ordinal, *(end for axis in box for end in axis))
    ]


def read_boxes(flat: Sequence[int]) -> Boxes:
    """The inverse of `flat_boxes`."""
    boxes: list[list[Box]] = []
    for at in range(0, len(flat), NUMBERS):
        ordinal, d0, d1, h0, h1, w0, w1 = flat[at : at + NUMBERS]
        if ordinal == len(boxes):
            boxes.append([])
        boxes[ordinal].append(((d0, d1), (h0, h1), (w0, w1)))
    return tuple(tuple(found) for found in boxes)


def checks(table: pa.Table) -> list[tuple[str, Callable[[], bool]]]:
    """What must hold of a manifest that has these columns, in words; each check may rely on those before it."""
    return [
        ("shape and boxes of a case both or neither", lambda: _together(table)),
        ("volumes that fill their objects", lambda: _fill(table)),
        ("one or two boxes a class, inside the volume", lambda: _inside(table)),
    ]


def _together(table: pa.Table) -> bool:
    absent = [table[name].is_null().combine_chunks() for name in NAMES]
    return all(column.equals(absent[0]) for column in absent[1:])


def _fill(table: pa.Table) -> bool:
    table = table.filter(table["boxes"].is_valid())
    image_offset, label_offset, depth, height, width = (table[n].to_numpy().astype(np.int64) for n in NAMES[:5])
    image, label = table["image_bytes"].to_numpy(), table["label_bytes"].to_numpy()
    voxels = depth * height * width
    shapes = (depth > 0) & (height > 0) & (width > 0) & (depth * height < 2**31)
    offsets = (image_offset > 0) & (label_offset > 0) & (image > image_offset)
    sizes = (label - label_offset == voxels) & ((image - image_offset) % np.maximum(4 * voxels, 1) == 0)
    return bool(np.all(shapes & offsets & sizes))


def _inside(table: pa.Table) -> bool:
    column = table["boxes"].combine_chunks()
    counts: npt.NDArray[np.int64] = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    flat = column.flatten()
    if flat.null_count or np.any(counts % NUMBERS):
        return False
    boxes = flat.to_numpy().reshape(-1, NUMBERS).astype(np.int64)
    rows = np.repeat(np.arange(len(counts)), counts // NUMBERS)
    lengths = np.stack([pc.fill_null(table[name], 0).to_numpy() for name in NAMES[2:5]], axis=1)[rows]
    starts, stops = boxes[:, 1::2], boxes[:, 2::2]
    # Within a row the classes' numbers begin at 0, go up by one, and each stands once or twice.
    new = np.diff(rows, prepend=-1) != 0
    step = np.diff(boxes[:, 0], prepend=0)
    counted = np.where(new, boxes[:, 0] == 0, (step == 0) | (step == 1))
    thrice = (rows[2:] == rows[:-2]) & (boxes[2:, 0] == boxes[:-2, 0])
    return bool(np.all((starts >= 0) & (starts < stops) & (stops <= lengths)) and counted.all() and not thrice.any())
