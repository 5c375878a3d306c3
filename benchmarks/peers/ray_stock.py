"""Ray Data as it comes: `read_binary_files` of both prefixes over gcsfs, zipped in order of names, `map_batches`.

Zipping costs less than `Dataset.join`, which shuffles all bytes, and is right here since no pair lacks a part. Each
epoch is executed anew, as its users would have it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pyarrow.fs
import ray.data

from ingest.cluster import connected_ray

from .work import Epoch, Sampler, Tensors, Work, server_url

BLOCKS = 16


@contextlib.contextmanager
def opened(work: Work) -> Iterator[Epoch]:
    """Two data sets, one of each prefix."""
    import gcsfs

    url = server_url()
    system = gcsfs.GCSFileSystem(**({"endpoint_url": url, "token": "anon"} if url else {}))
    filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(system))
    images, labels = work.names()

    def read(uri: str, names: list[str], column: str) -> ray.data.Dataset:
        paths = [uri.removeprefix("gs://") + name for name in names]
        # By itself Ray makes a task a file here, and is many times slower.
        blocks = max(BLOCKS, len(work.groups(paths)))
        dataset = ray.data.read_binary_files(paths, filesystem=filesystem, override_num_blocks=blocks)
        return dataset.rename_columns({"bytes": column})

    with connected_ray():
        ray.data.DataContext.get_current().execution_options.preserve_order = True

        def epoch(limit: int | None) -> Iterator[Tensors]:
            both = read(work.images, images[:limit], "image").zip(read(work.labels, labels[:limit], "label"))
            batches = both.map_batches(functools.partial(_sample, Sampler(work)), batch_size=work.batch)
            for batch in batches.iter_torch_batches(batch_size=work.batch, prefetch_batches=2):
                yield batch["image"], batch["label"]

        yield epoch


def _sample(sampler: Sampler, batch: dict[str, Any]) -> dict[str, Any]:
    image, label = sampler(range(len(batch["image"])), list(batch["image"]), list(batch["label"]))
    return {"image": image.numpy(), "label": label.numpy()}
