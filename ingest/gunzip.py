"""Decompresses objects that are stored as gzip.

Such an object is named `.npy.gz`, or has the Content-Encoding gzip. Stores return its stored bytes, because the listed
size and checksum are those of the stored bytes. Gzip is recognised by its first two bytes, so neither the name nor the
listing needs to tell it.
"""

from __future__ import annotations

import zlib
from typing import TypeAlias

MAGIC = b"\x1f\x8b"
"""The first two bytes of every gzip file."""

MOST_BYTES = 2**32
"""Largest decompressed size of one object, in bytes. A few MB of gzip can hold terabytes."""

_WBITS = 31  # of zlib: gzip with its header and checksum, and the largest window
_STEP_BYTES = 2**16

Buffer: TypeAlias = bytes | bytearray | memoryview


def is_gzip(data: Buffer) -> bool:
    """Return whether the bytes begin as a gzip file does."""
    return data[:2] == MAGIC


def gunzip(data: Buffer, most_bytes: int = MOST_BYTES) -> bytes:
    """Decompress a gzip file of one or several members.

    Args:
        data: the whole file.
        most_bytes: decompression stops as soon as there are more bytes than this.

    Raises:
        ValueError: the file is damaged or cut, or holds more than `most_bytes`.
    """
    rest: Buffer = data
    parts: list[bytes] = []
    left = most_bytes
    while rest:
        member = zlib.decompressobj(wbits=_WBITS)
        try:
            part = member.decompress(rest, left + 1)
        except zlib.error as error:
            raise ValueError(f"gzip that is damaged ({error})") from error
        left -= len(part)
        if left < 0:
            raise ValueError(f"gzip of more than {most_bytes:,} bytes")
        if not member.eof:
            raise ValueError("gzip that ends too early")
        parts.append(part)
        rest = member.unused_data
    return parts[0] if len(parts) == 1 else b"".join(parts)


def gunzip_head(data: Buffer, most_bytes: int) -> bytes:
    """Decompress the first `most_bytes` bytes of a gzip file, or all if there are fewer, and no byte more.

    Args:
        data: the file, or its first part.
        most_bytes: bytes to return.

    Raises:
        ValueError: the file is damaged.
    """
    found = b""
    view = memoryview(data)
    member = zlib.decompressobj(wbits=_WBITS)
    for start in range(0, len(view), _STEP_BYTES):
        rest: Buffer = view[start : start + _STEP_BYTES]
        while rest and len(found) < most_bytes:
            if member.eof:
                member = zlib.decompressobj(wbits=_WBITS)
            try:
                found += member.decompress(rest, most_bytes - len(found))
            except zlib.error as error:
                raise ValueError(f"gzip that is damaged ({error})") from error
            rest = member.unused_data
        if len(found) >= most_bytes:
            break
    return found


def uncompressed(data: bytes, most_bytes: int = MOST_BYTES) -> bytes:
    """Return the content of an object: decompressed if the object is gzip, else unchanged.

    Raises:
        ValueError: the object is gzip and damaged or cut, or holds more than `most_bytes`.
    """
    return gunzip(data, most_bytes) if is_gzip(data) else data
