"""Which cases are held out, and which list came with the run."""

import dataclasses

import numpy as np
import pytest

from ingest.errors import ConfigError
from ingest.holdout import pick_cases, read_case_list, split_by_fraction, split_by_list, split_by_second
from ingest.manifest import Manifest
from ingest.pairing import Case
from ingest.pipeline import DataConfig
from ingest.stores import ObjectMeta
from train.config import Recipe
from train.holdout import save_held_out, split_of
from train.run_folder import checks_of_run_dir


def manifest(*ids: str, place: str = "/data") -> Manifest:
    cases = [Case(i, ObjectMeta(f"{i}_x.npy", 10), ObjectMeta(f"{i}_y.npy", 5)) for i in ids]
    return Manifest.from_cases(cases, images_uri=f"{place}/images/", labels_uri=f"{place}/labels/")


KITS19 = manifest(*(f"case_{number:05d}" for number in range(210)))


def ids(found: Manifest) -> list[str]:
    return found.table["case_id"].to_pylist()


def test_the_42_cases_of_the_reference_come_with_the_package():
    split = split_by_list(KITS19, read_case_list("kits19-mlperf"), "kits19-mlperf")
    assert (len(split.held_out), len(split.train), split.left_out) == (42, 168, 0)
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
    assert split.left_out == 2


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


BIDS = manifest(*(f"sub-{subject:02d}_ses-{session}" for subject in range(1, 22) for session in range(1, 4)))


def subjects_in(data: Manifest) -> set[str]:
    return {case_id.partition("_")[0] for case_id in ids(data)}


def test_sessions_of_a_bids_subject_are_held_out_together():
    for seed in range(5):
        split = split_by_fraction(BIDS, seed, 0.1)
        assert len(split.held_out) == 6
        train = [ids(BIDS)[index].partition("_")[0] for index in split.train]
        assert not subjects_in(split.held_out) & set(train)
        assert split.about == "63 cases of 21 subjects by BIDS' sub-*"


def test_bids_names_are_recognised_in_folders_and_beside_other_names():
    found = manifest("sub-03/ses-1/t1", "sub-03/ses-2/t1", "site/sub-03_t2", "sub-031_t1", "mysub-03_t1", "x", "sub-03")
    names = dict(zip(ids(found), found.subjects().names.to_pylist(), strict=True))
    assert {case_id for case_id, subject in names.items() if subject == "sub-03"} == {
        *("sub-03/ses-1/t1", "sub-03/ses-2/t1", "site/sub-03_t2", "sub-03")
    }
    assert len(set(names.values())) == 4


def test_other_sessions_of_a_listed_case_are_left_out_of_training():
    split = split_by_list(BIDS, ["sub-03_ses-2"], "list")
    assert ids(split.held_out) == ["sub-03_ses-2"]
    assert (len(split.train), split.left_out) == (60, 2)


def test_a_bids_subject_of_the_second_place_is_left_out_of_training():
    second = manifest("sub-03_ses-9", "case_1", place="/other")
    split = split_by_second(manifest("sub-03_ses-1", "sub-04_ses-1", "case_1"), second)
    assert (split.train.tolist(), split.left_out, len(split.held_out)) == ([0, 2], 1, 2)
    with pytest.raises(ConfigError, match=r"expected cases to train on in .* found none: all .* give --data.subject-p"):
        split_by_second(manifest("sub-03_ses-1"), second)
    assert split_by_second(manifest("sub-03_ses-1"), second, "").train.tolist() == [0]


def test_a_pattern_names_the_subject_by_its_group_or_its_match():
    cases = manifest("a7-left", "a7-right", "a7-right_copy_00001", "b7-left")
    assert cases.subjects(r"^(\w+)-").numbers.tolist() == [0, 0, 0, 1]
    assert cases.subjects(r"^[a-z]\d").numbers.tolist() == [0, 0, 0, 1]
    assert cases.subjects().numbers.tolist() == [0, 1, 1, 2]
    assert str(cases.subjects("7")) == "4 cases of 1 subject by the pattern '7'"


def test_a_pattern_that_names_no_subject_in_a_case_is_refused_and_the_case_named():
    with pytest.raises(ConfigError, match=r"in each of 5 case ids, found none in b, c, d and 1 more; change"):
        split_of(DataConfig(subject_pattern="^(a)"), manifest("a", "b", "c", "d", "e"))
    with pytest.raises(ConfigError, match=r"data.subject_pattern must be a regular expression; got '\('"):
        DataConfig(subject_pattern="(")


GOLDEN = {
    0: [11, 13, 23, 53, 65, 66, 67, 125, 154, 156],
    3: [4, 21, 24, 69, 105, 130, 143, 185, 188, 205],
}  # by seed, of the split before subjects were named


def test_case_ids_without_subjects_are_split_as_they_always_were():
    assert split_by_fraction(KITS19, 0, 0.05).indices.tolist() == GOLDEN[0]
    assert split_by_fraction(KITS19, 3, 0.05).indices.tolist() == GOLDEN[3]


def test_a_run_is_not_gone_on_with_under_another_subject_pattern(tmp_path):
    begun = Recipe()
    (tmp_path / "recipe.json").write_text(begun.to_json())
    resumed = dataclasses.replace(
        begun,
        data=dataclasses.replace(begun.data, subject_pattern="^(a)"),
        trainer=dataclasses.replace(begun.trainer, resume=str(tmp_path)),
    )
    with pytest.raises(ConfigError, match=r"subject_pattern"):
        checks_of_run_dir(resumed, str(tmp_path))
