"""What `submit` sends, and each error that it explains, against a dashboard of our own."""

import dataclasses
import json
import socket
from pathlib import Path

import pytest

from ingest.errors import ConfigError
from tests.train.fake_dashboard import fake_dashboard, node
from train.__main__ import main
from train.config import from_json
from train.job_package import PACKAGE_LIMIT_BYTES, RECIPE_NAME, SCRIPT_NAME, check_size, job_package
from train.job_places import place_warnings, placed
from train.recipes import DEMO


@pytest.fixture
def dashboard(monkeypatch):
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "STORAGE_EMULATOR_HOST"):
        monkeypatch.setenv(name, "")  # and put back afterwards: the command sets the first one itself
    with fake_dashboard() as server:
        yield server


def submit(server, *arguments: str) -> int:
    return main(["submit", "demo", "--address", server.url, *arguments])


def test_submit_sends_the_job_with_its_metadata_and_says_how_to_go_on(dashboard, capsys):
    options = ["--submission-id", "mine", "--metadata", "team=imaging", "--metadata", "why=a=b", "--env", "A=1"]
    assert submit(dashboard, *options, "--trainer.epochs", "3") == 0
    (job,) = dashboard.submitted
    assert job["submission_id"] == "mine"
    kept = {"recipe": "demo", "run_dir": "~/voxflux/runs/mine", "team": "imaging", "why": "a=b"}
    assert kept.items() <= job["metadata"].items()
    assert job["runtime_env"]["env_vars"] == {"A": "1", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    assert job["runtime_env"]["working_dir"].startswith("gcs://")
    assert 50_000 < sum(dashboard.uploaded_bytes) < 5 * 2**20
    printed = capsys.readouterr().out
    for step in ("status mine", "logs mine --follow", "stop mine"):
        assert f"voxflux {step}" in printed
    assert f"{dashboard.url}/#/jobs/mine" in printed


def test_a_package_holds_the_code_and_the_resolved_recipe_and_nothing_else():
    recipe = dataclasses.replace(DEMO, run_dir="gs://bucket/run")
    with job_package(recipe, "demo") as folder:
        assert sorted(path.name for path in folder.iterdir()) == sorted(["ingest", "train", RECIPE_NAME, SCRIPT_NAME])
        assert from_json((folder / RECIPE_NAME).read_text()) == recipe
        files = [path.name for path in folder.rglob("*")]
        assert "submit.py" in files
        assert "__pycache__" not in files
    with job_package(recipe, "demo", with_code=False) as folder:
        assert sorted(path.name for path in folder.iterdir()) == sorted([RECIPE_NAME, SCRIPT_NAME])


def test_a_package_that_ray_would_not_take_is_refused_before_it_is_sent(tmp_path):
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE

    assert min(DASHBOARD_CLIENT_MAX_SIZE, GCS_STORAGE_MAX_SIZE) == PACKAGE_LIMIT_BYTES
    (tmp_path / "small.py").write_bytes(b"x" * 100)
    with (tmp_path / "scan.npy").open("wb") as file:
        file.truncate(PACKAGE_LIMIT_BYTES - 100)
    with pytest.raises(ConfigError, match=r"below 100 MiB.* found 100\.0 MiB; its largest files: scan\.npy"):
        check_size(tmp_path)
    (tmp_path / "small.py").unlink()
    assert check_size(tmp_path) == PACKAGE_LIMIT_BYTES - 100


def test_submit_says_that_no_cluster_answers(dashboard, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        for command in (["submit", "demo"], ["list"], ["status", "x"], ["logs", "x"], ["stop", "x"]):
            assert main([*command, "--address", address]) == 1
            assert f"expected a Ray cluster's dashboard at {address}, found none" in capsys.readouterr().err


def test_an_address_given_wins_over_the_environment(dashboard, monkeypatch, capsys):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    assert submit(dashboard) == 0
    assert len(dashboard.submitted) == 1
    assert main(["submit", "demo", "--address", "ray://x"]) == 1
    assert "expected the dashboard's address" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("refusal", "found"),
    [
        ((401, "Unauthorized: Missing authentication token"), r"found none (401)"),
        ((403, "Forbidden: Invalid authentication token"), r"found another one (403)"),
    ],
)
def test_submit_says_that_the_token_is_missing_or_wrong(dashboard, capsys, refusal, found):
    dashboard.refusal = refusal
    assert submit(dashboard) == 1
    error = capsys.readouterr().err
    assert found in error
    assert "RAY_AUTH_TOKEN" in error


def test_a_server_that_is_no_dashboard_is_told_from_one(dashboard, capsys):
    dashboard.refusal = (200, "<html>hello</html>")
    assert submit(dashboard) == 1
    assert "found something else" in capsys.readouterr().err


@pytest.mark.parametrize(("what", "version"), [("ray", "2.9.3"), ("python", "3.9.18")])
def test_a_cluster_of_another_version_is_refused_unless_asked_not_to_check(dashboard, capsys, what, version):
    setattr(dashboard, f"{what}_version", version)
    assert submit(dashboard) == 1
    error = capsys.readouterr().err
    assert f"expected {what.capitalize()} " in error
    assert f"found {version}" in error
    assert not dashboard.submitted
    assert submit(dashboard, "--no-check") == 0


def test_a_cluster_too_small_for_the_recipe_is_refused_before_anything_is_sent(dashboard, capsys):
    dashboard.nodes = [node("127.0.0.1", {"CPU": 1.0}), node("10.0.0.2", {"CPU": 64.0, "GPU": 8.0}, "DEAD", head=False)]
    assert submit(dashboard, "--trainer.num-workers", "4") == 1
    assert "expected at least 0.5 CPUs for reading" in capsys.readouterr().err
    dashboard.nodes = [node("127.0.0.1", {"CPU": 8.0, "GPU": 1.0})]
    assert submit(dashboard, "--trainer.use-gpu", "True") == 1
    error = capsys.readouterr().err
    assert "expected a GPU for each of 2 ranks, found 1" in error
    assert "--no-check" in error
    assert not dashboard.uploaded_bytes
    assert submit(dashboard, "--trainer.use-gpu", "True", "--no-check") == 0


def test_a_head_that_has_just_started_is_asked_again_for_its_cpus(dashboard):
    dashboard.blind_answers = 2
    assert submit(dashboard) == 0
    assert len(dashboard.submitted) == 1


def test_a_dashboard_that_closes_a_connection_is_asked_again(dashboard):
    dashboard.dropped = 2
    assert submit(dashboard) == 0
    assert dashboard.dropped == 0
    assert len(dashboard.submitted) == 1


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_a_dashboard_that_closes_a_connection_is_asked_again_for_a_job(command, dashboard, capsys):
    dashboard.dropped = 2
    assert main([command, "ghost", "--address", dashboard.url]) == 1
    assert dashboard.dropped == 0
    assert "expected a job 'ghost'" in capsys.readouterr().err


def test_a_submission_id_that_is_taken_or_no_name_is_refused(dashboard, capsys):
    dashboard.taken = {"mine"}
    assert submit(dashboard, "--submission-id", "mine") == 1
    assert "found a job mine; choose another" in capsys.readouterr().err
    assert submit(dashboard, "--submission-id", "a/b") == 1
    assert "--submission-id of letters" in capsys.readouterr().err
    assert submit(dashboard, "--metadata", "nothing") == 1
    assert "expected --metadata KEY=VALUE, found 'nothing'" in capsys.readouterr().err


def test_a_job_that_is_not_there_is_named(dashboard, capsys):
    for command in ("status", "logs", "stop"):
        assert main([command, "ghost", "--address", dashboard.url]) == 1
        assert "expected a job 'ghost'" in capsys.readouterr().err


def test_local_folders_that_the_cluster_may_not_see_are_warned_of(dashboard, capsys, tmp_path):
    dashboard.nodes = [node("192.0.2.77", {"CPU": 8.0}), node("192.0.2.78", {"CPU": 8.0}, head=False)]
    assert submit(dashboard, "--data.images", f"{tmp_path}/i", "--data.labels", "gs://b/labels") == 0
    printed = capsys.readouterr().out
    assert f"warning: --data.images {tmp_path}/i is a folder" in printed
    assert "warning: --run-dir ~/voxflux/runs/" in printed
    assert "--data.labels" not in printed


def test_relative_places_are_those_of_here_and_a_jobs_own_are_in_the_heads_home():
    data = dataclasses.replace(DEMO.data, images="images", labels="gs://b/labels", manifest="m.parquet")
    found = placed(dataclasses.replace(DEMO, data=data), "job")
    assert found.data.images == str(Path("images").absolute())
    assert found.data.labels == "gs://b/labels"
    assert found.data.manifest == str(Path("m.parquet").absolute())
    assert found.data.holdout_cases is None
    assert found.run_dir == "~/voxflux/runs/job"
    assert found.demo.data_dir == "~/voxflux/data/demo"
    assert not place_warnings(found, "1.2.3.4", ["1.2.3.4"])


def test_relative_places_of_the_held_out_cases_and_the_ledger_are_those_of_here_too():
    data = dataclasses.replace(DEMO.data, eval_images="images", eval_labels="gs://b/labels")
    trainer = dataclasses.replace(DEMO.trainer, ledger="ledger")
    found = placed(dataclasses.replace(DEMO, data=data, trainer=trainer), "job")
    assert found.data.eval_images == str(Path("images").absolute())
    assert found.data.eval_labels == "gs://b/labels"
    assert found.trainer.ledger == str(Path("ledger").absolute())
    warnings = place_warnings(found, "1.2.3.4", ["1.2.3.4", "1.2.3.5"])
    assert any(warning.startswith("--data.eval-images") for warning in warnings)
    for given, expected in (("held.txt", str(Path("held.txt").absolute())), ("kits19-mlperf", "kits19-mlperf")):
        listed = dataclasses.replace(DEMO, data=dataclasses.replace(DEMO.data, holdout_cases=given))
        assert placed(listed, "job").data.holdout_cases == expected


def test_a_saved_recipe_is_run_with_overrides_and_a_wrong_file_is_refused(tmp_path, capsys):
    from train.commands import chosen_recipe

    file = tmp_path / "saved.json"
    file.write_text(DEMO.to_json())
    assert chosen_recipe(["--config", str(file)]) == (DEMO, "saved")
    recipe, name = chosen_recipe(["--config", str(file), "--name", "demo", "--trainer.epochs", "2"])
    assert (recipe.trainer.epochs, name) == (2, "demo")
    assert recipe.data == DEMO.data
    assert main(["run", "--config", str(tmp_path / "none.json")]) == 1
    assert "expected a saved recipe" in capsys.readouterr().err
    file.write_text(json.dumps({"nonsense": 1}))
    assert main(["run", "--config", str(file)]) == 1
    assert "expected a saved recipe" in capsys.readouterr().err
