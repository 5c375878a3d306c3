"""litdata's `StreamingRawDataset`: raw objects by asyncio and obstore, both parts of a pair as one item, torch workers.

All its settings are its defaults, so it chooses its own number of requests in flight. Two things are ours. Its index
is made from names that we listed, since it would write `index.json.zstd` into the bucket itself, beside the images,
where loaders that pair by position would read it. And on the emulator, which it does not know, it gets our client.
Runs in an environment of its own: see `own_venv`.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch.utils.data

from ingest.errors import ConfigError
from ingest.index import index_cases

from .torch_obstore import client_of
from .work import Epoch, Sampler, Tensors, Work, bucket_and_prefix, joined, server_url


class Batches(torch.utils.data.Dataset[Tensors]):
    """Whole batches of tensors out of litdata's items."""

    def __init__(self, work: Work, raw: Any) -> None:
        self.work = work
        self.raw = raw

    def __len__(self) -> int:
        return len(self.raw)

    def __getitems__(self, indices: Sequence[int]) -> Tensors:
        _point_at_emulator()
        return joined([self._read(group) for group in self.work.groups(indices)])

    def _read(self, indices: Sequence[int]) -> Tensors:
        items = self.raw.__getitems__(list(indices))
        return Sampler(self.work)(indices, [image for image, _ in items], [label for _, label in items])


def raw_dataset(work: Work, cache: str) -> Any:
    """The data set of [image, label] items, in the order of `Work.names`.

    Args:
        work: both places must lie in one bucket, since the data set has one root.
        cache: a folder; nothing is cached in it but what litdata keeps for itself.

    Raises:
        ConfigError: the places are in two buckets.
    """
    from litdata.raw.dataset import StreamingRawDataset
    from litdata.raw.indexer import BaseIndexer, FileMetadata

    (bucket, images), (other, labels) = map(bucket_and_prefix, (work.images, work.labels))
    if bucket != other:
        raise ConfigError(
            f"expected images and labels in one bucket, found {bucket} and {other}; leave litdata-raw out of --loaders"
        )
    table = index_cases(work.images, work.labels).manifest.table
    files = [
        FileMetadata(path=f"gs://{bucket}/{prefix}{name}", size=size)
        for prefix, role in ((images, "image"), (labels, "label"))
        for name, size in zip(table[role].to_pylist(), table[f"{role}_bytes"].to_pylist(), strict=True)
    ]

    class Given(BaseIndexer):  # type: ignore[misc]
        """The files that we listed."""

        def build_or_load_index(self, *_: Any, **__: Any) -> list[FileMetadata]:
            return files

        def discover_files(self, *_: Any) -> list[FileMetadata]:
            return files

    class Pairs(StreamingRawDataset):  # type: ignore[misc]
        """Items of two objects."""

        def setup(self, files: list[FileMetadata]) -> list[list[FileMetadata]]:
            half = len(files) // 2
            return [list(pair) for pair in zip(files[:half], files[half:], strict=True)]

    return Pairs(f"gs://{bucket}/", cache_dir=cache, indexer=Given())


def _point_at_emulator() -> None:
    """On the emulator only: litdata has no setting for a server of another name."""
    if server_url() is None:
        return
    from litdata.streaming import downloader

    downloader.GCPDownloader._get_store = lambda self, bucket: downloader._cached_obstore_store(
        self, lambda: client_of(bucket)
    )


@contextlib.contextmanager
def opened(work: Work) -> Iterator[Epoch]:
    """The loader, its workers kept between epochs. They are forked: litdata's data set has local classes here."""
    with tempfile.TemporaryDirectory(prefix="voxflux-litdata-") as cache:
        batches = Batches(work, raw_dataset(work, cache))
        order: list[int] = []
        loader = torch.utils.data.DataLoader(
            batches,
            batch_size=work.batch,
            sampler=order,
            num_workers=work.workers,
            persistent_workers=True,
            collate_fn=_as_it_is,
        )

        def epoch(limit: int | None) -> Iterator[Tensors]:
            order[:] = work.order(len(batches), limit)
            yield from loader

        yield epoch


def _as_it_is(batch: Tensors) -> Tensors:
    return batch
