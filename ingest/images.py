"""Lists images without labels, and reads some of them whole."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from .errors import ConfigError, PairingError
from .listing import list_objects
from .names import same_form, visible
from .pairing import CONVERT, EQUAL_NAMES, SUFFIXED_IMAGE, SUFFIXED_LABEL, VOLUME_LIKE, patterns_for
from .stores.base import ObjectMeta, StoreConfig, open_store

logger = logging.getLogger(__name__)

IMAGE_SCHEMA = pa.schema(
    [
        pa.field("case_id", pa.string(), nullable=False),
        pa.field("image_name", pa.string(), nullable=False),
        pa.field("image_npy", pa.large_binary(), nullable=False),
    ]
)


class Image(NamedTuple):
    """One image and its key."""

    case_id: str
    meta: ObjectMeta


class ImageShard(NamedTuple):
    """Plain values that tell a worker which images to read."""

    uri: str
    store: StoreConfig
    images: tuple[Image, ...]


def list_images(uri: str, store: StoreConfig | None = None, pattern: str | None = None) -> list[Image]:
    """List a place's images, in byte order of keys.

    Args:
        uri: the place.
        store: how to open it.
        pattern: regular expression with one group, the key, matched against whole names. None: names ending in
            `_x.npy` where there is one, else all that end in `.npy`.

    Raises:
        ConfigError: the pattern is no such regular expression.
        StoreError: the place cannot be listed, or is empty.
        PairingError: it holds no image, or two of the same key.
    """
    objects = list_objects(open_store(uri, store))
    if pattern is None:
        suffixed = any(re.fullmatch(SUFFIXED_IMAGE, entry.name) for entry in objects)
        pattern = SUFFIXED_IMAGE if suffixed else EQUAL_NAMES
        _warn_of_unmatched(uri, objects, pattern)
    try:
        compiled = re.compile(same_form(pattern))
    except re.error as error:
        raise ConfigError(f"--pattern: {pattern!r} is not a regular expression ({error}); mend it") from error
    if compiled.groups != 1:
        raise ConfigError(f"--pattern: expected one group, the key, found {compiled.groups} in {pattern!r}")
    found: dict[str, Image] = {}
    for entry in objects:
        match = compiled.fullmatch(same_form(entry.name))
        if match is None:
            continue
        key = match.group(1) or ""
        if key in found:
            names = (found[key].meta.name, entry.name)
            one, other = names if all(name.isascii() for name in names) else map(ascii, names)
            raise PairingError(
                f"expected one image a key in {uri}, found {one} and {other} for {key!r}; give a --pattern that takes "
                "one of them"
            )
        found[key] = Image(key, entry)
    if not found:
        raise PairingError(
            f"expected images in {uri}, found none among {len(objects)} objects (first: {visible(objects[0].name)}); "
            f"check the URI, or give --pattern, e.g. {_pattern_for(objects)}; {CONVERT}"
        )
    return [found[key] for key in sorted(found, key=lambda key: key.encode())]


def _warn_of_unmatched(uri: str, objects: list[ObjectMeta], pattern: str) -> None:
    """Warn of objects with names of volumes that the default pattern leaves out. Labels are left out on purpose."""
    left_out = [
        entry.name
        for entry in objects
        if VOLUME_LIKE.search(entry.name)
        and not re.fullmatch(pattern, same_form(entry.name))
        and not re.fullmatch(SUFFIXED_LABEL, same_form(entry.name))
    ]
    if left_out and len(left_out) < len(objects):
        logger.warning(
            "%s: %s of %s objects are .npy by their name and are left out, because they do not match %s (first: %s); "
            "to take them, give --pattern, e.g. %s",
            uri,
            f"{len(left_out):,}",
            f"{len(objects):,}",
            pattern,
            visible(left_out[0]),
            _pattern_for(objects),
        )


def _pattern_for(objects: list[ObjectMeta]) -> str:
    """Return a pattern that matches these names, quoted for a shell."""
    names = [same_form(entry.name) for entry in objects]
    suffixed, _ = patterns_for(names, [], same_place=True)
    if any(re.fullmatch(suffixed, name) for name in names):
        return shlex.quote(suffixed)
    return shlex.quote(patterns_for(names, [])[0])


def read_images(shard: ImageShard) -> Iterator[pa.Table]:
    """Yield a shard's images, raw, one a table.

    Yields:
        Tables of `IMAGE_SCHEMA`.

    Raises:
        StoreError: an image cannot be read.
    """
    store = open_store(shard.uri, shard.store)
    for image in shard.images:
        body = store.fetch([image.meta])[0]
        yield pa.table(
            {"case_id": [image.case_id], "image_name": [store.uri_of(image.meta.name)], "image_npy": [body]},
            schema=IMAGE_SCHEMA,
        )
