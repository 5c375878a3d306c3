"""How a bucket is to be read: measured by a few requests, and decided with a reason."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..errors import ObjectError, StoreError
from . import dataflux
from .base import ObjectMeta
from .gcs_compose import OBJECTS_PER_COMPOSITE, ComposeReader
from .gcs_direct import IN_FLIGHT, DirectReader

if TYPE_CHECKING:
    from .gcs import BucketFacts

COMPOSE_BELOW_BYTES = 1_000_000
"""Above this mean object size composing gains nothing, by Dataflux's own measurements."""

# Objects a second that one process allows on one core: direct, what CurlPool read at 160 KB a pair from the embedded
# server, and composed FACTS section 10.
DIRECT_CPU_RATE = 8000.0
COMPOSE_CPU_RATE = 2700.0
FEWEST_IN_FLIGHT, MOST_IN_FLIGHT = IN_FLIGHT, 128
COMPOSE_GAIN = 1.25
"""Composing writes to the bucket: it must bring so many times what direct reads do."""

_PROBES = 5


class Settled(NamedTuple):
    """How to read.

    Attributes:
        transport: `compose` or `direct`.
        reason: in words.
        max_in_flight: requests in flight a process for direct reads.
    """

    transport: Literal["compose", "direct"]
    reason: str
    max_in_flight: int


def settle(direct: DirectReader, objects: Sequence[ObjectMeta], facts: Callable[[], BucketFacts]) -> Settled:
    """Choose the transport and the requests in flight, by measuring where they are not given.

    Args:
        direct: reads the place; its configuration says what is given.
        objects: of the place, or a sample of them.
        facts: asks for the bucket's settings.

    Raises:
        StoreError: the bucket cannot be read at all.
    """
    config = direct.config
    some = sorted({meta for meta in objects if meta.size_bytes}, key=lambda meta: meta.size_bytes)
    get_s = None if config.max_in_flight else get_seconds(direct, some[:_PROBES])
    in_flight = config.max_in_flight or in_flight_for(get_s)
    if config.transport != "auto":
        return Settled(config.transport, "it was asked for", in_flight)
    if len(some) < 2:
        return Settled("direct", "there are fewer than two objects to compose", in_flight)
    mean_bytes = sum(meta.size_bytes for meta in some) / len(some)
    if mean_bytes > COMPOSE_BELOW_BYTES:
        reason = f"objects are {mean_bytes / 1e6:.1f} MB in the mean, and composing gains below 1 MB only"
        return Settled("direct", reason, in_flight)
    if (no_dataflux := dataflux.missing()) is not None:
        return Settled("direct", no_dataflux, in_flight)
    known = facts()
    if kept := known.keeps_composites():
        return Settled("direct", kept, in_flight)
    composed = some[:OBJECTS_PER_COMPOSITE]
    started = time.perf_counter()
    try:
        ComposeReader(direct=direct).probe(composed)
    except StoreError as error:
        return Settled("direct", f"composing {len(composed)} objects as a probe failed: {error}", in_flight)
    compose_s = time.perf_counter() - started
    if get_s is None:
        get_s = get_seconds(direct, some[:_PROBES])
    by_get = min(DIRECT_CPU_RATE, in_flight / get_s) if get_s else DIRECT_CPU_RATE
    # A composite takes as long for 32 objects as for a few: its time is that of three requests.
    by_compose = min(COMPOSE_CPU_RATE, config.compose_in_flight * OBJECTS_PER_COMPOSITE / compose_s)
    figures = (
        f"a GET takes {1e3 * (get_s or 0):.1f} ms and a composed read {1e3 * compose_s:.0f} ms, so a process reads "
        f"about {by_get:,.0f} objects/s directly with {in_flight} in flight, and {by_compose:,.0f} composed"
    )
    if by_compose < COMPOSE_GAIN * by_get:
        return Settled("direct", figures, in_flight)
    if known.unknown_because:
        figures += f"; whether soft delete keeps composites is not known, since {known.unknown_because}"
    return Settled("compose", figures, in_flight)


def get_seconds(direct: DirectReader, objects: Sequence[ObjectMeta]) -> float | None:
    """Median seconds of a GET on an open connection; None where there is nothing to read.

    Raises:
        StoreError: the bucket cannot be read at all.
    """
    if not objects:
        return None
    seconds: list[float] = []
    for meta in (objects[0], *objects):  # the first opens the connection
        started = time.perf_counter()
        body = direct.read(meta)
        if not isinstance(body, ObjectError):
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]) if len(seconds) > 1 else None


def in_flight_for(get_s: float | None) -> int:
    """Requests in flight that keep a process's CPU busy.

    Of those of libcurl fewer than 32 bring nothing where there is no latency either: whole epochs of 9,600 pairs took
    0.86 ms of CPU a sample with 8, 0.85 with 16, 0.76 with 32 and 0.79 with 64 (medians of six, 2026-11-26).
    """
    if get_s is None:
        return FEWEST_IN_FLIGHT
    return int(min(MOST_IN_FLIGHT, max(FEWEST_IN_FLIGHT, round(get_s * DIRECT_CPU_RATE))))
