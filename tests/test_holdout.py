"""Which cases are held out, and which list came with the run."""

import numpy as np
import pytest

from ingest.errors import ConfigError
from ingest.holdout import pick_cases, read_case_list, split_by_fraction, split_by_list, split_by_second
from ingest.manifest import Manifest
from ingest.pairing import Case
from ingest.pipeline import DataConfig
from ingest.stores import ObjectMeta
from train.holdout import save_held_out, split_of


def manifest(*ids: str, place: str = "/data") -> Manifest:
    cases = [Case(i, ObjectMeta(f"{i}_x.npy", 10), ObjectMeta(f"{i}_y.npy", 5)) for i in ids]
    return Manifest.from_cases(cases, images_uri=f"{place}/images/", labels_uri=f"{place}/labels/")


KITS19 = manifest(*(f"case_{number:05d}" for number in range(210)))


def ids(found: Manifest) -> list[str]:
    return found.table["case_id"].to_pylist()


def test_the_42_cases_of_the_reference_come_with_the_package():
    split = split_by_list(KITS19, read_case_list("kits19-mlperf"), "kits19-mlperf")
    assert (len(split.held_out), len(split.train), split.copies) == (42, 168, 0)
    assert (ids(split.held_out)[0], ids(split.held_out)[-1]) == ("case_00000", "case_00207")
    assert not set(split.train.tolist()) & set(split.indices.tolist())


def test_a_list_may_have_bare_numbers_comments_and_empty_lines(tmp_path):
    file = tmp_path / "cases.txt"
    file.write_text("# chosen by hand\n00005\n\ncase_00002 # the small one\n00005\n")
    split = split_of(DataConfig(holdout_cases=str(file)), KITS19)
    assert ids(split.held_out) == ["case_00002", "case_00005"]
    assert split.indices.tolist() == [2, 5]
    assert len(split.train) == 208


def test_copies_of_a_listed_case_are_neither_trained_on_nor_scored():
    cases = manifest("a", "a_copy_00001", "a_copy_00002", "b", "b_copy_00001")
    split = split_by_list(cases, ["a"], "list")
    assert ids(split.held_out) == ["a"]
    assert split.train.tolist() == [3, 4]
    assert split.copies == 2


def test_a_listed_case_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"cases\.txt: expected each of its 3 cases in /data.*2 not among.*x, y"):
        pick_cases(KITS19, ["x", "case_00001", "y"], "cases.txt")


@pytest.mark.parametrize("content", [None, "# nobody\n", b"\xff\xfe\x00"])
def test_a_list_that_is_none_is_refused(tmp_path, content):
    file = tmp_path / "cases.txt"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"expected (a file of )?case ids"):
        split_of(DataConfig(holdout_cases=str(file)), KITS19)


def test_holding_out_every_case_by_list_is_refused():
    with pytest.raises(ConfigError, match="expected cases to train on beside the 2 listed ones"):
        split_by_list(manifest("a", "b"), ["a", "b"], "list")


def test_a_second_manifest_is_scored_whole_under_indices_of_its_own():
    split = split_by_second(manifest("a", "b", "c"), manifest("a", "z", place="/other"))
    assert split.train.tolist() == [0, 1, 2]
    assert split.indices.tolist() == [3, 4]
    assert split.held_out.images_uri == "/other/images/"


def test_a_share_is_split_as_before():
    split = split_by_fraction(KITS19, 3, 0.1)
    assert len(split.held_out) == 21
    assert sorted([*split.train.tolist(), *split.indices.tolist()]) == list(range(210))


def test_a_run_goes_on_with_the_list_that_it_began_with(tmp_path):
    file = tmp_path / "cases.txt"
    file.write_text("00005\n00006\n")
    data = DataConfig(holdout_cases=str(file))
    begun = split_of(data, KITS19)
    save_held_out(str(tmp_path), begun)
    file.write_text("00099\n")
    again = split_of(data, KITS19, str(tmp_path))
    assert ids(again.held_out) == ["case_00005", "case_00006"]
    assert np.array_equal(again.train, begun.train)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_images": "/x"}, "expected data.eval_images and data.eval_labels together"),
        ({"eval_images": "/x", "eval_labels": "/y", "holdout_cases": "kits19-mlperf"}, "expected one way"),
    ],
)
def test_ways_to_hold_out_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**settings)


def test_a_bare_number_is_the_case_of_that_very_name_where_there_is_one():
    numbered = manifest("001", "002", "003", "case_003")
    assert pick_cases(numbered, ["003"], "list").tolist() == [2]
    assert pick_cases(numbered, ["case_003", "001"], "list").tolist() == [0, 3]
    assert pick_cases(KITS19, ["00003", "case_00003"], "list").tolist() == [3]


def test_a_run_whose_cases_are_numbers_finds_its_held_out_cases_again():
    numbered = manifest(*(f"{number:03d}" for number in range(1, 17)))
    split = split_by_fraction(numbered, 0, 0.2)
    assert pick_cases(numbered, ids(split.held_out), "--cases held-out").tolist() == split.indices.tolist()


def test_a_name_with_a_hash_is_not_cut_there(tmp_path):
    file = tmp_path / "cases.txt"
    file.write_text("# by hand\nscan#2\nscan#3\t# the small one\n  # none\n#scan\n")
    assert read_case_list(str(file)) == ["scan#2", "scan#3"]
    split = split_of(DataConfig(holdout_cases=str(file)), manifest("scan", "scan#2", "scan#3"))
    assert ids(split.held_out) == ["scan#2", "scan#3"]


def test_a_listed_name_is_found_in_either_unicode_form():
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for there, listed in ((composed, decomposed), (decomposed, composed)):
        assert pick_cases(manifest(there, "z"), [listed], "list").tolist() == [0]
