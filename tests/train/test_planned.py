"""Which epochs a run reads in one execution of Ray Data."""

import contextlib
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.synthetic import synthetic_manifest
from ingest.errors import UnreachableError
from ingest.manifest import Manifest
from ingest.plan import ShardConfig, plan_epochs
from ingest.quarantine import BadCaseConfig
from train import loop, planned
from train.batches import epochs_of
from train.config import Recipe, TrainerConfig
from train.flag import Plan
from train.holdout import Holdout
from train.loop import LoopJob, RankLoop, check_epoch
from train.planned import datasets_of, most_together, planned_dataset
from train.pulse import Pulses
from train.recipes import KITS19_SMALL

CASES = 12_000


@pytest.fixture(scope="module")
def manifest():
    return synthetic_manifest(CASES)


def recipe_of(bad: BadCaseConfig | None = None, **trainer) -> Recipe:
    recipe = KITS19_SMALL
    data = dataclasses.replace(recipe.data, images="images", labels="labels", bad=bad or BadCaseConfig())
    return dataclasses.replace(recipe, data=data, trainer=TrainerConfig(**{"epochs": 7, "evaluate_every": 0} | trainer))


def job_of(recipe: Recipe, manifest: Manifest, run_dir) -> LoopJob:
    train = np.arange(CASES)
    held_out = Holdout(manifest, train[:0], recipe.data)
    together = most_together(recipe, manifest, train)
    return LoopJob(
        recipe=recipe,
        run_dir=str(run_dir),
        holdout=held_out,
        train_cases=CASES,
        total_cases=CASES,
        together=together,
    )


def test_a_run_reads_small_epochs_on_end_up_to_its_scorings(manifest, tmp_path):
    job = job_of(recipe_of(), manifest, tmp_path)
    assert job.executions(0) == [range(2), range(2, 4), range(4, 7)]
    assert job.executions(2) == [range(2, 4), range(4, 7)]
    scored = job_of(recipe_of(evaluate_every=2), manifest, tmp_path)
    assert scored.executions(0) == [range(1), range(1, 3), range(3, 5), range(5, 7)]


@pytest.mark.parametrize(
    "changes",
    [{"bad": BadCaseConfig(on_bad="quarantine")}, {"bad": BadCaseConfig(on_stale="quarantine")}, {"max_workers": 4}],
)
def test_a_run_whose_ranks_or_cases_may_change_reads_each_epoch_by_itself(manifest, tmp_path, changes):
    job = job_of(recipe_of(**changes), manifest, tmp_path)
    assert job.executions(0) == [range(epoch, epoch + 1) for epoch in range(7)]


@pytest.mark.parametrize(("epochs", "names"), [(3, ["train"]), (4, ["train", "train_next"])])
def test_a_second_data_set_is_made_where_there_is_a_second_execution(manifest, tmp_path, epochs, names):
    job = job_of(recipe_of(epochs=epochs), manifest, tmp_path)
    assert list(datasets_of(job, manifest, np.arange(CASES))) == names


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 300), st.integers(0, 300), st.integers(1, 40))
def test_an_epochs_steps_are_those_of_its_plan_also_where_other_ranks_began_it(
    manifest, tmp_path, cases, trained, step
):
    trained = min(trained, cases)
    job = dataclasses.replace(job_of(recipe_of(), manifest, tmp_path), train_cases=cases)
    plan = plan_epochs(
        case_bytes=np.ones(cases, np.int64), seed=1, epochs=(0,), shards=ShardConfig(), consumed=np.arange(trained),
        multiple=step,
    )  # fmt: skip
    assert job.steps_left(trained, step) == len(plan.order) // step


@pytest.mark.parametrize("epochs", [[3, 3, 3], [2, 2, 3]])
def test_a_batch_that_is_not_of_the_epoch_alone_ends_the_run_and_names_what_it_holds(epochs):
    check_epoch(epochs_of({"epoch": torch.tensor([2, 2, 2])}), 2)
    with pytest.raises(RuntimeError, match=r"expected samples of epoch 3, found some of \[(3, )?4\]"):
        check_epoch(epochs_of({"epoch": torch.tensor(epochs)}), 2)


@pytest.fixture
def job(manifest, tmp_path, monkeypatch) -> LoopJob:
    """A run whose stop flag is a list here, and whose data sets are but their executions."""
    notes: list[Plan] = []
    monkeypatch.setattr(planned, "note_plan", lambda _, plan: notes.append(plan))
    for module in (planned, loop):
        monkeypatch.setattr(module, "noted_plan", lambda _: notes[-1] if notes else None)
    monkeypatch.setattr(planned, "given_up", lambda _: None)
    monkeypatch.setattr(planned, "warm_reader", lambda _: None)
    monkeypatch.setattr(planned, "training_dataset", lambda *_, **about: about["executions"])
    return dataclasses.replace(job_of(recipe_of(), manifest, tmp_path), stop_flag=object())


def test_a_run_folder_that_does_not_answer_at_a_start_fails_the_ranks_which_may_start_again(job, manifest, monkeypatch):
    """What is raised where Ray's controller plans ends a run, however many restarts it is allowed."""

    def no_answer(_: str) -> None:
        raise UnreachableError("gs://b/run: no answer")

    with monkeypatch.context() as patched:
        patched.setattr(loop.checkpoint, "read_position", no_answer)
        for turn in (0, 1):
            planned_dataset(job, manifest, np.arange(CASES), turn)
        with pytest.raises(UnreachableError, match="no answer"):
            job.begin()
    with pytest.raises(UnreachableError, match="no answer"):
        job.begin()  # it answers by now, but what this start reads is not planned from where the run stands
    assert planned_dataset(job, manifest, np.arange(CASES)) == [range(2), range(4, 7)]  # the next start
    assert job.begin().first_read == 0


def test_the_second_data_set_of_a_start_and_its_ranks_go_by_the_plan_of_the_first(job, manifest, monkeypatch):
    """A case that turns bad in between may leave no step of the epoch: they would then number executions otherwise."""
    assert planned_dataset(job, manifest, np.arange(CASES)) == [range(2), range(4, 7)]
    position, _ = job.planned()
    monkeypatch.setattr(LoopJob, "planned", lambda _: (position, Plan(None, 1)))
    assert planned_dataset(job, manifest, np.arange(CASES), 1) == [range(2, 4)]
    assert job.begin().first_read == 0


def test_a_rank_that_ends_lets_go_of_what_it_reads():
    closed = []
    rank = RankLoop.__new__(RankLoop)  # without the process group and the network that it makes
    rank.epochs = SimpleNamespace(close=lambda: closed.append("epochs"))
    rank.stop_watch = SimpleNamespace(close=lambda: closed.append("stop watch"))
    rank.pulses, rank.ledger = Pulses(None, rank=0, ranks=1), contextlib.nullcontext()
    rank.close()
    assert sorted(closed) == ["epochs", "stop watch"]
