"""The crop against a direct simulation of MLPerf's formula: 20,000 draws of each, compared cell by cell.

The formula is FACTS section 4's, written again here from its words, with Python's generator as the reference has it.
Seeds are fixed, so a test that passes passes always. A p of 1e-4 or more is what one in 10,000 seeds of a right law
would miss; each deliberately wrong law comes out below 1e-30.
"""

from __future__ import annotations

import functools
import random
from collections import Counter

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from ingest.augment import NO_AUGMENTATION, draw
from ingest.crop import CropConfig, foreground_boxes
from ingest.plan import TRANSFORM, stream

DRAWS = 20_000
PATCH = (6, 5, 4)
SHAPE = (11, 9, 10)

Start = tuple[int, int, int]


def a_label() -> np.ndarray:
    """Class 1 has three components, one of them at the border; class 3 has one, longer than the patch along D and H."""
    label = np.zeros(SHAPE, np.uint8)
    label[0:2, 1:4, 2:4] = 1
    label[7:9, 5:8, 6:9] = 1
    label[5, 8, 0] = 1
    label[2:10, 1:8, 5] = 3
    return label


@functools.cache
def boxes_by_volume(value: int) -> list[tuple[slice, ...]]:
    components, _ = scipy.ndimage.label(a_label() == value)
    boxes = scipy.ndimage.find_objects(components)
    return sorted(boxes, key=lambda box: int(np.prod([extent.stop - extent.start for extent in box])))


FOREGROUND = a_label()[a_label() > 0].tolist()


def randrange(rng: random.Random, stop: int) -> int:
    return rng.randrange(stop) if stop > 0 else 0


def simulated(
    rng: random.Random,
    *,
    share: float = 0.4,
    components_kept: int = 2,
    last_start: bool = False,
    beyond: int = 0,
    by_voxel: bool = False,
) -> Start:
    """One crop's start by the formula; the keywords bend it into laws that are wrong."""
    if rng.random() >= share:
        extra = 1 if last_start else 0
        return tuple(randrange(rng, s - p + extra) for s, p in zip(SHAPE, PATCH, strict=True))  # type: ignore[return-value]
    chosen = rng.choice(FOREGROUND if by_voxel else sorted(set(FOREGROUND)))
    box = rng.choice(boxes_by_volume(chosen)[-components_kept:])
    start = []
    for extent, patch, size in zip(box, PATCH, SHAPE, strict=True):
        difference = abs(patch - (extent.stop - extent.start))
        before = randrange(rng, difference + beyond)
        after = difference - before
        if extent.stop - extent.start <= patch:
            low, high = max(0, extent.start - before), min(size, extent.stop + after)
        else:
            low, high = extent.start + before, extent.stop - after
        missing = patch - (high - low)
        if missing > 0 and low != 0:
            low -= missing
        start.append(low)
    return start[0], start[1], start[2]


def drawn(config: CropConfig) -> Counter[Start]:
    """What ingest draws for 20 cases in 1,000 epochs: each a function of (seed, epoch, case) alone."""
    label = a_label()[None]
    boxes = foreground_boxes(label)
    return Counter(
        draw(label, config, NO_AUGMENTATION, stream(17, epoch, case, TRANSFORM), lambda: boxes).start
        for epoch in range(DRAWS // 20)
        for case in range(20)
    )


def simulation(seed: int, **bent) -> Counter[Start]:
    rng = random.Random(seed)
    return Counter(simulated(rng, **bent) for _ in range(DRAWS))


def p_value(one: Counter[Start], other: Counter[Start]) -> float:
    """Of the chi-square test that both were drawn by one law; starts seen fewer than 20 times are one cell."""
    cells = sorted(one.keys() | other.keys())
    counts = np.array([[one[cell], other[cell]] for cell in cells]).T
    rare = counts.sum(axis=0) < 20
    table = np.column_stack([counts[:, ~rare], counts[:, rare].sum(axis=1)])
    return float(scipy.stats.chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue)


@functools.cache
def ours(share: float, starts: str) -> Counter[Start]:
    return drawn(CropConfig(patch=PATCH, foreground_probability=share, random_starts=starts))  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0], ids=["random", "both", "foreground"])
def test_crops_follow_the_formula(share: float) -> None:
    assert p_value(ours(share, "mlperf"), simulation(1, share=share)) > 1e-4


def test_by_default_the_last_start_is_drawn_too_and_nothing_else_differs() -> None:
    assert p_value(ours(0.4, "all"), simulation(2, last_start=True)) > 1e-4
    assert (5, 4, 6) in ours(0.0, "all")
    assert max(ours(0.0, "mlperf")) < (5, 0, 0)


@pytest.mark.parametrize(
    "bent",
    [
        {"share": 0.5},
        {"components_kept": 1},
        {"components_kept": 3},
        {"last_start": True},
        {"beyond": 1},
        {"by_voxel": True},
    ],
    ids=lambda bent: next(iter(bent)),
)
def test_a_wrong_law_is_found_out(bent: dict[str, object]) -> None:
    assert p_value(ours(0.4, "mlperf"), simulation(3, **bent)) < 1e-30
