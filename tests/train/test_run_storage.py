"""A run folder's URI means one place: to our store, and to Ray. No test here starts Ray."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pyarrow.fs
import pytest
import ray.train
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from ray.train.v2._internal.execution.storage import StorageContext

from ingest.emulator import EmbeddedServer
from ingest.errors import ConfigError
from ingest.stores import open_store
from train.recipes import DEMO
from train.run_folder import resolve_run_dir
from train.run_storage import storage_of

FOLDERS = ["runs#3/one", "r%41?x y/\u00fcn\u00ef/o n#e%41", "a+b/o?ne", "one"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_checkpoints_land_below_exactly_the_folder_that_our_store_sees(
    gcs_server: EmbeddedServer, bucket: str, tmp_path: Path, folder: str
) -> None:
    names = {"state#%41?.pt", "with space", "\u00fc"}
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    run_dir = f"gs://{bucket}/{folder}"
    storage = storage_of(run_dir)
    context = StorageContext(storage.path, storage.name, storage.filesystem)
    kept = context.persist_current_checkpoint(ray.train.Checkpoint.from_directory(str(tmp_path)), "checkpoint_1")
    store = open_store(run_dir)
    listed = list(store.list("checkpoint_1/"))
    assert {meta.name for meta in listed} == {f"checkpoint_1/{name}" for name in names}
    assert store.fetch(listed) == [meta.name.removeprefix("checkpoint_1/").encode() for meta in listed]
    assert all(meta.name.startswith(f"{folder}/") for meta in open_store(f"gs://{bucket}").list())
    with kept.as_directory() as back:
        assert {entry.name: entry.read_bytes() for entry in Path(back).iterdir()} == {
            name: name.encode() for name in names
        }


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_real_endpoint_and_the_emulator_get_the_same_path(
    gcs_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    emulated = storage_of(f"gs://b/{folder}")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    real = storage_of(f"gs://b/{folder}")
    assert type(real.filesystem) is type(emulated.filesystem) is pyarrow.fs.GcsFileSystem
    assert real[1:] == emulated[1:]
    assert f"{real.path}/{real.name}" == f"b/{folder}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_requests_to_an_endpoint_that_is_not_known_as_the_emulator_go_to_the_folder_that_our_store_sees(
    gcs_server: EmbeddedServer, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    emulator = os.environ["STORAGE_EMULATOR_HOST"]
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", emulator)  # Google's C++ client goes by it, and we do not
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(service_account(tmp_path / "account.json")))
    storage = storage_of(f"gs://{bucket}/{folder}")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state#%41?.pt").write_bytes(b"weights")
    context = StorageContext(storage.path, storage.name, storage.filesystem)
    saved = ray.train.Checkpoint.from_directory(str(tmp_path / "saved"))
    context.persist_current_checkpoint(saved, "checkpoint_1")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator)
    store = open_store(f"gs://{bucket}/{folder}")
    listed = list(store.list("checkpoint_1/"))
    assert [meta.name for meta in listed] == ["checkpoint_1/state#%41?.pt"]
    assert store.fetch(listed) == [b"weights"]
    assert all(meta.name.startswith(f"{folder}/") for meta in open_store(f"gs://{bucket}").list())


def service_account(file: Path) -> Path:
    """The key of a service account: Google's client signs its own tokens with it, and asks no server for one."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    account = {"type": "service_account", "project_id": "p", "private_key_id": "1", "client_id": "1"}
    account |= {"private_key": key.private_bytes(*form).decode(), "client_email": "a@p.iam.gserviceaccount.com"}
    file.write_text(json.dumps(account | {"token_uri": "http://127.0.0.1:9/token"}))
    return file


def test_a_local_folder_is_taken_literally_and_a_file_uri_is_decoded_as_our_store_does(tmp_path: Path) -> None:
    folder = tmp_path / "a b#%41?" / "one"
    for run_dir in (str(folder), folder.as_uri()):
        storage = storage_of(run_dir)
        StorageContext(storage.path, storage.name, storage.filesystem)
        assert [meta.name for meta in open_store(run_dir).list()] == [".validate_storage_marker"]
        assert Path(storage.path, storage.name) == folder


@pytest.mark.parametrize("run_dir", ["gs://b", "gs://b/", "gs://b/a//b", "gs://b/../b", "gs://b/./b", "gs://b/a\nb/c"])
def test_a_folder_that_ray_would_put_elsewhere_is_refused_before_anything_is_listed(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")  # no server
    with pytest.raises(ConfigError, match=r"expected a run folder .* found"):
        resolve_run_dir(dataclasses.replace(DEMO, run_dir=run_dir), "demo")
