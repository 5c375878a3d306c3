"""voxflux, as a run has it: index, choose the transport, `training_dataset`, batches read ahead."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import numpy as np

from ingest.cluster import connected_ray
from ingest.fetch import FetchConfig
from ingest.index import index_cases, look_up_cases
from ingest.manifest import Manifest
from ingest.pipeline import DataConfig, training_dataset
from ingest.stores.base import StoreConfig, Transport
from ingest.transport import choose_transport
from train.ahead import ReadAhead
from train.batches import tensor_batches

from .work import Epoch, Tensors, Work

AHEAD = 2  # batches, as the torch peers have them ready for each of their workers


@contextlib.contextmanager
def opened(
    work: Work, transport: Transport, *, boxes: bool = False, slabs: Literal["auto", "never"] = "auto"
) -> Iterator[Epoch]:
    """One transport of voxflux; with `boxes` the manifest holds them, as `index --boxes` writes it once."""
    store = StoreConfig(transport=transport)
    manifest = index_cases(work.images, work.labels, store).manifest
    if boxes:
        manifest, _ = look_up_cases(manifest, store)
    data = DataConfig(
        seed=work.seed,
        holdout_fraction=0.0,
        crop=work.crop(),
        augment=work.augment(),
        store=choose_transport(manifest, store).store,
        fetch=FetchConfig(slabs=slabs),
    )
    data = dataclasses.replace(data, images=manifest.images_uri, labels=manifest.labels_uri)

    with connected_ray():
        samples = training_dataset(manifest, data, batch=work.batch)

        def epoch(limit: int | None) -> Iterator[Tensors]:
            dataset = samples
            if limit is not None:
                few = Manifest(manifest.take(np.arange(limit)), manifest.images_uri, manifest.labels_uri)
                dataset = training_dataset(few, data, batch=work.batch)
            read = functools.partial(tensor_batches, dataset.iterator(), work.batch, drop_last=False)
            for batch in ReadAhead(read, AHEAD):
                yield batch["image"], batch["label"]

        yield epoch
