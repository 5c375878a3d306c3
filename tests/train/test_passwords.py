"""The password of an MLflow server stands in nothing that a run writes, prints or sends."""

from __future__ import annotations

import dataclasses
import io
import json
from urllib.parse import quote

import pytest
from rich.console import Console

from ingest.errors import ConfigError
from ingest.stores import open_store
from tests.train.fake_mlflow import NAME, PASSWORD, fake_mlflow
from train.config import Recipe, TrainerConfig
from train.page import page_of
from train.passwords import recipe_without_password, split_login
from train.recipes import DEMO
from train.resume_rules import changes_of
from train.run_folder import checks_of_run_dir
from train.stop import Stopped
from train.submit import Submission, submit
from train.tracking import reach, tracked

LOGIN = f"{NAME}:{quote(PASSWORD, safe='')}"


def recipe_of(uri: str) -> Recipe:
    return dataclasses.replace(DEMO, trainer=dataclasses.replace(DEMO.trainer, mlflow=uri))


@pytest.fixture(autouse=True)
def no_login(monkeypatch):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, "")  # and put back afterwards: what is under test sets them
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("http://a:b@host:5000/x", ("http://host:5000/x", "a", "b")),
        ("https://a:b%40c@host", ("https://host", "a", "b@c")),
        ("http://a:b@c@host", ("http://host", "a", "b@c")),
        ("postgresql://a:b@host/db?x=1", ("postgresql://host/db?x=1", "a", "b")),
        ("http://a@host", ("http://a@host", None, None)),
        ("http://host/a:b@c", ("http://host/a:b@c", None, None)),
        ("databricks", ("databricks", None, None)),
        ("sqlite:////folder/mlflow.db", ("sqlite:////folder/mlflow.db", None, None)),
    ],
)
def test_a_login_with_a_password_is_taken_out_of_a_uri(uri, parts):
    assert split_login(uri) == parts


def test_a_server_is_logged_in_to_and_the_password_is_neither_sent_as_a_setting_nor_printed_nor_kept(tmp_path):
    run_dir, console = str(tmp_path / "run"), Console(file=io.StringIO(), width=1000)
    with fake_mlflow() as server:
        recipe = recipe_of(server.url.replace("://", f"://{LOGIN}@"))
        tracking = reach(recipe.trainer.mlflow, run_dir, resumed=False)
        assert tracking is not None
        assert tracking.uri == server.url
        with tracked(tracking, recipe_without_password(recipe), run_dir, console, Stopped()):
            pass
        assert any("runs/create" in sent for sent in server.sent)
        assert not any(PASSWORD in sent or LOGIN in sent for sent in server.sent)
        # The run is gone on with by the variables alone.
        assert reach(server.url, run_dir, resumed=True) is not None
    for text in (console.file.getvalue(), (tmp_path / "run" / "mlflow.json").read_text()):
        assert server.url in text
        assert PASSWORD not in text
        assert LOGIN not in text


def test_a_wrong_password_is_refused_without_repeating_it(tmp_path):
    with fake_mlflow() as server:
        with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
            reach(server.url.replace("://", "://reader:wr0ng-one@"), str(tmp_path), resumed=False)
    assert "wr0ng-one" not in str(caught.value)


def test_a_database_that_cannot_be_opened_is_named_without_its_password(tmp_path):
    with pytest.raises(ConfigError, match="postgresql://host/db") as caught:
        reach("postgresql://me:h1dden@host/db", str(tmp_path), resumed=False)
    assert "h1dden" not in str(caught.value)


def test_the_page_of_a_run_of_an_earlier_version_shows_no_password(tmp_path):
    store = open_store(str(tmp_path))
    store.put("recipe.json", recipe_of("http://me:h1dden@host:5000").to_json().encode())
    store.put("metrics.json", b"[]")
    page = page_of(str(tmp_path))
    assert "http://host:5000" in page
    assert "h1dden" not in page


def test_going_on_with_a_run_of_an_earlier_version_records_no_password(tmp_path):
    run_dir = str(tmp_path)
    open_store(run_dir).put("recipe.json", recipe_of("http://me:h1dden@host:5000").to_json().encode())
    now = recipe_of("http://other:5000")
    now = dataclasses.replace(now, trainer=dataclasses.replace(now.trainer, resume=run_dir))
    changes = checks_of_run_dir(now, run_dir)
    assert changes is not None
    assert [str(change) for change in changes] == ["trainer.mlflow http://host:5000 -> http://other:5000"]
    assert "h1dden" not in json.dumps([str(change) for change in changes_of(recipe_without_password(now), now, "x")])


def test_a_job_with_a_password_is_refused_before_it_is_sent():
    submission = Submission(recipe=recipe_of("http://me:h1dden@host:5000"))
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD in the environment") as caught:
        submit(submission, "demo", Console(file=io.StringIO()))
    assert "h1dden" not in str(caught.value)


def test_a_wrong_tracking_uri_is_refused_without_its_password() -> None:
    with pytest.raises(ConfigError, match="must be a tracking URI") as refused:
        TrainerConfig(mlflow="user:secret@host:5000")
    assert "secret" not in str(refused.value)
    assert "'host:5000'" in str(refused.value)
