"""Large volumes in part: the same samples as of whole ones, the same words for bad cases, and far fewer bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest import slab
from ingest.augment import AugmentConfig, PatchSampler
from ingest.crop import CropConfig, foreground_boxes
from ingest.decode import DecodeConfig, decode_case
from ingest.emulator import EmbeddedServer
from ingest.errors import ConfigError, DecodeError, StaleManifestError
from ingest.fetch import FetchConfig, ShardSpec, read_shard
from ingest.index import index_cases, look_up_cases
from ingest.layout import Known, Layout
from ingest.manifest import cases_of
from ingest.pairing import Case
from ingest.pipeline import sample_patches
from ingest.quarantine import BadCaseConfig, QuarantineBook
from ingest.slab import BadCase, Slabs
from ingest.stores import ObjectMeta, Store, StoreConfig, open_store
from ingest.stores.base import Bodies, Pieces, RangeRequest
from ingest.testing import FaultProxy, MemoryStore, npy_bytes

from .ruined import AFTER_LISTING, REASONS, files_of, make_set, ruin

PATCH = (4, 4, 4)


class Counting(MemoryStore):
    """Counts what leaves it."""

    read_bytes = 0
    whole: list[str]
    ranged: list[str]

    def reset(self) -> None:
        self.read_bytes, self.whole, self.ranged = 0, [], []

    def fetch_each(self, objects: Sequence[ObjectMeta]) -> Bodies:
        self.whole += [meta.name for meta in objects]
        self.read_bytes += sum(meta.size_bytes for meta in objects)
        return super().fetch_each(objects)

    def fetch_ranges(self, requests: Sequence[RangeRequest]) -> Pieces:
        self.ranged += [request.meta.name for request in requests]
        self.read_bytes += sum(request.stop - request.start for request in requests)
        bodies = MemoryStore(self.uri).fetch_each([request.meta for request in requests])
        return [
            body[request.start : request.stop] if isinstance(body, bytes) else body
            for request, body in zip(requests, bodies, strict=True)
        ]


def places(name: str) -> tuple[Counting, Counting]:
    images, labels = Counting(f"memory://{name}-images"), Counting(f"memory://{name}-labels")
    for store in (images, labels):
        store.create()
        store.reset()
        for meta in list(store.list()):
            store.delete(meta.name)
    slab.forget()
    return images, labels


def put_case(images: Store, labels: Store, image: np.ndarray, label: np.ndarray) -> Case:
    images.put("a_x.npy", npy_bytes(image))
    labels.put("a_y.npy", npy_bytes(label))
    return one_case(images, labels)


def one_case(images: Store, labels: Store) -> Case:
    (image,), (label,) = images.list(), labels.list()
    return Case("a", image, label)


def slabs(patch=PATCH, *, channels=1, foreground=0.4, seed=1, least_bytes=1) -> Slabs:
    return Slabs(
        sampler=PatchSampler(
            crop=CropConfig(patch=patch, foreground_probability=foreground), augment=AugmentConfig(), seed=seed
        ),
        decode=DecodeConfig(channels=channels),
        least_bytes=least_bytes,
    )


def volume(shape, *, channels=1, seed=0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, *shape])
    image = rng.standard_normal((channels, *shape)).astype(np.float32)
    label = (rng.random((1, *shape)) < 0.15).astype(np.uint8) * rng.integers(1, 3, (1, *shape), dtype=np.uint8)
    return image, label


def sampled(cutter: Slabs, image, label, *, epoch, index):
    out_image = np.full((cutter.decode.channels, *cutter.sampler.crop.patch), -9, np.float32)
    out_label = np.full((1, *cutter.sampler.crop.patch), 99, np.uint8)
    cutter.sampler(image, label, epoch=epoch, index=index, out_image=out_image, out_label=out_label)
    return out_image, out_label


def decoded(cutter: Slabs, patch: slab.Patch):
    return decode_case(*patch, cutter.decode, image_name="i", label_name="l", smallest=cutter.sampler.crop.patch)


sides = st.tuples(*[st.tuples(st.integers(1, 4), st.integers(0, 9))] * 3)


@given(
    sides=sides,
    channels=st.integers(1, 2),
    epoch=st.integers(0, 3),
    index=st.integers(0, 5),
    told=st.booleans(),
    foreground=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_a_sample_of_a_slab_is_that_of_the_whole_volume_bit_for_bit(sides, channels, epoch, index, told, foreground):
    patch = tuple(patch for patch, _ in sides)
    shape = tuple(patch + more for patch, more in sides)
    image, label = volume(shape, channels=channels)
    images, labels = places("property")
    case = put_case(images, labels, image, label)
    cutter = slabs(patch, channels=channels, foreground=foreground)
    known = slab.look_up(images, labels, case) if told else None
    if told:
        assert known == Known(Layout(128, 128, shape), foreground_boxes(label))
    cut = cutter.cut(images, labels, case, known, epoch=epoch, index=index)
    assert isinstance(cut, slab.Patch)
    found = sampled(cutter, *decoded(cutter, cut), epoch=epoch, index=index)
    wanted = sampled(cutter, image, label, epoch=epoch, index=index)
    for have, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(have, want)
    assert [len(part) for part in cut] == [len(part) for part in cutter.blank()]


@pytest.mark.parametrize("foreground", [0.0, 1.0])
def test_only_the_slab_is_read_and_what_was_found_is_not_looked_for_again(foreground):
    image, label = volume((64, 20, 12))
    images, labels = places("counting")
    case = put_case(images, labels, image, label)
    cutter = slabs((8, 6, 5), foreground=foreground)
    first = cutter.cut(images, labels, case, None, epoch=0, index=0)
    assert isinstance(first, slab.Patch)
    assert (images.whole, labels.whole) == ([], ["a_y.npy"] if foreground else [])
    images.reset()
    labels.reset()
    for epoch in range(1, 4):
        assert isinstance(cutter.cut(images, labels, case, None, epoch=epoch, index=0), slab.Patch)
    assert (images.whole, labels.whole) == ([], [])
    assert images.read_bytes == 3 * 8 * 6 * 12 * 4
    assert labels.read_bytes == 3 * 8 * 6 * 12
    slab.forget()
    images.reset()
    labels.reset()
    known = Known(Layout(128, 128, (64, 20, 12)), foreground_boxes(label))
    cutter.cut(images, labels, case, known, epoch=0, index=0)
    assert images.read_bytes + labels.read_bytes == 8 * 6 * 12 * 5


def test_an_overwritten_label_is_searched_anew():
    image, label = volume((32, 8, 8))
    images, labels = places("anew")
    cutter = slabs(foreground=1.0)
    cutter.cut(images, labels, put_case(images, labels, image, label), None, epoch=0, index=0)
    other = np.zeros_like(label)
    other[0, 3, 3, 3] = 1
    case = put_case(images, labels, image, other)
    for index in range(5):
        cut = cutter.cut(images, labels, case, None, epoch=0, index=index)
        assert isinstance(cut, slab.Patch)
        assert decoded(cutter, cut)[1].max() == 1


@pytest.mark.parametrize(
    "spoilt",
    [
        {"image": lambda image: np.asfortranarray(image)},
        {"label": lambda label: np.asfortranarray(label)},
    ],
    ids=["image", "label"],
)
def test_a_volume_in_fortran_order_is_read_whole_with_the_same_samples(spoilt):
    image, label = volume((16, 9, 8))
    images, labels = places("fortran")
    turned = (spoilt.get("image", np.array)(image), spoilt.get("label", np.array)(label))
    case = put_case(images, labels, *turned)
    cutter = slabs(foreground=1.0)
    for index in range(4):
        cut = cutter.cut(images, labels, case, None, epoch=0, index=index)
        assert isinstance(cut, slab.Patch)
        found = sampled(cutter, *decoded(cutter, cut), epoch=0, index=index)
        for have, want in zip(found, sampled(cutter, image, label, epoch=0, index=index), strict=True):
            np.testing.assert_array_equal(have, want)
    assert images.whole
    assert slab.look_up(images, labels, case) is None


def test_which_cases_are_cut_goes_by_the_listing_alone():
    def case(image_bytes: int, generation: int | None = 7):
        return Case(
            "a", ObjectMeta("a_x.npy", image_bytes, generation), ObjectMeta("a_y.npy", image_bytes // 4, generation)
        )

    cutter = slabs((8, 8, 8), least_bytes=10_000)
    assert cutter.takes(case(10_000))
    assert not cutter.takes(case(9_999))
    assert not cutter.takes(case(10_000, None))
    assert not slabs((16, 16, 16), least_bytes=1).takes(case(20_000))  # the patch is most of it


def case_in(root):
    images, labels = open_store(f"{root}/images"), open_store(f"{root}/labels")
    return images, labels, cases_of(index_cases(images.uri, labels.uri).manifest.table)


@pytest.mark.parametrize("kind", REASONS)
def test_a_bad_case_has_the_same_reason_and_object_at_fault_as_when_read_whole(tmp_path, kind):
    make_set(tmp_path, 1)
    if kind in AFTER_LISTING:
        images, labels, (case,) = case_in(tmp_path)
        at_fault = ruin(tmp_path, 0, kind)
    else:
        at_fault = ruin(tmp_path, 0, kind)
        images, labels, (case,) = case_in(tmp_path)
    slab.forget()
    patch = (8, 8, 8) if kind == "too-small" else (7, 7, 7) if kind in ("nan", "label-seven") else PATCH
    cutter = slabs(patch, foreground=1.0)
    outcomes = []
    for index in range(12):
        cut = cutter.cut(images, labels, case, None, epoch=0, index=index)
        if isinstance(cut, BadCase):
            outcomes.append((getattr(cut.error, "reason", None) or REASONS[kind], cut.role))
            assert str(at_fault) in str(cut.error)
            continue
        try:
            decoded(cutter, cut)
        except DecodeError as error:
            outcomes.append((error.reason, "label" if str(error).startswith("l: ") else "image"))
    assert set(outcomes) == {(REASONS[kind], "label" if at_fault.parent.name == "labels" else "image")}
    assert len(outcomes) == 12 or kind == "nan"  # a voxel that is in no patch spoils none


def shard(root, *, bad=None, book=None, manifest=None, cutter=None, epoch=0, block=4) -> ShardSpec:
    manifest = manifest or index_cases(f"{root}/images", f"{root}/labels").manifest
    return ShardSpec(
        images_uri=manifest.images_uri,
        labels_uri=manifest.labels_uri,
        store=StoreConfig(),
        fetch=FetchConfig(chunk_bytes=4000, chunks_ahead=1),
        epochs=np.full(len(manifest), epoch),
        block=block,
        rows=manifest.table,
        indices=np.arange(len(manifest), dtype=np.int64),
        bad=bad or BadCaseConfig(),
        quarantine=book,
        slabs=cutter,
    )


def samples_of(spec: ShardSpec, cutter: Slabs) -> dict[int, tuple[bytes, bytes]]:
    return {
        int(index): (image.tobytes(), label.tobytes())
        for raw in read_shard(spec)
        for samples in sample_patches(
            raw, sampler=cutter.sampler, decode=cutter.decode, batch=spec.block, quarantine=spec.quarantine
        )
        for index, image, label in zip(samples["index"], samples["image"], samples["label"], strict=True)
    }


def test_a_shard_in_slabs_with_boxes_or_without_gives_the_samples_of_a_shard_read_whole(tmp_path):
    make_set(tmp_path, 11)
    cutter = slabs(foreground=0.5)
    manifest = index_cases(f"{tmp_path}/images", f"{tmp_path}/labels").manifest
    told, known = look_up_cases(manifest)
    assert None not in known
    wanted = samples_of(shard(tmp_path, manifest=manifest), cutter)
    assert sorted(wanted) == list(range(11))
    assert samples_of(shard(tmp_path, manifest=told), cutter) == wanted
    for each in (manifest, told):
        slab.forget()
        assert samples_of(shard(tmp_path, manifest=each, cutter=cutter), cutter) == wanted


def test_small_and_large_cases_of_one_shard_keep_their_places(tmp_path):
    make_set(tmp_path, 6)
    for number in (1, 4):
        image, label = volume((30, 12, 12), seed=number)
        for file, array in zip(files_of(tmp_path, number), (image, label), strict=True):
            file.write_bytes(npy_bytes(array))
    cutter = slabs(least_bytes=8000)
    manifest = index_cases(f"{tmp_path}/images", f"{tmp_path}/labels").manifest
    assert [cutter.takes(case) for case in cases_of(manifest.table)] == [False, True, False, False, True, False]
    assert samples_of(shard(tmp_path, cutter=cutter), cutter) == samples_of(shard(tmp_path), cutter)


def test_a_blocks_bytes_are_the_same_whether_its_bad_cases_are_found_now_or_were_before(tmp_path):
    make_set(tmp_path, 8)
    kinds = {1: "wrong-dtype", 3: "gone", 4: "shape-mismatch", 6: "label-seven"}
    for number, kind in kinds.items():
        if kind not in AFTER_LISTING:
            ruin(tmp_path, number, kind)
    manifest = index_cases(f"{tmp_path}/images", f"{tmp_path}/labels").manifest
    ruin(tmp_path, 3, "gone")
    cutter = slabs(foreground=1.0)
    book = QuarantineBook(None, 8)
    bad = BadCaseConfig(on_bad="quarantine", on_stale="quarantine")
    slab.forget()
    first = list(read_shard(shard(tmp_path, bad=bad, book=book, manifest=manifest, cutter=cutter)))
    assert {entry.index: entry.reason for entry in book.entries()} == {n: REASONS[kind] for n, kind in kinds.items()}
    assert [entry.uri.rsplit("/", 1)[1] for entry in book.entries()] == [
        "case_00001_x.npy", "case_00003_x.npy", "case_00004_x.npy", "case_00006_y.npy"
    ]  # fmt: skip
    again = list(read_shard(shard(tmp_path, bad=bad, book=book, manifest=manifest, cutter=cutter)))
    assert [(table.num_rows, table.nbytes) for table in first] == [(table.num_rows, table.nbytes) for table in again]
    assert [left_out for table in first for left_out in table["left_out"].to_pylist()] == [n in kinds for n in range(8)]


def test_without_a_quarantine_a_bad_case_ends_the_shard_with_its_own_error(tmp_path):
    make_set(tmp_path, 3)
    ruin(tmp_path, 1, "wrong-dtype")
    with pytest.raises(DecodeError, match=r"case_00001_x\.npy: expected dtype float32"):
        list(read_shard(shard(tmp_path, cutter=slabs())))


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_stale_objects_are_read_as_they_are_now_though_a_manifest_knows_their_old_boxes(tmp_path, told, cut):
    make_set(tmp_path, 4)
    cutter = slabs(foreground=1.0)
    manifest = index_cases(f"{tmp_path}/images", f"{tmp_path}/labels").manifest
    if told:
        manifest, _ = look_up_cases(manifest)
    image, label = volume((12, 13, 14), seed=5)
    for file, array in zip(files_of(tmp_path, 2), (image, label), strict=True):
        file.unlink()
        file.write_bytes(npy_bytes(array))
    slab.forget()
    refresh = shard(tmp_path, manifest=manifest, bad=BadCaseConfig(on_stale="refresh"), cutter=cutter if cut else None)
    assert samples_of(refresh, cutter) == samples_of(shard(tmp_path), cutter)
    with pytest.raises(StaleManifestError):
        list(read_shard(shard(tmp_path, manifest=manifest, cutter=cutter if cut else None)))


def test_a_label_that_is_read_whole_is_searched_once_a_process(tmp_path):
    make_set(tmp_path, 2)
    cutter = slabs(foreground=1.0)
    slab.forget()
    spec = shard(tmp_path)
    first = samples_of(spec, cutter)
    assert len(slab._BOXES) == 2
    assert samples_of(spec, cutter) == first
    assert len(slab._BOXES) == 2


def test_a_cloud_gets_few_requests_and_a_folder_only_what_is_needed(
    gcs_server: EmbeddedServer, bucket: str, tmp_path, monkeypatch
):
    image, label = volume((64, 40, 40))
    with FaultProxy(gcs_server.url) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        images, labels = (open_store(f"gs://{bucket}/{role}", StoreConfig()) for role in ("images", "labels"))
        case = put_case(images, labels, image, label)
        slab.forget()
        cutter = slabs((16, 16, 16), foreground=0.0)
        there = cutter.cut(images, labels, case, None, epoch=0, index=0)
        assert proxy.requests["read"] == 4  # two headers, two slabs
    images, labels = open_store(f"{tmp_path}/images"), open_store(f"{tmp_path}/labels")
    here = cutter.cut(images, labels, put_case(images, labels, image, label), None, epoch=0, index=0)
    assert isinstance(there, slab.Patch)
    assert isinstance(here, slab.Patch)
    assert [bytes(part) for part in there] == [bytes(part) for part in here]


@pytest.mark.parametrize("settings", [{"slabs": "always"}, {"slab_image_bytes": 0}])
def test_settings_of_slabs_that_cannot_be_meant_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        FetchConfig(**settings)
