"""Loss and Dice against a plain NumPy transcription of the published formulas."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from train.loss import DiceCELoss, dice_by_class, dice_score


def example(
    seed: int = 0, n: int = 3, k: int = 3, shape: tuple[int, int, int] = (4, 5, 6)
) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 3, (n, k, *shape)).astype(np.float32))
    label = torch.from_numpy(rng.integers(0, k, (n, 1, *shape)).astype(np.uint8))
    return logits, label


def softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def published_dice(p: npt.NDArray[np.float64], label: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """(2 sum(p g) + 1e-6) / (sum(p) + sum(g) + 1e-6) of each sample and foreground class in float64, loop by loop."""
    n, k = p.shape[:2]
    scores = np.empty((n, k - 1))
    for i in range(n):
        for c in range(1, k):
            g = (label[i, 0] == c).astype(np.float64)
            scores[i, c - 1] = (2 * (p[i, c] * g).sum() + 1e-6) / (p[i, c].sum() + g.sum() + 1e-6)
    return scores


def published_loss(logits: npt.NDArray[np.float64], label: npt.NDArray[np.int64]) -> float:
    """(mean(1 - Dice) + CE) / 2 in float64."""
    p = softmax(logits)
    picked = np.take_along_axis(p, label, axis=1)
    return float(((1 - published_dice(p, label)).mean() - np.log(picked).mean()) / 2)


@pytest.mark.parametrize("shape", [(4, 5, 6), (32, 32, 32)], ids=["small", "the reference's patch"])
@pytest.mark.parametrize("seed", range(5))
def test_the_loss_equals_the_published_formula(seed: int, shape: tuple[int, int, int]) -> None:
    logits, label = example(seed, shape=shape)
    expected = published_loss(logits.double().numpy(), label.long().numpy())
    assert DiceCELoss()(logits, label).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_soft_dice_equals_the_published_formula_for_each_sample_and_class(classes: int) -> None:
    logits, label = example(7, k=classes, shape=(16, 16, 16))
    label[0][label[0] == 1] = 0  # absent from one sample's label
    p = softmax(logits.double().numpy())
    found = dice_score(torch.from_numpy(p).float(), label)
    assert found.shape == (3, classes - 1)
    np.testing.assert_allclose(found, published_dice(p, label.long().numpy()), rtol=0, atol=1e-6)


def test_labels_of_either_dtype_give_the_same_loss() -> None:
    logits, label = example()
    assert DiceCELoss()(logits, label) == DiceCELoss()(logits, label.long())


def test_the_background_counts_in_the_cross_entropy_and_not_in_dice() -> None:
    label = torch.zeros(1, 1, 2, 2, 2, dtype=torch.uint8)
    sure = torch.tensor([40.0, -40.0, -40.0]).reshape(1, 3, 1, 1, 1).expand(1, 3, 2, 2, 2)
    assert DiceCELoss()(sure, label).item() == pytest.approx(0, abs=1e-6)  # both classes absent in both: Dice 1
    unsure = torch.zeros(1, 3, 2, 2, 2)
    p_sum = 8 / 3
    expected = ((1 - 1e-6 / (p_sum + 1e-6)) + np.log(3)) / 2
    assert DiceCELoss()(unsure, label).item() == pytest.approx(expected, abs=1e-6)


def test_the_loss_is_computed_in_float32_under_autocast() -> None:
    logits, label = example()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = DiceCELoss()(logits.bfloat16(), label)
    assert half.dtype == torch.float32
    assert half.item() == DiceCELoss()(logits.bfloat16().float(), label).item()


def test_gradients_flow_and_point_downhill() -> None:
    logits, label = example()
    logits.requires_grad_()
    loss = DiceCELoss()(logits, label)
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert DiceCELoss()(logits.detach() - 10 * logits.grad, label) < loss


def test_extreme_logits_keep_the_loss_finite() -> None:
    logits, label = example()
    assert torch.isfinite(DiceCELoss()(logits * 1e4, label))


def test_soft_dice_of_a_perfect_map_is_one_and_of_a_disjoint_one_is_zero() -> None:
    _, label = example()
    truth = (label == torch.arange(3).reshape(1, 3, 1, 1, 1)).float()
    torch.testing.assert_close(dice_score(truth, label), torch.ones(3, 2))
    torch.testing.assert_close(dice_score(truth.roll(1, dims=1), label), torch.zeros(3, 2), atol=1e-6, rtol=0)


def test_hard_dice_equals_the_published_formula() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 4, (2, 2, 1, 5, 6, 7))
    actual = dice_by_class(torch.from_numpy(a), torch.from_numpy(b.astype(np.uint8)), 4).numpy()
    assert actual.shape == (2, 3)
    for n in range(2):
        for c in range(1, 4):
            p, g = a[n] == c, b[n] == c
            expected = (2 * (p & g).sum() + 1e-6) / (p.sum() + g.sum() + 1e-6)
            assert actual[n, c - 1] == pytest.approx(expected, abs=1e-12)


def test_a_class_absent_from_both_maps_scores_one_and_from_one_map_nearly_zero() -> None:
    empty = torch.zeros(1, 1, 2, 2, 2, dtype=torch.uint8)
    some = empty.clone()
    some[0, 0, 0] = 1
    assert dice_by_class(empty, empty, 3).tolist() == [[1.0, 1.0]]
    scores = dice_by_class(some, empty, 3)[0]
    assert scores[0] < 1e-6
    assert scores[1] == 1.0


def test_shapes_that_would_broadcast_are_refused() -> None:
    logits, label = example()
    for wrong in (label[:, 0], label[:1], label[..., :1], logits):
        with pytest.raises(ValueError, match="expected scores"):
            DiceCELoss()(logits, wrong)
    with pytest.raises(ValueError, match="one shape"):
        dice_by_class(label, label[:1], 3)
