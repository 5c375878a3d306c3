"""One held-out case as a picture: image, truth, and what the run's last checkpoint says."""

from __future__ import annotations

from pathlib import Path

import torch

from .evaluate import sliding_window_logits
from .loop import LoopJob
from .report import plot_case
from .unet3d import UNet3D


def draw_prediction(job: LoopJob, checkpoint: Path, run_dir: Path) -> str:
    """Predict the first held-out case and draw its slice; returns the file."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    network = UNet3D(job.recipe.model)
    network.load_state_dict(state["model"])
    network.eval()
    case = job.holdout.first_case()
    logits = sliding_window_logits(network, torch.from_numpy(case.image.copy()), job.recipe.window)
    prediction = logits.argmax(dim=0).numpy()
    picture = run_dir / "prediction.png"
    plot_case(case.image[0], case.label[0], prediction, picture, title=f"held-out case {case.case_id}")
    return str(picture)
