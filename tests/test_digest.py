"""The fingerprint: equal for equal samples in any order, different for any other bit."""

import numpy as np
import pytest

from ingest.digest import combine, digest_batches


def batch(*indices: int, epoch: int = 0, bump: int = 0) -> dict[str, np.ndarray]:
    n = len(indices)
    return {
        "epoch": np.full(n, epoch),
        "index": np.array(indices),
        "image": np.array([np.full((1, 2, 2, 2), i + bump, np.float32) for i in indices]),
        "label": np.array([np.full((1, 2, 2, 2), i % 3, np.uint8) for i in indices]),
    }


def fingerprint(*batches: dict[str, np.ndarray]) -> str:
    return combine(digest_batches(batches))


def test_neither_order_nor_batching_counts():
    assert fingerprint(batch(0, 1, 2)) == fingerprint(batch(2), batch(1, 0))


@pytest.mark.parametrize("other", [batch(0, 1), batch(0, 1, 3), batch(0, 1, 2, bump=1), batch(0, 1, 2, epoch=1)])
def test_any_other_sample_gives_another_fingerprint(other):
    assert fingerprint(batch(0, 1, 2)) != fingerprint(other)


def test_a_sample_that_comes_twice_is_an_error():
    with pytest.raises(ValueError, match="found case 1 of epoch 1 twice"):
        fingerprint(batch(0, 1), batch(1))
