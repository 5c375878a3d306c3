"""Cases made of the MNI152 template."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from ingest.prepare.mni152 import Mni152Source, Template, load_template

SHAPE = (32, 40, 28)


@pytest.fixture(scope="module")
def template() -> Template:
    return load_template(SHAPE)


@pytest.fixture(scope="module")
def source(template: Template) -> Mni152Source:
    return Mni152Source(template=template, shape=SHAPE, seed=5)


def test_a_case_has_the_exact_shape_and_dtypes(source: Mni152Source) -> None:
    image, label = source.make(0)
    assert image.shape == label.shape == (1, *SHAPE)
    assert (image.dtype, label.dtype) == (np.float32, np.uint8)


def test_an_image_is_z_scored(source: Mni152Source) -> None:
    image, _ = source.make(1)
    assert abs(float(image.mean(dtype=np.float64))) < 1e-4
    assert abs(float(image.std(dtype=np.float64)) - 1) < 1e-4


def test_every_case_has_all_three_classes_and_no_other(source: Mni152Source) -> None:
    for case in range(12):
        share = np.bincount(source.make(case).label.ravel(), minlength=3) / np.prod(SHAPE)
        assert share.size == 3
        assert share[0] > 0.5
        assert share[1] > share[2] > 0.02


def test_the_whole_head_is_inside(source: Mni152Source) -> None:
    for case in range(12):
        label = source.make(case).label[0]
        inside = label[1:-1, 1:-1, 1:-1]
        assert np.count_nonzero(label) == np.count_nonzero(inside)


def test_labels_lie_where_the_image_shows_the_tissue(source: Mni152Source) -> None:
    image, label = source.make(2)
    background, grey, white = (float(image[label == tissue].mean()) for tissue in range(3))
    assert background < grey < white


def test_volumes_lie_as_d_up_h_forward_w_right(template: Template) -> None:
    # The stem is at the lower end of D, the frontal pole at the far end of H, and the brain is alike along W.
    head = template.channels[0] > 0.05
    low, high = head[: head.shape[0] // 4].sum(), head[-head.shape[0] // 4 :].sum()
    assert low < high
    left, right = np.array_split(template.channels[1], 2, axis=2)
    assert abs(float(left.sum() / right.sum()) - 1) < 0.1
    # Cerebellum: low in the back there is tissue where low in the front there is none.
    low_quarter = head[: head.shape[0] // 4]
    back, front = np.array_split(low_quarter, 2, axis=1)
    assert back.sum() > 2 * front.sum()


def test_a_case_is_the_same_whoever_makes_it(source: Mni152Source) -> None:
    elsewhere = pickle.loads(pickle.dumps(source))  # noqa: S301  our own object, as Ray carries it
    elsewhere.make(0)
    for first, second in zip(source.make(4), elsewhere.make(4), strict=True):
        assert first.tobytes() == second.tobytes()


def test_cases_and_seeds_differ_as_subjects_do(source: Mni152Source, template: Template) -> None:
    other_seed = Mni152Source(template=template, shape=SHAPE, seed=6)
    labels = [source.make(0).label, source.make(1).label, other_seed.make(0).label]
    for i, first in enumerate(labels):
        for second in labels[i + 1 :]:
            dice = 2 * np.sum((first > 0) & (second > 0)) / (np.sum(first > 0) + np.sum(second > 0))
            assert 0.5 < dice < 0.97


@pytest.mark.parametrize("shape", [(16, 16, 16), (24, 64, 32)])
def test_other_shapes_hold_the_whole_head_and_every_class(shape: tuple[int, int, int]) -> None:
    label = Mni152Source(template=load_template(shape), shape=shape, seed=0).make(0).label[0]
    assert label.shape == shape
    assert np.unique(label).tolist() == [0, 1, 2]
    assert np.count_nonzero(label) == np.count_nonzero(label[1:-1, 1:-1, 1:-1])
