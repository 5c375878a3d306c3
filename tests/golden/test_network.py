"""The network's arithmetic against a NumPy and SciPy transcription of its published structure (FACTS section 4)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage
import torch

from train.unet3d import UNet3D, UNet3DConfig

Array = npt.NDArray[np.float64]


class Transcription:
    """Takes the weights in the order in which the structure, read from top to bottom, uses them."""

    def __init__(self, model: UNet3D, norm: str) -> None:
        self.weights = [p.detach().double().numpy() for p in model.parameters()]
        self.norm = norm
        self.seen: list[tuple[int, ...]] = []

    def next(self) -> Array:
        return self.weights.pop(0)

    def convolve(self, x: Array, stride: int) -> Array:
        """3x3x3, no bias, one voxel of zeros around."""
        kernel = self.next()
        return np.stack(
            [
                [
                    sum(scipy.ndimage.correlate(c, k, mode="constant") for c, k in zip(sample, out, strict=True))
                    for out in kernel
                ]
                for sample in x
            ]
        )[:, :, ::stride, ::stride, ::stride]

    def block(self, x: Array, stride: int) -> Array:
        """Twice: convolution, norm, ReLU; the first has the stride."""
        for step in (stride, 1):
            x = self.convolve(x, step)
            gain, offset = (v[:, None, None, None] for v in (self.next(), self.next()))
            over = (2, 3, 4) if self.norm == "instancenorm" else (0, 2, 3, 4)
            x = (x - x.mean(axis=over, keepdims=True)) / np.sqrt(x.var(axis=over, keepdims=True) + 1e-5)
            x = np.maximum(x * gain + offset, 0)
        self.seen.append(x.shape[1:])
        return x

    def enlarge(self, x: Array) -> Array:
        """2x2x2 transposed, stride 2, with bias: each voxel becomes a cube of eight."""
        kernel, bias = self.next(), self.next()
        n, _, d, h, w = x.shape
        cubes = np.einsum("ncdhw,ckabe->nkdahbwe", x, kernel)
        return cubes.reshape(n, kernel.shape[1], 2 * d, 2 * h, 2 * w) + bias[:, None, None, None]

    def __call__(self, x: Array, levels: int) -> Array:
        x = self.block(x, 1)
        skips = []
        for _ in range(levels):
            skips.append(x)
            x = self.block(x, 2)
        for skip in reversed(skips):
            x = self.block(np.concatenate([self.enlarge(x), skip], axis=1), 1)
        kernel, bias = self.next(), self.next()
        assert not self.weights
        return np.einsum("ncdhw,kc->nkdhw", x, kernel[:, :, 0, 0, 0]) + bias[:, None, None, None]


@pytest.mark.parametrize("norm", ["instancenorm", "batchnorm"])
def test_logits_equal_a_plain_transcription_of_the_structure(norm: str) -> None:
    torch.manual_seed(3)
    model = UNet3D(UNet3DConfig(filters=(3, 4), bottleneck=5, norm=norm)).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # gains of 1 and offsets of 0 would hide where they are applied
                parameter.copy_(torch.rand_like(parameter) + (0.5 if name.endswith("weight") else -0.5))
    image = torch.randn(2, 1, 8, 12, 16, dtype=torch.float64)
    transcription = Transcription(model, norm)
    expected = transcription(image.numpy(), levels=2)
    np.testing.assert_allclose(model(image).detach().numpy(), expected, rtol=0, atol=1e-9)
    assert transcription.seen == [(3, 8, 12, 16), (4, 4, 6, 8), (5, 2, 3, 4), (4, 4, 6, 8), (3, 8, 12, 16)]


@pytest.mark.parametrize("norm", ["instancenorm", "batchnorm"])
def test_every_level_of_the_default_network_has_the_published_shape_at_the_published_patch(norm: str) -> None:
    with torch.device("meta"):
        model = UNet3D(UNet3DConfig(norm=norm))  # type: ignore[arg-type]
        image = torch.empty(2, 1, 128, 128, 128)
    seen: list[tuple[int, ...]] = []
    for module in (model.input_block, *model.downs, *model.ups, model.output):
        module.register_forward_hook(lambda _module, _inputs, output: seen.append(tuple(output.shape[1:])))
    model(image)
    levels = [(channels, *[128 >> halvings] * 3) for halvings, channels in enumerate((32, 64, 128, 256, 320, 320))]
    assert seen == [*levels, *levels[-2::-1], (3, 128, 128, 128)]
