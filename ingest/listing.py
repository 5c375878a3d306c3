"""Lists a place fast and completely: plain first, in parallel where it proves large."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import rich.console
import rich.progress

from .errors import EmptyListingError, ListingError
from .names import litter_kind, visible
from .stores.base import Lists, ObjectMeta, StoreConfig, is_unread

logger = logging.getLogger(__name__)

_QUIET_S = 2.0
_LINE_EVERY_S = 10.0


@runtime_checkable
class ListsFast(Protocol):
    """Can go on with a listing in parallel, from where a plain one stopped."""

    config: StoreConfig

    def list_rest(self, listed: list[ObjectMeta], found: Callable[[int], None]) -> list[ObjectMeta]:
        """Every object of the place, given the first ones in byte order of names."""


class Listing(NamedTuple):
    """The objects of a place.

    Attributes:
        objects: objects that may be data, in byte order of names.
        skipped: hidden files and folders, and the litter of macOS and Windows, by kind; see `names.litter_kind`.
    """

    objects: list[ObjectMeta]
    skipped: dict[str, list[ObjectMeta]]


def list_objects(store: Lists, *, progress: bool = True) -> list[ObjectMeta]:
    """List every object of a place that may be data, in byte order of names; see `list_place`."""
    return list_place(store, progress=progress).objects


def list_place(store: Lists, *, progress: bool = True) -> Listing:
    """List all objects of a place: those that may be data, and the litter among them.

    Hidden files and folders below the URI, and the litter of macOS and Windows, are skipped; a warning counts them.

    Args:
        store: the place.
        progress: show a bar on a terminal, else a log line every 10 s, once a listing takes more than 2 s.

    Raises:
        EmptyListingError: the place exists and holds no object that may be data.
        ListingError: the name of a file is no text.
        PlaceNotFoundError: the bucket or folder does not exist.
        CredentialsError, PermissionDeniedError, UnreachableError: as named.
    """
    with _progress(store.uri, shown=progress) as found:
        objects, skipped = without_litter(_list(store, found))
    _check_names(store.uri, objects)
    if skipped:
        logger.warning("%s: skipped %s", store.uri, _described(skipped))
    if not objects:
        but = f" but {_described(skipped)}" if skipped else ""
        raise EmptyListingError(
            f"expected objects in {store.uri}, found that it exists and holds none{but}; check the path below the "
            f"bucket or folder, or upload data there"
        )
    _warn_of_classes(store.uri, objects)
    unread = describe_unread(objects)
    if unread:
        logger.warning("%s: %s", store.uri, unread)
    return Listing(objects, skipped)


def without_litter(objects: list[ObjectMeta]) -> tuple[list[ObjectMeta], dict[str, list[ObjectMeta]]]:
    """Split a listing into the objects that may be data, and the litter by kind; see `litter_kind`."""
    kept: list[ObjectMeta] = []
    skipped: dict[str, list[ObjectMeta]] = {}
    for meta in objects:
        kind = litter_kind(meta.name)
        if kind is None:
            kept.append(meta)
        else:
            skipped.setdefault(kind, []).append(meta)
    return kept, skipped


def describe_unread(objects: list[ObjectMeta]) -> str | None:
    """Describe the objects that are stored with a Content-Encoding that is not read; None if there are none."""
    unread = [meta for meta in objects if is_unread(meta.content_encoding)]
    if not unread:
        return None
    counts = collections.Counter(meta.content_encoding for meta in unread)
    kinds = ", ".join(f"{count:,} {encoding}" for encoding, count in sorted(counts.items(), key=str))
    return (
        f"{len(unread):,} of {len(objects):,} objects are stored with a Content-Encoding that is not read ({kinds}; "
        f"first: {visible(unread[0].name)}); decompress them and upload them anew, uncompressed or as gzip"
    )


def _check_names(uri: str, objects: list[ObjectMeta]) -> None:
    """Refuse names that a manifest cannot hold: Python gives bytes that it cannot decode as lone surrogates."""
    for meta in objects:
        if meta.name.isascii():
            continue
        try:
            meta.name.encode()
        except UnicodeEncodeError:
            encoding = sys.getfilesystemencoding()
            do = "rename it" if encoding == "utf-8" else "set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
            raise ListingError(
                f"expected names of files in {encoding}, as the locale says, found {os.fsencode(meta.name)!r} in "
                f"{uri}; {do}"
            ) from None


def _described(skipped: dict[str, list[ObjectMeta]]) -> str:
    total = sum(len(metas) for metas in skipped.values())
    kinds = ", ".join(
        f"{len(metas):,} {kind} (first: {visible(metas[0].name)})" for kind, metas in sorted(skipped.items())
    )
    return f"{total:,} objects that are not data: {kinds}"


def _list(store: Lists, found: Callable[[int], None]) -> list[ObjectMeta]:
    above = store.config.fast_listing_above if isinstance(store, ListsFast) else None
    objects: list[ObjectMeta] = []
    for meta in store.list():
        objects.append(meta)
        if len(objects) % 1000 == 0:
            found(len(objects))
        if above is not None and len(objects) > above and isinstance(store, ListsFast):
            return store.list_rest(objects, found)
    return objects


def _warn_of_classes(uri: str, objects: list[ObjectMeta]) -> None:
    classes = collections.Counter(meta.storage_class for meta in objects)
    others = {name: count for name, count in classes.items() if name not in (None, "STANDARD")}
    if others:
        counts = ", ".join(f"{count:,} {name}" for name, count in sorted(others.items()) if name)
        logger.warning(
            "%s: %s of %s objects are not of storage class STANDARD (%s); they are listed and read all the same, but "
            "reading them costs a retrieval fee each epoch: rewrite them as STANDARD",
            uri,
            f"{sum(others.values()):,}",
            f"{len(objects):,}",
            counts,
        )


@contextlib.contextmanager
def _progress(uri: str, *, shown: bool) -> Iterator[Callable[[int], None]]:
    started = time.monotonic()
    last_line = started
    bar = rich.progress.Progress(
        rich.progress.SpinnerColumn("line"),  # of ASCII
        rich.progress.TextColumn("listing {task.description}", markup=False),  # a name may have brackets
        rich.progress.TextColumn("{task.completed:,.0f} objects"),
        rich.progress.TimeElapsedColumn(),
        console=rich.console.Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(uri, total=None)

    def found(count: int) -> None:
        nonlocal last_line
        now = time.monotonic()
        if not shown or now - started < _QUIET_S:
            return
        if sys.stderr.isatty():
            bar.start()
            bar.update(task, completed=count)
        elif now - last_line >= _LINE_EVERY_S:
            last_line = now
            logger.info("listing %s: %s objects in %.0f s so far", uri, f"{count:,}", now - started)

    try:
        yield found
    finally:
        if bar.live.is_started:  # stopping one that never started prints an empty line
            bar.stop()
