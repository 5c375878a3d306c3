"""A fingerprint of what a data set hands to training: equal fingerprints, equal samples to the last bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Digests = dict[tuple[int, int], bytes]


def digest_batch(batch: Mapping[str, npt.NDArray[Any]], into: Digests) -> None:
    """Add the samples of one batch.

    Args:
        batch: `epoch` (N,) and `index` (N,) integers, `image` (N, C, D, H, W) float32, `label` (N, 1, D, H, W)
            uint8.
        into: SHA-256 of index, image and label by (epoch, index); written to.

    Raises:
        ValueError: a sample came twice.
    """
    for epoch, index, image, label in zip(
        batch["epoch"].tolist(), batch["index"].tolist(), batch["image"], batch["label"], strict=True
    ):
        if (epoch, index) in into:
            raise ValueError(f"expected each case once an epoch, found case {index} of epoch {epoch + 1} twice")
        digest = hashlib.sha256(np.int64(index).astype("<i8").tobytes())
        for array in (image, label):
            digest.update(repr((array.dtype.str, array.shape)).encode())
            digest.update(np.ascontiguousarray(array).data)
        into[epoch, index] = digest.digest()


def combine(digests: Mapping[tuple[int, int], bytes]) -> str:
    """One SHA-256, in hexadecimal, of all samples by epoch and index: the order they came in does not count."""
    whole = hashlib.sha256()
    for (epoch, index), digest in sorted(digests.items()):
        whole.update(f"{epoch} {index} ".encode())
        whole.update(digest)
    return whole.hexdigest()


def digest_batches(batches: Iterable[Mapping[str, npt.NDArray[Any]]]) -> Digests:
    """The digests of all samples of these batches."""
    found: Digests = {}
    for batch in batches:
        digest_batch(batch, found)
    return found
