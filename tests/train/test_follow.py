"""The lines that a run shows of itself."""

from __future__ import annotations

from train.follow import epoch_line, progress_text
from train.monitor import Progress

ROW = {"epoch": 1, "train_loss": 0.5, "mean_dice": 0.75, "samples_per_s": 20.0, "stall_share": 0.25}


def test_an_epochs_line_says_what_it_waited_for_most() -> None:
    causes = {"listing": 9.0, "fetching": 3.0, "transforming": 1.0}
    assert epoch_line({**ROW, "stall_by_cause_s": causes}, 8) == (
        "epoch 2/8: loss 0.5000, mean Dice 0.7500, 20.0 samples/s, stall 25.0% (fetching 75% of it)"
    )
    assert epoch_line({**ROW, "mean_dice": None}, 8) == "epoch 2/8: loss 0.5000, 20.0 samples/s, stall 25.0%"


def test_progress_shows_what_is_known_and_leaves_out_what_is_not() -> None:
    assert progress_text(Progress(), 8) == "starting"
    now = Progress(epoch=0, step=3, steps_per_epoch=30, steps_of_epoch=3, loss=0.61, samples_per_s=16.9, quarantined=2)
    assert progress_text(now, 8) == "epoch 1/8  step 3/30  loss 0.6100  samples/s 16.9  quarantined 2"
