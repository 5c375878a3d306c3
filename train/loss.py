"""The training loss and the score, by MLPerf's formulas.

Source: mlcommons/training, retired_benchmarks/unet3d/pytorch, `model/losses.py` (FACTS section 4):

    loss = (mean over samples and foreground classes of (1 - Dice) + cross entropy) / 2
    Dice = (2 sum(p g) + 1e-6) / (sum(p) + sum(g) + 1e-6)

with p a class's probability and g its indicator. The cross entropy counts the background, Dice does not.
Legend: N samples, K classes, D H W space.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

SMOOTH = 1e-6
"""Added above and below in Dice, as MLPerf does: a class that is nowhere, in neither map, scores exactly 1."""


def dice_score(probability_NKDHW: torch.Tensor, label_N1DHW: torch.Tensor) -> torch.Tensor:
    """Soft Dice of each sample and foreground class.

    Args:
        probability_NKDHW: (N, K, D, H, W) float, a distribution over K; background is class 0.
        label_N1DHW: (N, 1, D, H, W) uint8 or int64, values below K.

    Returns:
        (N, K-1) float32 in [0, 1]. A class absent from the label scores about 1e-6 / sum(p): nearly 0 unless the
        prediction leaves it out entirely, when it scores 1.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    _check_shapes(probability_NKDHW, label_N1DHW)
    scores = []
    for value in range(1, probability_NKDHW.shape[1]):
        p_NDHW = probability_NKDHW[:, value].float()
        g_NDHW = (label_N1DHW[:, 0] == value).float()
        both = (p_NDHW * g_NDHW).sum(dim=(1, 2, 3))
        scores.append(_dice(both, p_NDHW.sum(dim=(1, 2, 3)), g_NDHW.sum(dim=(1, 2, 3))))
    return torch.stack(scores, dim=1)


class DiceCELoss(nn.Module):
    """Half of (mean foreground 1 - Dice) plus half of the voxels' mean cross entropy.

    Everything is computed in float32, also under autocast: sums over a patch overflow float16 and lose counts in
    bfloat16.
    """

    def forward(self, logits_NKDHW: torch.Tensor, label_N1DHW: torch.Tensor) -> torch.Tensor:
        """The loss of a batch.

        Args:
            logits_NKDHW: (N, K, D, H, W), any float dtype.
            label_N1DHW: (N, 1, D, H, W) uint8 or int64, values below K.

        Returns:
            A scalar, float32.

        Raises:
            ValueError: if the shapes do not belong together.
        """
        return self.by_sample(logits_NKDHW, label_N1DHW).mean()

    def by_sample(self, logits_NKDHW: torch.Tensor, label_N1DHW: torch.Tensor) -> torch.Tensor:
        """The loss of each sample: the batch's is their mean, since all have the same number of voxels.

        Args and raises as for `forward`.

        Returns:
            (N,) float32.
        """
        _check_shapes(logits_NKDHW, label_N1DHW)
        with torch.autocast(logits_NKDHW.device.type, enabled=False):
            log_probability_NKDHW = F.log_softmax(logits_NKDHW.float(), dim=1)
            # Unreduced: the reductions of nll_loss have no deterministic form on GPUs.
            entropy_NDHW = F.nll_loss(log_probability_NKDHW, label_N1DHW[:, 0].long(), reduction="none")
            dice_loss_N = (1 - dice_score(log_probability_NKDHW.exp(), label_N1DHW)).mean(dim=1)
            return (dice_loss_N + entropy_NDHW.mean(dim=(1, 2, 3))) / 2


def dice_by_class(prediction_N1DHW: torch.Tensor, label_N1DHW: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Hard Dice of label maps: the score that MLPerf's 0.908 is a mean of.

    Args:
        prediction_N1DHW: (N, 1, D, H, W) integers, the arg-max of the logits.
        label_N1DHW: (N, 1, D, H, W) integers.
        num_classes: K, background included.

    Returns:
        (N, K-1) float64 on the CPU, counted in integers, so exact whatever the volume. A class absent from both
        maps scores 1 (the formula's 1e-6 / 1e-6); absent from one only, about 0.

    Raises:
        ValueError: if the two maps differ in shape.
    """
    if prediction_N1DHW.shape != label_N1DHW.shape:
        raise ValueError(
            f"expected prediction and label of one shape (N, 1, D, H, W); found {tuple(prediction_N1DHW.shape)} "
            f"and {tuple(label_N1DHW.shape)}"
        )
    scores = []
    for value in range(1, num_classes):
        p, g = prediction_N1DHW == value, label_N1DHW == value
        counts = [mask.flatten(1).sum(dim=1).cpu().double() for mask in (p & g, p, g)]
        scores.append(_dice(*counts))
    return torch.stack(scores, dim=1)


def _dice(both: torch.Tensor, predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    return (2 * both + SMOOTH) / (predicted + true + SMOOTH)


def _check_shapes(scores_NKDHW: torch.Tensor, label_N1DHW: torch.Tensor) -> None:
    """Refuse what would otherwise broadcast in silence."""
    shape = tuple(scores_NKDHW.shape)
    if len(shape) != 5 or shape[1] < 2 or tuple(label_N1DHW.shape) != (shape[0], 1, *shape[2:]):
        raise ValueError(
            f"expected scores (N, K, D, H, W) with K of 2 or more, and a label (N, 1, D, H, W) of the same N, D, H, "
            f"W; found {shape} and {tuple(label_N1DHW.shape)}"
        )
