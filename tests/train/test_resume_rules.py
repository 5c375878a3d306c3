"""Every setting either may change when a run is resumed, and the change is recorded, or is refused with its reason."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import ingest
import train
from ingest.errors import ConfigError
from ingest.manifest import Manifest
from ingest.pairing import Case
from ingest.stores import ObjectMeta
from tests.train.test_checkpoint import save
from train import finite
from train.checkpoint import name_latest, read_position
from train.config import Recipe
from train.finite import NonFiniteError
from train.recipes import DEMO, RECIPES
from train.records import read_events
from train.resume_rules import RULES, Change, changes_of, record, rule_of, settings_of
from train.run_folder import checks_of_run_dir, run_folder
from train.step import StepResult


def changed(recipe: Recipe, setting: str, value: object) -> Recipe:
    """The recipe with another value of one setting, by its dotted name."""

    def put(tree, names):
        name, *rest = names
        return dataclasses.replace(tree, **{name: put(getattr(tree, name), rest) if rest else value})

    return put(recipe, setting.split("."))


def a_run(run_dir, recipe: Recipe = DEMO, step: int = 40) -> str:
    """A run's folder, as it is after so many steps."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.json").write_text(recipe.to_json())
    save(run_dir, "checkpoint_1", epoch=0, step=step, parts=[np.arange(4, dtype=np.int64)])
    name_latest(str(run_dir), "checkpoint_1")
    return str(run_dir)


def resumed(recipe: Recipe, run_dir: str) -> Recipe:
    return changed(recipe, "trainer.resume", run_dir)


def test_every_setting_of_a_recipe_has_a_rule_with_a_reason():
    for recipe in (DEMO, RECIPES["kits19-mlperf"][1]):
        for name, _ in settings_of(recipe):
            rule = rule_of(name)  # a new setting without a rule is a KeyError
            assert rule.reason
    names = [name for name, _ in settings_of(DEMO)]
    for covered in RULES:
        assert covered == "demo" or any(name == covered or name.startswith(f"{covered}.") for name in names), covered
    with pytest.raises(KeyError, match=r"no rule of RULES says whether trainer\.new_setting may change"):
        rule_of("trainer.new_setting")


def test_a_new_run_is_refused_in_the_folder_of_another_and_accepted_where_that_got_to_no_checkpoint(tmp_path):
    run_dir = a_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"expected no run in .*run, found one; go on with it by --trainer\.resume"):
        checks_of_run_dir(DEMO, run_dir)
    (tmp_path / "run" / "latest.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint_1")
    assert checks_of_run_dir(DEMO, run_dir) is None


def test_a_resumed_run_without_a_recipe_is_refused_before_anything_is_written(tmp_path):
    missing = str(tmp_path / "mistyped")
    with (
        pytest.raises(ConfigError, match=r"found no recipe\.json; check --trainer\.resume"),
        run_folder(resumed(DEMO, missing), "demo"),
    ):
        raise AssertionError("the folder is not to be used")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("optimizer.learning_rate", 0.08), ("optimizer.clip_norm", 1.0), ("optimizer.warmup_epochs", 0)),
        *(("trainer.deterministic", True), ("trainer.evaluate_every", 3), ("trainer.quality_threshold", 0.9)),
        *(("trainer.checkpoint_every_steps", 7), ("trainer.num_workers", 3), ("trainer.precision", "fp32")),
        *(("data.blocks_in_flight", 3), ("window.overlap", 0.5), ("data.bad.budget_cases", 9)),
        *(("trainer.batch_size", 2), ("trainer.accumulate", 2), ("data.shards.execution_cases", 1)),
    ],
)
def test_a_setting_that_may_change_is_accepted_and_recorded_with_its_step(tmp_path, setting, value):
    run_dir = a_run(tmp_path / "run")
    now = resumed(changed(DEMO, setting, value), run_dir)
    changes = checks_of_run_dir(now, run_dir)
    assert [change.setting for change in changes] == [setting]
    assert changes[0].now == value
    record(run_dir, changes, read_position(run_dir).step)
    event = read_events(run_dir)[-1]
    assert event.kind == "setting"
    assert re.fullmatch(rf"{re.escape(setting)} .+ -> .+ at step 40", event.text)


def test_a_change_is_told_in_words(tmp_path):
    run_dir = a_run(tmp_path / "run")
    change = Change("optimizer.learning_rate", 0.8, 0.08)
    assert record(run_dir, [change], 40) == ["optimizer.learning_rate 0.8 -> 0.08 at step 40"]


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("model.filters", (4, 8), "weights of its checkpoints would not fit"),
        ("optimizer.name", "sgd", "saved state would not fit"),
        ("optimizer.momentum", 0.5, "loading that state restores it"),
        ("data.seed", 9, "other samples"),
        ("data.crop.patch", (16, 16, 16), "other samples"),
        ("data.augment.noise_std_max", 0.2, "other samples"),
        ("data.decode.channels", 2, "other samples"),
        ("data.holdout_fraction", 0.2, "held-out cases would be trained on"),
        ("demo.cases", 12, "other cases"),
    ],
)
def test_a_setting_that_may_not_change_is_refused_with_its_reason_and_its_flag(tmp_path, setting, value, reason):
    run_dir = a_run(tmp_path / "run")
    flag = f"--{setting.replace('_', '-')}"
    with pytest.raises(ConfigError, match=rf"found {re.escape(setting)} .*refused: .*{reason}.*{re.escape(flag)}"):
        checks_of_run_dir(resumed(changed(DEMO, setting, value), run_dir), run_dir)


def test_an_evaluation_set_may_move_and_not_come_or_go(tmp_path):
    def evaluated(place: str) -> Recipe:
        return dataclasses.replace(DEMO, data=dataclasses.replace(DEMO.data, eval_images=place, eval_labels=place))

    assert changes_of(evaluated("old"), evaluated("new"), "run") == []
    for before, now in ((DEMO, evaluated("new")), (evaluated("old"), DEMO)):
        with pytest.raises(ConfigError, match=r"data\.eval_images"):
            changes_of(before, now, "run")


def test_the_advice_of_a_step_that_is_not_finite_can_be_followed(tmp_path):
    run_dir = a_run(tmp_path / "run")
    case = Case("a", ObjectMeta("a_x.npy", 8), ObjectMeta("a_y.npy", 8))
    Manifest.from_cases([case], images_uri="gs://b/", labels_uri="gs://b/").save(f"{run_dir}/manifest.parquet")
    result = StepResult(loss=float("nan"), sample_losses=[float("nan")], gradient_norm=float("nan"), finite=False)
    with pytest.raises(NonFiniteError) as caught:
        finite.stop_run(result, [0], epoch=0, step=41, rate=0.003, run_dir=run_dir, rank=0)
    assert f"--trainer.resume {run_dir}" in str(caught.value)
    values = {"optimizer.learning_rate": 0.0003, "optimizer.clip_norm": 1.0, "trainer.precision": "fp32"}
    for setting, value in values.items():
        assert f"--{setting.replace('_', '-')}" in str(caught.value)
        now = resumed(changed(DEMO, setting, value), run_dir)
        assert [change.setting for change in checks_of_run_dir(now, run_dir)] == [setting]


FLAG = re.compile(r"--((?:data|trainer|optimizer|model|window|demo)\.[a-z0-9]+(?:[.-][a-z0-9]+)*)")
NEW_RUN = {
    *("data.crop.patch", "data.decode.channels", "data.decode.num_classes", "model.in_channels", "model.num_classes"),
    "demo.shape",
    *("data.holdout_fraction", "data.holdout_cases", "data.subject_pattern"),
}
"""Settings that messages advise to change and that a resumed run refuses: another network, other samples."""


def test_every_setting_that_a_message_names_exists_and_may_change_on_resume_or_calls_for_a_new_run():
    settings = {name for name, _ in settings_of(DEMO)}
    found = set()
    for package in (ingest, train):
        for file in Path(package.__file__).parent.rglob("*.py"):
            found |= {name.replace("-", "_").replace(".no_", ".") for name in FLAG.findall(file.read_text())}
    bad = {f"data.{name.rpartition('.')[2]}": name for name in settings if name.startswith("data.bad.")}
    named = {bad.get(name, name) for name in found}
    unknown = {name for name in named if not any(each == name or each.startswith(f"{name}.") for each in settings)}
    assert unknown == set()
    assert {name for name in named if rule_of(name).verdict == "refused"} == NEW_RUN
    assert len(named) > 20
