"""What CPU time cannot be beaten: the bytes by the fastest client and nothing else, and the transforms in memory.

It is one process that does one after the other, so loaders of several may be faster than it, and none cheaper.

`local-loop` is the plainest loop over local files: `np.load` and the transforms, in one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ingest.augment import PatchSampler
from ingest.stores import StoreConfig, open_store
from ingest.stores.curl import Answer, Get
from ingest.stores.gcs_clients import authorization, curl_pool, object_url

from .work import Epoch, Tensors, Work, bucket_and_prefix

CHUNK_BATCHES = 8
MOST_HELD = 64


@contextlib.contextmanager
def opened(work: Work) -> Iterator[Epoch]:
    """Many GETs by libcurl whose bytes are dropped; then the transforms of pairs in memory, again and again."""
    names = work.names()
    stores = [open_store(uri) for uri in (work.images, work.labels)]
    listed = [{meta.name: meta for meta in store.list()} for store in stores]
    wanted = [
        [(object_url(*_bucket_and_key(uri, name), generation=None), metas[name].size_bytes) for name in part]
        for uri, part, metas in zip((work.images, work.labels), names, listed, strict=True)
    ]
    # 64 pairs in memory, so that caches are no warmer than they are with real ones; fewer where they are large.
    held = min(MOST_HELD, work.together, len(names[0]))
    arrays = [
        [_array_of(store.fetch([meta])[0]) for meta in list(metas.values())[:held]]
        for store, metas in zip(stores, listed, strict=True)
    ]

    connections = curl_pool(StoreConfig(), work.in_flight)

    def epoch(limit: int | None) -> Iterator[Tensors]:
        order = work.order(len(names[0]), limit)
        # A few batches at a time, so that an epoch that is broken off has made samples of what it fetched.
        for start in range(0, len(order), CHUNK_BATCHES * work.batch):
            some = order[start : start + CHUNK_BATCHES * work.batch]
            for group in work.groups(some):
                headers = authorization()
                each = [
                    Get(url, expected_bytes, headers)
                    for index in group
                    for url, expected_bytes in (part[index] for part in wanted)
                ]
                for outcome in connections.get(each):
                    if not isinstance(outcome, Answer) or outcome.status != 200:
                        raise RuntimeError(f"expected the floor's requests to succeed, found {outcome}")
            pairs = [(arrays[0][index % held], arrays[1][index % held]) for index in some]
            yield from _batches(work, some, pairs)

    yield epoch


@contextlib.contextmanager
def opened_local(work: Work) -> Iterator[Epoch]:
    """`np.load` of both files of each pair."""
    names = work.names()

    def epoch(limit: int | None) -> Iterator[Tensors]:
        order = work.order(len(names[0]), limit)
        for start in range(0, len(order), work.batch):
            some = order[start : start + work.batch]
            pairs = [
                (np.load(Path(work.images) / names[0][index]), np.load(Path(work.labels) / names[1][index]))
                for index in some
            ]
            yield from _batches(work, some, pairs)

    yield epoch


def _bucket_and_key(uri: str, name: str) -> tuple[str, str]:
    bucket, prefix = bucket_and_prefix(uri)
    return bucket, prefix + name


def _array_of(body: bytes) -> np.ndarray:
    import io

    array: np.ndarray = np.load(io.BytesIO(body))
    return array


def _batches(work: Work, order: list[int], pairs: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[Tensors]:
    sampler = PatchSampler(crop=work.crop(), augment=work.augment(), seed=work.seed)
    for start in range(0, len(order), work.batch):
        some = order[start : start + work.batch]
        image_NCDHW = np.empty((len(some), 1, *work.patch), dtype=np.float32)
        label_N1DHW = np.empty((len(some), 1, *work.patch), dtype=np.uint8)
        for row, index in enumerate(some):
            image, label = pairs[start + row]
            sampler(image, label, epoch=0, index=index, out_image=image_NCDHW[row], out_label=label_N1DHW[row])
        yield torch.from_numpy(image_NCDHW), torch.from_numpy(label_N1DHW)
