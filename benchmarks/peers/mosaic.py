"""mosaicml-streaming: pairs are first written into MDS shards, which workers then download whole and read locally.

It pays before the first epoch what the others pay in each: `write_shards` rewrites the data set, timed apart and said
on standard error. What is timed is an epoch with nothing downloaded yet, as of a data set larger than the disk. Shards
go into a bucket of their own on the embedded server; in a bucket of yours nothing is written, so there it does not run.
Runs in an environment of its own: see `own_venv`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.utils.data

from ingest.errors import ConfigError
from ingest.stores import open_store

from .work import Epoch, Sampler, Tensors, Work, server_url

SHARD_BUCKET = "voxflux-bench-mds"
_CHUNK = 64  # pairs that are read together while shards are written


def write_shards(work: Work) -> float:
    """Write the pairs as shards, unless they are there.

    Returns:
        Seconds it took, reading the pairs included; 0 where nothing was to do.

    Raises:
        ConfigError: there is no embedded server.
    """
    if server_url() is None:
        raise ConfigError("expected the embedded server, found none; leave mosaic out of --loaders for your own bucket")
    from google.cloud import storage
    from streaming import MDSWriter

    client = storage.Client(project="none")
    if client.lookup_bucket(SHARD_BUCKET) is not None:
        return 0.0
    started = time.perf_counter()
    client.create_bucket(SHARD_BUCKET)
    images, labels = open_store(work.images), open_store(work.labels)
    pairs = list(zip(images.list(), labels.list(), strict=True))
    columns = {"index": "int", "image": "bytes", "label": "bytes"}
    with MDSWriter(out=_remote(), columns=columns) as writer:
        chunk = min(_CHUNK, work.together)
        for start in range(0, len(pairs), chunk):
            some = pairs[start : start + chunk]
            bodies = zip(images.fetch([x for x, _ in some]), labels.fetch([y for _, y in some]), strict=True)
            for number, (image, label) in enumerate(bodies, start):
                writer.write({"index": number, "image": image, "label": label})
    return time.perf_counter() - started


def _without_images() -> None:
    """Where torchvision does not load, stand-ins for the two names that the library's vision data sets import.

    PyPI's torchvision is built for CUDA and does not load beside a torch for CPUs. Nothing here uses it.
    """
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        for name, held in (("", {}), (".datasets", {"VisionDataset": object}), (".transforms", {})):
            _stand_in(f"torchvision{name}", held)
        _stand_in("torchvision.transforms.functional", {"to_tensor": None})


def _stand_in(name: str, held: dict[str, Any]) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    module.__dict__.update(held)
    sys.modules[name] = module


def _remote() -> str:
    return f"gs://{SHARD_BUCKET}/pairs"


def _sign_in_nowhere() -> None:
    """On the embedded server only: the library asks for Google credentials even there."""
    import google.auth
    from google.auth.credentials import AnonymousCredentials

    google.auth.default = lambda *_, **__: (AnonymousCredentials(), "none")


@contextlib.contextmanager
def opened(work: Work) -> Iterator[Epoch]:
    """A fresh data set, cache and pool of workers for each epoch: a kept one would read what it has downloaded.

    So the start of forked workers is in what is timed; it takes a tenth of a second.
    """
    _without_images()
    if server_url() is not None:
        _sign_in_nowhere()
    from streaming import StreamingDataset

    took_s = write_shards(work)
    if took_s:
        print(f"mosaic: wrote its shards in {took_s:.1f} s", file=sys.stderr)

    # A worker holds all pairs of a batch before any is decoded.
    batch = min(work.batch, work.together)

    def epoch(limit: int | None) -> Iterator[Tensors]:
        with tempfile.TemporaryDirectory(prefix="voxflux-mosaic-") as cache:
            pairs = StreamingDataset(
                remote=_remote(),
                local=cache,
                batch_size=batch,
                shuffle=True,
                shuffle_seed=work.seed,
                epoch_size=limit,
                num_canonical_nodes=1,
            )
            loader = torch.utils.data.DataLoader(
                pairs, batch_size=batch, num_workers=work.workers, collate_fn=_Collate(work)
            )
            yield from loader

    yield epoch


class _Collate:
    """Pairs to tensors, in the worker."""

    def __init__(self, work: Work) -> None:
        self._sampler = Sampler(work)

    def __call__(self, pairs: list[dict[str, Any]]) -> Tensors:
        indices = [int(np.int64(pair["index"])) for pair in pairs]
        return self._sampler(indices, [pair["image"] for pair in pairs], [pair["label"] for pair in pairs])
