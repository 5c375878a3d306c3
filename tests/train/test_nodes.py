"""Which nodes read, which train, and what is said where they cannot."""

import dataclasses

import pytest

from ingest.errors import ConfigError
from ingest.index import index_cases
from ingest.pipeline import DataConfig
from ingest.stores import open_store
from ingest.testing import make_cases
from train.config import Recipe, TrainerConfig
from train.nodes import DATA_WORKERS, Node, check_readers, check_visible, missing, with_readers


def node(name: str, cpus: float, labels: dict[str, str] | None = None, **resources: float) -> Node:
    return Node(name, f"10.0.0.{name}", labels or {}, {"CPU": cpus} | resources)


def recipe(selector: dict[str, str] | None = None, **trainer) -> Recipe:
    return Recipe(
        data=DataConfig(label_selector=selector),
        trainer=TrainerConfig(**({"num_workers": 2, "batch_size": 4} | trainer)),
    )


GPU_NODE = node("1", 2, accelerator=2)
DATA_NODE = node("2", 4, DATA_WORKERS)


def test_data_workers_read_where_there_are_any_and_all_nodes_else():
    assert with_readers(recipe(), [GPU_NODE, DATA_NODE]).data.label_selector == DATA_WORKERS
    assert with_readers(recipe(), [GPU_NODE]).data.label_selector == {}


def test_a_label_that_is_asked_for_is_kept():
    assert with_readers(recipe({"disk": "ssd"}), [DATA_NODE]).data.label_selector == {"disk": "ssd"}


def test_a_label_that_no_node_has_is_refused():
    with pytest.raises(ConfigError, match="expected nodes labelled disk=ssd to read on, found none among 2"):
        check_readers(recipe({"disk": "ssd"}), [GPU_NODE, DATA_NODE], use_gpu=False)


def test_trainers_on_nodes_of_their_own_leave_the_data_nodes_cpus_alone():
    check_readers(recipe(DATA_WORKERS, resources_per_worker={"accelerator": 1.0}), [GPU_NODE, DATA_NODE], use_gpu=False)


def test_trainers_that_may_take_all_cpus_of_the_data_nodes_are_refused():
    with pytest.raises(ConfigError, match=r"found 0 on nodes labelled ray-subcluster=data: they have 2"):
        check_readers(recipe(DATA_WORKERS), [GPU_NODE, node("3", 2, DATA_WORKERS)], use_gpu=False)


def test_too_little_of_a_custom_resource_is_refused():
    with pytest.raises(ConfigError, match="expected 2 accelerator for each of 2 ranks, found enough for 1"):
        check_readers(recipe({}, resources_per_worker={"accelerator": 2.0}), [GPU_NODE, DATA_NODE], use_gpu=False)


@pytest.mark.parametrize("wrong", [{"GPU": 1.0}, {"accelerator": 0.0}])
def test_resources_that_have_options_of_their_own_or_are_nothing_are_refused(wrong):
    with pytest.raises(ConfigError, match="resources_per_worker"):
        recipe(resources_per_worker=wrong)


@pytest.mark.parametrize("wrong", [{"": "x"}, {"a": ""}, {"a": "!b"}, {"a": "in(b,c)"}])
def test_labels_that_are_no_plain_values_are_refused(wrong):
    with pytest.raises(ConfigError, match="label_selector"):
        DataConfig(label_selector=wrong)


@pytest.fixture
def files(tmp_path):
    """A manifest of cases in a folder."""
    make_cases(open_store(f"{tmp_path}/images/"), open_store(f"{tmp_path}/labels/"), 3, shape=[(8, 8, 8)], seed=0)
    return index_cases(f"{tmp_path}/images", f"{tmp_path}/labels").manifest


def seen_by(*blind: str):
    """A look that finds every path missing on the nodes named, and asks the file system for the others."""

    def look(nodes, paths):
        return {node.node_id: list(paths) if node.node_id in blind else missing(paths) for node in nodes}

    return look


def test_files_that_a_node_does_not_see_are_refused_and_the_node_named(files, tmp_path):
    with pytest.raises(
        ConfigError, match=r"expected the images in .* all 2 nodes, found nothing .* on 1 .*10\.0\.0\.2;"
    ):
        check_visible(recipe(), [files], "gs://runs/x", [GPU_NODE, DATA_NODE], seen_by("2"))


def test_held_out_files_that_a_node_does_not_see_are_refused_too(files):
    bucket = dataclasses.replace(files, images_uri="gs://b/images/", labels_uri="gs://b/labels/")
    with pytest.raises(ConfigError, match=r"expected the images in .* found nothing .* on 1"):
        check_visible(recipe(), [bucket, files], "gs://runs/x", [GPU_NODE, DATA_NODE], seen_by("2"))


def test_files_that_all_nodes_see_are_taken(files, tmp_path):
    check_visible(recipe(), [files], str(tmp_path / "run"), [GPU_NODE, DATA_NODE], seen_by())
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_a_node_does_not_see_is_refused(files, tmp_path):
    bucket = dataclasses.replace(files, images_uri="gs://b/images/", labels_uri="gs://b/labels/")
    with pytest.raises(ConfigError, match="what is written to --run-dir"):
        check_visible(recipe(), [bucket], str(tmp_path / "run"), [GPU_NODE, DATA_NODE], seen_by("2"))
    check_visible(recipe(), [bucket], "gs://runs/x", [GPU_NODE, DATA_NODE], seen_by("1", "2"))


def test_a_node_without_cpus_need_not_see_the_files(files, tmp_path):
    head = node("9", 0)
    check_visible(recipe(), [files], str(tmp_path / "run"), [head, DATA_NODE], seen_by("9"))


def test_nothing_is_asked_of_a_single_node(files, tmp_path):
    def never(nodes, paths):
        raise AssertionError(f"asked {nodes} for {paths}")

    check_visible(recipe(), [files], str(tmp_path / "run"), [DATA_NODE], never)


def test_the_first_case_is_what_is_looked_for(files, tmp_path):
    asked: list[str] = []

    def look(nodes, paths):
        asked.extend(paths)
        return {node.node_id: missing(paths) for node in nodes}

    check_visible(recipe(), [files], "gs://runs/x", [GPU_NODE, DATA_NODE], look)
    assert asked == [f"{tmp_path}/images/case_00000_x.npy", f"{tmp_path}/labels/case_00000_y.npy"]
