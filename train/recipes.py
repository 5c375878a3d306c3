"""Named complete configurations; every field can be set from the command line."""

from __future__ import annotations

from ingest.augment import AugmentConfig
from ingest.crop import CropConfig
from ingest.pipeline import DataConfig
from ingest.plan import ShardConfig

from .config import DemoConfig, Recipe, TrainerConfig
from .evaluate import SlidingWindowConfig
from .optimizer import OptimizerConfig
from .unet3d import UNet3DConfig

DEMO = Recipe(
    data=DataConfig(
        crop=CropConfig(patch=(32, 32, 32)),
        # MLPerf's brightness multiplies by 1.7 to 2.3, which z-scored MR volumes never show: ±30 % here.
        augment=AugmentConfig(brightness_range=(-0.3, 0.3)),
        shards=ShardConfig(shard_cases=32),
        holdout_fraction=0.1,
    ),
    model=UNet3DConfig(filters=(8, 16, 32), bottleneck=64, norm="instancenorm"),
    optimizer=OptimizerConfig(
        name="adamw", learning_rate=3e-3, warmup_epochs=1, lr_decay_epochs=(0.75,), lr_decay_factor=0.3
    ),
    window=SlidingWindowConfig(overlap=0.25),
    trainer=TrainerConfig(num_workers=2, batch_size=4, epochs=8, evaluate_every=2, use_gpu=False),
    demo=DemoConfig(),
)

# 2 mm: MNI152's field of view is 108 voxels of it an axis. A patch sees two thirds of a brain's width.
# One window as wide as the volume is `--roi 112 112 112`: 108 is no multiple of the network's stride of 16. On the one
# held-out case tried, after 7 epochs, it gave 0.75 of grey and 0.83 of white matter, where windows of the patch's size
# gave 0.91 and 0.91. Likely since instance norm averages over the window, which has more background than patches have.
DEMO_QUALITY = Recipe(
    data=DataConfig(
        crop=CropConfig(patch=(64, 64, 64)),
        augment=AugmentConfig(brightness_range=(-0.3, 0.3)),
        shards=ShardConfig(shard_cases=16),
        holdout_fraction=0.1,
    ),
    model=UNet3DConfig(filters=(8, 16, 32, 64), bottleneck=128, norm="instancenorm"),
    optimizer=OptimizerConfig(
        name="adamw", learning_rate=3e-3, warmup_epochs=1, lr_decay_epochs=(0.667, 0.9), lr_decay_factor=0.3
    ),
    trainer=TrainerConfig(num_workers=2, batch_size=2, epochs=60, evaluate_every=10, use_gpu=False),
    demo=DemoConfig(cases=60, shape=(108, 108, 108)),
)

# The reference: GoogleCloudPlatform/dataflux-pytorch, demo/image-segmentation (8 GPUs, 32³ volumes and patches).
KITS19_SMALL = Recipe(
    data=DataConfig(crop=CropConfig(patch=(32, 32, 32))),
    model=UNet3DConfig(norm="batchnorm"),
    optimizer=OptimizerConfig(name="sgd", learning_rate=0.8, warmup_epochs=20),
    trainer=TrainerConfig(num_workers=8, batch_size=32, epochs=100, evaluate_every=10, use_gpu=True),
)

# MLPerf Training's image segmentation: mlcommons/training, retired_benchmarks/unet3d/pytorch.
KITS19_MLPERF = Recipe(
    data=DataConfig(
        crop=CropConfig(patch=(128, 128, 128)), shards=ShardConfig(shard_cases=16), holdout_cases="kits19-mlperf"
    ),
    model=UNet3DConfig(norm="instancenorm"),
    optimizer=OptimizerConfig(name="sgd", learning_rate=0.8, warmup_epochs=200),
    trainer=TrainerConfig(
        num_workers=8,
        batch_size=2,
        epochs=4000,
        evaluate_from=999,
        evaluate_every=20,
        quality_threshold=0.908,
        use_gpu=True,
    ),
)

RECIPES: dict[str, tuple[str, Recipe]] = {
    "demo": ("minutes on a laptop: MNI152-derived cases on an embedded server, a small U-Net", DEMO),
    "demo-quality": (
        "a quarter of an hour on two cores: the same at 2 mm, patches of 64³, scored by class",
        DEMO_QUALITY,
    ),
    "kits19-small": ("the reference demo: 32³, batch 32, 100 epochs, 8 ranks", KITS19_SMALL),
    "kits19-mlperf": (
        "MLPerf's image segmentation: 128³, instance norm, target mean Dice 0.908",
        KITS19_MLPERF,
    ),
}
