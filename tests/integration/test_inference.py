"""Validation, `evaluate` and `predict` on real runs: the same cases, the same scores, to the last bit."""

import dataclasses
import gzip
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
import ray.train
import torch
import torch.distributed

from ingest.errors import ConfigError, DecodeError, PairingError
from ingest.geometry import to_json
from ingest.index import index_cases
from ingest.pipeline import DataConfig
from ingest.stores import StoreConfig, open_store
from ingest.testing import make_cases, npy_bytes
from tests.integration.test_train import quiet, tiny
from train import checkpoint
from train.__main__ import main
from train.audit import audit
from train.best import BEST_FILE
from train.evaluate import SlidingWindowConfig, score_case
from train.holdout import HELD_OUT, Holdout, RankData
from train.inference import EvaluateConfig, PredictConfig, evaluate, predict
from train.launch import Outcome, run
from train.unet3d import UNet3D, UNet3DConfig
from train.validate import Scores
from train.validate import evaluate as evaluate_held_out
from train.weights import load_trained
from train.workers import WorkersConfig

pytestmark = pytest.mark.usefixtures("ray_here")

AFFINE = np.array([[0.0, 0, -1.2, 30], [0, 1.2, 0, -40], [1.6, 0, 0, 7], [0, 0, 0, 1]])
HALF = WorkersConfig(cpus_per_worker=0.5, use_gpu=False)
WINDOW = SlidingWindowConfig(roi=(8, 8, 8), overlap=0.25)


class Trained(NamedTuple):
    """A finished run, and the 42 cases that it was scored on."""

    outcome: Outcome
    images: str
    labels: str


@pytest.fixture(scope="module")
def trained(places, gcs_server, tmp_path_factory) -> Trained:
    """Two ranks on local files, first scored after two epochs, on 42 other cases in a bucket; one has an affine."""
    gcs_server.create_bucket("held-out")
    images, labels = "gs://held-out/set/images/", "gs://held-out/set/labels/"
    make_cases(open_store(images), open_store(labels), 42, shape=[(9, 12, 10), (8, 8, 8), (5, 13, 8)], seed=9)
    open_store("gs://held-out/set/geometry/").put("case_00003.json", to_json(AFFINE))
    until = {"epochs": 9, "evaluate_from": 1, "quality_threshold": 1e-5}
    recipe = tiny(places.local, tmp_path_factory.mktemp("runs") / "run", **until)
    data = dataclasses.replace(recipe.data, eval_images=images, eval_labels=labels)
    return Trained(run(dataclasses.replace(recipe, data=data), "tiny", quiet()), images, labels)


def arrays(uri: str) -> dict[str, np.ndarray]:
    store = open_store(uri)
    entries = [entry for entry in store.list() if entry.name.endswith(".npy")]
    return {e.name: np.load(io.BytesIO(b)) for e, b in zip(entries, store.fetch(entries), strict=True)}


def test_a_second_pair_of_uris_is_scored_whole_kept_by_case_and_ends_the_run_at_the_quality_threshold(trained):
    run_dir, rows = Path(trained.outcome.run_dir), trained.outcome.rows
    assert [(row["epoch"], row.get("scored")) for row in rows] == [(0, None), (1, 42)]  # of nine epochs
    assert all(row["trained"] + row["tail"] == 65 for row in rows)
    table = pq.read_table(run_dir / "scores" / "epoch-00001.parquet").to_pydict()
    assert table["case_id"] == [f"case_{number:05d}" for number in range(42)]
    assert np.mean([table["dice_1"], table["dice_2"]]) == pytest.approx(rows[1]["mean_dice"], abs=1e-12)
    assert np.mean(table["mean_dice"]) == pytest.approx(rows[1]["mean_dice"], abs=1e-12)
    assert json.loads((run_dir / BEST_FILE).read_text())["mean_dice"] == rows[1]["mean_dice"]


def test_evaluate_gives_exactly_the_dice_that_training_reported(trained, tmp_path, capfd):
    run_dir, (_, row) = Path(trained.outcome.run_dir), trained.outcome.rows
    given = ["--images", trained.images, "--labels", trained.labels, "--cases", "held-out"]
    output = tmp_path / "scores.parquet"
    command = ["evaluate", "--checkpoint", str(trained.outcome.checkpoint), *given, "--output", str(output)]
    assert main([*command, "--workers", "2", "--cpus-per-worker", "0.5", "--use-gpu", "False"]) == 0
    printed, errors = capfd.readouterr()
    assert "core_worker.cc" not in errors
    assert f"mean Dice on 42 cases: {row['mean_dice']!r}" in printed
    assert "case_00041" in printed
    assert pq.read_table(output).equals(pq.read_table(run_dir / "scores" / "epoch-00001.parquet"))


def test_predict_then_a_separate_script_gives_the_dice_that_training_reported(trained, bucket, tmp_path):
    reported = trained.outcome.rows[1]["mean_dice"]
    output = f"gs://{bucket}/maps"
    config = PredictConfig(checkpoint=trained.outcome.run_dir, images=trained.images, output=output, workers=HALF)
    written = predict(config, quiet())
    assert written == sorted([*(f"case_{n:05d}_y.npy" for n in range(42)), "case_00003.nii.gz"])
    maps, labels = arrays(output), arrays(trained.labels)
    assert maps.keys() == labels.keys()
    assert all(maps[name].dtype == np.uint8 and maps[name].shape == labels[name].shape for name in labels)
    for folder, files in (("maps", maps), ("labels", labels)):
        (tmp_path / folder).mkdir()
        for name, array in files.items():
            np.save(tmp_path / folder / name, array)
    script = [sys.executable, Path(__file__).with_name("dice_of_maps.py"), tmp_path / "maps", tmp_path / "labels"]
    said = subprocess.run(script, check=True, capture_output=True, text=True, timeout=240).stdout.split()
    assert said[0] == "42"
    assert float(said[1]) == pytest.approx(reported, abs=1e-12)
    store = open_store(output)
    (entry,) = [entry for entry in store.list() if entry.name.endswith(".nii.gz")]
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(store.fetch([entry])[0]))
    np.testing.assert_allclose(image.affine, AFFINE, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(image.dataobj), maps["case_00003_y.npy"][0])


def scores_on(ranks: int, network: UNet3D, holdout: Holdout, meeting: Path) -> list[tuple[Scores, int]]:
    """What each of so many processes says, and how many of the cases it was dealt."""
    parts = RankData().configure({HELD_OUT: holdout.dataset()}, ranks, None, None)

    def score(rank: int, part: ray.data.DataIterator) -> tuple[Scores, int]:
        class Counted:
            """Counts the cases that a rank is dealt."""

            cases = 0

            def iter_batches(self, **options):
                for table in part.iter_batches(**options):
                    self.cases += len(table)
                    yield table

        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
        try:
            for buffer in network.buffers():
                buffer.add_(rank)  # each has seen batches of its own; what counts is rank 0's
            mine = Counted()
            scores = evaluate_held_out(network, holdout, WINDOW, mine, torch.device("cpu"))
            return scores, mine.cases
        finally:
            torch.distributed.destroy_process_group()

    remote = ray.remote(num_cpus=0.5)(score)
    return ray.get([remote.remote(rank, part[HELD_OUT]) for rank, part in enumerate(parts)], timeout=240)


def test_42_cases_on_1_2_and_3_ranks_have_the_same_mean_which_is_that_of_each_case_scored_alone(trained, tmp_path):
    torch.manual_seed(0)
    network = UNet3D(UNet3DConfig(filters=(4, 8), bottleneck=8, norm="batchnorm")).eval()
    images, labels = arrays(trained.images), arrays(trained.labels)
    alone = [
        score_case(network, torch.from_numpy(images[name]), torch.from_numpy(labels[name.replace("_x", "_y")]), WINDOW)
        for name in sorted(images)
    ]
    assert len(alone) == 42
    cases = index_cases(trained.images, trained.labels).manifest
    data = DataConfig(store=StoreConfig(transport="direct"), task_cpus=0.5)
    holdout = Holdout(cases, np.arange(100, 142), data)
    for ranks in (1, 2, 3):
        said = scores_on(ranks, network, holdout, tmp_path / f"ranks-{ranks}")
        scores = said[0][0]
        assert all(other == scores for other, _ in said)
        assert [score.index for score in scores.by_case] == list(range(100, 142))
        assert sum(dealt for _, dealt in said) == 42
        assert all(dealt > 42 // ranks // 2 for _, dealt in said)
        assert scores.mean_dice == pytest.approx(np.mean(alone), abs=1e-6)
    assert 0 < scores.mean_dice < 1


def test_held_out_cases_are_not_read_before_they_are_scored(tmp_path):
    images, labels = f"{tmp_path}/images/", f"{tmp_path}/labels/"
    make_cases(open_store(images), open_store(labels), 6, shape=(8, 8, 8))
    holdout = Holdout(index_cases(images, labels).manifest, np.arange(6), DataConfig(task_cpus=0.5))
    (tmp_path / "images").rename(tmp_path / "away")  # to read one now would fail
    (part,) = RankData().configure({HELD_OUT: holdout.dataset()}, 1, None, None)
    time.sleep(1)
    (tmp_path / "away").rename(tmp_path / "images")
    tables = part[HELD_OUT].iter_batches(batch_size=None, batch_format="pyarrow")
    assert sorted(index for table in tables for index in table["index"].to_pylist()) == list(range(6))


@pytest.mark.crash  # not for crashes: it starts two whole runs
def test_a_run_holds_out_a_list_and_goes_on_with_the_one_it_began_with(places, tmp_path, capsys):
    (tmp_path / "cases.txt").write_text("# held out\ncase_00007\n00003\n\ncase_00050\n")
    run_dir, ledger = tmp_path / "run", tmp_path / "ledger"
    options = [
        *("--data.images", f"{places.local}images", "--data.labels", f"{places.local}labels", "--data.crop.patch"),
        *("8", "8", "8", "--data.task-cpus", "0.5", "--data.holdout-cases", str(tmp_path / "cases.txt")),
        *("--window.roi", "8", "8", "8", "--model.filters", "4", "8", "--model.bottleneck", "8"),
        *("--trainer.cpus-per-worker", "0.5", "--trainer.batch-size", "4", "--trainer.num-workers", "2"),
        *("--trainer.use-gpu", "False", "--trainer.epochs", "9", "--trainer.evaluate-every", "1"),
        *("--trainer.quality-threshold", "1e-5", "--trainer.ledger", str(ledger)),
    ]
    assert main(["run", "kits19-small", *options, "--run-dir", str(run_dir)]) == 0
    assert "quality threshold 1e-05: reached after epoch 1" in capsys.readouterr().out
    scores = pq.read_table(run_dir / "scores" / "epoch-00000.parquet")
    assert scores["case_id"].to_pylist() == ["case_00003", "case_00007", "case_00050"]
    found = audit(str(run_dir))
    assert found.passed, found
    assert found.epochs[0].cases == 62
    (tmp_path / "cases.txt").unlink()
    assert main(["run", "kits19-small", *options, "--trainer.resume", str(run_dir)]) == 0
    rows = json.loads((run_dir / "metrics.json").read_text())
    assert [row["epoch"] for row in rows] == [0]  # a run that has reached its threshold trains no further
    own = evaluate(EvaluateConfig(checkpoint=str(run_dir), workers=HALF), quiet())
    assert own.mean_dice == rows[0]["mean_dice"]


def test_the_best_checkpoint_is_kept_though_later_ones_replace_it(tmp_path):
    from train.metrics import MetricsWriter
    from train.waits import CAUSES

    writer = MetricsWriter(str(tmp_path))
    row = {"samples": 1, "samples_per_s": 1.0, "first_batch_s": 0.1, "stall_share": 0.0, "au": None}
    row |= {"wall_s": 1.0, "stall_s": 0.0, "stall_by_cause_s": dict.fromkeys(CAUSES, 0.0)}
    about = {"ranks": 1, "files": {}, "checkpoint": None}
    bodies = []
    for epoch, dice in enumerate([0.3, None, 0.8, 0.8, 0.5]):
        folder = tmp_path / f"checkpoint_{epoch}"
        folder.mkdir()
        torch.save({"epoch": epoch}, folder / checkpoint.STATE_FILE)
        bodies.append((folder / checkpoint.STATE_FILE).read_bytes())
        reported = about | {"row": row | {"epoch": epoch, "step": 10 * epoch, "mean_dice": dice}}
        writer.after_report(None, [reported], ray.train.Checkpoint(str(folder)))
        (folder / checkpoint.STATE_FILE).unlink()
    assert (tmp_path / "best" / checkpoint.STATE_FILE).read_bytes() == bodies[2]
    assert json.loads((tmp_path / BEST_FILE).read_text()) == {
        "checkpoint": "best", "epoch": 2, "step": 20, "mean_dice": 0.8
    }  # fmt: skip
    assert json.loads((tmp_path / "latest.json").read_text())["checkpoint"] == "checkpoint_4"


def test_a_checkpoint_of_another_network_is_refused_with_the_tensors_that_differ(trained, tmp_path):
    best = load_trained(trained.outcome.run_dir)
    assert best.uri == f"{trained.outcome.run_dir}/best"
    other = dataclasses.replace(best.recipe, model=UNet3DConfig(filters=(4, 16), bottleneck=8))
    torch.save({"model": best.weights, "recipe": other.to_json()}, tmp_path / "state.pt")
    with pytest.raises(ConfigError, match=r"expected the weights of UNet3DConfig.*filters=\(4, 16\).*downs\.0.*found"):
        load_trained(str(tmp_path))
    (tmp_path / "state.pt").write_bytes(b"no checkpoint at all")
    with pytest.raises(ConfigError, match="expected a checkpoint of"):
        load_trained(str(tmp_path))
    (tmp_path / "state.pt").unlink()
    with pytest.raises(ConfigError, match=r"expected a run's folder .* found none of these"):
        load_trained(str(tmp_path))


def test_a_case_without_a_label_and_a_list_of_strangers_are_refused(trained, tmp_path):
    images, labels = f"{tmp_path}/images/", f"{tmp_path}/labels/"
    make_cases(open_store(images), open_store(labels), 2, shape=(8, 8, 8))
    given = {"checkpoint": trained.outcome.run_dir, "workers": HALF}
    (tmp_path / "labels" / "case_00001_y.npy").unlink()
    with pytest.raises(PairingError, match=r"1 of 2 images have no label: case_00001_x\.npy"):
        evaluate(EvaluateConfig(**given, images=images, labels=labels), quiet())
    strangers = EvaluateConfig(**given, images=trained.images, labels=trained.labels, cases="kits19-mlperf")
    with pytest.raises(ConfigError, match=r"expected each of its 42 cases in gs://held-out.*found 34 not among"):
        evaluate(strangers, quiet())


def test_a_window_that_the_network_cannot_take_is_refused_before_anything_is_read(trained):
    workers = dataclasses.replace(HALF, roi=(8, 10, 8))
    checkpoint, images, labels = trained.outcome.run_dir, "gs://nowhere/images", "gs://nowhere/labels"
    message = r"expected a window \(D, H, W\) of multiples of 4 voxels.*found --roi 8 10 8; give --roi 8 12 8"
    with pytest.raises(ConfigError, match=message):
        evaluate(
            EvaluateConfig(checkpoint=trained.outcome.run_dir, images=images, labels=labels, workers=workers), quiet()
        )
    with pytest.raises(ConfigError, match=message):
        predict(PredictConfig(checkpoint=checkpoint, images=images, output="x", workers=workers), quiet())


def test_an_image_of_two_channels_is_refused_by_name(trained, tmp_path):
    images = open_store(f"{tmp_path}/images/")
    images.put("case_00001_x.npy", npy_bytes(np.zeros((2, 8, 8, 8), np.float32)))
    config = PredictConfig(
        checkpoint=trained.outcome.run_dir, images=images.uri, output=f"{tmp_path}/maps", workers=HALF
    )
    with pytest.raises(DecodeError, match=r"case_00001_x\.npy: expected 1 image channels.*found 2") as caught:
        predict(config, quiet())
    assert "Traceback" not in str(caught.value)
