"""Pictures of cases: the slice that is shown, the colours, and files that really are pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from ingest.errors import ConfigError
from ingest.overlay import COLOURS, OPACITY, class_colour, draw_overlays, draw_slice, informative_slice, save_figure


def ball_case(name: str, shape: tuple[int, int, int] = (24, 30, 36)) -> tuple[str, np.ndarray, np.ndarray]:
    """A bright ball with a core of class 2 in a shell of class 1."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    radius = np.sqrt((grid**2).sum(axis=0))
    label = np.where(radius < 0.35, 2, np.where(radius < 0.7, 1, 0)).astype(np.uint8)
    image = (label + np.random.default_rng(0).normal(0, 0.2, shape)).astype(np.float32)
    return name, image[None], label[None]


def test_the_slice_shown_is_the_middle_one_among_those_with_the_most_classes() -> None:
    label = np.zeros((11, 4, 4), np.uint8)
    label[1:10, :, :] = 1
    assert informative_slice(label) == 5
    label[8, 0, 0] = 2
    assert informative_slice(label) == 8


def test_a_slice_with_far_more_foreground_beats_the_middle() -> None:
    label = np.zeros((11, 10, 10), np.uint8)
    label[4:7, 0, 0] = 1
    label[9] = 1
    assert informative_slice(label) == 9


def test_without_foreground_the_middle_slice_is_shown() -> None:
    assert informative_slice(np.zeros((9, 4, 4), np.uint8)) == 4
    assert informative_slice(np.zeros((1, 4, 4), np.uint8)) == 0


def test_labels_are_drawn_in_the_class_colours() -> None:
    axes = Figure().subplots()
    draw_slice(axes, np.zeros((2, 2)), np.array([[0, 1], [2, 9]]))
    overlay = np.asarray(axes.images[1].get_array())
    assert overlay[0, 0, 3] == 0
    assert overlay[0, 1].tolist() == pytest.approx([0xE6 / 255, 0x9F / 255, 0, OPACITY], abs=1e-6)
    assert class_colour(9) == COLOURS[1]


def test_a_grid_of_cases_becomes_a_png(tmp_path: Path) -> None:
    path = tmp_path / "made" / "grid.png"
    draw_overlays([ball_case(f"case_{i:05d}") for i in range(5)], path)
    picture = imread(path)
    assert picture.ndim == 3
    assert picture.shape[1] > picture.shape[0] > 300
    assert picture[..., :3].std() > 0.05


def test_odd_cases_are_drawn_without_a_warning(tmp_path: Path) -> None:
    name, image, label = ball_case("$unclosed_{ 症例 é.npy", (1, 8, 8))
    image[0, 0, 0, 0] = np.nan
    flat = ("flat", np.zeros((2, 3, 4, 5), np.float32), np.zeros((1, 3, 4, 5), np.uint8))
    nothing = ("nan", np.full((1, 3, 4, 5), np.nan, np.float32), np.zeros((1, 3, 4, 5), np.uint8))
    draw_overlays([(name, image, label), flat, nothing], tmp_path / "odd.png")
    assert (tmp_path / "odd.png").stat().st_size > 1000


def test_cases_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found none"):
        draw_overlays([], tmp_path / "x.png")
    name, image, label = ball_case("case_7")
    with pytest.raises(ConfigError, match=r"case_7: expected .*\(1, 24, 30, 36\) and \(1, 23, 30, 36\)"):
        draw_overlays([(name, image, label[:, 1:])], tmp_path / "x.png")


def test_a_figure_is_written_over_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    save_figure(Figure(figsize=(1, 1)), path)
    assert imread(path).shape == (120, 120, 4)
