"""A finished run's Dice by class comes from its scores by case, and from nothing that contradicts them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from benchmarks.__main__ import main
from benchmarks.quality import QualityConfig, run
from ingest.errors import ConfigError
from train.validate import CaseScore, merge, save_scores

DICE = {0: [[0.5, 0.75], [0.25, 1.0]], 2: [[0.9, 0.7], [0.8, 0.6]]}


def a_run(folder: Path) -> Path:
    """Three epochs, of which the first and the last were scored on two cases."""
    rows = []
    for epoch in range(3):
        row = {"epoch": epoch, "train_loss": 0.5 / (epoch + 1), "mean_dice": None, "wall_s": 20.0}
        if epoch in DICE:
            scores = merge(
                [[CaseScore(n, f"case_{n}", dice, [True] * len(dice)) for n, dice in enumerate(DICE[epoch])]], 2
            )
            save_scores(str(folder), epoch, scores)
            row |= {"mean_dice": scores.mean_dice, "scored": 2, "evaluate_s": 10.0}
        rows.append(row)
    (folder / "metrics.json").write_text(json.dumps(rows))
    return folder


def test_the_table_the_json_and_the_curve_have_the_means_of_the_scores_by_case(tmp_path: Path) -> None:
    out, file = io.StringIO(), tmp_path / "out" / "quality.json"
    config = QualityConfig(run_dir=str(a_run(tmp_path)), json=file)
    assert run(config, Console(file=out, width=60)) == 0
    printed = out.getvalue().splitlines()
    start = printed.index("| after epoch | grey matter Dice | white matter Dice | mean | lowest case |")
    assert printed[start + 1 : start + 4] == [
        "|---|---|---|---|---|",
        "| 1 | 0.3750 | 0.8750 | 0.6250 | 0.6250 |",
        "| 3 | 0.8500 | 0.6500 | 0.7500 | 0.7000 |",
    ]
    assert "3 epochs in 1.3 min, 2 held-out cases; best after epoch 3: mean Dice 0.7500, lowest case 0.7000" in printed
    saved = json.loads(file.read_text())
    assert [row["grey matter"] for row in saved["rows"]] == pytest.approx([0.375, 0.85])
    assert saved["meta"]["best"]["epochs"] == 3
    assert np.ptp(imread(file.with_suffix(".png"))) > 0.5


def test_an_epoch_without_a_loss_is_null_in_the_json_and_a_gap_in_the_curve(tmp_path: Path) -> None:
    folder, file = a_run(tmp_path), tmp_path / "out" / "quality.json"
    rows = json.loads((folder / "metrics.json").read_text())
    rows[-1]["train_loss"] = None  # it was not finite
    (folder / "metrics.json").write_text(json.dumps(rows))
    assert run(QualityConfig(run_dir=str(folder), json=file), Console(quiet=True)) == 0
    assert json.loads(file.read_text())["meta"]["train_loss"] == [0.5, 0.25, None]


def test_scores_that_are_not_those_which_the_run_reported_are_refused(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    save_scores(
        str(folder),
        2,
        merge([[CaseScore(0, "case_0", [0.9, 0.7], [True] * 2), CaseScore(1, "case_1", [0.8, 0.61], [True] * 2)]], 2),
    )
    with pytest.raises(ConfigError, match=r"expected the mean Dice that the run reported, 0\.75.*found 0\.7525"):
        run(QualityConfig(run_dir=str(folder)), Console(quiet=True))
    (folder / "scores" / "epoch-00002.parquet").unlink()
    with pytest.raises(ConfigError, match=r"scores by case of epoch 3 .*found none"):
        run(QualityConfig(run_dir=str(folder)), Console(quiet=True))


def test_a_folder_without_scores_and_a_class_too_many_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quality", str(tmp_path)]) == 1
    assert "expected scored epochs" in capsys.readouterr().err
    assert main(["quality", str(a_run(tmp_path)), "--classes", "kidney", "tumour", "cyst"]) == 1
    assert "expected Dice of 3 classes, kidney, tumour, cyst" in capsys.readouterr().err
