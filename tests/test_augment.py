"""Flip, brightness and noise: one draw for image and label, a function of (seed, epoch, case) alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.augment import NO_AUGMENTATION, AugmentConfig, PatchParams, PatchSampler, apply, draw
from ingest.crop import CropConfig
from ingest.errors import ConfigError

SHAPE = (7, 8, 9)
CODED = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(1, *SHAPE)
CODED_LABEL = (CODED % 251).astype(np.uint8)


def sample(sampler, image, label, *, epoch=0, index=0):
    patch = sampler.crop.patch
    out_image, out_label = np.full((1, *patch), -1, np.float32), np.full((1, *patch), 255, np.uint8)
    params = sampler(image, label, epoch=epoch, index=index, out_image=out_image, out_label=out_label)
    return params, out_image, out_label


@given(
    start=st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 5)),
    flips=st.tuples(*[st.booleans()] * 3),
)
def test_crop_and_flips_move_image_and_label_alike(start, flips):
    out_image, out_label = np.empty((1, 4, 4, 4), np.float32), np.empty((1, 4, 4, 4), np.uint8)
    params = PatchParams(start, flips, 1.0, 0.0)
    apply(CODED, CODED_LABEL, params, np.random.default_rng(0), out_image, out_label)
    expected = CODED[(slice(None), *(slice(s, s + 4) for s in start))]
    for axis, flipped in enumerate(flips, start=1):
        expected = np.flip(expected, axis) if flipped else expected
    np.testing.assert_array_equal(out_image, expected)
    np.testing.assert_array_equal(out_label, out_image % 251)


def test_a_sample_depends_on_seed_epoch_and_case_and_on_nothing_else():
    sampler = PatchSampler(crop=CropConfig(patch=(4, 4, 4)), augment=AugmentConfig(), seed=11)
    label = (CODED_LABEL > 100).astype(np.uint8)
    first = sample(sampler, CODED, label, epoch=2, index=5)
    np.random.seed(1)  # noqa: NPY002  global state is touched on purpose: it must not matter
    sample(sampler, CODED, label, epoch=0, index=0)
    again = sample(sampler, CODED, label, epoch=2, index=5)
    assert first[0] == again[0]
    np.testing.assert_array_equal(first[1], again[1])
    others = [sample(sampler, CODED, label, epoch=e, index=i)[0] for e, i in ((2, 6), (3, 5), (2, 7))]
    assert len({first[0], *others}) > 1


def test_the_draws_follow_the_laws_of_mlperf():
    label = np.zeros((1, 6, 6, 6), np.uint8)
    config, crop = AugmentConfig(), CropConfig(patch=(4, 4, 4))
    drawn = [draw(label, crop, config, np.random.default_rng(i)) for i in range(4000)]
    flips = np.array([d.flips for d in drawn]).mean(axis=0)
    bright = np.array([d.brightness for d in drawn])
    noise = np.array([d.noise_std for d in drawn])
    # Four standard deviations of a share of 4,000 draws: 0.030 at one third, 0.019 at one tenth.
    assert np.all(np.abs(flips - 1 / 3) < 0.030)
    assert abs((bright != 1).mean() - 0.1) < 0.019
    assert abs((noise > 0).mean() - 0.1) < 0.019
    changed = bright[bright != 1]
    assert 1.7 <= changed.min() < 1.75
    assert 2.25 < changed.max() <= 2.3
    assert noise.max() <= 0.1


def test_noise_and_brightness_change_the_image_by_what_was_drawn_and_never_the_label():
    zeros = np.zeros((1, 16, 16, 16), np.float32)
    out_image, out_label = np.empty((1, 16, 16, 16), np.float32), np.empty((1, 16, 16, 16), np.uint8)
    label = np.ones((1, 16, 16, 16), np.uint8)
    params = PatchParams((0, 0, 0), (False, False, False), 2.0, 0.05)
    apply(zeros + 3, label, params, np.random.default_rng(1), out_image, out_label)
    assert abs(out_image.mean() - 6) < 0.005
    assert abs(out_image.std() - 0.05) < 0.003
    assert (out_label == 1).all()


def test_no_augmentation_is_the_plain_crop():
    sampler = PatchSampler(crop=CropConfig(patch=SHAPE), augment=NO_AUGMENTATION, seed=0)
    for index in range(20):
        _, image, label = sample(sampler, CODED, CODED_LABEL, index=index)
        np.testing.assert_array_equal(image, CODED)
        np.testing.assert_array_equal(label, CODED_LABEL)


@pytest.mark.parametrize("bad", [{"flip_probability": 2}, {"brightness_range": (1.0, 0.5)}, {"noise_std_max": -1}])
def test_augment_config_rejects_what_is_no_probability_or_range(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        AugmentConfig(**bad)
