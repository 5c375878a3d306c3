"""How large a read task is whose volumes are read in part: by what it hands on, within bounds of what it reads."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ingest.augment import AugmentConfig, PatchSampler
from ingest.crop import CropConfig
from ingest.decode import DecodeConfig
from ingest.fetch import FetchConfig
from ingest.layout import Known, Layout
from ingest.manifest import Manifest, cases_of
from ingest.pairing import Case
from ingest.plan import ShardConfig, shard_bounds
from ingest.slab import READ_FOR_ONE, Slabs
from ingest.stores.base import ObjectMeta

SHARDS = ShardConfig()


def slabs(patch: tuple[int, int, int], channels: int = 1) -> Slabs:
    sampler = PatchSampler(crop=CropConfig(patch=patch), augment=AugmentConfig(), seed=0)
    return Slabs(sampler=sampler, decode=DecodeConfig(channels=channels), least_bytes=FetchConfig().slab_image_bytes)


def manifest_of(
    label_bytes: list[int], *, pinned: list[tuple[bool, bool]] | None = None, channels: int = 1
) -> Manifest:
    """Images of four bytes a voxel and channel, labels of one; of those that are not pinned no generation is known."""
    pinned = pinned or [(True, True)] * len(label_bytes)
    cases = []
    for number, (size, known) in enumerate(zip(label_bytes, pinned, strict=True)):
        of_image, of_label = (1 if each else None for each in known)
        image = ObjectMeta(f"{number}_x", 4 * channels * size, of_image)
        cases.append(Case(f"{number:05d}", image, ObjectMeta(f"{number}_y", size, of_label)))
    return Manifest.from_cases(cases, images_uri="gs://b/images/", labels_uri="gs://b/labels/")


# Voxels where patches of 32 and of 128 cubed begin to be cut: at 8 MiB, and at four thirds of the patch.
EDGES = [2**21 - 1, 2**21, 4 * 128**3 // 3, 4 * 128**3 // 3 + 1]


@given(
    found=st.lists(
        st.tuples(
            st.integers(20, 400).map(lambda side: side**3) | st.sampled_from(EDGES), st.booleans(), st.booleans()
        ),
        min_size=1,
        max_size=30,
    ),
    patch=st.sampled_from([(32, 32, 32), (128, 128, 128), (16, 256, 256)]),
)
def test_a_case_weighs_both_its_objects_or_where_its_patch_is_cut_no_less_than_the_patch(found, patch):
    cutter = slabs(patch)
    manifest = manifest_of([size for size, _, _ in found], pinned=[known for _, *known in found])
    cut = np.array([cutter.takes(case) for case in cases_of(manifest.table)])
    weights, whole = cutter.shard_weights(manifest.table), manifest.case_bytes()
    assert weights.dtype == np.int64
    np.testing.assert_array_equal(weights[~cut], whole[~cut])
    assert np.all(weights[cut] >= sum(map(len, cutter.blank())))
    assert np.all(weights[cut] < whole[cut])


def test_a_shard_of_large_volumes_holds_more_of_them_where_they_are_read_in_part():
    manifest = manifest_of([311**3] * 240)  # 147 MB each
    by_slabs = shard_bounds(slabs((128, 128, 128)).shard_weights(manifest.table), SHARDS, unit=2)
    assert set(np.diff(by_slabs).tolist()) == {4}
    assert set(np.diff(shard_bounds(manifest.case_bytes(), SHARDS, unit=2)).tolist()) == {2}


def test_a_shard_of_small_patches_out_of_large_volumes_reads_no_more_than_a_bound():
    manifest = manifest_of([311**3] * 6000)
    bounds = shard_bounds(slabs((32, 32, 32)).shard_weights(manifest.table), SHARDS)
    slab_bytes = 5 * 32 * 311**2  # of a shard's patches alone, 768 cases would be allowed: 12 GB
    assert 5 < np.diff(bounds).max() < READ_FOR_ONE * SHARDS.shard_bytes / slab_bytes


def test_flat_volumes_whose_shape_is_told_weigh_what_is_read_of_them_and_not_of_a_cube():
    shape = (20, 1024, 1024)
    manifest = manifest_of([20 * 2**20] * 8, channels=4)
    known = [Known(Layout(128, 128, shape), ())] * 4 + [None] * 4
    told = manifest.with_known(known).table
    whole = int(manifest.case_bytes()[0])
    thick, thin = (slabs((depth, 128, 128), channels=4).shard_weights(told) for depth in (16, 4))
    assert set(thick[:4].tolist()) == {whole // READ_FOR_ONE}  # 16 of 20 planes: read whole
    assert thick[4] < whole // READ_FOR_ONE
    assert set(thin[:4].tolist()) == {(16 * 20 * 2**20 // 5 + 20 * 2**20) // READ_FOR_ONE}
