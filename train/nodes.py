"""The nodes of a cluster: which of them read, and whether all of them see the files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import ray
from ray._private.accelerators import get_accelerator_manager_for_resource
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ingest.errors import ConfigError
from ingest.manifest import Manifest
from ingest.stores import open_store
from ingest.stores.local import LocalStore

from .config import Recipe

DATA_WORKERS = {"ray-subcluster": "data"}
"""Label of data workers where nothing else is to read; the key is Ray Data's own for a part of a cluster."""

LOOK_TIMEOUT_S = 60.0

Look = Callable[[Sequence["Node"], Sequence[str]], Mapping[str, Sequence[str]]]


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A node that is alive.

    Attributes:
        node_id: Ray's, hexadecimal.
        address: its IP address.
        labels: Ray's own and those it was started with.
        resources: in total, by name: CPU, GPU, memory, custom ones.
    """

    node_id: str
    address: str
    labels: Mapping[str, str]
    resources: Mapping[str, float]

    def has(self, selector: Mapping[str, str]) -> bool:
        """Whether it has all of these labels."""
        return all(self.labels.get(key) == value for key, value in selector.items())

    def holds(self, amounts: Mapping[str, float]) -> bool:
        """Whether it has as much of every resource."""
        return all(self.resources.get(name, 0.0) + 1e-6 >= amount for name, amount in amounts.items())


def alive_nodes() -> list[Node]:
    """The nodes of the cluster that Ray is connected to."""
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], node.get("Labels") or {}, node["Resources"])
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]


def gpus_of_machine() -> float:
    """GPUs that a Ray that starts on this machine would have."""
    manager = get_accelerator_manager_for_resource("GPU")
    if manager is None:
        return 0.0
    visible = manager.get_current_process_visible_accelerator_ids()
    there = manager.get_current_node_num_accelerators()
    return float(there if visible is None else min(there, len(visible)))


def with_readers(recipe: Recipe, nodes: Sequence[Node]) -> Recipe:
    """The recipe with `data.label_selector` decided: nodes labelled as data workers read, if there are any."""
    if recipe.data.label_selector is not None:
        return recipe
    found = DATA_WORKERS if any(node.has(DATA_WORKERS) for node in nodes) else {}
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, label_selector=dict(found)))


def labelled(selector: Mapping[str, str]) -> str:
    """Labels as `ray start --labels` takes them."""
    return ",".join(f"{key}={value}" for key, value in selector.items())


def check_readers(recipe: Recipe, nodes: Sequence[Node], *, use_gpu: bool) -> None:
    """Nodes that read must have CPUs that no trainer takes, and trainers what they reserve: else both wait in silence.

    A trainer may come to lie on any node that has what it reserves, so its CPUs are not counted on for reading there.

    Args:
        recipe: the run; None as its label selector is every node.
        nodes: of the cluster.
        use_gpu: whether each rank takes a GPU.

    Raises:
        ConfigError: no node has the labels, too few CPUs are left on those that have, or a custom resource is short.
    """
    trainer, selector = recipe.trainer, recipe.data.label_selector or {}
    for name, amount in (trainer.resources_per_worker or {}).items():
        room = sum(int(node.resources.get(name, 0.0) / amount + 1e-6) for node in nodes)
        if room < trainer.num_workers:
            raise ConfigError(
                f"expected {amount:g} {name} for each of {trainer.num_workers} ranks, found enough for {room}; lower "
                "--trainer.num-workers, correct --trainer.resources-per-worker, or add nodes that have it"
            )
    readers = [node for node in nodes if node.has(selector)]
    called = labelled(selector)
    if not readers:
        raise ConfigError(
            f"expected nodes labelled {called} to read on, found none among {len(nodes)}; start data workers with "
            f"`ray start --labels {called}`, or leave --data.label-selector out"
        )
    reserved = {"GPU": 1.0} if use_gpu else {}
    needs = {"CPU": trainer.rank_cpus, **reserved, **(trainer.resources_per_worker or {})}
    cpus = sum(node.resources.get("CPU", 0.0) for node in readers)
    shared = sum(node.resources.get("CPU", 0.0) for node in readers if node.holds(needs))
    taken = min(trainer.num_workers * trainer.rank_cpus, shared)
    if cpus - taken + 1e-6 < recipe.data.read_cpus:
        where = f"nodes labelled {called}" if selector else "the cluster's nodes"
        raise ConfigError(
            f"expected at least {recipe.data.read_cpus:g} CPUs for reading and transforming beside the trainers, "
            f"found {max(cpus - taken, 0):g} on {where}: they have {cpus:g}, of which trainers may take {taken:g}; "
            "add data workers, lower --trainer.cpus-per-worker or --data.task-cpus, or keep trainers elsewhere with "
            "--trainer.resources-per-worker"
        )


def missing(paths: Sequence[str]) -> list[str]:
    """Those of these paths that are not there, as seen from this process."""
    return [path for path in paths if not os.path.exists(path)]  # noqa: PTH110  a task that imports little


def look_from(nodes: Sequence[Node], paths: Sequence[str]) -> dict[str, list[str]]:
    """Look for paths from each node, by a task there that reserves nothing.

    Returns:
        For each node id, the paths that are not there.

    Raises:
        ConfigError: a node did not answer within a minute.
    """
    look = ray.remote(num_cpus=0, max_retries=0)(missing)
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote(paths): node
        for node in nodes
    }
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_TIMEOUT_S)
    if silent:
        raise ConfigError(
            f"expected every node to say within {LOOK_TIMEOUT_S:g} s whether it sees the local files, found no answer "
            f"from {', '.join(sorted(asked[task].address for task in silent))}; try again, or use gs:// places"
        )
    return {asked[task].node_id: ray.get(task) for task in answered}


def check_visible(
    recipe: Recipe, manifests: Sequence[Manifest], run_dir: str, nodes: Sequence[Node], look: Look = look_from
) -> None:
    """Local places must be the same folders on every node that runs anything of ours; gs:// places always are.

    Args:
        recipe: the run.
        manifests: what is trained on and scored; the first case of each is looked for.
        run_dir: of the run; a file is put there for a moment, and looked for.
        nodes: of the cluster; those without CPUs run nothing of ours. With a single node nothing is asked.
        look: says which paths are missing, node by node.

    Raises:
        ConfigError: what is not seen from which nodes.
    """
    if len(nodes) < 2:
        return
    working = [node for node in nodes if node.resources.get("CPU", 0.0) > 0]
    with contextlib.ExitStack() as stack:
        wanted: dict[str, str] = {}
        for manifest in manifests:
            for uri, column, role in (
                (manifest.images_uri, "image", "images"),
                (manifest.labels_uri, "label", "labels"),
            ):
                store = open_store(uri)
                if isinstance(store, LocalStore) and len(manifest):
                    wanted[store.uri_of(manifest.table[column][0].as_py())] = f"the {role} in {store.root}"
        for folder, role in ((run_dir, "--run-dir"), (recipe.trainer.ledger, "--trainer.ledger")):
            place = open_store(folder) if folder else None
            if isinstance(place, LocalStore):
                wanted[stack.enter_context(_probe(Path(place.root)))] = f"what is written to {role} {folder}"
        if not wanted:
            return
        unseen = look(working, list(wanted))
    for path, what in wanted.items():
        blind = sorted({node.address for node in working if path in unseen[node.node_id]})
        count = sum(path in unseen[node.node_id] for node in working)
        if blind:
            raise ConfigError(
                f"expected {what} to be seen from all {len(working)} nodes, found nothing at {path} on {count} of "
                f"them: {', '.join(blind)}; use a gs:// place, or a file system that all nodes mount at the same path"
            )


@contextlib.contextmanager
def _probe(place: Path) -> Iterator[str]:
    """A file in a folder, for a moment; a folder that was made for it goes again with it."""
    made = [parent for parent in (place, *place.parents) if not parent.exists()]
    place.mkdir(parents=True, exist_ok=True)
    file = place / f".voxflux-seen-{uuid.uuid4().hex}"
    file.touch()
    try:
        yield str(file)
    finally:
        file.unlink()
        with contextlib.suppress(OSError):  # another run has put something there meanwhile
            for parent in made:
                parent.rmdir()
