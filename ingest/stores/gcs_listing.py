"""A listing in parallel: split points of the names, and one plain listing for each range between them."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable, Sequence

from .base import ObjectMeta

ListRange = Callable[[str, str | None], list[ObjectMeta]]
"""Lists plainly, whole: from this name, to before that one; None is no end."""
FirstName = Callable[[str, str | None], str | None]
"""Gives the first name of such a range; None where there is none."""


def list_ranges(
    list_range: ListRange, start: str, points: Sequence[str], threads: int, found: Callable[[int], None]
) -> list[ObjectMeta]:
    """List everything from a name on, in byte order of names. Any points give the same listing.

    Args:
        list_range: lists one range; called from several threads.
        start: the first name that may be listed.
        points: names, whether they exist or not; those up to `start` are left out.
        threads: how many ranges are listed at a time.
        found: told how many objects are listed so far.

    Raises:
        StoreError: the error of any range; the ranges not yet begun are cancelled.
    """
    bounds = [start, *sorted({point for point in points if point > start})]
    ends = [*bounds[1:], None]
    pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="voxflux-listing")
    try:
        ranges = [pool.submit(list_range, begin, end) for begin, end in zip(bounds, ends, strict=True)]
        count = 0
        for done in concurrent.futures.as_completed(ranges):
            count += len(done.result())
            found(count)
        return [meta for listed in ranges for meta in listed.result()]
    finally:
        pool.shutdown(cancel_futures=True)


def probe_points(first: str, first_name: FirstName, *, wanted: int, most_probes: int = 200) -> list[str]:
    """Find split points by asking for single names, however long a prefix the names share.

    Each step finds the character at which the names of a range first differ, and splits the range there.

    Args:
        first: the first name of all.
        first_name: asks for one.
        wanted: points after which the search ends.
        most_probes: requests after which it ends.
    """
    left = most_probes

    def ask(prefix: str, end: str | None) -> str | None:
        nonlocal left
        start = _after(prefix)
        if start is None or left <= 0 or (end is not None and start >= end):
            return None
        left -= 1
        return first_name(start, end)

    points: list[str] = []
    queue: collections.deque[tuple[str, str | None]] = collections.deque([(first, None)])
    while queue and left > 0 and len(points) < wanted:
        low, end = queue.popleft()
        # The shorter the prefix, the fewer names come after all that begin with it.
        short, long = 0, len(low)
        while short < long:
            middle = (short + long) // 2
            if ask(low[: middle + 1], end) is None:
                short = middle + 1
            else:
                long = middle
        names = [low]
        while len(names) < 2 * wanted and (name := ask(names[-1][: short + 1], end)) is not None:
            names.append(name)
        cuts = [name[: short + 1] for name in names[1:]]
        points.extend(cuts)
        queue.extend(zip(names, [*cuts, end], strict=True) if cuts else ())
    return points


def _after(prefix: str) -> str | None:
    """The first string after all that begin with a prefix; None where its last character is the last of all."""
    last = ord(prefix[-1]) + 1 if prefix else 0x110000
    if last == 0x110000:
        return None
    return prefix[:-1] + chr(0xE000 if last == 0xD800 else last)
