"""Reads three epochs on a cluster of a head and two data nodes, one of which is taken away midway and replaced.

A script of its own, run by the test beside it: Ray connects a process to one cluster only.
"""

import logging
import sys

import ray
import ray.data
from ray.cluster_utils import Cluster

from ingest.crop import CropConfig
from ingest.digest import combine, digest_batch
from ingest.index import index_cases
from ingest.pipeline import DataConfig, training_dataset
from ingest.plan import ShardConfig


def main(root: str) -> None:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 200 * 2**20})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=200 * 2**20) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    data = DataConfig(seed=7, holdout_fraction=0.0, crop=CropConfig(patch=(8, 8, 8)), shards=ShardConfig(shard_cases=1))
    samples = training_dataset(index_cases(f"{root}images", f"{root}labels").manifest, data, batch=1)
    found: dict[tuple[int, int], bytes] = {}
    ran_on: set[str] = set()
    for epoch in range(3):
        for number, batch in enumerate(samples.iter_batches(batch_size=None, batch_format="numpy")):
            digest_batch(batch, found)
            if (epoch, number) == (1, 5):
                cluster.remove_node(nodes.pop(0), allow_graceful=False)
                nodes.append(cluster.add_node(num_cpus=1, object_store_memory=200 * 2**20))
        ran_on |= {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    print(f"digest {combine(found)} samples {len(found)} nodes {len(ran_on)}")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
