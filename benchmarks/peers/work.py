"""What every loader is asked to do, and the transforms that all but the reference share."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import numpy as np
import torch

from ingest.augment import NO_AUGMENTATION, AugmentConfig, PatchSampler
from ingest.crop import CropConfig
from ingest.decode import DecodeConfig, decode_case

Transform = Literal["none", "crop", "full"]
Tensors = tuple[torch.Tensor, torch.Tensor]
# One epoch, or its first so many samples: image (N, 1, D, H, W) float32 and label (N, 1, D, H, W) uint8.
Epoch = Callable[[int | None], Iterator[Tensors]]
Opened = AbstractContextManager[Epoch]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The same for every loader.

    Attributes:
        images: URI.
        labels: URI.
        patch: (D, H, W) of a sample.
        batch: samples of a batch.
        transform: `none` cuts one corner, `crop` places the patch by MLPerf's law, `full` augments it too.
        workers: processes of loaders that have a number of them.
        in_flight: requests a process, of loaders that have a number of them.
        seed: of order and transforms.
        together: pairs whose bytes a process may hold at once; see `room`.
    """

    images: str
    labels: str
    patch: tuple[int, int, int]
    batch: int
    transform: Transform
    workers: int
    in_flight: int
    seed: int
    together: int = 2**30

    def crop(self) -> CropConfig:
        """Where the patch is cut."""
        return CropConfig(patch=self.patch, foreground_probability=0.0 if self.transform == "none" else 0.4)

    def augment(self) -> AugmentConfig:
        """What is done to it."""
        return AugmentConfig() if self.transform == "full" else NO_AUGMENTATION

    def names(self) -> tuple[list[str], list[str]]:
        """Names of the pairs' objects, in order."""
        from ingest.index import index_cases

        table = index_cases(self.images, self.labels).manifest.table
        return table["image"].to_pylist(), table["label"].to_pylist()

    def groups(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """Parts of a list of pairs, each small enough to be held at once."""
        return [indices[start : start + self.together] for start in range(0, len(indices), self.together)]

    def order(self, count: int, limit: int | None) -> list[int]:
        """A shuffled epoch."""
        order: list[int] = np.random.default_rng(self.seed).permutation(count).tolist()
        return order[:limit]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Bytes of pairs in, a batch of tensors out: voxflux's own decoding and transforms, for peers that have none."""

    work: Work

    def __call__(self, indices: Sequence[int], images: Sequence[bytes], labels: Sequence[bytes]) -> Tensors:
        """A batch of these pairs."""
        work = self.work
        sampler = PatchSampler(crop=work.crop(), augment=work.augment(), seed=work.seed)
        image_NCDHW = np.empty((len(indices), 1, *work.patch), dtype=np.float32)
        label_N1DHW = np.empty((len(indices), 1, *work.patch), dtype=np.uint8)
        for row, (index, image, label) in enumerate(zip(indices, images, labels, strict=True)):
            image_CDHW, label_1DHW = decode_case(
                image, label, DecodeConfig(), image_name="image", label_name="label", smallest=work.patch
            )
            sampler(
                image_CDHW, label_1DHW, epoch=0, index=index, out_image=image_NCDHW[row], out_label=label_N1DHW[row]
            )
        return torch.from_numpy(image_NCDHW), torch.from_numpy(label_N1DHW)


def joined(batches: Sequence[Tensors]) -> Tensors:
    """Several small batches as one."""
    if len(batches) == 1:
        return batches[0]
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def bucket_and_prefix(uri: str) -> tuple[str, str]:
    """Of a gs:// URI; the prefix ends in a slash."""
    bucket, _, prefix = uri.removeprefix("gs://").partition("/")
    return bucket, prefix.rstrip("/") + "/"


def server_url() -> str | None:
    """Of the emulator, where one is set."""
    return os.environ.get("STORAGE_EMULATOR_HOST")
