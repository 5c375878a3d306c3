"""A figure that is missing: written as null, read as None, and never the best."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ingest.errors import ConfigError
from ingest.pipeline import DataConfig
from ingest.quarantine import QuarantineBook, QuarantineEntry
from ingest.stores import open_store
from train.best import is_best, reached
from train.config import Recipe
from train.evaluate import SlidingWindowConfig
from train.follow import epoch_line
from train.metrics import METRICS_FILE, MetricsWriter, read_metrics
from train.page import page_of
from train.plain_json import of_json, to_json
from train.report import epoch_table
from train.validate import CaseScore, evaluate


def strict(text: bytes) -> object:
    """What a reader that takes no NaN makes of it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def row(epoch: int, dice: float | None, **changes) -> dict:
    return {
        "epoch": epoch,
        "step": epoch + 1,
        "train_loss": 0.5,
        "mean_dice": dice,
        "learning_rate": 0.1,
        "samples": 4,
        "samples_per_s": 1.0,
        "first_batch_s": 0.1,
        "stall_share": 0.0,
        "au": None,
        "wall_s": 1.0,
        "stall_s": 0.0,
        "stall_by_cause_s": {},
    } | changes


def test_figures_that_are_not_finite_are_null_wherever_they_stand():
    value = {"a": math.nan, "b": [1.0, math.inf, {"c": (-math.inf, 2)}], "d": "NaN"}
    assert strict(to_json(value).encode()) == {"a": None, "b": [1.0, None, {"c": [None, 2]}], "d": "NaN"}
    assert of_json('{"a": NaN, "b": [-Infinity, 1]}') == {"a": None, "b": [None, 1]}


def test_a_nan_never_wins_and_never_blocks_the_best():
    assert not is_best([row(0, math.nan)], row(0, math.nan))
    assert is_best([row(0, math.nan), row(1, 0.2)], row(1, 0.2))
    assert not is_best([row(0, math.nan), row(1, 0.3), row(2, 0.2)], row(2, 0.2))
    assert reached([row(0, math.nan)], 0.5, 1) is None


def test_an_epoch_whose_dice_is_nan_is_written_as_null_and_read_by_all(tmp_path):
    open_store(str(tmp_path)).put("recipe.json", Recipe().to_json().encode())
    odd = row(0, math.nan, dice_by_class=[math.nan, 0.5])
    MetricsWriter(str(tmp_path)).after_report(None, [{"row": odd, "ranks": 1, "checkpoint": "a"}], None)
    strict((tmp_path / METRICS_FILE).read_bytes())
    rows = read_metrics(str(tmp_path))
    assert rows[0]["mean_dice"] is None
    assert rows[0]["dice_by_class"] == [None, 0.5]
    assert "not scored" in page_of(str(tmp_path))
    epoch_table(rows)


def test_rows_with_nan_of_an_earlier_version_make_a_page_and_lines(tmp_path):
    open_store(str(tmp_path)).put("recipe.json", Recipe().to_json().encode())
    (tmp_path / METRICS_FILE).write_text(json.dumps([row(0, math.nan, train_loss=math.nan), row(1, 0.5)]))
    rows = read_metrics(str(tmp_path))
    assert "0.5000" in page_of(str(tmp_path))
    assert epoch_line(rows[0], 2).startswith("epoch 1/2: loss not known, 1.0 samples/s")
    epoch_table([row(0, math.nan)])


def test_a_setting_that_is_not_finite_is_named_and_not_written_as_no_json():
    recipe = Recipe()
    store = dataclasses.replace(recipe.data.store, retry_deadline_s=math.inf)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, store=store))
    with pytest.raises(ConfigError, match=r"--data\.store\.retry_deadline_s Infinity"):
        recipe.to_json()


def test_a_held_out_set_of_bad_cases_only_ends_the_run_at_its_first_scoring_and_says_why():
    book = QuarantineBook(None, 5)
    for index in (3, 5):
        book.report(QuarantineEntry(index, f"case_{index}", f"gs://b/case_{index}", "not-npy", "expected NPY", 0))
    holdout = SimpleNamespace(
        rows=[0, 1], indices=np.array([3, 5]), data=DataConfig(images="a", labels="b"), quarantine=book
    )
    shard = SimpleNamespace(iter_batches=lambda **_: [])
    network = torch.nn.Identity()
    with pytest.raises(ConfigError, match=r"all 2 in quarantine: case_3 \(not-npy\): expected NPY; case_5"):
        evaluate(network, holdout, SlidingWindowConfig(), shard, torch.device("cpu"))


def test_a_case_that_turned_bad_once_it_was_scored_counts_as_scored(monkeypatch):
    """As where Ray reads a lost block again, and a case of it is gone by then."""
    book = QuarantineBook(None, 5)
    for index in (3, 5):
        book.report(QuarantineEntry(index, f"case_{index}", f"gs://b/case_{index}", "missing", "expected it", 0))
    holdout = SimpleNamespace(
        rows=[0, 1, 2], indices=np.array([3, 4, 5]), data=DataConfig(images="a", labels="b"), quarantine=book
    )
    scored = [CaseScore(index, f"case_{index}", [0.5], [True]) for index in (4, 5)]
    monkeypatch.setattr("train.validate.score_rows", lambda *_: iter(scored))
    shard = SimpleNamespace(iter_batches=lambda **_: [])
    scores = evaluate(torch.nn.Identity(), holdout, SlidingWindowConfig(), shard, torch.device("cpu"))
    assert [score.index for score in scores.by_case] == [4, 5]


@pytest.mark.parametrize(("asked_after", "scored"), [(1, 1), (2, 2), (4, 3)])
def test_scoring_ends_after_the_case_that_is_under_way_when_the_run_is_asked_to_stop(monkeypatch, asked_after, scored):
    begun: list[int] = []

    def rows(*_):
        for index in (3, 4, 5):
            begun.append(index)
            yield CaseScore(index, f"case_{index}", [0.5], [True])

    monkeypatch.setattr("train.validate.score_rows", rows)
    holdout = SimpleNamespace(
        rows=[0, 1, 2], indices=np.array([3, 4, 5]), data=DataConfig(images="a", labels="b"), quarantine=None
    )
    shard = SimpleNamespace(iter_batches=lambda **_: [])
    scores = evaluate(
        torch.nn.Identity(),
        holdout,
        SlidingWindowConfig(),
        shard,
        torch.device("cpu"),
        lambda: len(begun) >= asked_after,
    )
    assert len(begun) == scored
    assert (scores is None) == (asked_after <= 3)
