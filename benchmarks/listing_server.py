"""A bucket of objects that are nowhere: a server that answers GCS's JSON listing from a function of names.

It knows ``GET /storage/v1/b/BUCKET/o`` with prefix, startOffset, endOffset, maxResults, pageToken and fields, and
``GET /storage/v1/b/BUCKET``. Object i is called by its number, so names are in byte order, and where a page begins is
found by bisection: a million objects take no memory and no disk.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import bisect
import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "voxflux-listing"
FOLDER = "set/"
MOST_RESULTS = 5000  # as GCS
_GENERATION = 1_700_000_000_000_000


def object_name(number: int) -> str:
    """The full name of an object; in byte order of numbers up to 99,999,999."""
    return f"{FOLDER}case_{number:08d}_x.npy"


def object_size(number: int) -> int:
    """Bytes of an object."""
    return 131_200 + 4 * (number % 977)


def object_crc32c(number: int) -> int:
    """The checksum that the listing gives: of nothing, but always the same."""
    return number * 2_654_435_761 % 2**32


def list_page(query: dict[str, str], objects: int) -> bytes:
    """The body of one page.

    Args:
        query: of the request.
        objects: that the bucket holds.
    """
    prefix, begin, end = query.get("prefix", ""), query.get("startOffset", ""), query.get("endOffset", "")
    if token := query.get("pageToken", ""):
        begin = base64.urlsafe_b64decode(token).decode()
    start = max(_first_from(prefix, objects), _first_from(begin, objects))
    stop = _first_from(prefix + "\U0010ffff", objects) if prefix else objects
    if end:
        stop = min(stop, _first_from(end, objects))
    page_stop = max(start, min(stop, start + min(int(query.get("maxResults", MOST_RESULTS)), MOST_RESULTS)))
    about = _wanted(query.get("fields", ""))
    parts = []
    if start < page_stop:
        items = ",".join([_item(number, about) for number in range(start, page_stop)])
        parts.append(f'"items":[{items}]')
    if page_stop < stop:
        parts.append(f'"nextPageToken":"{base64.urlsafe_b64encode(object_name(page_stop).encode()).decode()}"')
    return ('{"kind":"storage#objects"' + "".join("," + part for part in parts) + "}").encode()


def _first_from(name: str, objects: int) -> int:
    """The number of the first object whose name is not below this one, by bytes."""
    return bisect.bisect_left(range(objects), name.encode(), key=lambda number: object_name(number).encode())


def _wanted(fields: str) -> frozenset[str]:
    """Which fields of an object are asked for; empty is all."""
    found = re.search(r"items\(([^)]*)\)", fields)
    return frozenset(found.group(1).split(",")) if found else frozenset()


def _item(number: int, wanted: frozenset[str]) -> str:
    item = f'{{"name":"{object_name(number)}"'
    if not wanted or "size" in wanted:
        item += f',"size":"{object_size(number)}"'
    if not wanted or "generation" in wanted:
        item += f',"generation":"{_GENERATION + number}"'
    if not wanted or "crc32c" in wanted:
        item += f',"crc32c":"{base64.b64encode(object_crc32c(number).to_bytes(4, "big")).decode()}"'
    if not wanted or "storageClass" in wanted:
        item += ',"storageClass":"STANDARD"'
    return item + "}"


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, objects: int, latency_s: float
) -> None:
    """One connection, kept open from request to request."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
            parts = urlsplit(target)
            query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
            await asyncio.sleep(latency_s)
            path = unquote(parts.path)
            status, body = "200 OK", b"{}"
            if method == "GET" and path == f"/storage/v1/b/{BUCKET}/o":
                body = list_page(query, objects)
            elif method == "GET" and path == f"/storage/v1/b/{BUCKET}":
                about = {"kind": "storage#bucket", "name": BUCKET, "storageClass": "STANDARD"}
                body = json.dumps(about, allow_nan=False).encode()
            else:
                status, body = "404 Not Found", b'{"error":{"code":404,"message":"not here"}}'
            length = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(length.encode() + body)
            await writer.drain()
    writer.close()


async def _serve(objects: int, latency_s: float) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _answer(reader, writer, objects=objects, latency_s=latency_s)

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def listing_server(objects: int, latency_ms: float = 0.0) -> Iterator[str]:
    """Serve so many objects from a process of its own while the context is entered.

    Args:
        objects: in the bucket, at most 100,000,000.
        latency_ms: added to every request.

    Yields:
        The server's URL, for STORAGE_EMULATOR_HOST.
    """
    command = [sys.executable, "-m", "benchmarks.listing_server", str(objects), str(latency_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("objects", type=int)
    parser.add_argument("latency_ms", type=float)
    given = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(given.objects, given.latency_ms / 1000))
