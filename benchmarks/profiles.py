"""Known training jobs that `utilization` emulates the accelerators of."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """A known training job, as an accelerator sees it.

    Attributes:
        pair_kb: KiB of image and label together, before any scaling down.
        pairs: of the data set that is made for it, before any scaling down; epochs repeat.
        batch: samples a rank and step.
        step_s: seconds that an accelerator computes a step.
        patch: edge of the patch in voxels, before any scaling down.
        about: whose job it is.
    """

    pair_kb: int
    pairs: int
    batch: int
    step_s: float
    patch: int
    about: str


PROFILES = {
    "demo-v100": Profile(pair_kb=160, pairs=4800, batch=32, step_s=0.21, patch=32, about="Google's demo, 8 V100"),
    "unet3d-h100": Profile(
        pair_kb=143_555, pairs=560, batch=7, step_s=0.323, patch=128, about="MLPerf Storage unet3d, 147 MB, H100"
    ),
}
