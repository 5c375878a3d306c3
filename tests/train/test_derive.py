"""Whatever follows from another setting is derived from it, said in one line, and saved with the run."""

import dataclasses

import pytest
import tyro

from ingest.errors import ConfigError
from train import preflight
from train.config import Recipe, from_json
from train.derive import cpu_shares, derive, derived_line, warm_up_warning, with_cpus
from train.optimizer import OptimizerConfig, in_epochs, learning_rate_at
from train.recipes import DEMO, DEMO_QUALITY, KITS19_MLPERF, KITS19_SMALL, RECIPES
from train.resume_rules import changes_of


def given(name: str, *overrides: str) -> Recipe:
    """The recipe that a command line asks for."""
    return tyro.extras.overridable_config_cli(RECIPES, prog="voxflux run", args=[name, *overrides])


def test_windows_are_of_the_patch_unless_they_are_given():
    assert derive(given("kits19-small", "--data.crop.patch", "48", "48", "48")).window.roi == (48, 48, 48)
    asked = given("demo", "--data.crop.patch", "48", "48", "48", "--window.roi", "32", "32", "32")
    assert derive(asked).window.roi == (32, 32, 32)


@pytest.mark.parametrize(
    ("recipe", "patch"), [(DEMO, 32), (DEMO_QUALITY, 64), (KITS19_SMALL, 32), (KITS19_MLPERF, 128)]
)
def test_each_recipe_scores_windows_of_its_patch(recipe, patch):
    assert derive(recipe).window.roi == recipe.data.crop.patch == (patch,) * 3


def test_classes_and_channels_are_given_once_for_the_data_and_the_network_follows():
    recipe = derive(given("demo", "--data.decode.num-classes", "5", "--data.decode.channels", "4"))
    assert (recipe.model.in_channels, recipe.model.num_classes) == (4, 5)
    preflight.check_model(given("demo", "--data.decode.num-classes", "5"))


def test_a_network_for_other_classes_than_the_data_has_is_an_error_that_says_to_leave_it_out():
    with pytest.raises(ConfigError, match=r"for 3 classes, found one for 5; leave --model\.num-classes out"):
        preflight.check_model(given("demo", "--model.num-classes", "5"))
    with pytest.raises(ConfigError, match=r"for 1 image channels, found one for 4; leave --model\.in-channels out"):
        preflight.check_model(given("demo", "--model.in-channels", "4"))


@pytest.mark.parametrize(
    ("name", "epochs", "after"),
    [
        ("demo", 8, (6,)),
        ("demo", 16, (12,)),
        ("demo", 2, (2,)),
        ("demo", 1, (1,)),
        ("demo-quality", 60, (40, 54)),
        ("demo-quality", 6, (4, 5)),
        ("demo-quality", 1, (1,)),
        ("kits19-small", 7, ()),
        ("kits19-mlperf", 7, ()),
    ],
)
def test_the_learning_rate_drops_at_shares_of_the_epochs_that_there_are(name, epochs, after):
    optimizer = derive(given(name, "--trainer.epochs", str(epochs))).optimizer
    assert optimizer.lr_decay_epochs == after
    assert all(type(epoch) is int for epoch in optimizer.lr_decay_epochs)


def test_a_drop_may_be_given_in_epochs_too_and_a_share_never_falls_into_the_warm_up():
    assert derive(given("demo", "--optimizer.lr-decay-epochs", "3", "5")).optimizer.lr_decay_epochs == (3, 5)
    shares = OptimizerConfig(warmup_epochs=2.5, lr_decay_epochs=(0.1, 0.2), lr_decay_factor=0.5)
    assert in_epochs(shares, 10).lr_decay_epochs == (3,)


@pytest.mark.parametrize("wrong", [(0.5, 6), (6.5,), (-1,)])
def test_drops_that_are_neither_all_epochs_nor_all_shares_are_refused(wrong):
    with pytest.raises(ConfigError, match="must all be whole epochs, or all be shares below 1"):
        OptimizerConfig(warmup_epochs=0, lr_decay_epochs=wrong)


def test_the_learning_rate_of_shares_is_not_asked_for_before_they_are_epochs():
    with pytest.raises(ConfigError, match="in epochs, found shares"):
        learning_rate_at(DEMO.optimizer, 0)
    assert learning_rate_at(derive(DEMO).optimizer, 5) == pytest.approx(3e-3)
    assert learning_rate_at(derive(DEMO).optimizer, 6) == pytest.approx(9e-4)


@pytest.mark.parametrize(
    ("cpus", "processes", "of_process", "of_task", "shares"),
    [
        (2, 2, None, None, (0.5, 1)),
        (16, 2, None, None, (1, 1)),
        (3, 2, None, None, (1, 1)),
        (2, 3, None, None, (0.33, 1)),
        (1, 1, None, None, (0.5, 0.5)),
        (1, 2, None, None, (0.25, 0.5)),
        (2, 8, None, None, (0.25, 1)),
        (2, 1, 1.5, None, (1.5, 0.5)),
        (2, 2, None, 1.5, (0.25, 1.5)),
        (2, 2, 1, 1, (1, 1)),
        (0, 2, None, None, (0.25, 0.25)),
    ],
)
def test_ranks_and_reading_share_the_cpus_that_there_are(cpus, processes, of_process, of_task, shares):
    assert cpu_shares(cpus, processes, of_process, of_task) == shares


def test_the_reference_recipe_starts_on_two_cpus_with_two_cpu_ranks_and_not_with_its_eight():
    two = given("kits19-small", "--trainer.use-gpu", "False", "--trainer.num-workers", "2")
    preflight.check_cpus(two, 2)
    found = with_cpus(derive(two), 2)
    assert (found.trainer.rank_cpus, found.data.read_cpus) == (0.5, 1)
    with pytest.raises(ConfigError, match="found 0: the cluster has 2 and 8 trainers take 2"):
        preflight.check_cpus(given("kits19-small", "--trainer.use-gpu", "False"), 2)
    with pytest.raises(ConfigError, match="found 0: the cluster has 2 and 2 trainers take 2"):
        preflight.check_cpus(given("demo", "--trainer.cpus-per-worker", "1"), 2)


def test_the_cpus_of_a_moment_decide_nothing_where_a_cluster_may_grow():
    found = with_cpus(given("demo", "--trainer.no-check-resources"), 1)
    assert (found.trainer.cpus_per_worker, found.data.task_cpus) == (1, 1)


def test_one_line_says_all_that_was_derived_and_nothing_where_all_was_given():
    found = with_cpus(derive(DEMO), 2)
    assert derived_line(DEMO, found, 2) == (
        "derived: windows of 32 x 32 x 32 (the patch); a network of 1 channel and 3 classes (the data's); "
        "learning rate x 0.3 after epoch 6 of 8; CPUs: 0.5 a rank and 1 a read task, of 2"
    )
    assert derived_line(found, with_cpus(derive(found), 2), 2) is None


def test_a_saved_recipe_holds_what_was_derived_and_deriving_again_changes_nothing():
    found = with_cpus(derive(DEMO), 2)
    read = from_json(found.to_json())
    assert read == found
    assert with_cpus(derive(read), 64) == found


def test_a_resumed_run_derives_what_it_had_and_may_have_other_cpus():
    saved = from_json(with_cpus(derive(DEMO), 2).to_json())
    assert changes_of(saved, derive(DEMO), "run") == []
    longer = derive(given("demo", "--trainer.epochs", "16"))
    assert [str(change) for change in changes_of(saved, longer, "run")] == [
        "optimizer.lr_decay_epochs [6] -> [12]",
        "trainer.epochs 8 -> 16",
    ]


def test_a_run_that_ends_in_its_warm_up_is_warned_of():
    assert "within 5 epochs, found one of 20" in warm_up_warning(given("kits19-small", "--trainer.epochs", "5"))
    assert all(warm_up_warning(recipe) is None for _, recipe in RECIPES.values())


def test_demo_cases_that_hold_no_patch_are_refused_before_they_are_made():
    with pytest.raises(ConfigError, match=r"hold a patch of \(64, 64, 64\), found --demo.shape \(48, 48, 48\)"):
        preflight.check_model(given("demo", "--data.crop.patch", "64", "64", "64"))
    elsewhere = dataclasses.replace(DEMO.data, images="gs://b/i/", labels="gs://b/l/")
    wide = dataclasses.replace(elsewhere, crop=dataclasses.replace(elsewhere.crop, patch=(64, 64, 64)))
    preflight.check_model(dataclasses.replace(DEMO, data=wide))
