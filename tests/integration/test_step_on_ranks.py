"""Steps of several parts, and steps that are not finite, in whole runs."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ingest.augment import AugmentConfig
from ingest.index import index_cases
from ingest.pipeline import training_dataset
from ingest.stores import open_store
from tests.integration.test_train import quiet, tiny
from train.audit import audit
from train.batches import ToTensors
from train.checkpoint import load_state, name_latest, read_position
from train.config import Recipe
from train.finite import NonFiniteError
from train.launch import run
from train.loss import DiceCELoss
from train.optimizer import OptimizerConfig
from train.unet3d import UNet3D

pytestmark = pytest.mark.usefixtures("ray_here")


RATE = 0.1


def all_cases(recipe: Recipe) -> Recipe:
    """65 cases and none held out: two steps of 32 an epoch, and a tail of one."""
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, holdout_fraction=0.0),
        optimizer=OptimizerConfig(name="sgd", learning_rate=RATE, warmup_epochs=0),
    )


def trained_by_32(recipe: Recipe, epochs: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """A plain loop of steps of 32 over the same samples: weights, and the mean loss of each epoch."""
    manifest = index_cases(recipe.data.images, recipe.data.labels).manifest
    samples = training_dataset(manifest, recipe.data, multiple=32, batch=32)
    torch.manual_seed(recipe.data.seed)
    network, loss_of, means = UNet3D(recipe.model), DiceCELoss(), []
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9, nesterov=True)
    for _ in range(epochs):
        losses = []
        for batch in samples.iter_torch_batches(batch_size=32, collate_fn=ToTensors()):
            assert len(batch["index"]) == 32
            loss = loss_of(network(batch["image"]), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert len(losses) == 2
        means.append(sum(losses) / 2)
    return network.state_dict(), means


def same_weights(run_dir: str, wanted: dict[str, torch.Tensor]) -> None:
    found = load_state(run_dir, read_position(run_dir).checkpoint)["model"]
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)


@pytest.mark.crash  # not for crashes: it starts two whole runs
def test_two_parts_of_16_end_as_32_do_resumed_in_mid_epoch_on_other_ranks_or_not(places, tmp_path):
    options = {"evaluate_every": 0, "epochs": 2, "checkpoint_every_steps": 1, "checkpoints_kept": 9}
    options["ledger"] = str(tmp_path / "ledger")
    recipe = all_cases(tiny(places.local, tmp_path / "parts", num_workers=1, batch_size=16, accumulate=2, **options))
    wanted, losses = trained_by_32(recipe, epochs=2)
    parts = run(recipe, "tiny", quiet())
    same_weights(parts.run_dir, wanted)
    assert [(row["step"], row["tail"]) for row in parts.rows] == [(2, 1), (4, 1)]
    assert [row["train_loss"] for row in parts.rows] == pytest.approx(losses, abs=1e-5)

    # Back to the middle of the second epoch, and on from there with two ranks, each taking its 16 in two parts of 8.
    positions = Path(parts.run_dir).glob("checkpoint_*/position.json")
    (middle,) = (file.parent for file in positions if json.loads(file.read_text())["step"] == 3)
    name_latest(parts.run_dir, middle.name)
    position = read_position(parts.run_dir)
    assert (position.epoch, position.step, len(position.before.indices)) == (1, 3, 32)
    trainer = dataclasses.replace(recipe.trainer, num_workers=2, batch_size=8, resume=parts.run_dir)
    resumed = run(dataclasses.replace(recipe, trainer=trainer), "tiny", quiet())
    assert read_position(resumed.run_dir).checkpoint != middle.name
    assert [row["step"] for row in resumed.rows] == [2, 4]
    assert resumed.rows[1]["ranks"] == 2
    assert [row["train_loss"] for row in resumed.rows] == pytest.approx(losses, abs=1e-5)
    same_weights(resumed.run_dir, wanted)
    found = audit(resumed.run_dir)
    assert found.passed, found
    assert found.rolled_back == 1
    assert [(epoch.cases, epoch.once, epoch.tail) for epoch in found.epochs] == [(65, 64, 1)] * 2


def test_a_case_whose_loss_turns_nan_ends_the_run_by_its_name_and_no_start_is_wasted_on_it(places, tmp_path):
    for role in ("images", "labels"):
        source, target = open_store(f"{places.local}{role}/"), open_store(f"{tmp_path}/set/{role}/")
        for entry in source.list():
            target.put(entry.name, source.fetch([entry])[0])
    path = tmp_path / "set" / "images" / "case_00011_x.npy"
    np.save(
        path, np.full_like(np.load(path), 3e38)
    )  # finite, so it decodes; brightness of 1.7 to 2.3 makes it infinite
    ledger = tmp_path / "ledger"
    options = {"evaluate_every": 0, "max_failures": -1, "ledger": str(ledger), "accumulate": 2}
    recipe = all_cases(tiny(f"{tmp_path}/set/", tmp_path / "run", **options))
    augment = AugmentConfig(brightness_probability=1.0)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, augment=augment))
    with pytest.raises(NonFiniteError, match=r"not finite for 1 of its 16 cases: case_00011; look at") as caught:
        run(recipe, "tiny", quiet())
    assert caught.value.case_ids == ("case_00011",)
    report = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert report["case_ids"] == ["case_00011"]
    assert report["epoch"] == 0
    assert report["gradient_norm"] == ["nan", "nan"]
    losses = report["loss_by_case"]
    assert len(losses) == 16
    assert losses.pop("case_00011") == "nan"
    assert all(0 < loss < 5 for loss in losses.values())
    attempts = list(ledger.glob("*.jsonl"))
    assert len(attempts) == 2  # of the one attempt's two ranks
    lines = [json.loads(line) for file in attempts for line in file.read_text().splitlines()[1:]]
    assert all(line["step"] < report["step"] for line in lines)
    assert read_position(str(tmp_path / "run")).checkpoint is None
