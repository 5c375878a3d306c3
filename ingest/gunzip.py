"""Volumes that are stored compressed: `.npy.gz`, or an object whose Content-Encoding is gzip."""

from __future__ import annotations

import zlib

MAGIC = b"\x1f\x8b"
MOST_BYTES = 2**32
"""Of one volume: a few MB of gzip can stand for terabytes."""


def gunzip(data: bytes | bytearray | memoryview, most_bytes: int = MOST_BYTES) -> bytes:
    """Decompress all members of a gzip file.

    Raises:
        ValueError: it is damaged, cut, or holds more than `most_bytes`.
    """
    rest, parts, left = bytes(data), [], most_bytes
    while rest:
        member = zlib.decompressobj(wbits=31)
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
