"""What tests, benchmarks and demos of stores need: stores in memory, imitated latency, faults, small labelled cases.

`StoreContract` is found here too; it needs pytest, so it is loaded when it is asked for.
"""

from __future__ import annotations

import concurrent.futures
import io
import itertools
import math
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import google_crc32c
import numpy as np

from .errors import (
    ConfigError,
    ObjectError,
    ObjectNotFoundError,
    PermissionDeniedError,
    PlaceNotFoundError,
    StaleManifestError,
)
from .fault_proxy import Fault, FaultProxy, every_fault
from .stores.base import (
    BaseStore,
    Bodies,
    ObjectMeta,
    Pieces,
    Puts,
    RangeRequest,
    Store,
    StoreConfig,
    precondition_failed,
)

__all__ = [
    "Fault",
    "FaultProxy",
    "LatencyStore",
    "MemoryStore",
    "every_fault",
    "make_case",
    "make_cases",
    "npy_bytes",
]

ShapeDHW = tuple[int, int, int]

_PLACES: dict[str, dict[str, tuple[bytes, int]]] = {}
_DENIED: set[str] = set()
_LOCK = threading.Lock()
_GENERATIONS = itertools.count(1)


class MemoryStore(BaseStore):
    """A place in this process's memory. Thread-safe; pickles as its URI, so it comes back only in this process."""

    def __init__(self, uri: str, config: StoreConfig | None = None) -> None:
        """Note the place ``memory://name``; `create` makes it."""
        name = uri.removeprefix("memory://").rstrip("/")
        if not uri.startswith("memory://") or not name:
            raise ConfigError(f"expected memory://name, found {uri!r}; give the place a name")
        self.uri = f"memory://{name}/"
        self.config = config or StoreConfig()

    def create(self) -> MemoryStore:
        """Make the place, empty, unless it is there."""
        with _LOCK:
            _PLACES.setdefault(self.uri, {})
        return self

    def deny(self) -> MemoryStore:
        """From now on nobody may use the place."""
        _DENIED.add(self.uri)
        return self

    def _objects(self) -> dict[str, tuple[bytes, int]]:
        if self.uri in _DENIED:
            raise PermissionDeniedError(f"expected leave to use {self.uri}, found it denied; use another place")
        if self.uri not in _PLACES:
            raise PlaceNotFoundError(f"expected the place {self.uri}, found none; create() it first")
        return _PLACES[self.uri]

    def list(self, prefix: str = "") -> Iterator[ObjectMeta]:
        """See `Lists.list`."""
        with _LOCK:
            objects = dict(self._objects())
        for name in sorted(objects, key=lambda name: name.encode()):
            if name.startswith(prefix):
                body, generation = objects[name]
                yield ObjectMeta(name, len(body), generation, google_crc32c.value(body))

    def fetch_each(self, objects: Sequence[ObjectMeta]) -> Bodies:
        """See `Fetches.fetch_each`."""
        with _LOCK:
            held = dict(self._objects())
        return [self._checked(meta, held.get(meta.name)) for meta in objects]

    def _checked(self, meta: ObjectMeta, held: tuple[bytes, int] | None) -> bytes | ObjectError:
        if held is None:
            return ObjectNotFoundError(
                f"expected the listed object {self.uri_of(meta.name)}, found that it is gone; put it back"
            )
        body, generation = held
        if len(body) != meta.size_bytes or meta.generation not in (None, generation):
            return StaleManifestError(
                f"expected {self.uri_of(meta.name)} as listed ({meta.size_bytes:,} bytes, generation "
                f"{meta.generation}), found {len(body):,} bytes, generation {generation}; it was overwritten since"
            )
        return body

    def put(self, name: str, data: bytes, if_generation: int | None = None) -> int:
        """See `Puts.put`."""
        if not name:
            raise ConfigError(f"expected a name of an object below {self.uri}, found an empty one")
        with _LOCK:
            self._require(name, if_generation)
            generation = next(_GENERATIONS)
            self._objects()[name] = (bytes(data), generation)
            return generation

    def delete(self, name: str, if_generation: int | None = None) -> None:
        """See `Deletes.delete`."""
        if not name:
            raise ConfigError(f"expected a name of an object below {self.uri}, found an empty one")
        with _LOCK:
            if name not in self._objects():
                raise ObjectNotFoundError(
                    f"expected the object {self.uri_of(name)} to delete, found none; it is gone already"
                )
            self._require(name, if_generation)
            del self._objects()[name]

    def _require(self, name: str, if_generation: int | None) -> None:
        found = self._objects().get(name, (b"", 0))[1]
        if if_generation is not None and found != if_generation:
            raise precondition_failed(self.uri_of(name), if_generation, f"generation {found}" if found else "none")


class LatencyStore(BaseStore):
    """Another store, made as slow as a distant one.

    Attributes:
        store: what it wraps.
        latency_s: added once a listing, a put, and each `in_flight` objects or ranges of a fetch.
    """

    def __init__(self, store: Store, latency_s: float, in_flight: int = 32) -> None:
        """Wrap `store`."""
        self.store = store
        self.latency_s = latency_s
        self.in_flight = in_flight
        self.uri = store.uri

    def list(self, prefix: str = "") -> Iterator[ObjectMeta]:
        """See `Lists.list`."""
        time.sleep(self.latency_s)
        yield from self.store.list(prefix)

    def fetch_each(self, objects: Sequence[ObjectMeta]) -> Bodies:
        """See `Fetches.fetch_each`."""
        time.sleep(self.latency_s * math.ceil(len(objects) / self.in_flight))
        return self.store.fetch_each(objects)

    def fetch_ranges(self, requests: Sequence[RangeRequest]) -> Pieces:
        """See `FetchesRanges.fetch_ranges`."""
        time.sleep(self.latency_s * math.ceil(len(requests) / self.in_flight))
        return self.store.fetch_ranges(requests)

    def put(self, name: str, data: bytes, if_generation: int | None = None) -> int:
        """See `Puts.put`."""
        time.sleep(self.latency_s)
        return self.store.put(name, data, if_generation)

    def delete(self, name: str, if_generation: int | None = None) -> None:
        """See `Deletes.delete`."""
        time.sleep(self.latency_s)
        self.store.delete(name, if_generation)


def make_cases(
    images: Puts,
    labels: Puts,
    count: int,
    shape: ShapeDHW | Sequence[ShapeDHW] = (16, 16, 16),
    *,
    seed: int = 0,
    first: int = 0,
    image_folder: str = "",
    label_folder: str = "",
) -> list[str]:
    """Write small labelled cases: smooth blobs, brighter with each class, and a little noise.

    Case ``i`` is a pure function of (seed, i, its shape). Names are ``case_00000_x.npy`` and ``case_00000_y.npy``.

    Args:
        images: where image_CDHW go: (1, D, H, W) float32, about z-scored.
        labels: where label_CDHW go: (1, D, H, W) uint8 with values 0, 1, 2; each value occurs from 8³ on.
        count: how many cases.
        shape: (D, H, W), or several that are cycled through.
        seed: of the cases.
        first: the number of the first case.
        image_folder: before each image's name; empty or ending in ``/``.
        label_folder: before each label's name; empty or ending in ``/``.

    Returns:
        The cases' keys: ``case_00000`` and so on.
    """
    shapes = _shapes(shape)

    def write(number: int) -> str:
        image_CDHW, label_CDHW = make_case(shapes[number % len(shapes)], np.random.default_rng([seed, number]))
        key = f"case_{number:05d}"
        images.put(f"{image_folder}{key}_x.npy", npy_bytes(image_CDHW))
        labels.put(f"{label_folder}{key}_y.npy", npy_bytes(label_CDHW))
        return key

    with concurrent.futures.ThreadPoolExecutor(4, thread_name_prefix="make-cases") as pool:
        return list(pool.map(write, range(first, first + count)))


def make_case(
    shape_DHW: ShapeDHW, rng: np.random.Generator
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    """One case of `make_cases`: image_CDHW and label_CDHW, both (1, D, H, W)."""
    axes = np.ogrid[tuple(slice(0, 1, size * 1j) for size in shape_DHW)]
    field = np.zeros(shape_DHW, dtype=np.float64)
    for _ in range(3):
        centre, width = rng.uniform(0.2, 0.8, 3), rng.uniform(0.15, 0.3)
        distance = sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True))
        field += np.exp(-distance / (2 * width**2))
    low, high = np.quantile(field, (0.7, 0.9))
    label = (field > low).astype(np.uint8) + (field > high)
    image = label - 0.5 + 0.2 * rng.standard_normal(shape_DHW)
    return image[np.newaxis].astype(np.float32), label[np.newaxis].astype(np.uint8)


def npy_bytes(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> bytes:
    """The array as a whole .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _shapes(shape: ShapeDHW | Sequence[ShapeDHW]) -> list[ShapeDHW]:
    flat = [size for size in shape if isinstance(size, int)]
    if flat:
        if len(flat) != 3 or len(shape) != 3:
            raise ConfigError(f"expected a shape (D, H, W) or several of them, found {shape!r}")
        return [(flat[0], flat[1], flat[2])]
    return [size for size in shape if not isinstance(size, int)]


def __getattr__(name: str) -> Any:
    if name in ("StoreContract", "FlatNamesContract"):
        from . import store_contract

        return getattr(store_contract, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
