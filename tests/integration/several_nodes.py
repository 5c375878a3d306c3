"""A run on a cluster of a head, a node that stands for GPUs, and two data nodes; prints what it saw, as JSON.

A script of its own, run by the test beside it: Ray connects a process to one cluster only.
"""

import contextlib
import dataclasses
import io
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
import ray.data
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_actors, list_tasks
from rich.console import Console

from ingest.crop import CropConfig
from ingest.errors import ConfigError
from ingest.index import index_cases
from ingest.pipeline import DataConfig, training_dataset
from ingest.plan import ShardConfig
from ingest.stores import open_store
from ingest.testing import make_cases
from train.config import Recipe, TrainerConfig
from train.evaluate import SlidingWindowConfig
from train.launch import run
from train.nodes import DATA_WORKERS
from train.optimizer import OptimizerConfig
from train.unet3d import UNet3DConfig

STORE_BYTES = 100 * 2**20
LARGE = (400, (64, 64, 64))  # 1.3 MB each: more than the stores of all four nodes hold


def recipe(root: str, run_dir: str, labels_root: str | None = None) -> Recipe:
    labels = f"{labels_root or root}labels"
    return Recipe(
        run_dir=run_dir,
        data=DataConfig(images=f"{root}images", labels=labels, seed=3, crop=CropConfig(patch=(8, 8, 8))),
        model=UNet3DConfig(filters=(4, 8), bottleneck=8),
        optimizer=OptimizerConfig(name="adamw", learning_rate=5e-3, warmup_epochs=0),
        window=SlidingWindowConfig(roi=(8, 8, 8), overlap=0.25),
        trainer=TrainerConfig(
            num_workers=2, batch_size=4, epochs=2, use_gpu=False, resources_per_worker={"accelerator": 1.0}
        ),
    )


def outcome_of(recipe: Recipe) -> dict[str, object]:
    printed = io.StringIO()
    outcome = run(recipe, "nodes", Console(file=printed, width=200))
    return {"checkpoint": outcome.checkpoint, "dice": outcome.rows[-1]["mean_dice"], "epochs": len(outcome.rows)}


def refusal_of(recipe: Recipe) -> dict[str, object]:
    try:
        run(recipe, "nodes", Console(quiet=True))
    except ConfigError as error:
        return {"refused": str(error)}
    return {"refused": None}


@ray.remote(num_cpus=1)
class Holder:
    """Holds CPUs of the node that it is put on."""

    def ready(self) -> bool:
        return True


@contextlib.contextmanager
def holding(*holders: Any) -> Iterator[None]:
    ray.get([holder.ready.remote() for holder in holders])
    yield
    for holder in holders:
        ray.kill(holder)


def where() -> dict[str, list[str]]:
    """Nodes that read tasks and trainers ran on, and those that a watcher of their loss ran on."""
    tasks = [task for task in list_tasks(limit=10_000, detail=True) if task.node_id]
    actors = list_actors(limit=10_000, detail=True)
    return {
        "read": sorted({task.node_id for task in tasks if task.name.startswith("ReadPairedVolume")}),
        "scored": sorted({task.node_id for task in tasks if task.name.startswith("ReadVolume")}),
        "trained": sorted({actor.node_id for actor in actors if actor.class_name == "RayTrainWorker"}),
        "watched_from": sorted({actor.node_id for actor in actors if actor.class_name == "PreemptionWatcher"}),
    }


def memory_of(root: str) -> dict[str, object]:
    """Bytes in the object stores while an epoch passes that is larger than they are."""
    manifest = index_cases(f"{root}images", f"{root}labels").manifest
    # Of blocks as large as by default a store of this size holds three: where two nodes read unequally, one spills.
    shards = ShardConfig(block_bytes=8 * 2**20)
    data = DataConfig(holdout_fraction=0.0, crop=CropConfig(patch=LARGE[1]), label_selector=DATA_WORKERS, shards=shards)
    samples = training_dataset(manifest, data, batch=4)
    state = get_state_from_address(None)
    used: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.3):
            used.append(get_memory_info_reply(state).store_stats.object_store_bytes_primary_copy)

    watcher = threading.Thread(target=watch)
    watcher.start()
    count = 0
    for batch in samples.iter_batches(batch_size=4, batch_format="numpy"):
        count += len(batch["index"])
        time.sleep(0.02)  # a consumer that is slower than reading
    done.set()
    watcher.join()
    spilled = get_memory_info_reply(state).store_stats.spilled_bytes_total
    sample_bytes = 5 * 64**3
    return {
        "samples": count,
        "epoch_bytes": count * sample_bytes,
        "store_bytes": 4 * STORE_BYTES,
        "peak_bytes": max(used),
        "spilled_bytes": spilled,
    }


def main(gs: str, local: str, run_root: str, large: str) -> None:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    make_cases(open_store(f"{large}images/"), open_store(f"{large}labels/"), LARGE[0], shape=[LARGE[1]], seed=1)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": True},
    )
    gpu = cluster.add_node(num_cpus=4, resources={"accelerator": 2}, object_store_memory=STORE_BYTES)
    data = [cluster.add_node(num_cpus=1, labels=DATA_WORKERS, object_store_memory=STORE_BYTES) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    found: dict[str, object] = {"gpu": [gpu.node_id], "data": sorted(node.node_id for node in data)}
    found["run"] = outcome_of(recipe(gs, f"{run_root}run", labels_root=local))
    found["nodes"] = where()
    found["memory"] = memory_of(large)
    with holding(*[Holder.options(label_selector=DATA_WORKERS).remote() for _ in data]):
        found["held"] = refusal_of(recipe(gs, f"{run_root}held"))
    here = NodeAffinitySchedulingStrategy(gpu.node_id, soft=False)
    with holding(Holder.options(num_cpus=3, scheduling_strategy=here).remote()):
        found["scattered"] = refusal_of(recipe(gs, f"{run_root}scattered"))
    mine = recipe(gs, f"{run_root}no-accelerator")
    trainer = dataclasses.replace(mine.trainer, resources_per_worker={"accelerator": 2.0})
    found["too_few"] = refusal_of(dataclasses.replace(mine, trainer=trainer))
    print(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
