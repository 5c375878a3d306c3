"""One Ray for all integration tests, and one small data set in every kind of place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import ray

from ingest.emulator import EmbeddedServer
from ingest.stores import open_store
from ingest.testing import make_cases

CASES = 65
SHAPES = [(12, 12, 12), (12, 14, 16), (20, 12, 13)]


class Places(NamedTuple):
    """The same cases, twice."""

    gs: str
    local: str


@pytest.fixture(scope="session")
def ray_here(gcs_server: EmbeddedServer) -> Iterator[None]:
    """Four CPUs' worth of Ray, whose workers inherit where the embedded server is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, from third parties it imports
        ray.init(
            address="local",  # not whatever cluster another process has running on this machine
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="WARNING",
            object_store_memory=512 * 2**20,
            _system_config={
                "metrics_report_interval_ms": 1000,  # 10 s is longer than most runs here
                "worker_maximum_startup_concurrency": 4,  # else as many as there are cores, and ranks start last
            },
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def places(gcs_server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Places:
    """65 cases of three shapes, in a bucket and in a folder."""
    gcs_server.create_bucket("integration")
    folder: Path = tmp_path_factory.mktemp("cases")
    found = Places("gs://integration/set/", f"{folder}/")
    for root in found:
        make_cases(open_store(f"{root}images/"), open_store(f"{root}labels/"), CASES, shape=SHAPES, seed=5)
    return found
