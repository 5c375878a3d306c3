"""KiTS19's layout and formulas, on small NIfTI files of its kind."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from ingest.errors import (
    ConfigError,
    DecodeError,
    EmptyListingError,
    IngestError,
    PairingError,
    PlaceNotFoundError,
)
from ingest.prepare import PrepareConfig, PrepareResult, prepare

SPACINGS = [(3.1, 0.95, 0.78), (0.5, 1.37, 2.0), (1.6, 1.2, 1.2)]
SHAPES = [(9, 31, 27), (40, 17, 11), (7, 12, 13)]


def write_case(folder: Path, case: int, *, image=None, label=None, spacing=(3.0, 0.8, 0.8)) -> None:
    rng = np.random.default_rng(case)
    image = rng.normal(50, 200, (8, 12, 10)) if image is None else image
    label = rng.integers(0, 3, np.shape(image)) if label is None else label
    place = folder / f"case_{case:05d}"
    place.mkdir(parents=True)
    affine = np.diag([*spacing, 1.0])
    nibabel.save(nibabel.Nifti1Image(np.asarray(image, np.float64), affine), place / "imaging.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.asarray(label, np.uint8), affine), place / "segmentation.nii.gz")


def run(folder: Path, output: Path, **settings) -> PrepareResult:
    settings = {"shape": (16, 16, 16), "workers": 0} | settings
    return prepare(PrepareConfig(source="kits19", input=str(folder), output=str(output), **settings))


def load(output: Path, case: str) -> tuple[np.ndarray, np.ndarray]:
    image = np.load(output / "images" / f"{case}_x.npy", allow_pickle=False)
    return image, np.load(output / "labels" / f"{case}_y.npy", allow_pickle=False)


def transcription(image, label, spacing, target, minimum) -> tuple[np.ndarray, np.ndarray]:
    """The formulas of FACTS section 4, line by line, with torch's own interpolation."""
    spacing = np.float32(spacing).astype(float)  # what a NIfTI header can hold
    shape = [int(s / t * n) for s, t, n in zip(spacing, target, image.shape, strict=True)]
    x = torch.from_numpy(np.float32(image))[None, None]
    y = torch.from_numpy(np.uint8(label))[None, None]
    x = torch.nn.functional.interpolate(x, size=shape, mode="trilinear", align_corners=True)[0].numpy()
    y = torch.nn.functional.interpolate(y, size=shape, mode="nearest")[0].numpy()
    x = (np.clip(x, -79.0, 304.0) - 101.0) / 76.9
    lack = [max(0, least - n) for least, n in zip(minimum, shape, strict=True)]
    pads = [(0, 0), *((n // 2, n - n // 2) for n in lack)]
    return np.pad(x, pads, mode="edge"), np.pad(y, pads, mode="edge")


@pytest.mark.parametrize("target", [(1.6, 1.2, 1.2), (2.3, 1.9, 0.7)])
def test_cases_follow_the_formulas_at_odd_spacings_and_shapes(tmp_path, target) -> None:
    rng = np.random.default_rng(0)
    cases = []
    for case, (shape, spacing) in enumerate(zip(SHAPES, SPACINGS, strict=True)):
        image, label = rng.normal(60, 250, shape), rng.integers(0, 3, shape)
        write_case(tmp_path / "in", case, image=image, label=label, spacing=spacing)
        cases.append((image, label, spacing))
    minimum = (17, 20, 15)
    run(tmp_path / "in", tmp_path / "out", spacing=target, shape=minimum, resample="mlperf")
    for case, (image, label, spacing) in enumerate(cases):
        x, y = load(tmp_path / "out", f"case_{case:05d}")
        expected_x, expected_y = transcription(image, label, spacing, target, minimum)
        np.testing.assert_array_equal(y, expected_y)
        np.testing.assert_allclose(x, expected_x, atol=1e-5)
        assert (x.dtype, y.dtype) == (np.float32, np.uint8)
        assert x.flags.c_contiguous
        assert x.shape == y.shape
        assert all(size >= least for size, least in zip(x.shape, (1, *minimum), strict=True))


def test_defaults_are_those_of_mlperf(tmp_path) -> None:
    write_case(tmp_path / "in", 0, image=np.zeros((3, 4, 5)), label=np.zeros((3, 4, 5)))
    prepare(PrepareConfig(source="kits19", input=str(tmp_path / "in"), output=str(tmp_path / "out"), workers=0))
    x, _ = load(tmp_path / "out", "case_00000")
    assert x.shape == (1, 128, 128, 128)
    assert '"spacing": [\n    1.6,' in (tmp_path / "out" / "prepare.json").read_text()


def test_integer_files_with_a_scale_are_read_in_hounsfield_units(tmp_path) -> None:
    write_case(tmp_path / "in", 0)
    stored = nibabel.Nifti1Image(np.full((4, 4, 4), 1100, np.int16), np.eye(4))
    stored.header.set_slope_inter(1, -1024)
    nibabel.save(stored, tmp_path / "in" / "case_00000" / "imaging.nii.gz")
    label = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    nibabel.save(label, tmp_path / "in" / "case_00000" / "segmentation.nii.gz")
    volume = nibabel.load(tmp_path / "in" / "case_00000" / "imaging.nii.gz").get_fdata()
    run(tmp_path / "in", tmp_path / "out", spacing=(1.0, 1.0, 1.0), shape=(4, 4, 4))
    x, _ = load(tmp_path / "out", "case_00000")
    np.testing.assert_allclose(x[0], (np.clip(volume, -79, 304) - 101) / 76.9, atol=1e-5)


def test_cases_from_210_on_are_left_out(tmp_path) -> None:
    for case in (3, 209, 210, 299):
        write_case(tmp_path / "in", case)
    result = run(tmp_path / "in", tmp_path / "out")
    assert result.made == 2
    names = sorted(path.name for path in (tmp_path / "out" / "images").iterdir())
    assert names == ["case_00003_x.npy", "case_00209_x.npy"]


def test_fewer_cases_of_a_seed_are_part_of_more(tmp_path) -> None:
    for case in range(8):
        write_case(tmp_path / "in", case)

    def chosen(cases: int, seed: int) -> set[str]:
        output = tmp_path / f"out-{cases}-{seed}"
        run(tmp_path / "in", output, cases=cases, seed=seed)
        return {path.name for path in (output / "labels").iterdir()}

    assert len(chosen(3, 0)) == 3
    assert chosen(3, 0) < chosen(6, 0)
    assert any(chosen(3, 0) != chosen(3, seed) for seed in (1, 2))


def expect(error: type[IngestError], match: str, folder: Path, output: Path, **settings) -> None:
    with pytest.raises(error, match=match):
        run(folder, output, **settings)


def test_a_folder_that_is_not_there_is_named(tmp_path) -> None:
    expect(PlaceNotFoundError, "nowhere.*check --input", tmp_path / "nowhere", tmp_path / "out")


def test_a_folder_without_cases_says_what_was_found_instead(tmp_path) -> None:
    (tmp_path / "in" / "starter_code").mkdir(parents=True)
    expect(EmptyListingError, r"case_00000 to case_00209.*starter_code", tmp_path / "in", tmp_path / "out")


def test_a_case_without_segmentation_is_refused_before_any_work(tmp_path) -> None:
    write_case(tmp_path / "in", 0)
    write_case(tmp_path / "in", 7)
    (tmp_path / "in" / "case_00007" / "segmentation.nii.gz").unlink()
    expect(PairingError, r"1 files missing, first: case_00007/segm", tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_cases_than_there_are_is_refused_with_both_numbers(tmp_path) -> None:
    write_case(tmp_path / "in", 0)
    expect(ConfigError, "expected 5 labelled cases, found 1", tmp_path / "in", tmp_path / "out", cases=5)


def test_a_volume_that_is_not_3_d_is_refused(tmp_path) -> None:
    write_case(tmp_path / "in", 0, image=np.zeros((4, 4, 4, 2)))
    expect(DecodeError, r"3-D volume.*\(4, 4, 4, 2\)", tmp_path / "in", tmp_path / "out")


def test_image_and_label_of_two_shapes_are_refused_with_both(tmp_path) -> None:
    write_case(tmp_path / "in", 0, image=np.zeros((4, 4, 4)), label=np.zeros((4, 4, 5)))
    expect(DecodeError, r"\(4, 4, 4\) with affine .* label \(4, 4, 5\)", tmp_path / "in", tmp_path / "out")


def test_a_label_of_another_class_is_refused_with_its_value(tmp_path) -> None:
    label = np.zeros((4, 4, 4))
    label[1, 2, 3] = 7
    write_case(tmp_path / "in", 0, image=np.zeros((4, 4, 4)), label=label)
    expect(DecodeError, r"labels 0, 1 and 2, found also \[7", tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("label", "said", "follow"),
    [
        ([[0, 255]], "it is a mask of 0 and 255", lambda label: label == 255),
        ([[-1, 2]], "find out what -1 means", lambda label: np.where(label == -1, 0, label)),
        ([[0, 0.99999994]], "to be rounded, not cut", np.rint),
        ([[0, 7]], "map each value to its class", lambda label: np.where(label == 7, 2, label)),
    ],
)
def test_a_label_of_a_common_mistake_is_prepared_once_its_advice_is_followed(tmp_path, label, said, follow) -> None:
    label = np.broadcast_to(np.float32(label), (4, 4, 2))
    place = tmp_path / "in" / "case_00000"
    write_case(tmp_path / "in", 0, image=np.zeros((4, 4, 2)), label=np.zeros((4, 4, 2)), spacing=(1, 1, 1))
    nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), place / "segmentation.nii.gz")
    settings = {"spacing": (1, 1, 1), "shape": (1, 1, 1)}
    with pytest.raises(DecodeError, match=said) as caught:
        run(tmp_path / "in", tmp_path / "out", **settings)
    assert "--data." not in str(caught.value)
    mended = np.uint8(follow(label))
    nibabel.save(nibabel.Nifti1Image(mended, np.eye(4)), place / "segmentation.nii.gz")
    run(tmp_path / "in", tmp_path / "out", **settings)
    np.testing.assert_array_equal(load(tmp_path / "out", "case_00000")[1][0], mended)


def test_voxels_that_are_not_finite_are_refused_with_their_number(tmp_path) -> None:
    image = np.zeros((4, 4, 4))
    image[0, 0, :3] = [np.nan, np.inf, -np.inf]
    write_case(tmp_path / "in", 0, image=image, label=np.zeros((4, 4, 4)))
    expect(DecodeError, "found 3 NaN or infinite", tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"no gzip at all", b"cut"])
def test_a_file_that_is_no_nifti_is_refused_by_name(tmp_path, content) -> None:
    write_case(tmp_path / "in", 0, image=np.random.default_rng(0).normal(size=(20, 20, 20)))
    path = tmp_path / "in" / "case_00000" / "imaging.nii.gz"
    path.write_bytes(path.read_bytes()[:5000] if content == b"cut" else content)
    expect(DecodeError, r"imaging.nii.gz: expected a gzipped NIfTI", tmp_path / "in", tmp_path / "out")


def test_cases_before_a_bad_one_are_kept_and_the_run_goes_on_once_it_is_repaired(tmp_path) -> None:
    for case in range(3):
        write_case(tmp_path / "in", case)
    path = tmp_path / "in" / "case_00002" / "imaging.nii.gz"
    good = path.read_bytes()
    path.write_bytes(b"bad")
    expect(DecodeError, "case_00002", tmp_path / "in", tmp_path / "out")
    path.write_bytes(good)
    result = run(tmp_path / "in", tmp_path / "out")
    assert (result.made, result.already_there) == (1, 2)


def test_an_image_resampled_to_no_voxels_is_named(tmp_path) -> None:
    write_case(tmp_path / "in", 0, spacing=(0.1, 1.0, 1.0))
    expect(DecodeError, "case_00000.*at least one voxel", tmp_path / "in", tmp_path / "out")
