"""Classes that a label lacks, and labels without foreground."""

import io

import pyarrow.parquet as pq
import pytest

from ingest.errors import ConfigError
from train.inference import absent_classes
from train.validate import CaseScore, merge, to_parquet

HAS_BOTH = CaseScore(0, "a", [0.5, 0.7], [True, True])
HAS_ONE = CaseScore(1, "b", [0.8, 1.0], [True, False])
EMPTY = CaseScore(2, "c", [1.0, 0.0], [False, False])


def test_the_mean_over_present_classes_stands_beside_the_mean_over_all():
    scores = merge([[HAS_BOTH, EMPTY], [HAS_ONE]], 3)
    assert scores.mean_dice == pytest.approx(4.0 / 6)
    assert scores.mean_dice_present == pytest.approx((0.6 + 0.8) / 2)
    assert "over the classes present, mean Dice is 0.7000; 1 of 3 cases have an empty label" in absent_classes(scores)


def test_the_saved_scores_mark_cases_whose_label_is_empty():
    table = pq.read_table(io.BytesIO(to_parquet([HAS_BOTH, HAS_ONE, EMPTY])))
    assert table["empty"].to_pylist() == [False, False, True]
    assert table["mean_dice_present"].to_pylist() == [pytest.approx(0.6), 0.8, None]


def test_held_out_cases_whose_labels_are_all_empty_are_an_error():
    with pytest.raises(ConfigError, match="found only background in all 1, first: c"):
        merge([[EMPTY], []], 1)
