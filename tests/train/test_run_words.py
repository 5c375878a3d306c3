"""The lines that end a run count epochs from 1, as those before them do."""

from train import launch
from train.commands import run_recipe


def test_the_last_lines_of_a_run_count_epochs_from_1(monkeypatch, capsys):
    dice = (0.4, 0.9, None, 0.8)
    rows = [{"epoch": epoch, "mean_dice": value, "scored": 26} for epoch, value in enumerate(dice)]
    outcome = launch.Outcome("gs://b/run", rows, "gs://b/run/checkpoint_4", [])
    monkeypatch.setattr(launch, "run", lambda *_: outcome)
    assert run_recipe(["demo", "--trainer.epochs", "4", "--trainer.quality-threshold", "0.85"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "mean Dice on 26 held-out cases after epoch 4: 0.8000",
        "quality threshold 0.85: reached after epoch 2",
        "checkpoint: gs://b/run/checkpoint_4",
        "best:       gs://b/run/best (epoch 2, mean Dice 0.9000)",
    ]
