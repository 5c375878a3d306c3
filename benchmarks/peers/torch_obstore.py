"""A torch DataLoader whose workers keep many obstore GETs in flight: the strongest plain design we know."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Iterator, Sequence

import obstore
import torch.utils.data

from .work import Epoch, Sampler, Tensors, Work, bucket_and_prefix, joined, server_url


class Pairs(torch.utils.data.Dataset[Tensors]):
    """Reads a whole batch at once; the client is made in the worker."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.images, self.labels = work.names()
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def __getitems__(self, indices: Sequence[int]) -> Tensors:
        if self._pool is None:
            self._pool = concurrent.futures.ThreadPoolExecutor(self.work.in_flight)
            self._clients = [client_of(bucket_and_prefix(uri)[0]) for uri in (self.work.images, self.work.labels)]
        return joined([self._read(group) for group in self.work.groups(indices)])

    def _read(self, indices: Sequence[int]) -> Tensors:
        assert self._pool is not None
        prefixes = [bucket_and_prefix(uri)[1] for uri in (self.work.images, self.work.labels)]
        wanted = [
            (client, prefix + names[index])
            for client, prefix, names in zip(self._clients, prefixes, (self.images, self.labels), strict=True)
            for index in indices
        ]
        bodies = list(self._pool.map(lambda item: bytes(obstore.get(*item).bytes()), wanted))
        return Sampler(self.work)(indices, bodies[: len(indices)], bodies[len(indices) :])


def client_of(bucket: str) -> obstore.store.GCSStore:
    """A client of one bucket."""
    url = server_url()
    if url is None:
        return obstore.store.GCSStore(bucket)
    return obstore.store.GCSStore(
        bucket,
        config={"base_url": url},
        client_options={"allow_http": True},
        credential_provider=lambda: {"token": "anonymous", "expires_at": None},
    )


@contextlib.contextmanager
def opened(work: Work) -> Iterator[Epoch]:
    """The loader, its workers kept between epochs."""
    pairs = Pairs(work)
    order: list[int] = []
    loader = torch.utils.data.DataLoader(
        pairs,
        batch_size=work.batch,
        sampler=order,
        num_workers=work.workers,
        persistent_workers=True,
        prefetch_factor=2,
        collate_fn=_as_it_is,
        multiprocessing_context="forkserver",
    )

    def epoch(limit: int | None) -> Iterator[Tensors]:
        order[:] = work.order(len(pairs.images), limit)
        yield from loader

    yield epoch


def _as_it_is(batch: Tensors) -> Tensors:
    return batch
