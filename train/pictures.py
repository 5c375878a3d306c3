"""Held-out cases with what the run's last checkpoint says of them."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from .checkpoint import unpacked
from .evaluate import sliding_window_logits
from .loop import LoopJob
from .unet3d import UNet3D

CASES = 3  # that the run page shows
LONGEST_S = 20.0  # no further case is predicted after this: a large volume takes minutes on a CPU


@dataclasses.dataclass(frozen=True)
class PredictedCase:
    """One held-out case.

    Attributes:
        image: (D, H, W) float32, its first channel.
        truth: (D, H, W) uint8.
        prediction: (D, H, W) uint8.
    """

    case_id: str
    image: npt.NDArray[np.float32]
    truth: npt.NDArray[np.uint8]
    prediction: npt.NDArray[np.uint8]


def predict_some(job: LoopJob, checkpoint: Path) -> list[PredictedCase]:
    """The first held-out cases that are good, up to `CASES` of them, with their predictions."""
    state = unpacked(checkpoint.read_bytes(), str(checkpoint))
    network = UNet3D(job.recipe.model)
    network.load_state_dict(state["model"])
    network.eval()
    began_s = time.monotonic()
    found: list[PredictedCase] = []
    for case in job.holdout.good_cases():
        logits = sliding_window_logits(network, torch.from_numpy(case.image.copy()), job.recipe.window)
        prediction_DHW = logits.argmax(dim=0).numpy().astype(np.uint8)
        found.append(PredictedCase(case.case_id, case.image[0], case.label[0], prediction_DHW))
        if len(found) == CASES or time.monotonic() - began_s > LONGEST_S:
            break
    return found
