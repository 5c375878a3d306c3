"""A run on an MLflow server: a real MLflow, on its store of files, and servers that are not there."""

from __future__ import annotations

import dataclasses
import io
import json
import socket
import sys
import time

import pytest
from rich.console import Console

from ingest.errors import ConfigError
from ingest.stores import open_store
from train.config import TrainerConfig
from train.recipes import DEMO
from train.stop import Stopped
from train.tracking import MlflowRun, metrics_of, reach, read_tracking, tracked


def row(epoch: int) -> dict:
    return {
        "epoch": epoch,
        "step": 30 * (epoch + 1),
        "train_loss": 0.5 / (epoch + 1),
        "mean_dice": None if epoch % 2 else 0.75,
        "dice_by_class": [0.7, 0.8],
        "stall_s": 1.5,
        "stall_by_cause_s": {"fetching": 1.5},
        "retries": {"status-503": 2},
        "au": float("nan"),
    }


@pytest.fixture
def server(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow wants a database in its place
    return (tmp_path / "mlruns").as_uri()


def quiet() -> Console:
    return Console(file=io.StringIO(), width=1000)


def test_settings_epochs_and_the_end_are_on_the_server_and_a_run_gone_on_with_goes_on_there(server, tmp_path):
    run_dir, stopped = str(tmp_path / "first"), Stopped()
    console = quiet()
    with tracked(reach(server, run_dir, resumed=False), DEMO, run_dir, console, stopped) as begun:
        begun.rows([row(0)])
        begun.rows([row(0), row(1)])
        assert begun.client.get_run(begun.run_id).info.status == "RUNNING"
    assert begun.run_id in console.file.getvalue()
    assert "could not" not in console.file.getvalue()
    found = begun.client.get_run(begun.run_id)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "first")
    assert begun.client.get_experiment(found.info.experiment_id).name == "voxflux"
    assert found.data.tags["run_dir"] == run_dir
    assert run_dir in found.data.tags["mlflow.note.content"]
    assert len(found.data.params) > 50
    assert found.data.params["trainer.epochs"] == str(DEMO.trainer.epochs)
    assert found.data.params["data.crop.patch"] == json.dumps(DEMO.data.crop.patch)
    assert found.data.metrics["dice_by_class/2"] == 0.8

    longer = dataclasses.replace(DEMO, trainer=dataclasses.replace(DEMO.trainer, epochs=99))
    stopped.signal_number = 2
    with tracked(reach(server, run_dir, resumed=True), longer, run_dir, quiet(), stopped) as again:
        assert again.run_id == begun.run_id
        assert again.client.get_run(again.run_id).info.status == "RUNNING"
        again.rows([row(0), row(1), row(2)])
    history = again.client.get_metric_history(again.run_id, "train_loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.25), (3, pytest.approx(0.5 / 3))]
    found = again.client.get_run(again.run_id)
    assert found.info.status == "KILLED"
    assert found.data.params["trainer.epochs"] == str(DEMO.trainer.epochs)  # MLflow lets no param change
    assert found.data.tags["trainer.epochs"] == "99"

    with pytest.raises(OSError, match="disk"):
        with tracked(reach(server, run_dir, resumed=True), longer, run_dir, quiet(), Stopped()):
            raise OSError("the disk is full")
    assert again.client.get_run(again.run_id).info.status == "FAILED"
    # Another run in the same folder, as after one that ended before its first checkpoint, is another one there too.
    with tracked(reach(server, run_dir, resumed=False), DEMO, run_dir, quiet(), Stopped()) as other:
        assert other.run_id != again.run_id


def test_a_run_that_the_server_does_not_have_is_refused_before_anything_starts(server, tmp_path):
    run_dir = str(tmp_path / "run")
    open_store(run_dir).put("recipe.json", b"{}")
    assert reach(server, run_dir, resumed=True).run_id is None  # it began without MLflow
    saved = {"run_id": "0" * 32, "experiment_id": "1", "uri": "http://elsewhere:5000"}
    open_store(run_dir).put("mlflow.json", json.dumps(saved).encode())
    with pytest.raises(ConfigError, match=r"expected run 0{32} of .*that the run began with, http://elsewhere:5000"):
        reach(server, run_dir, resumed=True)
    open_store(run_dir).put("mlflow.json", b"[]")
    with pytest.raises(ConfigError, match=r"mlflow\.json, found something else"):
        read_tracking(run_dir)


def test_a_server_that_does_not_answer_is_told_of_within_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ConfigError, match=f"expected an MLflow tracking server at {uri}, found: .*start it, or"):
            reach(uri, str(tmp_path), resumed=False)
    assert time.monotonic() - began < 20
    with pytest.raises(ConfigError, match="expected an MLflow tracking server at nonsense://x"):
        reach("nonsense://x", str(tmp_path), resumed=False)


def test_without_mlflow_a_run_that_asks_for_it_is_refused_and_any_other_goes_on(tmp_path, monkeypatch):
    assert reach(None, str(tmp_path), resumed=False) is None
    with tracked(None, DEMO, str(tmp_path), quiet(), Stopped()) as nothing:
        assert nothing is None
    monkeypatch.setitem(sys.modules, "mlflow", None)  # Python's way to say that there is no such module
    with pytest.raises(ConfigError, match=r"expected MLflow's client, .*found none .*pip install .*\.\[mlflow\]"):
        reach("http://127.0.0.1:1", str(tmp_path), resumed=False)


class Server:
    """Stands for MLflow's client: refuses so many calls, then keeps what it is given."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.epochs: list[int] = []

    def log_batch(self, run_id: str, metrics: list) -> None:
        if self.refusals > 0:
            self.refusals -= 1
            raise OSError("no route")
        self.epochs.append(metrics[0].step)


def test_an_epoch_that_the_server_did_not_take_is_told_of_once_and_logged_later():
    server, console = Server(refusals=2), quiet()
    run = MlflowRun(server, "id", console)
    run.rows([row(0)])
    run.rows([row(0), row(1)])
    assert server.refusals == 1  # it is left alone for a while
    assert console.file.getvalue() == "could not log epoch 1 to MLflow, which is tried again: no route\n"
    run.rows([row(0), row(1)], now=True)
    assert console.file.getvalue().endswith("could not log epoch 1 to MLflow: no route\n")
    assert server.epochs == []
    run.rows([row(0), row(1)], now=True)
    run.rows([row(0), row(1)])
    assert server.epochs == [1, 2]


def test_only_finite_numbers_of_a_row_are_logged():
    assert metrics_of(row(1)) == {
        "step": 60,
        "train_loss": 0.25,
        "dice_by_class/1": 0.7,
        "dice_by_class/2": 0.8,
        "stall_s": 1.5,
        "stall_by_cause_s/fetching": 1.5,
        "retries/status-503": 2,
    }


@pytest.mark.parametrize(
    "uri", ["mlruns", "./mlruns", "/mlruns", "sqlite:///mlflow.db", "file://mlruns", "http://", ""]
)
def test_a_tracking_uri_that_means_another_place_on_another_machine_is_refused(uri):
    with pytest.raises(ConfigError, match=r"trainer\.mlflow must be a tracking URI"):
        TrainerConfig(mlflow=uri)


@pytest.mark.parametrize("uri", ["http://h:5000", "https://h", "databricks", "sqlite:////a/b.db", "file:///a"])
def test_tracking_uris_that_mlflow_knows_are_taken(uri):
    assert TrainerConfig(mlflow=uri).mlflow == uri
