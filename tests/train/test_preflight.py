"""What would go wrong later is said before anything starts, with the numbers that decide it."""

import contextlib
import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from ingest.crop import CropConfig
from ingest.errors import ConfigError
from ingest.layout import Known, Layout
from ingest.manifest import Manifest
from ingest.pairing import Case
from ingest.stores import ObjectMeta, open_store
from ingest.testing import npy_bytes
from train import preflight
from train.config import DemoConfig, Recipe, TrainerConfig, from_json
from train.recipes import DEMO, RECIPES


def with_trainer(**changes) -> Recipe:
    return dataclasses.replace(DEMO, trainer=dataclasses.replace(DEMO.trainer, **changes))


def test_trainers_that_leave_no_cpu_for_reading_are_refused():
    one = with_trainer(cpus_per_worker=1.0)
    given_one = dataclasses.replace(one, data=dataclasses.replace(one.data, task_cpus=1.0))
    with pytest.raises(ConfigError, match=r"expected at least 1 CPUs for reading .* found 0: the cluster has 2 and 2"):
        preflight.check_cpus(given_one, cpus=2)
    preflight.check_cpus(DEMO, cpus=2)


def test_a_demo_without_a_spare_cpu_is_refused_before_its_data_is_made(tmp_path):
    ranks = str(4 * (os.cpu_count() or 1))  # of a quarter of a CPU each, the least
    call = [sys.executable, "-m", "train", "run", "demo", "--run-dir", "run", "--trainer.num-workers", ranks]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env["PYTHONPATH"] = str(Path(train.__file__).parents[1])
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "CPUs for reading and transforming beside the trainers, found 0" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_gpus_are_taken_where_there_are_enough_and_missed_where_they_are_asked_for():
    assert preflight.check_gpus(with_trainer(use_gpu=None), gpus=2)
    assert not preflight.check_gpus(with_trainer(use_gpu=None), gpus=0)
    assert not preflight.check_gpus(with_trainer(use_gpu=False), gpus=8)
    with pytest.raises(ConfigError, match="expected a GPU for each of 2 ranks, found 1"):
        preflight.check_gpus(with_trainer(use_gpu=True), gpus=1)


def test_some_gpus_but_too_few_are_refused_with_both_numbers_and_the_flags():
    with pytest.raises(
        ConfigError, match=r"each of 8 ranks, found 3 .*num-workers 3 .*--trainer\.use-gpu False trains"
    ):
        preflight.check_gpus(with_trainer(use_gpu=None, num_workers=8), gpus=3)


@pytest.mark.parametrize("name", ["kits19-small", "kits19-mlperf"])
def test_the_kits19_recipes_ask_for_gpus_on_a_cluster_that_has_none_yet(name):
    recipe = RECIPES[name][1]
    assert preflight.gpus_unchecked(recipe, gpus=0)
    with pytest.raises(ConfigError, match=r"each of 8 ranks, found 0 .*--trainer\.use-gpu False trains on CPUs"):
        preflight.check_gpus(recipe, gpus=0)


def test_a_momentary_count_does_not_decide_for_cpus_where_resources_are_not_checked():
    assert preflight.gpus_unchecked(with_trainer(use_gpu=None), gpus=1)
    assert not preflight.gpus_unchecked(with_trainer(use_gpu=False), gpus=8)
    with pytest.raises(ConfigError, match=r"--trainer\.use-gpu True or False beside --trainer\.no-check-resources"):
        preflight.gpus_unchecked(with_trainer(use_gpu=None), gpus=0)


def test_a_kits19_recipe_is_refused_early_on_a_machine_without_gpus(monkeypatch):
    from train import launch

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"expected a GPU for each of 8 ranks, found 0"):
        launch.check_early(RECIPES["kits19-small"][1])


def test_a_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(ConfigError, match=r"expected at least 8 training cases.*found 7"):
        preflight.check_amount(DEMO, 7, 1)
    preflight.check_amount(DEMO, 8, 1)


def test_a_patch_larger_than_the_smallest_volume_is_refused_and_the_volume_named(tmp_path):
    place = f"{tmp_path}/"
    metas = []
    for name, shape in (("a_x.npy", (1, 40, 40, 40)), ("b_x.npy", (1, 40, 16, 40))):
        file = io.BytesIO()
        np.save(file, np.zeros(shape, np.float32))
        open_store(place).put(name, file.getvalue())
        metas.append(ObjectMeta(name, len(file.getvalue())))
    cases = [Case(m.name[0], m, ObjectMeta(m.name[0] + "_y.npy", 1)) for m in metas]
    manifest = Manifest.from_cases(cases, images_uri=place, labels_uri=place)
    with pytest.raises(ConfigError, match=r"patch of \(32, 32, 32\), found \(40, 16, 40\) in the smallest, .*b_x\.npy"):
        preflight.check_smallest(DEMO, manifest)


def test_instance_norm_on_a_bottleneck_of_one_voxel_is_refused():
    recipe = RECIPES["kits19-mlperf"][1]
    small = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, crop=CropConfig(patch=(32, 32, 32))))
    with pytest.raises(ConfigError, match="instance"):
        preflight.check_model(small)
    preflight.check_model(recipe)


@pytest.mark.parametrize(("part", "field", "value"), [("model", "in_channels", 2), ("model", "num_classes", 5)])
def test_a_network_for_other_data_is_refused(part, field, value):
    changed = dataclasses.replace(DEMO, **{part: dataclasses.replace(getattr(DEMO, part), **{field: value})})
    with pytest.raises(ConfigError, match="expected a network for"):
        preflight.check_model(changed)


def test_a_run_folder_without_room_is_refused(tmp_path):
    huge = dataclasses.replace(DEMO, model=dataclasses.replace(DEMO.model, bottleneck=2_000_000))
    with pytest.raises(ConfigError, match=r"MiB for checkpoints .* MiB free"):
        preflight.check_space(huge, str(tmp_path / "run"))
    preflight.check_space(DEMO, str(tmp_path / "run"))


def test_a_run_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(ConfigError, match="expected a folder to keep the run in, found the file"):
        preflight.check_space(DEMO, str(tmp_path / "run"))


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_is_read_back_as_it_was_saved(name):
    recipe = RECIPES[name][1]
    assert from_json(recipe.to_json()) == recipe


def test_what_is_no_recipe_is_refused():
    with pytest.raises(ConfigError, match="expected a saved recipe"):
        from_json('{"trainer": {"no_such_field": 1}}')


def test_held_out_cases_are_scored_when_due_and_at_the_end():
    trainer = TrainerConfig(epochs=10, evaluate_from=3, evaluate_every=4)
    assert [e for e in range(10) if trainer.evaluates(e)] == [3, 7, 9]
    assert not any(TrainerConfig(evaluate_every=0).evaluates(e) for e in range(100))


@pytest.mark.parametrize(
    "bad",
    [
        *({"num_workers": 0}, {"batch_size": 0}, {"accumulate": 0}, {"epochs": 0}, {"cpus_per_worker": 0}),
        *({"prefetch_batches": 0}, {"evaluate_every": -1}),
        *({"precision": "int4"}, {"compile_backend": "gcc"}),
    ],
)
def test_trainer_config_rejects_what_cannot_train(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        TrainerConfig(**bad)


def test_demo_config_rejects_too_little_data():
    with pytest.raises(ConfigError, match="2 cases or more"):
        DemoConfig(cases=1)


def test_scoring_without_held_out_cases_is_refused():
    with pytest.raises(ConfigError, match="expected held-out cases to score"):
        preflight.check_amount(DEMO, 100, 0)
    preflight.check_amount(with_trainer(evaluate_every=0), 100, 0)


@pytest.mark.parametrize(("boxes", "empty"), [([(), ()], True), ([(), ((((0, 1), (0, 1), (0, 1)),),)], False)])
def test_a_data_set_whose_known_labels_are_all_empty_is_refused_at_the_start(boxes, empty):
    cases = [Case(name, ObjectMeta(f"{name}_x.npy", 10), ObjectMeta(f"{name}_y.npy", 5)) for name in "ab"]
    manifest = Manifest.from_cases(cases, images_uri="/i/", labels_uri="/l/")
    known = manifest.with_known([Known(Layout(128, 128, (8, 8, 8)), found) for found in boxes])
    with pytest.raises(ConfigError, match="only background in all 2 labels") if empty else contextlib.nullcontext():
        assert preflight.check_foreground(DEMO, known) is None


def labelled(folder: Path, labels: list[np.ndarray]) -> Manifest:
    cases = []
    for number, label in enumerate(labels):
        body = npy_bytes(label)
        meta = ObjectMeta(f"{number}_y.npy", len(body))
        open_store(f"{folder}/labels/").put(meta.name, body)
        cases.append(Case(str(number), ObjectMeta(f"{number}_x.npy", 10), meta))
    return Manifest.from_cases(cases, images_uri=f"{folder}/images/", labels_uri=f"{folder}/labels/")


EMPTY = np.zeros((1, 4, 4, 4), np.uint8)


def test_a_data_set_whose_labels_are_all_empty_is_refused_at_the_start_without_boxes_too(tmp_path):
    with pytest.raises(ConfigError, match="only background in all 3 labels"):
        preflight.check_foreground(DEMO, labelled(tmp_path, [EMPTY] * 3))


def test_one_label_with_foreground_is_enough(tmp_path):
    labels = [EMPTY] * 4
    labels[2] = EMPTY + 1
    assert preflight.check_foreground(DEMO, labelled(tmp_path, labels)) is None


def test_many_empty_labels_of_more_are_a_warning_and_a_damaged_label_says_nothing(tmp_path):
    manifest = labelled(tmp_path, [EMPTY] * 40)
    assert "only background in the 32 that were looked at, of 40" in preflight.check_foreground(DEMO, manifest)
    few = labelled(tmp_path / "few", [EMPTY, np.zeros(7, np.uint8)])
    assert "only background in the 1 that were looked at, of 2" in preflight.check_foreground(DEMO, few)
