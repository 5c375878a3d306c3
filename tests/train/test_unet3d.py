"""The network against MLPerf's published structure, by counts and shapes worked out here independently."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ingest.errors import ConfigError
from train.unet3d import UNet3D, UNet3DConfig, check_patch, total_stride

SMALL = UNet3DConfig(filters=(4, 6), bottleneck=8)


def published_parameter_count(in_channels: int, classes: int, filters: list[int], bottleneck: int) -> int:
    """FACTS section 4 added up: 27 weights a 3x3x3 pair, 2 a norm channel, 8 a 2x2x2 pair and a bias up."""

    def block(channels_in: int, channels_out: int) -> int:
        return 27 * channels_in * channels_out + 27 * channels_out**2 + 2 * (2 * channels_out)

    total = block(in_channels, filters[0])
    levels = [*filters, bottleneck]
    for i in range(1, len(levels)):
        total += block(levels[i - 1], levels[i])
    for i in range(len(levels) - 1, 0, -1):
        total += 8 * levels[i] * levels[i - 1] + levels[i - 1]
        total += block(2 * levels[i - 1], levels[i - 1])
    return total + filters[0] * classes + classes


@pytest.mark.parametrize("norm", ["instancenorm", "batchnorm"])
def test_the_default_network_has_the_published_number_of_parameters(norm: str) -> None:
    model = UNet3D(UNet3DConfig(norm=norm))  # type: ignore[arg-type]
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == published_parameter_count(1, 3, [32, 64, 128, 256, 320], 320)
    # Added up on paper, so that the formula above is held too: 3x3x3 convolutions 27 * (519,200 down + 568,320 up),
    # norms 4 * (1,120 + 800), 2x2x2 transposed 8 * 227,328 + 800 biases, output 32 * 3 + 3.
    assert count == 29_363_040 + 7_680 + 1_819_424 + 99 == 31_190_243


@pytest.mark.parametrize("filters", [(8,), (4, 6), (8, 16, 32)])
def test_any_number_of_filters_has_the_number_of_parameters_of_the_formula(filters: tuple[int, ...]) -> None:
    model = UNet3D(UNet3DConfig(in_channels=2, num_classes=4, filters=filters, bottleneck=10, norm="batchnorm"))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == published_parameter_count(2, 4, list(filters), 10)


@pytest.mark.parametrize("norm", ["instancenorm", "batchnorm"])
def test_the_layers_are_the_published_ones_in_order(norm: str) -> None:
    model = UNet3D(UNet3DConfig(norm=norm))  # type: ignore[arg-type]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv3d)]
    ups = [m for m in model.modules() if isinstance(m, nn.ConvTranspose3d)]
    shapes = [(m.in_channels, m.out_channels, m.stride[0]) for m in convolutions]
    assert shapes == [
        *[(1, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)],
        *[(128, 256, 2), (256, 256, 1), (256, 320, 2), (320, 320, 1), (320, 320, 2), (320, 320, 1)],
        *[(640, 320, 1), (320, 320, 1), (512, 256, 1), (256, 256, 1), (256, 128, 1), (128, 128, 1)],
        *[(128, 64, 1), (64, 64, 1), (64, 32, 1), (32, 32, 1), (32, 3, 1)],
    ]
    norms = [m for m in model.modules() if isinstance(m, nn.InstanceNorm3d | nn.BatchNorm3d)]
    assert [m.num_features for m in norms] == [channels for _, channels, _ in shapes[:-1]]
    assert [(m.in_channels, m.out_channels) for m in ups] == [(320, 320), (320, 256), (256, 128), (128, 64), (64, 32)]
    assert all(m.kernel_size == (3, 3, 3) and m.padding == (1, 1, 1) and m.bias is None for m in convolutions[:-1])
    assert convolutions[-1].kernel_size == (1, 1, 1)
    assert convolutions[-1].bias is not None
    assert all(m.kernel_size == m.stride == (2, 2, 2) and m.bias is not None for m in ups)


def test_every_norm_is_affine_and_of_the_asked_kind() -> None:
    for norm, kind in (("instancenorm", nn.InstanceNorm3d), ("batchnorm", nn.BatchNorm3d)):
        model = UNet3D(UNet3DConfig(norm=norm))  # type: ignore[arg-type]
        norms = [m for m in model.modules() if isinstance(m, nn.InstanceNorm3d | nn.BatchNorm3d)]
        assert len(norms) == 22
        assert all(isinstance(m, kind) and m.affine for m in norms)


def test_every_level_halves_the_one_above_and_the_reference_patch_ends_at_one_voxel() -> None:
    model = UNet3D(UNet3DConfig(filters=(4, 5, 6, 7, 8), bottleneck=9, norm="batchnorm"))
    seen: list[tuple[int, ...]] = []
    for down in model.downs:
        down.register_forward_hook(lambda _module, _inputs, output: seen.append(tuple(output.shape)))
    assert model(torch.zeros(2, 1, 32, 32, 32)).shape == (2, 3, 32, 32, 32)
    assert seen == [(2, c, s, s, s) for c, s in ((5, 16), (6, 8), (7, 4), (8, 2), (9, 1))]


def test_patches_of_unequal_sides_keep_their_shape() -> None:
    assert UNet3D(SMALL)(torch.randn(1, 1, 8, 16, 12)).shape == (1, 3, 8, 16, 12)


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    model = UNet3D(SMALL)
    model(torch.randn(2, 1, 16, 16, 16)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith("0.weight"))


def test_channels_last_gives_the_same_logits() -> None:
    torch.manual_seed(0)
    model = UNet3D(SMALL).eval()
    image = torch.randn(2, 1, 16, 16, 16)
    expected = model(image)
    model = model.to(memory_format=torch.channels_last_3d)
    actual = model(image.to(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_stays_close_to_float32() -> None:
    torch.manual_seed(0)
    model = UNet3D(SMALL).eval()
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(image)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), model(image), rtol=0.1, atol=0.1)


def test_the_total_stride_doubles_with_every_level() -> None:
    assert total_stride(UNet3DConfig()) == 32
    assert total_stride(SMALL) == 4


def test_a_patch_that_is_not_a_multiple_of_the_stride_is_refused() -> None:
    for shape in [(30, 32, 32), (32, 32, 16), (0, 32, 32), (32, 32), (-32, 32, 32)]:
        with pytest.raises(ConfigError, match=r"expected .*32 voxels.*found \(.*; change the patch"):
            check_patch(UNet3DConfig(norm="batchnorm"), shape)
    with pytest.raises(ConfigError, match="multiples of 4"):
        UNet3D(SMALL)(torch.zeros(1, 1, 10, 8, 8))


def test_instance_norm_on_a_bottleneck_of_one_voxel_is_refused() -> None:
    with pytest.raises(ConfigError, match="use norm batchnorm"):
        check_patch(UNet3DConfig(), (32, 32, 32))
    check_patch(UNet3DConfig(), (32, 32, 64))
    check_patch(UNet3DConfig(norm="batchnorm"), (32, 32, 32), batch_size=2)


def test_batch_norm_of_one_sample_and_one_voxel_is_refused() -> None:
    with pytest.raises(ConfigError, match="raise the batch size"):
        check_patch(UNet3DConfig(norm="batchnorm"), (32, 32, 32), batch_size=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("in_channels", 0), ("num_classes", 1), ("filters", ()), ("filters", (8, 0)), ("bottleneck", 0), ("norm", "x")],
)
def test_a_size_that_cannot_work_is_refused_at_construction(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        UNet3DConfig(**{field: value})  # type: ignore[arg-type]
