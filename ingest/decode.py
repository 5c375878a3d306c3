"""Decodes the bytes of an `.npy` object to a checked array, without a copy and never by unpickling."""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from . import gunzip, mistakes
from .errors import ConfigError, DecodeError

# The .npy format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
MAGIC = b"\x93NUMPY"
LONGEST_HEADER_BYTES = 65_536
IMAGE_DTYPE = np.dtype(np.float32)
LABEL_DTYPE = np.dtype(np.uint8)

Buffer: TypeAlias = gunzip.Buffer
Volume = npt.NDArray[np.float32]
LabelMap = npt.NDArray[np.uint8]


class NpyHeader(NamedTuple):
    """The fields of an `.npy` header."""

    dtype: np.dtype[Any]
    fortran_order: bool
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    """The properties of a good case."""

    num_classes: int = 3
    """Label values run from 0 to num_classes - 1; any other makes the case a bad one."""

    channels: int = 1
    """Channels of an image."""

    def __post_init__(self) -> None:
        if not 2 <= self.num_classes <= 256:
            raise ConfigError(f"num_classes must be from 2 to 256, since labels are uint8; got {self.num_classes}")
        if self.channels < 1:
            raise ConfigError(f"channels must be 1 or more; got {self.channels}")


def parse_npy(data: Buffer, name: str) -> tuple[NpyHeader, int]:
    """Read the header of an uncompressed `.npy`.

    Args:
        data: the object's bytes, or a first part of them that holds the whole header.
        name: what messages call it.

    Returns:
        The header and the offset of the first voxel.

    Raises:
        DecodeError: the bytes are not an `.npy`, or its header cannot be trusted.
    """
    head = bytes(data[:12])
    if head[:6] != MAGIC:
        raise DecodeError(
            f"{name}: expected an .npy file, found one that starts with {head[:6]!r}; "
            "upload it anew or leave the case out",
            "not-npy",
        )
    version = head[6:8]
    if version == b"\x01\x00":
        start, length = 10, int.from_bytes(head[8:10], "little")
    elif version in (b"\x02\x00", b"\x03\x00") and len(head) == 12:
        start, length = 12, int.from_bytes(head[8:12], "little")
    else:
        raise DecodeError(
            f"{name}: expected .npy format 1.0, 2.0 or 3.0, found {version!r}; save it anew with numpy.save",
            "not-npy",
        )
    if length > LONGEST_HEADER_BYTES or start + length > len(data):
        raise DecodeError(
            f"{name}: expected an .npy header of at most {min(LONGEST_HEADER_BYTES, len(data) - start)} bytes, "
            f"found one that claims {length}; the file is truncated or damaged: upload it anew",
            "truncated",
        )
    try:
        return _parse_header_text(bytes(data[start : start + length])), start + length
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise DecodeError(
            f"{name}: expected an .npy header with descr, fortran_order and shape, found one that does not parse "
            f"({error}); upload it anew",
            "not-npy",
        ) from error


def read_header(data: Buffer, name: str) -> tuple[NpyHeader, int]:
    """Read the header of a volume. If the volume is stored as gzip, decompress no more than the header.

    Args:
        data: the object's bytes, or a first part of them that holds the whole header.
        name: what messages call it.

    Returns:
        The header, and the offset of the first voxel in the decompressed bytes.

    Raises:
        DecodeError: the bytes are not an `.npy`, or its header cannot be trusted.
    """
    if not gunzip.is_gzip(data):
        return parse_npy(data, name)
    try:
        head = gunzip.gunzip_head(data, LONGEST_HEADER_BYTES + 12)
    except ValueError as error:
        raise _bad_gzip(name, str(error)) from error
    return parse_npy(head, name)


def _decompressed(data: Buffer, name: str, expected_bytes: int, shape: tuple[int, ...]) -> Buffer:
    """Return the bytes of a volume, decompressed if it is stored as gzip.

    Args:
        data: the object's bytes.
        name: what messages call it.
        expected_bytes: length of the decompressed bytes, by the header.
        shape: by the header, for messages.

    Raises:
        DecodeError: damaged gzip, or gzip of more bytes than the header calls for or than are ever decompressed.
    """
    if not gunzip.is_gzip(data):
        return data
    if expected_bytes > gunzip.MOST_BYTES:
        raise DecodeError(
            f"{name}: expected at most {gunzip.MOST_BYTES:,} bytes in a gzip file, found a header that calls for "
            f"{expected_bytes:,}, for shape {shape}; check the file, and store it uncompressed if it is right",
            "gzip",
        )
    try:
        return gunzip.gunzip(data, expected_bytes)
    except ValueError as error:
        raise _bad_gzip(name, f"{error}, with a header that calls for {expected_bytes:,}") from error


def _bad_gzip(name: str, found: str) -> DecodeError:
    return DecodeError(f"{name}: expected an .npy file, compressed or not, found {found}; upload it anew", "gzip")


@functools.lru_cache(maxsize=1024)
def _parse_header_text(text: bytes) -> NpyHeader:
    """Parse a header, which is a Python literal. Cached, because a data set has few different headers."""
    fields = ast.literal_eval(text.decode("latin1").strip())
    if not isinstance(fields, dict) or fields.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("not a dictionary of these three")
    shape, fortran_order, descr = fields["shape"], fields["fortran_order"], fields["descr"]
    if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise ValueError("shape is not a tuple of lengths")
    if type(fortran_order) is not bool or not isinstance(descr, str):
        raise ValueError("fortran_order is no truth value or descr no plain type")
    return NpyHeader(np.dtype(descr), fortran_order, shape)


def read_array(data: Buffer, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """View the bytes as a 4-D array of `dtype`. A view allocates nothing, so a false header costs no memory.

    Gzip is decompressed here, because stores return objects as they are stored. Decompression stops at the length that
    the `.npy` header calls for.

    Returns:
        A read-only (C, D, H, W) view of the bytes, C- or Fortran-ordered as the header says.

    Raises:
        DecodeError: damaged gzip, pickled objects, another dtype, not 4-D, an empty axis, or a length that is not
            the one that the header calls for.
    """
    header, offset = read_header(data, name)
    if header.dtype.hasobject:
        raise DecodeError(
            f"{name}: expected {dtype} voxels, found pickled Python objects, which are never loaded; "
            "take the array of voxels out of the object where it was made, and save that by itself",
            "pickled",
        )
    if header.dtype != dtype:
        raise DecodeError(
            f"{name}: expected dtype {dtype}, found {_dtype_found(data, header, offset, dtype)}, or leave the case out",
            "dtype",
        )
    if len(header.shape) != 4 or 0 in header.shape:
        raise DecodeError(
            f"{name}: expected 4 axes (C, D, H, W), none empty, found shape {header.shape}; "
            f"{mistakes.rank_advice(header.shape, 'label' if dtype == LABEL_DTYPE else 'image')}",
            "rank",
        )
    expected_bytes = offset + math.prod(header.shape) * dtype.itemsize
    data = _decompressed(data, name, expected_bytes, header.shape)
    if len(data) != expected_bytes:
        raise DecodeError(
            f"{name}: expected {expected_bytes} bytes for shape {header.shape}, found {len(data)}; "
            "the file is truncated or damaged: upload it anew",
            "truncated",
        )
    return _view(data, header, offset)


def _view(data: Buffer, header: NpyHeader, offset: int) -> npt.NDArray[Any]:
    flat = np.frombuffer(data, dtype=header.dtype, count=math.prod(header.shape), offset=offset)
    return flat.reshape(header.shape, order="F" if header.fortran_order else "C")


def view_any(data: Buffer, header: NpyHeader, offset: int) -> npt.NDArray[Any] | None:
    """View the voxels of an `.npy` of any real type and any shape, e.g. of an int16 CT scan.

    Args:
        data: the object's bytes, which may be gzip.
        header: its header.
        offset: of the first voxel in the decompressed bytes.

    Returns:
        A read-only view in the header's shape; None if the voxels are not real numbers, or if the file is empty,
        truncated, damaged or too large to be decompressed.
    """
    count = math.prod(header.shape)
    if header.dtype.kind not in "biuf" or not count:
        return None
    expected_bytes = offset + count * header.dtype.itemsize
    try:
        data = _decompressed(data, "", expected_bytes, header.shape)
    except DecodeError:
        return None
    return _view(data, header, offset) if len(data) == expected_bytes else None


def _dtype_found(data: Buffer, header: NpyHeader, offset: int, dtype: np.dtype[Any]) -> str:
    """Name the dtype and values of an array whose dtype is not `dtype`, and the advice for them, for a message."""
    found, voxels = header.dtype, view_any(data, header, offset)
    seen = None if voxels is None else mistakes.look_at(voxels)
    if dtype == IMAGE_DTYPE:
        return f"{found}; {mistakes.image_dtype_advice(seen, found)}"
    if seen is None:
        return f"{found}; {mistakes.IN_ONE_TABLE}, and save the classes as {dtype}"
    return f"{found} with {seen}; {mistakes.label_advice(seen)}"


def decode_case(
    image_data: Buffer,
    label_data: Buffer,
    config: DecodeConfig,
    *,
    image_name: str,
    label_name: str,
    smallest: tuple[int, int, int] | None = None,
) -> tuple[Volume, LabelMap]:
    """Decode and check one case.

    Args:
        image_data: an `.npy` of (C, D, H, W) float32.
        label_data: an `.npy` of (1, D, H, W) uint8.
        config: what is expected.
        image_name: the image's URI, for messages.
        label_name: the label's URI, for messages.
        smallest: (D, H, W) that the volume must reach on every axis: the patch.

    Returns:
        The image (C, D, H, W) float32 and the label (1, D, H, W) uint8: read-only views of the data.

    Raises:
        DecodeError: with `reason` not-npy, pickled, dtype, rank, truncated, shape-mismatch, smaller-than-patch,
            label-value or non-finite.
    """
    image_CDHW: Volume = read_array(image_data, image_name, IMAGE_DTYPE)
    label_1DHW: LabelMap = read_array(label_data, label_name, LABEL_DTYPE)
    check_channels(image_CDHW.shape, config, image_name)
    if label_1DHW.shape[0] != 1:
        raise DecodeError(
            f"{label_name}: expected 1 label channel, found {label_1DHW.shape[0]} in shape {label_1DHW.shape}; "
            f"{mistakes.label_channels_advice(label_1DHW, image_CDHW.shape[1:])}",
            "shape-mismatch",
        )
    if image_CDHW.shape[1:] != label_1DHW.shape[1:]:
        raise DecodeError(
            f"{image_name}: expected image and label of one (D, H, W), found {image_CDHW.shape[1:]} and "
            f"{label_1DHW.shape[1:]} in {label_name}; "
            f"{mistakes.shapes_advice(image_CDHW.shape[1:], label_1DHW.shape[1:])}, or leave the case out",
            "shape-mismatch",
        )
    if smallest is not None and any(have < want for have, want in zip(image_CDHW.shape[1:], smallest, strict=True)):
        raise DecodeError(
            f"{image_name}: expected a volume of at least the patch {smallest}, found {image_CDHW.shape[1:]}; "
            "pad image and label alike, choose a smaller --data.crop.patch, or leave the case out",
            "smaller-than-patch",
        )
    check_values(label_1DHW, config, label_name)
    check_finite(image_CDHW, image_name)
    return image_CDHW, label_1DHW


def check_finite(image_CDHW: Volume, name: str) -> None:
    """Refuse an image with voxels that are NaN or infinite.

    Raises:
        DecodeError: with the reason non-finite.
    """
    # A sum carries every NaN and infinity through, at a third of what asking each voxel costs. It may also overflow.
    with np.errstate(invalid="ignore", over="ignore"):
        total = float(np.add.reduce(image_CDHW, axis=None))
    if not math.isfinite(total) and (bad := int(np.count_nonzero(~np.isfinite(image_CDHW)))):
        raise DecodeError(
            f"{name}: expected finite voxels, found {bad} that are NaN or infinite; {mistakes.NOT_FINITE}",
            "non-finite",
        )


def check_channels(shape_CDHW: tuple[int, ...], config: DecodeConfig, name: str) -> None:
    """Refuse an image with another number of channels.

    Raises:
        DecodeError: with the reason shape-mismatch.
    """
    if shape_CDHW[0] != config.channels:
        raise DecodeError(
            f"{name}: expected {config.channels} image channels, found {shape_CDHW[0]} channels in shape {shape_CDHW}; "
            f"{mistakes.image_channels_advice(shape_CDHW, config.channels)}",
            "shape-mismatch",
        )


def check_values(label_1DHW: LabelMap, config: DecodeConfig, name: str) -> None:
    """Refuse a label with values outside the classes.

    Raises:
        DecodeError: with the reason label-value.
    """
    top = int(label_1DHW.max())
    if top >= config.num_classes:
        raise DecodeError(
            f"{name}: expected label values 0 to {config.num_classes - 1}, found {top}; "
            f"{mistakes.label_advice(mistakes.look_at(label_1DHW), config.num_classes)}",
            "label-value",
        )
