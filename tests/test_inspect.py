"""`inspect` reports all that is wrong with a data set at once, and what the images and labels hold."""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path

import numpy as np
import pytest

from ingest.__main__ import main
from ingest.case_faults import look_at
from ingest.commands import _body_of
from ingest.crop import CropConfig
from ingest.decode import DecodeConfig
from ingest.emulator import EmbeddedServer
from ingest.errors import (
    ConfigError,
    DecodeError,
    ObjectNotFoundError,
    PermissionDeniedError,
    PlaceNotFoundError,
)
from ingest.index import index_cases
from ingest.intensity import FARTHEST, Intensities
from ingest.stores import ObjectMeta, open_store
from ingest.testing import MemoryStore, npy_bytes
from train import preflight
from train.recipes import DEMO

from .gcs_place import GCSPlace
from .ruined import files_of, make_set, ruin

SHAPE = (12, 13, 14)


def voxels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, *SHAPE)).astype(np.float32)


def label_of(image: np.ndarray) -> np.ndarray:
    return (image > 0.5).astype(np.uint8) + (image > 1).astype(np.uint8)


def write_cases(root: Path, images: list[np.ndarray], labels: list[np.ndarray] | None = None) -> Path:
    for number, image in enumerate(images):
        for file in files_of(root, number):
            file.parent.mkdir(exist_ok=True)
        image_file, label_file = files_of(root, number)
        image_file.write_bytes(npy_bytes(image))
        label_file.write_bytes(npy_bytes(label_of(voxels(number)) if labels is None else labels[number]))
    return root


def inspected(root: Path, capsys: pytest.CaptureFixture[str], *options: str, status: int) -> str:
    """Run `inspect`, check its status, and return its output with single blanks for white space."""
    roots = ["--images", f"{root}/images", "--labels", f"{root}/labels", "--picture", f"{root}/picture.png"]
    assert main(["inspect", *roots, *options]) == status
    return " ".join(capsys.readouterr().out.split())


def test_everything_that_is_wrong_is_said_in_one_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    make_set(tmp_path, 12)
    kinds = {0: "truncated", 1: "nan", 2: "label-seven", 3: "wrong-dtype", 4: "pickled", 5: "not-npy"}
    at_fault = [ruin(tmp_path, number, kind).name for number, kind in kinds.items()]
    # One case with three faults of its own.
    image, label = files_of(tmp_path, 6)
    spoilt = np.load(image)
    spoilt[0, 0, 0, 0] = np.inf
    image.write_bytes(npy_bytes(spoilt[:, :-1]))
    label.write_bytes(npy_bytes(np.load(label) + np.uint8(5)))
    files_of(tmp_path, 7)[1].unlink()
    (tmp_path / "images" / "._case_00008_x.npy").write_bytes(b"x")
    (tmp_path / "labels" / ".hidden").mkdir()
    (tmp_path / "labels" / ".hidden" / "case_00008_y.npy").write_bytes(b"x")
    printed = inspected(tmp_path, capsys, status=1)
    for name in at_fault:
        assert f"{name}: expected" in printed
    assert "case_00006_x.npy: expected image and label of one (D, H, W)" in printed
    assert "case_00006_x.npy: expected finite voxels, found 1" in printed
    assert "case_00006_y.npy: expected label values 0 to 2, found 7" in printed
    assert "--decode.num-classes" in printed
    assert "--data." not in printed
    assert "1 of 12 images have no label: case_00007_x.npy" in printed
    assert "1 left by macOS" in printed
    assert "1 in hidden folders" in printed
    assert "of 11 cases read, 4 are good and 7 bad" in printed
    assert "class 7: " in printed
    assert "transport: direct" in printed
    assert printed.endswith("wrong: 1 objects in no case; 7 of 11 cases read are bad")


def test_a_good_data_set_ends_with_status_0_and_its_table_says_that_nothing_was_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_set(tmp_path, 5)
    printed = inspected(tmp_path, capsys, status=0)
    assert "of 5 cases read, 5 are good and 0 bad" in printed
    assert "none" in printed
    assert not any(word in printed for word in ("warning", "wrong"))


def test_a_refused_object_is_a_fault_of_its_case_and_a_missing_place_ends_the_inspection() -> None:
    denied, nowhere = MemoryStore("memory://inspect-denied").create().deny(), MemoryStore("memory://inspect-nowhere")
    assert isinstance(_body_of(denied, ObjectMeta("a", 1)), PermissionDeniedError)
    with pytest.raises(PlaceNotFoundError):
        _body_of(nowhere, ObjectMeta("a", 1))


def test_both_places_that_cannot_be_listed_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels").mkdir()
    printed = inspected(tmp_path, capsys, status=1)
    assert "wrong: images: expected a folder" in printed
    assert "wrong: labels: expected objects" in printed


HOUNSFIELD = np.clip(voxels(3) * 400 - 300, -1024, 1500).astype(np.float32)
RAW_MR = np.abs(voxels(4) * 300)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (HOUNSFIELD, "CT in Hounsfield units"),
        (HOUNSFIELD.astype(np.int16), "CT in Hounsfield units"),
        (HOUNSFIELD[0], "CT in Hounsfield units"),
        (RAW_MR, "raw MR"),
        (RAW_MR.astype(np.uint16), "raw MR"),
        (voxels(5) * 40, "a raw image"),
        (voxels(6) * 1e-3, "hardly more than one value"),
    ],
)
def test_images_that_look_unnormalised_are_warned_of_whatever_their_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], image: np.ndarray, kind: str
) -> None:
    write_cases(tmp_path, [image, image])
    decodes = image.dtype == np.float32 and image.ndim == 4
    printed = inspected(tmp_path, capsys, status=0 if decodes else 1)
    assert "warning: channel 0: expected" in printed
    assert kind in printed
    assert "normalise before you upload" in printed


@pytest.mark.parametrize(
    "image",
    [
        voxels(),
        (voxels() - voxels().min()) / np.ptp(voxels()),
        np.where(np.arange(voxels().size).reshape(1, *SHAPE) % 500, voxels() / 9, 30),  # a few bright voxels
    ],
)
def test_normalised_images_are_not_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], image: np.ndarray
) -> None:
    write_cases(tmp_path, [image.astype(np.float32)] * 2)
    assert "warning" not in inspected(tmp_path, capsys, status=0)


@pytest.mark.parametrize("share", [0.002, 0.0049, 0.006, 0.02, 0.3])
def test_no_z_scored_image_is_taken_for_a_raw_one_however_skewed(share: float) -> None:
    image = np.zeros((1, 40, 50, 50), np.float64)
    image.ravel()[: round(share * image.size)] = 3000  # the worst that Cantelli's inequality knows
    scored = ((image - image.mean()) / image.std()).astype(np.float32)
    for each in (scored, -scored):
        intensities = Intensities()
        intensities.add(each)
        (stats,) = intensities.channels().values()
        assert stats.complaint() is None, stats
        assert stats.mean == pytest.approx(0, abs=1e-4)
        assert stats.std == pytest.approx(1, rel=1e-4)
        assert max(np.abs(stats.percentiles)) < FARTHEST


def test_intensities_are_those_of_all_voxels_by_channel_and_leave_out_what_is_not_finite() -> None:
    rng = np.random.default_rng(8)
    images = [rng.normal(3, 2, (2, 9, 8, 7)).astype(np.float32) * [[[[1]]], [[[10]]]] for _ in range(3)]
    images[1] = np.asfortranarray(images[1])
    images[2][0, 0, 0, 0] = np.nan
    intensities = Intensities()
    for image in images:
        intensities.add(image)
    for channel, stats in intensities.channels().items():
        together = np.concatenate([image[channel].ravel() for image in images])
        finite = together[np.isfinite(together)]
        assert (stats.images, stats.voxels, stats.not_finite) == (3, len(finite), len(together) - len(finite))
        assert (stats.low, stats.high) == (finite.min(), finite.max())
        assert stats.mean == pytest.approx(finite.mean())
        assert stats.std == pytest.approx(finite.std())
        assert stats.percentiles[2] == pytest.approx(np.median(finite), abs=0.2 * finite.std())


def test_channels_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cases(tmp_path, [np.concatenate([voxels(), HOUNSFIELD])])
    printed = inspected(tmp_path, capsys, "--decode.channels", "2", status=0)
    assert "channel 0 of 1 images: min " in printed
    assert "channel 1 of 1 images: min -1,024, max " in printed
    assert "percentiles of a sample of voxels: 0.5 %: -1,024, 5 %: " in printed
    assert "warning: channel 1: " in printed
    assert "warning: channel 0: " not in printed


def test_labels_that_are_all_empty_are_wrong_where_a_run_refuses_them_and_a_warning_where_there_may_be_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = np.zeros((1, *SHAPE), np.uint8)
    write_cases(tmp_path, [voxels(n) for n in range(4)], [empty] * 4)
    for options in (["--sample", "2"], []):
        printed = inspected(tmp_path, capsys, *options, status=1)
        assert "wrong: a run would refuse this data: expected foreground in at least one label" in printed
        assert "only background in all 4 labels" in printed
        assert printed.endswith("wrong: every label is empty")
    printed = inspected(tmp_path, capsys, "--boxes", f"{tmp_path}/m.parquet", status=1)
    assert printed.endswith("wrong: every label is empty")
    write_cases(tmp_path, [voxels(0)])
    assert "3 of 4 labels are empty" in inspected(tmp_path, capsys, status=0)
    write_cases(tmp_path, [voxels(n) for n in range(40)], [empty] * 40)
    printed = inspected(tmp_path, capsys, status=0)
    assert "warning: expected foreground in the labels, found only background in the 32 that were looked at" in printed
    assert "look at more with --sample" in printed


def run_refuses(root: Path, patch: tuple[int, int, int]) -> str | None:
    """What the checks of a run's start say of a data set; None if they take it."""
    data = dataclasses.replace(DEMO.data, crop=CropConfig(patch=patch))
    recipe = dataclasses.replace(DEMO, data=data)
    manifest = index_cases(f"{root}/images", f"{root}/labels").manifest
    try:
        preflight.check_foreground(recipe, manifest)
        preflight.check_smallest(recipe, manifest)
    except (ConfigError, DecodeError) as error:
        return str(error)
    return None


def test_a_volume_that_holds_no_patch_is_wrong_for_inspect_in_the_words_of_the_run_that_refuses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cases(tmp_path, [voxels(n) for n in range(4)])
    for patch in ((12, 12, 12), (12, 13, 14)):
        inspected(tmp_path, capsys, "--patch", *map(str, patch), status=0)
        assert run_refuses(tmp_path, patch) is None
    printed = inspected(tmp_path, capsys, "--patch", "16", "16", "16", status=1)
    refused = run_refuses(tmp_path, (16, 16, 16))
    assert refused is not None
    assert f"wrong: a run would refuse this data: {refused}" in printed
    assert printed.endswith("wrong: a run would refuse its smallest volumes")


def test_inspect_says_which_patch_fits_and_which_checks_only_a_run_can_make(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cases(tmp_path, [voxels(n) for n in range(4)])
    printed = inspected(tmp_path, capsys, status=0)
    assert "a patch of these cases may have up to (12, 13, 14) voxels" in printed
    assert "a run that holds out 10% of the subjects trains on 3 cases and scores 1" in printed
    assert "not checked here, but by a run before it starts: that the volumes hold its patch (give --patch" in printed
    printed = inspected(tmp_path, capsys, "--patch", "12", "12", "12", status=0)
    assert "not checked here, but by a run before it starts: that the cases are enough for a batch" in printed


def test_a_single_case_of_which_a_run_can_hold_none_out_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cases(tmp_path, [voxels()])
    printed = inspected(tmp_path, capsys, status=0)
    assert "warning: a run would refuse this data: expected subjects to train on, found 1" in printed


def test_names_with_brackets_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path, 2)
    for file in files_of(tmp_path, 0):
        file.rename(file.parent / file.name.replace("case_", "[red]case_"))
    (tmp_path / "images" / "[red]case_00000_x.npy").write_bytes(b"no volume")
    assert "[red]case_00000_x.npy: expected an .npy file" in inspected(tmp_path, capsys, status=1)


def test_a_picture_that_cannot_be_written_is_said_and_the_rest_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_set(tmp_path, 2)
    (tmp_path / "picture.png").mkdir()
    printed = inspected(tmp_path, capsys, status=1)
    assert "wrong: expected to write" in printed
    assert "transport: direct" in printed


def test_boxes_of_bad_cases_are_not_saved_and_the_rest_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_set(tmp_path, 4)
    ruin(tmp_path, 1, "truncated")
    printed = inspected(tmp_path, capsys, "--boxes", f"{tmp_path}/m.parquet", status=1)
    assert "with `voxflux index --boxes` and --on-bad quarantine" in printed
    assert "transport: direct" in printed
    assert not (tmp_path / "m.parquet").exists()


def test_boxes_that_cannot_be_saved_are_said_and_the_rest_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_set(tmp_path, 2)
    (tmp_path / "file").write_bytes(b"no folder")
    printed = inspected(tmp_path, capsys, "--boxes", f"{tmp_path}/file/m.parquet", status=1)
    assert "wrong: expected to write" in printed
    assert "transport: direct" in printed
    assert printed.endswith("wrong: no manifest was saved")


def test_objects_of_an_encoding_that_is_not_read_are_said_beside_bad_cases(
    gcs_server: EmbeddedServer, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        image = voxels(number)
        for role, body, encoding in (
            ("images", npy_bytes(image), None if number else "gzip"),
            ("labels", npy_bytes(label_of(image)), "br" if number == 2 else None),
        ):
            place = GCSPlace(open_store(f"gs://{bucket}/{role}"), gcs_server.url)
            stored = body if encoding is None else gzip.compress(body)
            # The body called br is gzip reversed: it only has to be neither .npy nor gzip.
            place.write(f"{number}.npy", stored[::-1] if encoding == "br" else stored, None, encoding)
    roots = ["--images", f"gs://{bucket}/images", "--labels", f"gs://{bucket}/labels"]
    assert main(["inspect", *roots, "--picture", f"{tmp_path}/p.png"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "labels: 1 of 3 objects are stored with a Content-Encoding that is not read (1 br; first: 2.npy)" in printed
    assert "of 3 cases read, 2 are good and 1 bad" in printed
    assert f"bad: expected gs://{bucket}/labels/2.npy to be stored uncompressed or as gzip" in printed


def test_the_faults_of_a_case_whose_image_cannot_be_had_are_those_of_its_label_too() -> None:
    gone = ObjectNotFoundError("expected i, found that it is gone")
    look = look_at(gone, npy_bytes(label_of(voxels()) + np.uint8(9)), DecodeConfig(), image_name="i", label_name="l")
    assert [str(fault).partition(",")[0] for fault in look.faults] == [
        "expected i",
        "l: expected label values 0 to 2",
    ]
    assert look.image is None
    assert look.label is not None
