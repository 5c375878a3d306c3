"""Whether a parallel listing is complete, as far as a few plain pages can tell."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

import numpy as np

from .base import ObjectMeta

SPREAD_PROBES = 8
GAP_PROBES = 24
_SPREAD_OBJECTS = 1000
_GAP_OBJECTS = 8

ListPage = Callable[[str, int], Sequence[ObjectMeta]]
"""A plain page: the first name, how many objects."""


def what_is_missing(listed: Sequence[ObjectMeta], fast: Sequence[ObjectMeta], page: ListPage) -> str | None:
    """Compare a parallel listing with plain ones that know nothing of it.

    Looked at are: every object already listed plainly; pages from starts spread over the names; the places where
    neighbouring names lie furthest apart, which is where a lost range of names shows; and the end.

    Args:
        listed: plain, the first objects in byte order of names.
        fast: parallel, in byte order of names.
        page: lists a plain page.

    Returns:
        What the parallel listing lacks or has wrong, in words; None where no difference was found.
    """
    names = [meta.name for meta in fast]
    sizes = {meta.name: meta.size_bytes for meta in fast}
    lacking = _difference(listed, names, sizes)
    if lacking:
        return lacking
    if not names:
        return "it is empty"
    for position in np.linspace(0, len(names) - 1, SPREAD_PROBES).astype(int):
        lacking = _difference(page(names[position], _SPREAD_OBJECTS), names, sizes)
        if lacking:
            return lacking
    for position in _widest_gaps(names):
        lacking = _difference(page(names[position], _GAP_OBJECTS), names, sizes)
        if lacking:
            return lacking
    return None


def _difference(plain: Sequence[ObjectMeta], names: Sequence[str], sizes: dict[str, int]) -> str | None:
    for meta in plain:
        if meta.name not in sizes:
            return f"it lacks {meta.name}"
        if sizes[meta.name] != meta.size_bytes:
            return f"it gives {sizes[meta.name]:,} bytes for {meta.name}, which has {meta.size_bytes:,}"
    if plain:
        between = bisect.bisect_right(names, plain[-1].name) - bisect.bisect_left(names, plain[0].name)
        if between != len(plain):
            return (
                f"it has {between:,} objects from {plain[0].name} to {plain[-1].name}, where there are {len(plain):,}"
            )
    return None


def _widest_gaps(names: Sequence[str]) -> list[int]:
    """Positions whose next name lies furthest off, names taken as numbers after what all of them share."""
    first, last = names[0].encode(), names[-1].encode()
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    values = np.array(
        [int.from_bytes(name.encode()[shared : shared + 7].ljust(7, b"\0"), "big") for name in names],
        dtype=np.int64,
    )
    widest = np.argsort(np.diff(values))[::-1][:GAP_PROBES]
    return [int(position) for position in widest]
