"""Large volumes in part: the patch is drawn before the volume is read, and the slab that holds it is fetched.

A slab is the planes of a volume between the patch's first and last D, and of those planes the rows between its first
and last H: in a C-ordered `.npy` they lie together, plane by plane. Where the patch starts needs the volume's shape,
and for a foreground crop the boxes of its foreground; both come from the manifest (`voxflux index --boxes`),
or from the object itself: its first bytes, and once a process the whole label.

What is handed on is the patch as an image and a label of their own. Sampled, they give what the whole volume would
have given, bit for bit, since a sample takes the same random numbers whatever its volume.

A checksum is of a whole object, and a volume is good or bad as a whole: of one that is read in part only the patch is
looked at. A NaN elsewhere is found by the sample that meets it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import itertools
import math
import threading
import zlib
from collections.abc import Callable, Hashable
from typing import Any, Generic, Literal, NamedTuple, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .augment import PatchSampler
from .crop import Boxes, Shape, foreground_boxes
from .decode import LABEL_DTYPE, Buffer, DecodeConfig, LabelMap, check_values, decode_case, read_array, read_header
from .errors import DecodeError, ObjectError
from .layout import Known, Layout, layout_of
from .pairing import Case
from .stores.base import ObjectMeta, RangeRequest, Store

HEAD_BYTES = 512  # more than the .npy header of any plain array; one that is longer is read whole
READ_FOR_ONE = 3  # bytes that a read task may read for each that it hands on, before they count in its size
CASES_KNOWN = 8192  # of which a process remembers layout and boxes: about 2 KB each

DEPTH = "depth"  # of `layout.FIELDS`

T = TypeVar("T")


class _Lately(Generic[T]):
    """What was found of the cases seen last, by key. Thread-safe; two threads may find the same at once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._found: collections.OrderedDict[Hashable, T] = collections.OrderedDict()

    def get(self, key: Hashable, find: Callable[[], T]) -> T:
        """The value of this key, found now unless it is remembered."""
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
                return self._found[key]
        value = find()
        with self._lock:
            self._found[key] = value
            while len(self._found) > self._size:
                self._found.popitem(last=False)
        return value

    def __len__(self) -> int:
        return len(self._found)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._found.clear()


_LAYOUTS: _Lately[Layout | None] = _Lately(CASES_KNOWN)
_BOXES: _Lately[Boxes] = _Lately(CASES_KNOWN)


def forget() -> None:
    """Forget what this process has found of cases."""
    _LAYOUTS.clear()
    _BOXES.clear()


class Patch(NamedTuple):
    """A case's patch as two `.npy` files."""

    image_npy: Buffer
    label_npy: Buffer


class BadCase(NamedTuple):
    """A case that cannot be had.

    Attributes:
        error: of the object at fault.
        role: which one that is.
    """

    error: ObjectError | DecodeError
    role: Literal["image", "label"]


class _BadCaseError(Exception):
    """Carries a `BadCase` out of nested calls; never leaves this file."""

    def __init__(self, error: ObjectError | DecodeError, role: Literal["image", "label"]) -> None:
        super().__init__(error, role)
        self.case = BadCase(error, role)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slabs:
    """Which cases have their patch cut in the read task, and how. Plain values.

    Attributes:
        sampler: draws the patch.
        decode: what a good case looks like.
        least_bytes: of an image of which it may be worth while to read a part.
    """

    sampler: PatchSampler
    decode: DecodeConfig
    least_bytes: int

    def takes(self, case: Case) -> bool:
        """Whether the case's patch is cut here, from a slab or from the whole volume.

        Goes by the listing alone, so that a task that is run again cuts the same cases. A generation has to be
        known: it is what keeps the parts of an object together.
        """
        return (
            case.image.size_bytes >= self._cut_from_bytes()
            and case.image.generation is not None
            and case.label.generation is not None
        )

    def _cut_from_bytes(self) -> int:
        """The smallest image whose patch is cut here: where a quarter of it is not in the patch, as `_pays` has it."""
        patch_bytes = 4 * self.decode.channels * math.prod(self.sampler.crop.patch)
        return max(self.least_bytes, -(-4 * patch_bytes // 3))

    def shard_weights(self, cases: pa.Table) -> npt.NDArray[np.int64]:
        """What each case adds to the size of its shard, (N,) int64 bytes: what its read task hands on.

        That is both objects whole, and of a case whose patch is cut here the patch; but a third of what cutting it
        reads, labels whole, where that is more: tasks are to be few, and none is to read for minutes. A volume whose
        shape no manifest tells is taken for a cube.

        Args:
            cases: rows of a manifest.
        """
        image, label = (cases[f"{role}_bytes"].to_numpy() for role in ("image", "label"))
        cut = image >= self._cut_from_bytes()
        for role in ("image", "label"):
            cut &= cases[f"{role}_generation"].is_valid().to_numpy()
        planes = np.rint(np.cbrt(label))  # a label has a byte a voxel
        if DEPTH in cases.column_names:
            known = cases[DEPTH].is_valid().to_numpy()
            planes[known] = cases[DEPTH].drop_null().to_numpy()
        depth = self.sampler.crop.patch[0]
        part = np.where(_pays(depth, planes), depth / np.maximum(planes, 1), 1.0)
        read_bytes = (image * part).astype(np.int64) + label
        handed_on = np.maximum(sum(map(len, self.blank())), read_bytes // READ_FOR_ONE)
        weights: npt.NDArray[np.int64] = np.where(cut, handed_on, image + label)
        return weights

    def blank(self) -> Patch:
        """Zeros in the place of a patch, as many bytes as one has."""
        patch, _, _ = _empty(self.decode.channels, self.sampler.crop.patch)
        return patch

    def read_bytes(self, case: Case, known: Known | None) -> int:
        """About as many bytes as cutting this case will read; without `known` as if the volume were a cube."""
        image, label = case.image.size_bytes, case.label.size_bytes
        depth = round(label ** (1 / 3)) if known is None else known.layout.shape[0]
        patch = self.sampler.crop.patch[0]
        if not _pays(patch, depth):
            return image + label
        return image * patch // depth + (label if known is None else label * patch // depth)

    def cut(
        self, images: Store, labels: Store, case: Case, known: Known | None, *, epoch: int, index: int
    ) -> Patch | BadCase:
        """Read as much of a case as its patch needs, and cut it out.

        Raises:
            StoreError: a store as a whole cannot be read.
        """
        draw = functools.partial(self.sampler.start, epoch=epoch, index=index)
        try:
            layout = _layout(images, labels, case) if known is None else known.layout
            if layout is None or not self._fits(layout, case):
                return self._cut_whole(images, labels, case, draw)
            if known is not None:
                start = draw(layout.shape, lambda: known.boxes)
            else:
                start = draw(layout.shape, functools.partial(self._boxes, labels, case.label))
            return self._cut_slab(images, labels, case, layout, start)
        except _BadCaseError as error:
            return error.case

    def _fits(self, layout: Layout, case: Case) -> bool:
        """Whether a slab is worth while; a case that is not as configured is read whole, and decoding says why."""
        patch = self.sampler.crop.patch
        return (
            case.image.size_bytes - layout.image_offset == 4 * self.decode.channels * math.prod(layout.shape)
            and all(have >= want for have, want in zip(layout.shape, patch, strict=True))
            and _pays(patch[0], layout.shape[0])
        )

    def _boxes(self, labels: Store, meta: ObjectMeta) -> Boxes:
        def find() -> Boxes:
            name = labels.uri_of(meta.name)
            (body,) = _unless_bad(labels.fetch_each([meta]), "label")
            try:
                label_1DHW: LabelMap = read_array(body, name, LABEL_DTYPE)
                check_values(label_1DHW, self.decode, name)
            except DecodeError as error:
                raise _BadCaseError(error, "label") from error
            return foreground_boxes(label_1DHW)

        return _BOXES.get((labels.uri, meta), find)

    def _cut_slab(self, images: Store, labels: Store, case: Case, layout: Layout, start: Shape) -> Patch:
        patch, image_CDHW, label_1DHW = _empty(self.decode.channels, self.sampler.crop.patch)
        _read_slab(images, case.image, "image", layout.image_offset, layout.shape, start, image_CDHW)
        _read_slab(labels, case.label, "label", layout.label_offset, layout.shape, start, label_1DHW)
        return patch

    def _cut_whole(self, images: Store, labels: Store, case: Case, draw: Callable[..., Shape]) -> Patch:
        (image,) = _unless_bad(images.fetch_each([case.image]), "image")
        (label,) = _unless_bad(labels.fetch_each([case.label]), "label")
        names = images.uri_of(case.image.name), labels.uri_of(case.label.name)
        try:
            image_CDHW, label_1DHW = decode_case(
                image,
                label,
                self.decode,
                image_name=names[0],
                label_name=names[1],
                smallest=self.sampler.crop.patch,
            )
        except DecodeError as error:
            raise _BadCaseError(error, "label" if names_fault(error, names[1]) else "image") from error
        key = (labels.uri, case.label)
        d, h, w = draw(label_1DHW.shape[1:], lambda: _BOXES.get(key, lambda: foreground_boxes(label_1DHW)))
        depth, height, width = self.sampler.crop.patch
        cut = np.s_[:, d : d + depth, h : h + height, w : w + width]
        patch, image_out, label_out = _empty(self.decode.channels, self.sampler.crop.patch)
        np.copyto(image_out, image_CDHW[cut])
        np.copyto(label_out, label_1DHW[cut])
        return patch


def boxes_of(name: str, data: Buffer, label_1DHW: LabelMap) -> Boxes:
    """The boxes of a label that was read whole, searched for once a process.

    Args:
        name: the label's URI.
        data: its bytes, by which it is told from one that has taken its place.
        label_1DHW: the same, decoded.
    """
    return _BOXES.get((name, len(data), zlib.crc32(data)), lambda: foreground_boxes(label_1DHW))


def look_up(images: Store, labels: Store, case: Case) -> Known | BadCase | None:
    """Read the label whole and the header of the image, for the shape and boxes of a case in the manifest.

    If the headers do not show that the case can be read in part, the image is read whole. So a bad image is told from
    one that is compressed or in Fortran order. Any number of channels and any label values are good here.

    Returns:
        The shape and boxes; a BadCase; or None for a good case that is always read whole.

    Raises:
        StoreError: a store as a whole cannot be read.
    """
    names = images.uri_of(case.image.name), labels.uri_of(case.label.name)
    try:
        layout = _layout(images, labels, case)
        (label,) = _unless_bad(labels.fetch_each([case.label]), "label")
        if layout is not None:
            label_1DHW: LabelMap = read_array(label, names[1], LABEL_DTYPE)
            return Known(layout, foreground_boxes(label_1DHW))
        (image,) = _unless_bad(images.fetch_each([case.image]), "image")
        channels = read_header(image, names[0])[0].shape[:1]
        anything = DecodeConfig(num_classes=256, channels=max(1, *channels))
        decode_case(image, label, anything, image_name=names[0], label_name=names[1])
    except _BadCaseError as error:
        return error.case
    except DecodeError as error:
        return BadCase(error, "label" if names_fault(error, names[1]) else "image")
    return None


def names_fault(error: DecodeError, name: str) -> bool:
    """Whether this object is the one at fault: each message begins with its name."""
    return str(error).startswith(f"{name}: ")


@overload
def _pays(part: int, whole: int) -> bool: ...


@overload
def _pays(part: int, whole: npt.NDArray[Any]) -> npt.NDArray[np.bool_]: ...


def _pays(part: int, whole: Any) -> Any:
    """Whether it pays to read a part, whose checksum is not known: where a quarter is saved. Also of arrays."""
    return 4 * part <= 3 * whole


def _unless_bad(bodies: list[bytes | ObjectError], role: Literal["image", "label"]) -> list[bytes]:
    good: list[bytes] = []
    for body in bodies:
        if isinstance(body, ObjectError):
            raise _BadCaseError(body, role) from body
        good.append(body)
    return good


def _layout(images: Store, labels: Store, case: Case) -> Layout | None:
    """By the objects' first bytes, once a process; None where the case has to be read whole."""

    def find() -> Layout | None:
        heads: list[bytes | memoryview] = []
        role: Literal["image", "label"]
        for role, store, meta in (("image", images, case.image), ("label", labels, case.label)):
            if not meta.size_bytes:
                return None
            (head,) = store.fetch_ranges([RangeRequest(meta, 0, min(HEAD_BYTES, meta.size_bytes))])
            if isinstance(head, ObjectError):
                raise _BadCaseError(head, role) from head
            heads.append(head)
        return layout_of(heads[0], heads[1], case.image.size_bytes, case.label.size_bytes)

    return _LAYOUTS.get((images.uri, case.image, labels.uri, case.label), find)


def _read_slab(
    store: Store,
    meta: ObjectMeta,
    role: Literal["image", "label"],
    offset: int,
    shape: Shape,
    start: Shape,
    out_CDHW: npt.NDArray[Any],
) -> None:
    """Fill `out_CDHW` with the patch of its shape that starts there in a C-ordered volume of this shape."""
    depth, height, width = shape
    channels, planes, rows, columns = out_CDHW.shape
    voxel = out_CDHW.itemsize
    places = list(itertools.product(range(channels), range(planes)))
    requests = []
    for channel, plane in places:
        first = offset + ((channel * depth + start[0] + plane) * height + start[1]) * width * voxel
        requests.append(RangeRequest(meta, first, first + rows * width * voxel))
    for (channel, plane), piece in zip(places, store.fetch_ranges(requests), strict=True):
        if isinstance(piece, ObjectError):
            raise _BadCaseError(piece, role) from piece
        plane_HW = np.frombuffer(piece, dtype=out_CDHW.dtype).reshape(rows, width)
        np.copyto(out_CDHW[channel, plane], plane_HW[:, start[2] : start[2] + columns])


def _empty(channels: int, patch: Shape) -> tuple[Patch, npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Two `.npy` files of a patch's shape, and their voxels to be written."""
    image, image_CDHW = _empty_npy((channels, *patch), np.dtype(np.float32))
    label, label_1DHW = _empty_npy((1, *patch), LABEL_DTYPE)
    return Patch(image, label), image_CDHW, label_1DHW


def _empty_npy(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[memoryview, npt.NDArray[Any]]:
    header = _header(shape, dtype.str)
    body = np.zeros(len(header) + math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    body[: len(header)] = np.frombuffer(header, dtype=np.uint8)
    return body.data, body[len(header) :].view(dtype).reshape(shape)


@functools.lru_cache(maxsize=64)
def _header(shape: tuple[int, ...], descr: str) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()
