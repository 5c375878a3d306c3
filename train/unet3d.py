"""The 3D U-Net of MLPerf Training, sized by a configuration.

Source: mlcommons/training, retired_benchmarks/unet3d/pytorch (FACTS section 4). The defaults are that network;
initialisation is torch's own, as there. Legend: N samples, C channels, K classes, D H W space.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from ingest.errors import ConfigError

Norm = Literal["instancenorm", "batchnorm"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UNet3DConfig:
    """The network's size; the defaults are MLPerf's."""

    in_channels: int | None = None
    """Channels of the image; None takes the data's."""

    num_classes: int | None = None
    """Channels of the logits, background included; None takes the data's classes."""

    filters: tuple[int, ...] = (32, 64, 128, 256, 320)
    """Channels of each level, full resolution first; every level halves the one before it."""

    bottleneck: int = 320
    """Channels of the lowest level, one halving below the last of `filters`."""

    norm: Norm = "instancenorm"
    """Normalisation after each 3x3x3 convolution, affine in both cases; MLPerf's is `instancenorm`."""

    def __post_init__(self) -> None:
        for field, channels in (("in_channels", self.channels), ("bottleneck", self.bottleneck)):
            if channels < 1:
                raise ConfigError(f"{field} must be 1 or more channels; got {channels}")
        if self.classes < 2:
            raise ConfigError(f"num_classes must be 2 or more, background included; got {self.num_classes}")
        if not self.filters or any(channels < 1 for channels in self.filters):
            raise ConfigError(f"filters must be one or more counts of channels, each 1 or more; got {self.filters}")
        if self.norm not in ("instancenorm", "batchnorm"):
            raise ConfigError(f"norm must be instancenorm or batchnorm; got {self.norm!r}")

    @property
    def channels(self) -> int:
        """`in_channels`, or MLPerf's, where no data is known."""
        return 1 if self.in_channels is None else self.in_channels

    @property
    def classes(self) -> int:
        """`num_classes`, or MLPerf's, where no data is known."""
        return 3 if self.num_classes is None else self.num_classes


def total_stride(config: UNet3DConfig) -> int:
    """Voxels of the image per voxel of the bottleneck along each axis: 2 to the number of halvings."""
    return int(2 ** len(config.filters))


def check_patch(config: UNet3DConfig, patch_shape: Sequence[int], batch_size: int | None = None) -> None:
    """Reject a patch that the network cannot take, before anything runs.

    Args:
        config: The network's size.
        patch_shape: (D, H, W) in voxels.
        batch_size: Samples per rank and step in training; None when it is not known or for inference.

    Raises:
        ConfigError: if an axis is no positive multiple of the total stride (the skip connections would not fit),
            or if the normalisation would be fed a single value a channel: instance norm on a bottleneck of one
            voxel, or batch norm on such a bottleneck with one sample.
    """
    stride = total_stride(config)
    shape = tuple(patch_shape)
    if len(shape) != 3 or any(length < stride or length % stride for length in shape):
        raise ConfigError(
            f"expected a patch (D, H, W) of multiples of {stride} voxels, since {len(config.filters)} levels halve "
            f"it {len(config.filters)} times; found {shape}; change the patch, or give fewer filters"
        )
    if any(length != stride for length in shape):
        return
    if config.norm == "instancenorm":
        raise ConfigError(
            f"expected more than one voxel in the bottleneck, since instance norm of one voxel is always zero; "
            f"found patch {shape} with total stride {stride}; use norm batchnorm, a larger patch, or fewer filters"
        )
    if batch_size == 1:
        raise ConfigError(
            f"expected more than one value a channel for batch norm; found 1 sample a rank with a bottleneck of "
            f"one voxel (patch {shape}, total stride {stride}); raise the batch size a rank, or give fewer filters"
        )


class UNet3D(nn.Module):
    """Encoder and decoder with skip connections; logits at the image's resolution.

    Each level is two 3x3x3 convolutions without bias, each followed by a norm and a ReLU; going down the first
    of them has stride 2, going up a 2x2x2 transposed convolution (with bias, without norm) precedes them and the
    level's own encoder output is concatenated. Plain convolutions throughout, so
    `model.to(memory_format=torch.channels_last_3d)` works.

    Attributes:
        config: What it was built from.
    """

    def __init__(self, config: UNet3DConfig) -> None:
        super().__init__()
        self.config = config
        widths = (*config.filters, config.bottleneck)
        self.input_block = _convolutions(config.channels, widths[0], config.norm, stride=1)
        self.downs = nn.ModuleList(
            _convolutions(above, below, config.norm, stride=2) for above, below in itertools.pairwise(widths)
        )
        self.ups = nn.ModuleList(
            _Up(below, above, config.norm)
            for below, above in zip(widths[:0:-1], widths[-2::-1], strict=True)  # from the bottleneck upwards
        )
        self.output = nn.Conv3d(widths[0], config.classes, kernel_size=1)

    def forward(self, image_NCDHW: torch.Tensor) -> torch.Tensor:
        """Class scores of every voxel.

        Args:
            image_NCDHW: (N, C, D, H, W) float, each axis a multiple of the total stride.

        Returns:
            (N, K, D, H, W) logits in the dtype of the computation (half precision under autocast).

        Raises:
            ConfigError: if the image's shape does not fit the network; see `check_patch`.
        """
        check_patch(self.config, image_NCDHW.shape[2:], image_NCDHW.shape[0] if self.training else None)
        features = self.input_block(image_NCDHW)
        skips = []
        for down in self.downs:
            skips.append(features)
            features = down(features)
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            features = up(features, skip)
        logits_NKDHW: torch.Tensor = self.output(features)
        return logits_NKDHW


class _Up(nn.Module):
    """One level of the decoder: double the resolution, join the skip connection, convolve twice."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm) -> None:
        super().__init__()
        self.enlarge = nn.ConvTranspose3d(in_channels, out_channels, kernel_size=2, stride=2)
        self.convolutions = _convolutions(2 * out_channels, out_channels, norm, stride=1)

    def forward(self, below_NCDHW: torch.Tensor, skip_NCDHW: torch.Tensor) -> torch.Tensor:
        """Join (N, Cin, D/2, H/2, W/2) from below with (N, Cout, D, H, W) of the encoder to (N, Cout, D, H, W)."""
        joined = torch.cat((self.enlarge(below_NCDHW), skip_NCDHW), dim=1)
        out: torch.Tensor = self.convolutions(joined)
        return out


def _convolutions(in_channels: int, out_channels: int, norm: Norm, stride: int) -> nn.Sequential:
    """Two 3x3x3 convolutions, each with norm and ReLU; the first has the stride."""
    layers: list[nn.Module] = []
    for channels, step in ((in_channels, stride), (out_channels, 1)):
        layers += [
            nn.Conv3d(channels, out_channels, kernel_size=3, stride=step, padding=1, bias=False),
            nn.InstanceNorm3d(out_channels, affine=True) if norm == "instancenorm" else nn.BatchNorm3d(out_channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
