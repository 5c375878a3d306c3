"""Joining by key: no pair is ever wrong, and nothing is left out without a word."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.errors import ConfigError, PairingError
from ingest.geometry import list_geometry
from ingest.images import list_images
from ingest.pairing import PairingConfig, join_by_key, pair_cases
from ingest.stores.base import ObjectMeta


def objects(*names: str) -> list[ObjectMeta]:
    return [ObjectMeta(name, 100 + i, i, i) for i, name in enumerate(names)]


def composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


keys = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\n"), min_size=1, max_size=12).map(
    composed
)


@given(
    both=st.sets(keys, min_size=1, max_size=12),
    image_only=st.sets(keys, max_size=4),
    label_only=st.sets(keys, max_size=4),
    data=st.data(),
)
def test_pairing_never_joins_two_keys_whatever_the_order_and_the_orphans(both, image_only, label_only, data):
    image_only, label_only = image_only - both, label_only - both - image_only
    images = data.draw(st.permutations([ObjectMeta(f"{k}_x.npy", len(k)) for k in both | image_only]))
    labels = data.draw(st.permutations([ObjectMeta(f"{k}_y.npy", len(k)) for k in both | label_only]))
    pairing = join_by_key(images, labels)
    assert [case.case_id for case in pairing.cases] == sorted(both)
    assert all(
        case.image.name == case.case_id + "_x.npy" and case.label.name == case.case_id + "_y.npy"
        for case in pairing.cases
    )
    assert {(p.kind, p.key) for p in pairing.problems} == {("image-without-label", k) for k in image_only} | {
        ("label-without-image", k) for k in label_only
    }


@given(
    names=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.sampled_from(["_x.npy", "_y.npy"])),
        max_size=20,
    ),
)
def test_pairing_accounts_for_every_object_and_pairs_no_doubled_key(names):
    images = objects(*(f"{f}/{n}{s}" for f, n, s in names if s == "_x.npy"))
    labels = objects(*(f"{f}/{n}{s}" for f, n, s in names if s == "_y.npy"))
    config = PairingConfig(image_pattern=r"./(\d)_x\.npy", label_pattern=r"./(\d)_y\.npy")
    pairing = join_by_key(images, labels, config)
    assert 2 * len(pairing.cases) + len(pairing.problems) == len(images) + len(labels)
    for case in pairing.cases:
        assert sum(i.name[2] == case.case_id for i in images) == 1
        assert sum(i.name[2] == case.case_id for i in labels) == 1


def test_pairing_rejects_label_without_image():
    with pytest.raises(PairingError, match=r"1 of 2 labels have no image: b_y\.npy; .*on-orphan quarantine"):
        pair_cases(objects("a_x.npy"), objects("a_y.npy", "b_y.npy"))


def test_pairing_rejects_image_without_label_and_names_the_first_few():
    images = objects(*(f"c{i}_x.npy" for i in range(6)))
    with pytest.raises(PairingError, match=r"5 of 6 images have no label: c1_x\.npy, c2_x\.npy, c3_x\.npy and 2 more"):
        pair_cases(images, objects("c0_y.npy"))


def test_pairing_quarantines_orphans_when_asked(caplog):
    pairing = pair_cases(objects("a_x.npy", "b_x.npy"), objects("a_y.npy"), PairingConfig(on_orphan="quarantine"))
    assert [case.case_id for case in pairing.cases] == ["a"]
    assert [(p.kind, p.name) for p in pairing.problems] == [("image-without-label", "b_x.npy")]
    assert "b_x.npy" in caplog.text


def test_pairing_rejects_a_key_that_two_images_share():
    config = PairingConfig(image_pattern=r"(?:.*/)?(\w+)_x\.npy", label_pattern=r"(?:.*/)?(\w+)_y\.npy")
    with pytest.raises(PairingError, match=r"2 of 2 images share their key with another object \(first key: 'a'\)"):
        pair_cases(objects("old/a_x.npy", "new/a_x.npy"), objects("a_y.npy"), config)


def test_pairing_rejects_a_name_listed_twice():
    with pytest.raises(PairingError, match="share their key"):
        pair_cases([ObjectMeta("a_x.npy", 1), ObjectMeta("a_x.npy", 2)], objects("a_y.npy"))


def test_pairing_takes_equal_names_in_two_folders():
    pairing = pair_cases(objects("s1/scan.npy", "s2/scan.npy"), objects("s2/scan.npy", "s1/scan.npy"))
    assert [case.case_id for case in pairing.cases] == ["s1/scan", "s2/scan"]


def test_pairing_takes_equal_names_that_end_in_x():
    pairing = pair_cases(objects("max_x.npy"), objects("max_x.npy"))
    assert [case.case_id for case in pairing.cases] == ["max_x"]


def test_pairing_takes_images_and_labels_from_one_place():
    listing = objects("a_x.npy", "a_y.npy", "b_x.npy", "b_y.npy", "note.txt")
    pairing = pair_cases(listing, listing, same_place=True)
    assert [(c.image.name, c.label.name) for c in pairing.cases] == [
        ("a_x.npy", "a_y.npy"),
        ("b_x.npy", "b_y.npy"),
    ]


def test_pairing_does_not_let_a_misnamed_npy_pass_in_silence():
    with pytest.raises(
        PairingError, match=r"1 of 2 images are \.npy by their name but match no naming pattern: stray\.npy"
    ):
        pair_cases(objects("a_x.npy", "stray.npy"), objects("a_y.npy"))


def test_pairing_ignores_and_counts_what_is_not_npy():
    assert pair_cases(objects("a_x.npy", "README.md"), objects("a_y.npy")).ignored == 1


def test_pairing_says_when_nothing_pairs_at_all():
    with pytest.raises(PairingError, match=r"found none among 1 objects for images \(first: scan\.nii\)"):
        pair_cases(objects("scan.nii"), objects("mask.nii"))


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        ("(.*)_a", None, "together"),
        ("(", "(.*)", "not a regular expression"),
        (".*", "(.*)", "expected one group"),
        ("(a)(b)", "(.*)", "found 2"),
    ],
)
def test_pairing_config_rejects_patterns_that_cannot_work(image, label, message):
    with pytest.raises(ConfigError, match=message):
        PairingConfig(image_pattern=image, label_pattern=label)


@pytest.mark.parametrize("name", ["b_x.NPY", "b_x.npy.gz"])
def test_pairing_does_not_let_a_volume_of_another_ending_pass_in_silence(name):
    with pytest.raises(PairingError, match=r"are \.npy by their name but match no naming pattern"):
        pair_cases(objects("a_x.npy", name), objects("a_y.npy"))


def test_pairing_never_makes_an_object_its_own_label():
    listing = objects("a_x.npy", "b_x.npy")
    with pytest.raises(PairingError, match="2 of 2 images have no label"):
        pair_cases(listing, listing, same_place=True)


COMPOSED, DECOMPOSED = "M\u00fcller", "Mu\u0308ller"


@given(keys=st.sets(keys, min_size=1, max_size=8), forms=st.tuples(*[st.sampled_from(["NFC", "NFD"])] * 2))
def test_pairing_joins_names_in_either_unicode_form_and_keeps_them_as_listed(keys, forms):
    images, labels = (
        [ObjectMeta(unicodedata.normalize(form, key) + suffix, 1) for key in sorted(keys)]
        for form, suffix in zip(forms, ("_x.npy", "_y.npy"), strict=True)
    )
    pairing = join_by_key(images, labels)
    assert not pairing.problems
    assert [case.case_id for case in pairing.cases] == sorted(keys)
    assert [case.image.name for case in pairing.cases] == [meta.name for meta in images]
    assert [case.label.name for case in pairing.cases] == [meta.name for meta in labels]


def test_pairing_shows_how_two_names_differ_that_look_the_same():
    images = objects(f"{COMPOSED}_x.npy", f"{DECOMPOSED}_x.npy")
    with pytest.raises(PairingError, match="share their key") as caught:
        pair_cases(images, objects(f"{COMPOSED}_y.npy"))
    assert "'M\\xfcller_x.npy'" in str(caught.value)
    assert "'Mu\\u0308ller_x.npy'" in str(caught.value)


def test_pairing_shows_what_cannot_be_seen_in_an_unpaired_name():
    with pytest.raises(PairingError, match="have no label") as caught:
        pair_cases(objects("a_x.npy", "b\u200b_x.npy"), objects("a_y.npy"))
    assert "'b\\u200b_x.npy'" in str(caught.value)


def test_patterns_match_names_in_either_form():
    config = PairingConfig(image_pattern=rf"{COMPOSED}(\d)\.npy", label_pattern=rf"{DECOMPOSED}(\d)\.npy")
    assert len(pair_cases(objects(f"{DECOMPOSED}1.npy"), objects(f"{COMPOSED}1.npy"), config).cases) == 1


def test_images_without_labels_have_keys_of_one_form(tmp_path):
    (tmp_path / f"{DECOMPOSED}_x.npy").touch()
    assert [image.case_id for image in list_images(str(tmp_path))] == [COMPOSED]
    (tmp_path / f"{COMPOSED}_x.npy").touch()
    with pytest.raises(PairingError) as caught:
        list_images(str(tmp_path))
    assert "\\xfc" in str(caught.value)
    assert "\\u0308" in str(caught.value)


def test_affines_are_found_by_either_form_of_a_name(tmp_path):
    (tmp_path / f"{DECOMPOSED}.json").write_text("{}")
    assert list(list_geometry(str(tmp_path))) == [COMPOSED]
