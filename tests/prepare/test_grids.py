"""Image and label on one grid: by their affines when they are read, and after resampling."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ingest.errors import ConfigError, DecodeError
from ingest.geometry import from_json, resampled_affine
from ingest.prepare import PrepareConfig, prepare
from ingest.prepare.placement import count_outside
from ingest.prepare.resample import (
    grid_places,
    label_at,
    linear_at,
    resample_linear,
    resample_nearest,
    resampled_shape,
)

SPACING = (3.0, 0.8, 0.8)
RAS = np.array([[0, 0, 0.8, -40], [0, 0.8, 0, -50], [3.0, 0, 0, 7], [0, 0, 0, 1]])


def save_case(folder: Path, image: np.ndarray, label: np.ndarray, *, image_affine=RAS, label_affine=RAS) -> Path:
    place = folder / "case_00000"
    place.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(image.astype(np.float32), image_affine), place / "imaging.nii.gz")
    nibabel.save(nibabel.Nifti1Image(label.astype(np.uint8), label_affine), place / "segmentation.nii.gz")
    return folder


def run(folder: Path, output: Path, **settings) -> tuple[np.ndarray, np.ndarray]:
    settings = {"shape": (1, 1, 1), "spacing": SPACING, "workers": 0} | settings
    prepare(PrepareConfig(source="kits19", input=str(folder), output=str(output), **settings))
    return tuple(np.load(output / f"{role}s" / f"case_00000_{role_}.npy")[0] for role, role_ in ROLES)


ROLES = (("image", "x"), ("label", "y"))


def anatomy() -> tuple[np.ndarray, np.ndarray]:
    """An image whose bright voxels are those of its label, (12, 20, 16), without any symmetry."""
    label = np.zeros((12, 20, 16), np.uint8)
    label[2:6, 3:9, 1:6] = 1
    label[5:7, 8:12, 4:8] = 2
    return label * 100.0, label


def turned(array: np.ndarray, order: tuple[int, ...], flips: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels stored along other axes, and the affine that says so."""
    change = np.zeros((4, 4))
    change[3, 3] = 1
    stored = np.flip(np.transpose(array, order), flips)
    for new, old in enumerate(order):
        change[old, new] = -1 if new in flips else 1
        change[old, 3] = array.shape[old] - 1 if new in flips else 0
    return stored, RAS @ change


@pytest.mark.parametrize(("order", "flips"), [((0, 1, 2), (2,)), ((2, 0, 1), (0, 1)), ((1, 0, 2), ())])
def test_a_label_stored_along_other_axes_is_refused_with_both_affines_and_resampled_when_asked_to(
    tmp_path, order, flips
) -> None:
    image, label = anatomy()
    stored, affine = turned(label, order, flips)
    save_case(tmp_path / "in", image, stored, label_affine=affine)
    with pytest.raises(DecodeError, match="on one grid") as caught:
        run(tmp_path / "in", tmp_path / "out")
    for matrix in (RAS, affine):
        assert str(np.round(np.float32(matrix).astype(float), 4).tolist()) in str(caught.value)
    assert "--on-mismatch resample" in str(caught.value)
    # The advice is followed, in the same output: what was made before is the same under either setting.
    x, y = run(tmp_path / "in", tmp_path / "out", on_mismatch="resample")
    np.testing.assert_array_equal(y, label)
    np.testing.assert_array_equal(x > x.min(), y > 0)


def test_a_label_shifted_in_the_world_is_refused_with_its_distance_and_follows_its_affine_when_resampled(
    tmp_path,
) -> None:
    image, label = anatomy()
    shifted = RAS.copy()
    shifted[2, 3] += 6.0  # two voxels along D
    save_case(tmp_path / "in", image, label, label_affine=shifted)
    with pytest.raises(DecodeError, match=r"corners at most 0\.080 mm apart.*corners up to 6\.000 mm apart"):
        run(tmp_path / "in", tmp_path / "out")
    _, y = run(tmp_path / "in", tmp_path / "out", on_mismatch="resample")
    np.testing.assert_array_equal(y[2:], label[:-2])
    assert not y[:2].any()


def test_affines_that_differ_by_rounding_are_one_grid(tmp_path) -> None:
    image, label = anatomy()
    rounded = RAS.copy()
    rounded[:3, 3] += 1e-3
    _, y = run(save_case(tmp_path / "in", image, label, label_affine=rounded), tmp_path / "out")
    np.testing.assert_array_equal(y, label)


def test_a_label_that_lies_wholly_outside_its_image_is_refused_even_when_resampling(tmp_path) -> None:
    image, label = anatomy()
    far = RAS.copy()
    far[0, 3] += 1000
    save_case(tmp_path / "in", image, label, label_affine=far)
    count = np.count_nonzero(label)
    with pytest.raises(DecodeError, match=rf"found {count} of {count} outside"):
        run(tmp_path / "in", tmp_path / "out", on_mismatch="resample")


def test_a_label_partly_outside_its_image_is_refused_with_the_count_and_passes_once_that_part_is_set_to_0(
    tmp_path,
) -> None:
    image, label = anatomy()
    begun = RAS.copy()
    begun[:3, 3] += 3 * RAS[:3, 0]  # the image begins three slices into the scan that the label is of
    save_case(tmp_path / "in", image[3:], label, image_affine=begun)
    beyond = np.count_nonzero(label[:3])
    assert 0 < beyond < np.count_nonzero(label)
    with pytest.raises(DecodeError, match=rf"found {beyond} of {np.count_nonzero(label)} outside.*set the label's"):
        run(tmp_path / "in", tmp_path / "out", on_mismatch="resample")
    label[:3] = 0
    save_case(tmp_path / "in", image[3:], label, image_affine=begun)
    _, y = run(tmp_path / "in", tmp_path / "out", on_mismatch="resample")
    np.testing.assert_array_equal(y, label[3:])


@pytest.mark.parametrize(("place", "outside"), [(-1.0, 1), (-0.9, 0), (2.9, 0), (3.0, 1)])
def test_a_labelled_voxel_is_outside_where_it_touches_no_voxel_of_the_image(place, outside) -> None:
    affine = np.eye(4)
    affine[0, 3] = place
    assert count_outside(np.ones((1, 1, 1), np.uint8), affine, np.eye(4), (3, 1, 1)) == outside


def test_a_label_of_half_the_spacing_comes_onto_its_image_without_a_shift(tmp_path) -> None:
    # Each image voxel's middle is the corner of eight label voxels: rounding to the nearest would shift the label.
    image, label = anatomy()
    fine = label.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    half = RAS @ np.diag([0.5, 0.5, 0.5, 1])
    half[:3, 3] = (RAS @ [-0.25, -0.25, -0.25, 1])[:3]
    save_case(tmp_path / "in", image, fine, label_affine=half)
    _, y = run(tmp_path / "in", tmp_path / "out", on_mismatch="resample")
    np.testing.assert_array_equal(y, label)
    at = np.moveaxis(np.indices(fine.shape), 0, -1) - [12.5, 20.5, 15.5]
    ball = (np.sqrt((at**2).sum(-1)) < 7.3).astype(np.uint8)
    save_case(tmp_path / "in2", image, ball, label_affine=half)
    _, y = run(tmp_path / "in2", tmp_path / "out2", on_mismatch="resample")
    np.testing.assert_allclose(middle(y), (middle(ball) - 0.5) / 2, atol=0.05)  # the nearest: 0.25
    assert 8 * y.sum() == pytest.approx(ball.sum(), rel=0.02)


def test_an_image_whose_affine_has_another_spacing_than_pixdim_is_refused_with_both(tmp_path) -> None:
    image, label = anatomy()
    save_case(tmp_path / "in", image, label)
    path = tmp_path / "in" / "case_00000" / "imaging.nii.gz"
    data = bytearray(gzip.decompress(path.read_bytes()))
    header = nibabel.Nifti1Header(bytes(data[:348]))
    header["pixdim"][1:4] = (5.0, 0.8, 0.8)
    data[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(data)))
    with pytest.raises(DecodeError, match=r"pixdim \[5.0, 0.8, 0.8\] mm and an affine with \[3.0, 0.8, 0.8\] mm"):
        run(tmp_path / "in", tmp_path / "out")


def test_a_size_that_float32_puts_just_below_a_whole_number_is_that_number_on_the_grid(tmp_path) -> None:
    # 16 voxels of 0.9 mm are 12 of 1.2 mm; a header's float32 makes 11.9999997 of them.
    affine = np.diag([1.6, 0.9, 1.2, 1])
    save_case(tmp_path / "in", np.zeros((4, 16, 5)), np.zeros((4, 16, 5)), image_affine=affine, label_affine=affine)
    x, _ = run(tmp_path / "in", tmp_path / "out", spacing=(1.6, 1.2, 1.2))
    assert x.shape == (4, 12, 5)
    x, _ = run(tmp_path / "in", tmp_path / "mlperf", spacing=(1.6, 1.2, 1.2), resample="mlperf")
    assert x.shape == (4, 11, 5)


def test_an_affine_that_cannot_be_inverted_is_refused_by_name(tmp_path) -> None:
    image, label = anatomy()
    flat = RAS.copy()
    flat[:3, 0] = 0
    save_case(tmp_path / "in", image, label)
    stored = nibabel.Nifti1Image(label, RAS)
    stored.header.set_sform(flat, code=1)
    stored.header.set_qform(None, code=0)
    data = bytearray(stored.to_bytes())
    place = tmp_path / "in" / "case_00000" / "segmentation.nii.gz"
    header = nibabel.Nifti1Header(bytes(data[:348]))
    for row, name in zip(flat[:3], ("srow_x", "srow_y", "srow_z"), strict=True):
        header[name] = row
    header["sform_code"], header["qform_code"] = 1, 0
    data[:348] = header.binaryblock
    place.write_bytes(gzip.compress(bytes(data)))
    with pytest.raises(DecodeError, match=r"segmentation.nii.gz: expected a finite affine that can be inverted"):
        run(tmp_path / "in", tmp_path / "out")


SHAPE = (60, 64, 56)
STEPS = [2 / 3, 0.8, 0.9, 1.1, 1.25, 4 / 3, 1.5, 2.0]
PLACES = np.random.default_rng(0).uniform(0.45, 0.55, (8, 3))
"""Middles of blobs, as shares of each axis. The middle of one blob is known to a tenth of a voxel only, because its
surface is rounded to voxels. The mean over several blobs shows a shift."""


def blob(at: np.ndarray, axes: tuple[np.ndarray, ...]) -> np.ndarray:
    """A smooth blob between 0 and 1, at these voxels of `SHAPE`. Its label is 1 where the blob is above one half."""
    parts = zip(np.ix_(*axes), at, SHAPE, strict=True)
    distance = sum(((axis - share * n) / (0.3 * n)) ** 2 for axis, share, n in parts)
    return np.exp(-np.log(2) * distance).astype(np.float32)


def middle(weight: np.ndarray) -> np.ndarray:
    """The centre of mass, in voxels."""
    sums = [weight.sum(axis=tuple(other for other in range(3) if other != axis), dtype=float) for axis in range(3)]
    return np.array([line @ np.arange(len(line)) / line.sum() for line in sums])


def through(at: np.ndarray, step: float, resample: str) -> tuple[np.ndarray, np.ndarray]:
    """A blob and its label, resampled."""
    volume = blob(at, tuple(np.arange(n) for n in SHAPE))
    label = (volume > 0.5).astype(np.uint8)
    new = resampled_shape(SHAPE, (1.0, 1.0, 1.0), (step, step, step), resample)
    if resample == "grid":
        places = grid_places(SHAPE, new, [step] * 3)
        return linear_at(volume, places), label_at(label, places)
    return resample_linear(volume, new), resample_nearest(label, new)


def shift(step: float, resample: str) -> np.ndarray:
    """How far labels lie from their images after resampling, in voxels of the source."""
    pairs = [through(at, step, resample) for at in PLACES]
    return step * np.mean([middle(image > 0.5) - middle(label) for image, label in pairs], axis=0)


@pytest.mark.parametrize("step", STEPS)
def test_image_and_label_of_one_blob_stay_at_one_place_on_the_grid(step) -> None:
    assert np.abs(shift(step, "grid")).max() < 0.05


@pytest.mark.parametrize("step", [0.8, 4 / 3, 2.0])
def test_mlperfs_formulas_put_them_up_to_half_a_source_voxel_apart(step) -> None:
    # The label takes a voxel that lies before the image's place, so structures come out further back in the label.
    apart = shift(step, "mlperf")
    assert (apart < -0.25).all()
    assert (apart > -0.75).all()


@pytest.mark.parametrize("step", STEPS)
def test_ground_truth_sent_through_the_grid_and_back_is_as_near_as_the_grids_resolution_allows(step) -> None:
    # The bound is the blob itself, drawn at the places of the grid without any resampling, and sent back: no label on
    # that grid knows more of the blob, so resampling may lose no more than this.
    label = (blob(PLACES[0], tuple(np.arange(n) for n in SHAPE)) > 0.5).astype(np.uint8)
    _, there = through(PLACES[0], step, "grid")
    places = grid_places(SHAPE, there.shape, [step] * 3)
    drawn = (blob(PLACES[0], places) > 0.5).astype(np.uint8)
    back = grid_places(there.shape, SHAPE, [1 / step] * 3)
    bound = dice(label_at(drawn, back), label)
    found = dice(label_at(there, back), label)
    assert found > bound - 0.002
    assert found >= (0.98 if step <= 1.5 else 0.97)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other))


def test_a_structures_volume_stays_when_the_spacing_doubles() -> None:
    # A face between two voxels that become one is a tie. These boxes would lose or gain a third if all ties went one
    # way. Sharp edges and corners fill less than half of a voxel, so a little is lost.
    rng = np.random.default_rng(1)
    before = after = 0
    for _ in range(40):
        label = np.zeros((24, 24, 24), np.uint8)
        start, size = rng.integers(4, 8, 3), rng.integers(5, 11, 3)
        label[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = 1
        before += int(label.sum())
        after += 8 * int(label_at(label, grid_places(label.shape, (12, 12, 12), [2.0] * 3)).sum())
    assert after == pytest.approx(before, rel=0.08)


def test_a_label_takes_no_value_that_it_did_not_have() -> None:
    label = np.random.default_rng(2).choice(np.array([2, 5, 200], np.uint8), (9, 11, 10))
    for step in (0.5, 0.7, 1.0, 1.3, 2.0):
        new = resampled_shape(label.shape, (1, 1, 1), (step, step, step), "grid")
        found = label_at(label, grid_places(label.shape, new, [step] * 3))
        assert set(np.unique(found)) <= {2, 5, 200}
    np.testing.assert_array_equal(label_at(label, grid_places(label.shape, label.shape, [1.0] * 3)), label)


@pytest.mark.parametrize("resample", ["grid", "mlperf"])
def test_the_affine_says_where_each_prepared_voxel_lies(tmp_path, resample) -> None:
    # An image that is its own coordinate along each axis in turn; a value says where in the scan its voxel lies.
    shape = (12, 20, 16)
    for axis in range(3):
        ramp = np.broadcast_to(np.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(3)]), shape)
        save_case(tmp_path / f"in{axis}", ramp, np.zeros(shape))
        x, _ = run(
            tmp_path / f"in{axis}",
            tmp_path / f"out{axis}",
            spacing=(2.2, 1.1, 0.7),
            shape=(20, 16, 20),
            resample=resample,
        )
        affine = from_json((tmp_path / f"out{axis}" / "geometry" / "case_00000.json").read_bytes(), "it")
        scan = np.linalg.inv(RAS) @ affine
        inner = x.shape[0] // 2, x.shape[1] // 2, x.shape[2] // 2
        for at in (inner, tuple(n - 2 for n in inner)):
            expected = (scan @ [*at, 1])[axis]
            assert x[at] * 76.9 + 101.0 == pytest.approx(expected, abs=2e-3)
        if resample == "grid":
            np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), (2.2, 1.1, 0.7), rtol=1e-5)


def test_an_affine_of_kept_corners_is_as_before() -> None:
    affine = resampled_affine(np.eye(4), (9, 31, 27), (17, 24, 17), (20, 24, 20))
    np.testing.assert_allclose(affine @ [1, 0, 1, 1], [0, 0, 0, 1], atol=1e-12)


def test_a_run_is_not_gone_on_with_on_another_grid(tmp_path) -> None:
    save_case(tmp_path / "in", *anatomy())
    run(tmp_path / "in", tmp_path / "out", resample="mlperf")
    with pytest.raises(ConfigError, match="resample 'mlperf' before and 'grid' now"):
        run(tmp_path / "in", tmp_path / "out")


def test_an_output_from_before_the_choice_was_made_by_mlperfs_formulas(tmp_path) -> None:
    save_case(tmp_path / "in", *anatomy())
    run(tmp_path / "in", tmp_path / "out", resample="mlperf")
    path = tmp_path / "out" / "prepare.json"
    about = json.loads(path.read_text())
    del about["resample"]
    path.write_text(json.dumps(about))
    with pytest.raises(ConfigError, match="resample 'mlperf' before and 'grid' now"):
        run(tmp_path / "in", tmp_path / "out")
    run(tmp_path / "in", tmp_path / "out", resample="mlperf")


def test_the_choice_is_no_part_of_an_mni152_outputs_settings(tmp_path) -> None:
    # Outputs from before there was a choice are gone on with, and keep their bytes.
    assert "resample" not in PrepareConfig(source="mni152", output=str(tmp_path)).settings(1)
    assert PrepareConfig(source="kits19", input="in", output=str(tmp_path)).settings(1)["resample"] == "grid"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"resample": "cubic"}, "--resample grid or mlperf, found 'cubic'"),
        ({"resample": "mlperf"}, "--resample grid for mni152"),
        ({"on_mismatch": "ignore"}, "--on-mismatch fail or resample, found 'ignore'"),
        ({"on_mismatch": "resample"}, "no --on-mismatch for mni152"),
    ],
)
def test_grids_that_there_are_not_are_refused(tmp_path, settings, match) -> None:
    with pytest.raises(ConfigError, match=match):
        PrepareConfig(source="mni152", output=str(tmp_path), **settings)
