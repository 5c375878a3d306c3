"""Files of ours keep the user's umask: prepared volumes and label maps are patients' data."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingest.stores import open_store
from ingest.stores.local import locked


@pytest.fixture
def private_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_under_a_umask_of_077_nobody_else_can_read_what_is_put(tmp_path, private_umask):
    open_store(f"{tmp_path}/new/").put("case/a_y.npy", b"a label map")
    assert mode(tmp_path / "new/case/a_y.npy") == 0o600
    assert mode(tmp_path / "new/case") == 0o700


def test_under_a_umask_of_022_others_can_read_what_is_put(tmp_path):
    before = os.umask(0o022)
    try:
        open_store(f"{tmp_path}/").put("a", b"1")
    finally:
        os.umask(before)
    assert mode(tmp_path / "a") == 0o644


@pytest.mark.parametrize("kept", [0o600, 0o664])
def test_a_file_that_is_written_again_keeps_its_permissions(tmp_path, kept):
    store = open_store(f"{tmp_path}/")
    store.put("a", b"1")
    (tmp_path / "a").chmod(kept)
    store.put("a", b"2")
    assert mode(tmp_path / "a") == kept
    assert (tmp_path / "a").read_bytes() == b"2"


@pytest.mark.parametrize(("folder", "wanted"), [(0o700, 0o600), (0o755, 0o600), (0o775, 0o666), (0o777, 0o666)])
def test_a_lock_file_is_open_to_others_only_where_they_may_write_its_folder(tmp_path, folder, wanted):
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(folder)
    with locked(str(place / "a")):
        (lock,) = place.iterdir()
        assert mode(lock) == wanted


def test_files_that_threads_make_at_once_have_names_of_their_own(tmp_path):
    store = open_store(f"{tmp_path}/")
    threads = [threading.Thread(target=store.put, args=("a", bytes([n]) * 1000)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set((tmp_path / "a").read_bytes())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
