"""The reference demo's own design on its own library: two Dataflux map-style datasets, torch DataLoader, 2 workers.

Its transforms are MLPerf's, a sample at a time, as the formulas in mlcommons/training, retired_benchmarks/unet3d/
pytorch, have them (FACTS section 4); written anew here, with NumPy's global generator as there.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import scipy.ndimage
import torch.utils.data

from .work import Epoch, Tensors, Work, bucket_and_prefix

Array = npt.NDArray[np.generic]


class Pairs(torch.utils.data.Dataset[tuple[Array, Array]]):
    """Pairs by sorted position, as the demo does."""

    def __init__(self, work: Work, *, composed: bool) -> None:
        from dataflux_pytorch import dataflux_mapstyle_dataset as dataflux
        from google.cloud import storage

        self.work = work
        self.parts = [
            dataflux.DataFluxMapStyleDataset(
                project_name="",
                bucket_name=bucket,
                config=dataflux.Config(
                    prefix=prefix, sort_listing_results=True, num_processes=1, disable_compose=not composed
                ),
                data_format_fn=_array_of,
            )
            for bucket, prefix in map(bucket_and_prefix, (work.images, work.labels))
        ]
        for part in self.parts:
            part.storage_client = storage.Client(project="none")

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Array, Array]]:
        samples = []
        for group in self.work.groups(indices):
            images, labels = (part.__getitems__(group) for part in self.parts)
            samples += [transformed(image, label, self.work) for image, label in zip(images, labels, strict=True)]
        return samples


def _array_of(data: bytes) -> Array:
    array: Array = np.load(io.BytesIO(data))
    return array


def transformed(image: Array, label: Array, work: Work) -> tuple[Array, Array]:
    """Crop, flip, brightness, noise: each drawn when it is applied."""
    random = np.random
    starts = [0, 0, 0]
    if work.transform != "none":
        starts = _balanced(label, work.patch) if random.random() < 0.4 else _anywhere(label, work.patch)
    cut = (slice(None), *(slice(start, start + length) for start, length in zip(starts, work.patch, strict=True)))
    image, label = image[cut], label[cut]
    if work.transform == "full":
        for axis in (1, 2, 3):
            if random.random() < 1 / 3:
                image, label = np.flip(image, axis), np.flip(label, axis)
        image, label = image.astype(np.float32), label.astype(np.uint8)
        if random.random() < 0.1:
            image = image * np.float32(1 + random.uniform(0.7, 1.3))
        if random.random() < 0.1:
            image = (image + random.normal(0.0, random.uniform(0.0, 0.1), image.shape)).astype(np.float32)
    return np.ascontiguousarray(image), np.ascontiguousarray(label)


def _anywhere(label: Array, patch: tuple[int, int, int]) -> list[int]:
    return [
        int(np.random.randint(0, length - size)) if length > size else 0
        for length, size in zip(label.shape[1:], patch, strict=True)
    ]


def _balanced(label: Array, patch: tuple[int, int, int]) -> list[int]:
    present = [value for value in np.unique(label) if value > 0]
    if not present:
        return _anywhere(label, patch)
    components, _ = scipy.ndimage.label(label[0] == np.random.choice(present))
    boxes = sorted(
        scipy.ndimage.find_objects(components), key=lambda box: np.prod([side.stop - side.start for side in box])
    )[-2:]
    box = boxes[np.random.randint(len(boxes))]
    starts = []
    for side, size, length in zip(box, patch, label.shape[1:], strict=True):
        difference = abs(size - (side.stop - side.start))
        before = int(np.random.randint(0, difference)) if difference else 0
        if side.stop - side.start <= size:
            low, high = max(0, side.start - before), min(length, side.stop + difference - before)
        else:
            low, high = side.start + before, side.stop - (difference - before)
        starts.append(max(0, low if low == 0 else min(low, high - size)))
    return starts


@contextlib.contextmanager
def opened(work: Work, *, composed: bool) -> Iterator[Epoch]:
    """The loader, its workers kept between epochs."""
    pairs = Pairs(work, composed=composed)
    order: list[int] = []
    loader = torch.utils.data.DataLoader(
        pairs,
        batch_size=work.batch,
        sampler=order,
        num_workers=work.workers,
        persistent_workers=True,
        multiprocessing_context="forkserver",
    )

    def epoch(limit: int | None) -> Iterator[Tensors]:
        order[:] = work.order(len(pairs), limit)
        yield from loader

    yield epoch
