"""The look at the smallest volumes before a run starts: it obeys the policies for bad and stale cases."""

import dataclasses
import gzip
from pathlib import Path

import numpy as np
import pytest

from ingest.crop import CropConfig
from ingest.errors import ConfigError, DecodeError, ObjectNotFoundError, QuarantineBudgetError, StaleManifestError
from ingest.index import index_cases, look_up_cases
from ingest.manifest import Manifest
from ingest.quarantine import BadCaseConfig, QuarantineBook, QuarantineEntry
from ingest.testing import npy_bytes
from tests.ruined import files_of, make_set, ruin
from train.config import Recipe
from train.launch import quarantined_of
from train.preflight import check_smallest
from train.recipes import DEMO

FAIL = BadCaseConfig()
QUARANTINE = BadCaseConfig(on_bad="quarantine", on_stale="quarantine", budget_cases=2)


def policy(bad: BadCaseConfig, patch: int = 8) -> Recipe:
    data = dataclasses.replace(DEMO.data, bad=bad, crop=CropConfig(patch=(patch, patch, patch)))
    return dataclasses.replace(DEMO, data=data)


def save_pair(root: Path, number: int, shape: tuple[int, int, int]) -> None:
    image, label = files_of(root, number)
    image.write_bytes(npy_bytes(np.zeros((1, *shape), np.float32)))
    label.write_bytes(npy_bytes(np.ones((1, *shape), np.uint8)))


def listed(root: Path) -> Manifest:
    return index_cases(f"{root}/images", f"{root}/labels").manifest


@pytest.fixture
def root(tmp_path) -> Path:
    make_set(tmp_path, 5)
    return tmp_path


def test_an_empty_smallest_image_ends_a_run_by_name_or_is_left_to_the_quarantine(root):
    files_of(root, 3)[0].write_bytes(b"")
    manifest = listed(root)
    with pytest.raises(DecodeError, match=r"case_00003_x\.npy: expected an \.npy file"):
        check_smallest(policy(FAIL), manifest)
    said = check_smallest(policy(QUARANTINE), manifest)
    assert "1 cases will be quarantined, of a budget of 2" in said
    assert "case_00003_x.npy" in said


def test_a_missing_smallest_image_obeys_the_policy(root):
    save_pair(root, 2, (9, 9, 9))
    manifest = listed(root)
    files_of(root, 2)[0].unlink()
    with pytest.raises(ObjectNotFoundError, match=r"case_00002_x\.npy"):
        check_smallest(policy(FAIL), manifest)
    assert "case_00002_x.npy" in check_smallest(policy(QUARANTINE), manifest)


def test_a_touched_smallest_image_is_read_as_it_is_now_where_stale_cases_are_refreshed(root):
    save_pair(root, 2, (9, 9, 9))
    manifest = listed(root)
    save_pair(root, 2, (8, 9, 9))
    with pytest.raises(StaleManifestError, match=r"case_00002_x\.npy"):
        check_smallest(policy(FAIL), manifest)
    refresh = BadCaseConfig(on_stale="refresh")
    assert check_smallest(policy(refresh), manifest) is None
    save_pair(root, 2, (7, 9, 9))
    with pytest.raises(ConfigError, match=r"found \(7, 9, 9\) in the smallest, .*case_00002_x\.npy"):
        check_smallest(policy(refresh), manifest)


def test_a_thin_smallest_image_is_passed_over_and_those_beyond_the_budget_end_the_run(root):
    for number in (1, 2):
        save_pair(root, number, (4, 10, 10))
    manifest = listed(root)
    with pytest.raises(ConfigError, match=r"expected every volume to hold a patch"):
        check_smallest(policy(FAIL), manifest)
    assert "2 cases will be quarantined" in check_smallest(policy(QUARANTINE), manifest)
    with pytest.raises(QuarantineBudgetError, match=r"expected at most 2 bad cases, found 5, .*--data\.crop\.patch"):
        check_smallest(policy(QUARANTINE, patch=16), manifest)


def test_where_the_manifest_has_shapes_a_volume_that_is_thin_on_one_axis_is_found_before_the_start(root):
    save_pair(root, 4, (4, 40, 40))  # the largest by its bytes
    manifest, _ = look_up_cases(listed(root))
    with pytest.raises(ConfigError, match=r"found \(4, 40, 40\) in the first of 1 that do not, .*case_00004_x\.npy"):
        check_smallest(policy(FAIL), manifest)
    said = check_smallest(policy(QUARANTINE), manifest)
    assert "1 volumes are smaller than the patch" in said
    others = np.array([0, 1, 2, 3])
    assert check_smallest(policy(FAIL), manifest, others) is None  # it is held out: scoring pads it
    with pytest.raises(QuarantineBudgetError, match="expected at most 2 bad cases, found 5"):
        check_smallest(policy(QUARANTINE, patch=16), manifest)


def test_an_image_with_its_channels_last_is_called_so_and_not_too_small_for_the_patch(root):
    image, _ = files_of(root, 1)
    image.write_bytes(npy_bytes(np.zeros((9, 9, 9, 1), np.float32)))
    manifest = listed(root)
    with pytest.raises(DecodeError, match=r"found 9 channels in shape \(9, 9, 9, 1\); the channels seem to stand last"):
        check_smallest(policy(FAIL), manifest)
    assert "the channels seem to stand last" in check_smallest(policy(QUARANTINE), manifest)


def test_a_case_without_a_shape_in_a_manifest_with_shapes_is_read(root):
    ruin(root, 1, "not-npy")
    manifest, _ = look_up_cases(listed(root))
    with pytest.raises(DecodeError, match="case_00001"):
        check_smallest(policy(FAIL), manifest)
    assert "case_00001" in check_smallest(policy(QUARANTINE), manifest)


def test_a_smallest_image_that_is_stored_as_gzip_is_looked_at_as_any_other(root):
    image, _ = files_of(root, 2)
    image.write_bytes(gzip.compress(npy_bytes(np.zeros((1, 8, 9, 9), np.float32))))
    assert check_smallest(policy(FAIL), listed(root)) is None
    image.write_bytes(gzip.compress(npy_bytes(np.zeros((1, 7, 9, 9), np.float32))))
    with pytest.raises(ConfigError, match=r"found \(7, 9, 9\) in the smallest, .*case_00002_x\.npy"):
        check_smallest(policy(FAIL), listed(root))


def test_a_run_that_quarantined_its_smallest_case_goes_on_without_looking_at_it(root, tmp_path):
    files_of(root, 3)[0].write_bytes(b"")
    manifest = listed(root)
    run_dir = str(tmp_path / "run")
    QuarantineBook(run_dir, 2).report(QuarantineEntry(3, "case_00003", "case_00003_x.npy", "not-npy", "empty", 0))
    quarantined = quarantined_of(policy(QUARANTINE).data, run_dir)
    assert quarantined.tolist() == [3]
    assert check_smallest(policy(QUARANTINE), manifest, None, quarantined) is None
    assert quarantined_of(policy(FAIL).data, run_dir) is None
    # Those that are quarantined already count towards the budget.
    for number in (1, 2):
        save_pair(root, number, (4, 10, 10))
    with pytest.raises(QuarantineBudgetError, match="found 3, of which 1 are quarantined already"):
        check_smallest(policy(QUARANTINE), listed(root), None, quarantined)
