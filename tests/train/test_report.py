"""The run's table and pictures."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from ingest.errors import ConfigError
from train.report import epoch_table, plot_case, plot_curves


def rows(count: int = 6) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "train_loss": math.exp(-epoch / 3),
            "mean_dice": None if epoch == 2 else 0.9 - 0.5 * math.exp(-epoch / 2),
            "learning_rate": 0.05,
            "samples_per_s": 41.26,
            "first_batch_s": 1.5,
            "stall_share": 0.123,
            "au": None if epoch == 0 else 0.91,
        }
        for epoch in range(count)
    ]


def printed(table: object) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(table)
    return out.getvalue()


def test_the_table_has_a_line_an_epoch_with_its_units() -> None:
    text = printed(epoch_table(rows(3)))
    assert "mean Dice" in text
    for value in ("0.7165", "41.3", "12.3%", "91.0%", "1.50", "0.05"):
        assert value in text, value


def test_the_table_shows_a_dash_for_what_an_epoch_lacks() -> None:
    line = next(line for line in printed(epoch_table([{"epoch": 4}])).splitlines() if " 5 " in line)
    assert line.count(" - ") == 7


def epochs_of(text: str) -> list[int]:
    cells = [line.split("│")[1].strip() for line in text.splitlines() if line.count("│") > 2]
    return [int(cell) for cell in cells if cell.isdigit()]


def test_the_table_counts_epochs_from_1() -> None:
    assert epochs_of(printed(epoch_table(rows(3)))) == [1, 2, 3]


def test_the_table_of_a_run_that_was_stopped_in_its_first_epoch_is_empty() -> None:
    assert epoch_table([]).row_count == 0


def test_a_table_of_40_epochs_is_printed_whole() -> None:
    text = printed(epoch_table(rows(40)))
    assert epochs_of(text) == list(range(1, 41))
    assert "of 40 epochs" not in text


def test_a_longer_table_has_the_first_the_last_the_best_and_those_with_problems() -> None:
    many = rows(512)
    many[99]["mean_dice"] = 0.99
    many[199]["train_loss"] = None
    many[299]["stall_share"] = 0.6
    text = printed(epoch_table(many))
    assert epochs_of(text) == [1, 2, 3, 4, 5, 100, 200, 300, 508, 509, 510, 511, 512]
    assert "13 of 512 epochs: the first and last 5, the best, those with problems" in text


def test_a_long_table_full_of_problems_stays_short_and_says_how_many_there_are() -> None:
    many = [{**row, "train_loss": None, "mean_dice": None} for row in rows(512)]
    text = printed(epoch_table(many))
    assert epochs_of(text) == [*range(1, 21), *range(508, 513)]
    assert "25 of 512 epochs: the first and last 5, those with problems (the first 20 of 512)" in " ".join(text.split())


def test_a_row_of_the_best_names_the_first_of_equals() -> None:
    many = [{**row, "mean_dice": 0.5} for row in rows(100)]
    assert epochs_of(printed(epoch_table(many))) == [1, 2, 3, 4, 5, 96, 97, 98, 99, 100]


def test_curves_count_epochs_from_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("train.report.save_figure", lambda figure, path: drawn.append(figure))
    plot_curves(rows(4), tmp_path / "curves.png")
    loss, dice = drawn[0].axes
    assert loss.lines[0].get_xdata().tolist() == [1, 2, 3, 4]
    assert dice.lines[0].get_xdata().tolist() == [1, 2, 4]
    assert dice.get_title().endswith("at epoch 4")


def test_curves_become_a_png(tmp_path: Path) -> None:
    plot_curves(rows(), tmp_path / "run" / "curves.png")
    assert imread(tmp_path / "run" / "curves.png").std() > 0.01


def test_curves_survive_rows_that_lack_everything(tmp_path: Path) -> None:
    empty = dict.fromkeys(rows(1)[0])
    for lacking in ([], [{}], [empty], [{"epoch": 0, "train_loss": math.nan}], rows(1)):
        plot_curves(lacking, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").stat().st_size > 1000
        (tmp_path / "curves.png").unlink()


def test_a_case_becomes_a_png_of_three_panels(tmp_path: Path) -> None:
    truth = np.zeros((20, 24, 28), np.uint8)
    truth[5:15, 4:20, 4:24] = 1
    truth[8:12, 8:16, 8:20] = 2
    image = truth + np.random.default_rng(0).normal(0, 0.2, truth.shape)
    plot_case(image, truth, np.roll(truth, 2, axis=1), tmp_path / "case.png", "case_00001: mean Dice 0.83 $")
    picture = imread(tmp_path / "case.png")
    assert picture.shape[1] == 1200


def test_a_case_of_unequal_shapes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one shape"):
        plot_case(np.zeros((2, 3, 4)), np.zeros((2, 3, 4)), np.zeros((2, 3, 5)), tmp_path / "x.png", "")


def test_drawing_leaves_pyplot_alone() -> None:
    # In a process of its own: other tests' libraries may have imported pyplot into this one.
    code = "import sys, train.report, ingest.overlay; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
