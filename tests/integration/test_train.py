"""The training job on a real Ray Train: two ranks, a bucket, checkpoints, scores."""

import dataclasses
import io
import json
from pathlib import Path
from urllib.parse import quote

import pytest
import ray
import torch
from rich.console import Console

from ingest.augment import AugmentConfig
from ingest.crop import CropConfig
from ingest.errors import ConfigError, DecodeError
from ingest.index import index_cases
from ingest.pipeline import DataConfig
from ingest.stores import open_store
from tests.train.fake_mlflow import NAME, PASSWORD, fake_mlflow
from train.__main__ import main
from train.checkpoint import read_position
from train.config import Recipe, TrainerConfig, from_json
from train.derive import derive
from train.evaluate import SlidingWindowConfig
from train.launch import run
from train.optimizer import OptimizerConfig
from train.records import read_events, read_steps
from train.tracking import reach
from train.unet3d import UNet3DConfig

pytestmark = pytest.mark.usefixtures("ray_here")


def tiny(root: str, run_dir: Path, **trainer) -> Recipe:
    options = {"num_workers": 2, "cpus_per_worker": 0.5, "batch_size": 4, "epochs": 2, "use_gpu": False} | trainer
    return Recipe(
        run_dir=str(run_dir),
        data=DataConfig(
            images=f"{root}images",
            labels=f"{root}labels",
            seed=3,
            holdout_fraction=0.15,
            task_cpus=0.5,
            blocks_in_flight=2,  # each process that reads takes 2 s of CPU time to start
            crop=CropConfig(patch=(8, 8, 8)),
            augment=AugmentConfig(brightness_range=(-0.3, 0.3)),
        ),
        model=UNet3DConfig(filters=(4, 8), bottleneck=8),
        optimizer=OptimizerConfig(name="adamw", learning_rate=5e-3, warmup_epochs=0),
        window=SlidingWindowConfig(roi=(8, 8, 8), overlap=0.25),
        trainer=TrainerConfig(**options),
    )


def quiet() -> Console:
    return Console(quiet=True)


def test_two_ranks_train_score_every_held_out_case_once_and_leave_a_whole_run_behind(places, tmp_path):
    outcome = run(tiny(places.gs, tmp_path / "run"), "tiny", quiet())
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert rows == outcome.rows
    assert [row["epoch"] for row in rows] == [0, 1]
    for row in rows:
        assert row["samples"] == 48
        assert row["tail"] == 7
        assert row["scored"] == 10
        assert row["ranks"] == 2
        assert 0 <= row["mean_dice"] <= 1
        assert 0 < row["au"] <= 1
        assert 0 <= row["stall_share"] < 1
        assert row["first_batch_s"] > 0
        assert row["samples_per_s"] > 0
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    state = torch.load(Path(outcome.checkpoint) / "state.pt", weights_only=True)
    position = read_position(outcome.run_dir)
    assert (position.epoch, position.step, len(position.before.indices)) == (2, 12, 0)
    assert from_json(state["recipe"]).model == derive(tiny(places.gs, tmp_path)).model
    assert all(Path(picture).read_bytes().startswith(b"\x89PNG") for picture in outcome.pictures)
    assert len(outcome.pictures) == 2
    actors = {actor["ActorClassName"] for actor in ray._private.state.actors().values()}
    assert "RayTrainWorker" in actors
    assert "PreemptionWatcher" not in actors  # on one node nobody would be left to hear it


def test_a_bad_case_ends_a_run_with_its_name_and_reason_and_no_start_is_wasted_on_it(places, tmp_path):
    for role in ("images", "labels"):
        source, target = open_store(f"{places.local}{role}/"), open_store(f"{tmp_path}/set/{role}/")
        for entry in source.list():
            target.put(entry.name, source.fetch([entry])[0])
    for number in range(65):
        (tmp_path / "set" / "labels" / f"case_{number:05d}_y.npy").write_bytes(b"no label at all, but long enough")
    ledger = tmp_path / "ledger"
    recipe = tiny(f"{tmp_path}/set/", tmp_path / "run", evaluate_every=0, max_failures=-1, ledger=str(ledger))
    with pytest.raises(DecodeError, match=r"case_\d+_y\.npy: expected an \.npy file") as caught:
        run(recipe, "tiny", quiet())
    assert "Traceback" not in str(caught.value)
    assert len(list(ledger.glob("*.jsonl"))) <= 2  # of the one attempt's two ranks
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "No epoch was finished" in page
    assert "expected an .npy file" in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cpus_per_worker": 2.0}, "expected at least 0.5 CPUs for reading"),
        ({"batch_size": 100}, "expected at least 200 training cases"),
        ({"use_gpu": True}, "expected a GPU for each of 2 ranks"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_it_starts(places, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(tiny(places.gs, tmp_path / "run", **changes), "tiny", quiet())
    assert not (tmp_path / "run").exists()


def test_a_run_without_uris_is_refused(tmp_path, capsys):
    assert (
        main(
            [
                "run",
                "kits19-small",
                "--run-dir",
                str(tmp_path / "run"),
                "--data.images",
                "gs://b/i",
                "--trainer.use-gpu",
                "False",
            ]
        )
        == 1
    )
    assert "expected two URIs, --data.images and --data.labels" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["nonsense"]])
def test_the_recipes_are_listed(arguments, capsys):
    assert main(arguments) == (0 if arguments == ["--help"] else 2)
    printed = capsys.readouterr()
    assert "kits19-mlperf" in printed.out + printed.err


def test_a_run_from_a_manifest_is_kept_in_a_bucket_and_gone_on_with_there_and_on_its_mlflow_server(
    places, bucket, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow wants a database in its place
    mlflow = (tmp_path / "mlruns").as_uri()
    saved, run_dir = str(tmp_path / "train.parquet"), f"gs://{bucket}/runs/one"
    index_cases(f"{places.gs}images", f"{places.gs}labels").manifest.save(saved)
    recipe = tiny(places.gs, Path("unused"), num_workers=1, epochs=1, evaluate_every=0, mlflow=mlflow)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, manifest=saved, images="", labels=""))
    first = run(dataclasses.replace(recipe, run_dir=run_dir), "tiny", quiet())
    assert [row["epoch"] for row in first.rows] == [0]
    assert first.rows[0]["samples"] == 52
    assert first.rows[0]["mean_dice"] is None
    trainer = dataclasses.replace(recipe.trainer, resume=run_dir, epochs=2)
    second = run(dataclasses.replace(recipe, trainer=trainer), "tiny", quiet())
    assert [row["epoch"] for row in second.rows] == [0, 1]
    assert [row["step"] for row in second.rows] == [13, 26]
    saved = json.loads(open_store(run_dir).fetch([e for e in open_store(run_dir).list() if e.name == "recipe.json"])[0])
    assert saved["trainer"]["epochs"] == 2
    names = {entry.name.split("/")[-1] for entry in open_store(run_dir).list()}
    assert {"state.pt", "latest.json", "metrics.json", "manifest.parquet", "recipe.json", "report.html"} <= names
    told = read_events(run_dir)
    assert [event.kind for event in told] == ["start", "end", "setting", "start", "end"]
    assert told[2].text == "trainer.epochs 1 -> 2 at step 13"
    assert len(read_steps(run_dir)) == 2
    tracking = reach(mlflow, run_dir, resumed=True)
    tracked = tracking.client.get_run(tracking.run_id)
    assert tracked.info.status == "FINISHED"
    assert tracked.data.tags["run_dir"] == run_dir
    assert tracked.data.params["data.images"] == f'"{places.gs}images/"'  # as resolved
    logged = [(point.step, point.value) for point in tracking.client.get_metric_history(tracking.run_id, "train_loss")]
    assert logged == [(number, row["train_loss"]) for number, row in enumerate(second.rows, 1)]


def test_the_password_of_an_mlflow_server_is_in_no_file_of_a_run_and_in_no_line_that_it_prints(
    places, tmp_path, monkeypatch
):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # and put back afterwards: the run sets them
    console = Console(file=io.StringIO(), width=1000)
    with fake_mlflow() as server:
        uri = server.url.replace("://", f"://{NAME}:{quote(PASSWORD, safe='')}@")
        recipe = tiny(places.gs, tmp_path / "run", num_workers=1, epochs=1, evaluate_every=0, mlflow=uri)
        run(recipe, "tiny", console)
    assert any("runs/log-batch" in sent for sent in server.sent)
    assert server.url in (tmp_path / "run" / "report.html").read_text()
    found = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    for secret in (PASSWORD, quote(PASSWORD, safe="")):
        assert secret not in console.file.getvalue()
        assert not any(secret in sent for sent in server.sent)
        assert not [file for file in found if secret.encode() in file.read_bytes()]


def test_a_run_folder_that_ray_cannot_name_is_refused(places, tmp_path):
    with pytest.raises(ConfigError, match="plain ASCII"):
        run(tiny(places.gs, tmp_path / "ünï"), "tiny", quiet())


def test_a_run_without_a_spare_cpu_is_refused_within_seconds_also_when_others_hold_them(places, tmp_path):
    @ray.remote(num_cpus=3.5)
    class Holder:
        def ready(self) -> None:
            pass

    holder = Holder.remote()
    ray.get(holder.ready.remote())
    with pytest.raises(ConfigError, match=r"expected 1\.5 free CPUs, found 0\.5: other jobs hold the rest"):
        run(tiny(places.local, tmp_path / "run"), "tiny", quiet())
    ray.kill(holder)
    with pytest.raises(ConfigError, match=r"expected at least 0\.5 CPUs for reading .* found 0"):
        run(tiny(places.local, tmp_path / "run", cpus_per_worker=2.0), "tiny", quiet())
    assert not (tmp_path / "run").exists()
