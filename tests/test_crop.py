"""The crop law: inside the volume, around the foreground, as MLPerf places it."""

import hypothesis.extra.numpy
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given
from hypothesis import strategies as st

from ingest.crop import CropConfig, draw_start, foreground_boxes
from ingest.errors import ConfigError

lengths = st.tuples(*[st.integers(1, 12)] * 3)


@given(lengths, lengths, st.integers(0, 2**32), st.floats(0, 1), st.sampled_from(["all", "mlperf"]))
def test_a_patch_always_lies_inside_the_volume(patch, extra, seed, probability, random_starts):
    rng = np.random.default_rng(seed)
    shape = tuple(p + e - 1 for p, e in zip(patch, extra, strict=True))
    label = (rng.random((1, *shape)) < rng.random() * 0.5).astype(np.uint8) * 2
    config = CropConfig(patch=patch, foreground_probability=probability, random_starts=random_starts)
    for _ in range(5):
        start = draw_start(shape, lambda: foreground_boxes(label), config, rng.random(6))
        assert all(0 <= s <= n - p for s, n, p in zip(start, shape, patch, strict=True))


@given(st.integers(0, 2**32))
def test_a_foreground_patch_holds_a_small_component_whole_and_lies_within_a_large_one(seed):
    rng = np.random.default_rng(seed)
    label = np.zeros((1, 20, 20, 20), np.uint8)
    low = rng.integers(0, 12, 3)
    high = low + rng.integers(1, 9, 3)
    label[0, low[0] : high[0], low[1] : high[1], low[2] : high[2]] = 1
    config = CropConfig(patch=(5, 5, 5), foreground_probability=1)
    start = draw_start((20, 20, 20), lambda: foreground_boxes(label), config, rng.random(6))
    for s, a, b in zip(start, low.tolist(), high.tolist(), strict=True):
        if b - a <= 5:
            assert s <= a
            assert s + 5 >= b
        else:
            assert a <= s
            assert s + 5 <= b


def test_boxes_are_of_the_two_largest_components_by_box_volume_of_each_class():
    label = np.zeros((1, 10, 10, 10), np.uint8)
    label[0, 0, 0, 0] = 1
    label[0, 2:5, 2:5, 2:5] = 1
    label[0, 7:9, 7:9, 7:9] = 1
    label[0, 0, 9, 9] = 2
    assert foreground_boxes(label) == (
        (((7, 9), (7, 9), (7, 9)), ((2, 5), (2, 5), (2, 5))),
        (((0, 1), (9, 10), (9, 10)),),
    )


@given(
    label=hypothesis.extra.numpy.arrays(
        np.uint8, st.tuples(st.just(1), *[st.integers(1, 7)] * 3), elements=st.sampled_from([0, 0, 1, 2, 5])
    ),
    order=st.sampled_from("CF"),
)
def test_boxes_are_those_of_a_search_through_the_whole_volume(label, order):
    expected = []
    for value in sorted(set(label.ravel().tolist()) - {0}):
        components, count = scipy.ndimage.label(label[0] == value)
        where = [np.argwhere(components == number + 1) for number in range(count)]
        boxes = [tuple(zip(at.min(0).tolist(), (at.max(0) + 1).tolist(), strict=True)) for at in where]
        expected.append(tuple(sorted(boxes, key=lambda box: np.prod([stop - start for start, stop in box]))[-2:]))
    assert foreground_boxes(np.asarray(label, order=order)) == tuple(expected)


def test_components_touch_by_faces_only():
    label = np.zeros((1, 2, 2, 2), np.uint8)
    label[0, 0, 0, 0] = label[0, 1, 1, 1] = 1
    assert scipy.ndimage.label(label[0])[1] == 2
    assert len(foreground_boxes(label)[0]) == 2


def test_a_case_without_foreground_is_cropped_at_random_and_reaches_both_ends():
    config = CropConfig(patch=(4, 4, 4), foreground_probability=1)
    rng = np.random.default_rng(0)
    starts = np.array([draw_start((6, 6, 6), tuple, config, rng.random(6)) for _ in range(300)])
    assert np.array_equal(np.unique(starts[:, 0]), [0, 1, 2])


def test_the_reference_never_picks_the_last_start_and_can_be_had():
    config = CropConfig(patch=(4, 4, 4), foreground_probability=0, random_starts="mlperf")
    rng = np.random.default_rng(0)
    starts = np.array([draw_start((6, 6, 4), tuple, config, rng.random(6)) for _ in range(300)])
    assert np.array_equal(np.unique(starts[:, 0]), [0, 1])
    assert np.array_equal(np.unique(starts[:, 2]), [0])


def test_boxes_are_not_looked_for_when_the_crop_is_a_random_one():
    def never():
        raise AssertionError("the search costs more than all the rest")

    config = CropConfig(patch=(2, 2, 2), foreground_probability=0)
    assert draw_start((2, 2, 2), never, config, np.zeros(6)) == (0, 0, 0)


@pytest.mark.parametrize(
    "bad", [{"patch": (0, 64, 64)}, {"foreground_probability": 1.5}, {"random_starts": "reference"}]
)
def test_crop_config_rejects_what_cannot_be_cut(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        CropConfig(**bad)
