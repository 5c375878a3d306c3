"""Every loader that needs no Ray gives each pair of the data set once an epoch, whole and as tensors."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.peers import floor, own_venv, reference, torch_obstore
from benchmarks.peers.work import Opened, Work
from ingest.emulator import EmbeddedServer
from ingest.stores import open_store
from ingest.testing import make_cases
from tests.needs import needs_dataflux

PAIRS, BATCH, PATCH = 40, 16, (8, 8, 8)
BUCKET = "peers"


def work_of(images: str, labels: str) -> Work:
    return Work(
        images=images,
        labels=labels,
        patch=PATCH,
        batch=BATCH,
        transform="none",
        workers=2,
        in_flight=8,
        seed=3,
        together=5,  # fewer than a batch: what is read in parts must give the same
    )


def digest(image: np.ndarray, label: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def remote(gcs_server: EmbeddedServer) -> Work:
    """40 pairs of 8 voxels a side, which is the patch: nothing can be cut from them but themselves."""
    gcs_server.create_bucket(BUCKET)
    work = work_of(f"gs://{BUCKET}/set/images/", f"gs://{BUCKET}/set/labels/")
    make_cases(open_store(work.images), open_store(work.labels), PAIRS, PATCH)
    return work


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """The same pairs as files."""
    folder: Path = tmp_path_factory.mktemp("pairs")
    work = work_of(str(folder / "images"), str(folder / "labels"))
    make_cases(open_store(work.images), open_store(work.labels), PAIRS, PATCH)
    return work


@pytest.fixture(scope="module")
def wanted(local: Work) -> Counter[str]:
    """Digests of all pairs."""
    images, labels = (sorted(Path(uri).glob("*.npy")) for uri in (local.images, local.labels))
    return Counter(digest(np.load(image), np.load(label)) for image, label in zip(images, labels, strict=True))


def digests(opened: Opened, limit: int | None = None) -> Counter[str]:
    """Of one epoch's samples, after checking that each batch is what a training step takes."""
    found: Counter[str] = Counter()
    with opened as epoch:
        for image, label in epoch(limit):
            assert image.dtype == torch.float32
            assert label.dtype == torch.uint8
            assert image.shape == label.shape == (len(image), 1, *PATCH)
            assert len(image) <= BATCH
            found.update(digest(x, y) for x, y in zip(image.numpy(), label.numpy(), strict=True))
    return found


def test_pairs_differ_from_each_other(wanted: Counter[str]) -> None:
    assert len(wanted) == PAIRS


def test_the_local_loop_gives_each_pair_once(local: Work, wanted: Counter[str]) -> None:
    assert digests(floor.opened_local(local)) == wanted


def test_the_floor_gives_as_many_samples_as_there_are_pairs(remote: Work) -> None:
    # Which ones does not matter there: it transforms what is in memory already.
    assert digests(floor.opened(remote)).total() == PAIRS


def test_a_limited_epoch_ends_there(local: Work) -> None:
    assert digests(floor.opened_local(local), limit=BATCH).total() == BATCH


# DataLoader workers start from a fork server, and pass what they make through files that a collector closes.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "opened",
    [
        pytest.param(torch_obstore.opened, id="torch-obstore"),
        pytest.param(lambda work: reference.opened(work, composed=True), id="reference", marks=needs_dataflux),
        pytest.param(
            lambda work: reference.opened(work, composed=False), id="reference-readonly", marks=needs_dataflux
        ),
    ],
)
def test_a_torch_peer_gives_each_pair_once(
    opened: Callable[[Work], Opened], remote: Work, wanted: Counter[str]
) -> None:
    assert digests(opened(remote)) == wanted


CHILD = """
import json, sys
from benchmarks.peers import litdata_raw, mosaic
from benchmarks.peers.work import Work
from tests.benchmarks.test_peers import digests
work = json.loads(sys.argv[2])
work["patch"] = tuple(work["patch"])
module = {"litdata-raw": litdata_raw, "mosaic": mosaic}[sys.argv[1]]
print(json.dumps(digests(module.opened(Work(**work)))))
"""


@pytest.mark.parametrize("peer", sorted(own_venv.REQUIREMENTS))
def test_a_peer_with_an_environment_of_its_own_gives_each_pair_once(
    peer: str, remote: Work, wanted: Counter[str], gcs_server: EmbeddedServer
) -> None:
    if not (own_venv.folder_of(peer) / ".made").exists():
        pytest.skip(f"{own_venv.REQUIREMENTS[peer]} is not installed: `python -m benchmarks throughput` does it")
    done = subprocess.run(
        [str(own_venv.python_of(peer)), "-c", CHILD, peer, json.dumps(remote.__dict__)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **gcs_server.env()},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Counter(json.loads(done.stdout.splitlines()[-1])) == wanted


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
