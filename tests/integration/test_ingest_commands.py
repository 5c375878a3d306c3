"""`python -m ingest`: what a user types, and what they read."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ingest.__main__ import main
from ingest.index import index_cases
from ingest.stores import dataflux

pytestmark = pytest.mark.usefixtures("ray_here")


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=array.dtype.hasobject)
    return file.getvalue()


def digest_of(capsys, images: str, labels: str, *options: str) -> str:
    status = main(["digest", "--images", images, "--labels", labels, "--patch", "8", "8", "8", "--seed", "7", *options])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return printed.out.strip().splitlines()[-1]


def test_digest_is_one_for_a_bucket_composed_or_direct_and_for_local_files(places, capsys):
    lines = {
        digest_of(capsys, f"{root}images", f"{root}labels/", "--epochs", "2", *transport)
        for root, transport in (
            *([] if dataflux.missing() else [(places.gs, ["--transport", "compose"])]),
            (places.gs, ["--transport", "direct"]),
            (places.gs, []),
            (places.local, []),
            (Path(places.local).as_uri() + "/", []),
            (os.path.relpath(places.local) + "/", []),
        )
    }
    assert len(lines) == 1
    assert re.fullmatch(r"digest [0-9a-f]{64} samples 130", lines.pop())


def test_digest_differs_for_another_seed(places, capsys):
    images, labels = f"{places.local}images", f"{places.local}labels"
    assert digest_of(capsys, images, labels) != digest_of(capsys, images, labels, "--seed", "8")


def few(places, folder: Path, count: int = 4) -> Path:
    """A copy of a few cases, to be spoilt."""
    for role, suffix in (("images", "x"), ("labels", "y")):
        (folder / role).mkdir()
        for number in range(count):
            name = f"case_{number:05d}_{suffix}.npy"
            shutil.copy(Path(places.local) / role / name, folder / role / name)
    return folder


GOOD = np.zeros((1, 12, 12, 12), np.float32)
GOOD_LABEL = np.zeros((1, 12, 12, 12), np.uint8)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("images/case_00001_x.npy", b"not a volume", "case_00001_x.npy: expected an .npy file, found one that starts"),
        ("images/case_00001_x.npy", npy(np.array([{}], object)), "found pickled Python objects, which are never"),
        ("images/case_00001_x.npy", npy(GOOD.astype(np.int16)), "expected dtype float32, found int16"),
        ("images/case_00001_x.npy", npy(GOOD[:, :9]), r"expected image and label of one \(D, H, W\)"),
        ("labels/case_00000_y.npy", npy(GOOD_LABEL + np.uint8(7)), "expected label values 0 to 2, found 7"),
        ("images/case_00000_x.npy", npy(GOOD + np.float32(np.nan)), "expected finite voxels, found 1728 that are NaN"),
    ],
)
def test_a_bad_case_ends_a_digest_with_its_name_and_reason(places, tmp_path, capsys, name, data, message):
    (few(places, tmp_path) / name).write_bytes(data)
    status = main(["digest", "--images", f"{tmp_path}/images", "--labels", f"{tmp_path}/labels", "--patch", *"888"])
    printed = capsys.readouterr()
    assert status == 1
    assert re.search(message, printed.err)
    assert "Traceback" not in printed.err


def test_a_volume_smaller_than_the_patch_is_named(places, capsys):
    roots = ["--images", f"{places.local}images", "--labels", f"{places.local}labels"]
    assert main(["digest", *roots, "--patch", "13", "12", "12"]) == 1
    assert re.search(r"expected a volume of at least the patch \(13, 12, 12\)", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "labels/case_00002_y.npy").unlink(), r"1 of 4 images have no label: case_00002_x\.npy"),
        (lambda f: (f / "images/case_00002_x.npy").unlink(), r"1 of 4 labels have no image: case_00002_y\.npy"),
        (lambda f: shutil.rmtree(f / "images"), "expected a folder at .*images, found none"),
        (lambda f: [p.unlink() for p in (f / "images").iterdir()], "expected objects.*holds none"),
    ],
)
def test_places_that_do_not_pair_end_in_a_clear_error(places, tmp_path, capsys, spoil, message):
    spoil(few(places, tmp_path))
    roots = ["--images", f"{tmp_path}/images", "--labels", f"{tmp_path}/labels"]
    assert main(["digest", *roots, "--patch", *"888"]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://bucket/images", "expected a URI that starts with gs:// or file://"),
        ("gs://no-such-bucket/images", "expected the bucket gs://no-such-bucket"),
        ("gs://integration/nothing-here", "expected objects.*holds none"),
    ],
)
def test_a_wrong_place_ends_in_a_clear_error(places, capsys, uri, message):
    assert main(["digest", "--images", uri, "--labels", f"{places.gs}labels", "--patch", *"888"]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_key_that_two_objects_share_is_an_error(places, tmp_path, capsys):
    folder = few(places, tmp_path)
    shutil.copy(folder / "images/case_00000_x.npy", folder / "images/old_case_00000_x.npy")
    patterns = ["--pairing.image-pattern", r"(?:old_)?(.*)_x\.npy", "--pairing.label-pattern", r"(.*)_y\.npy"]
    roots = ["--images", f"{tmp_path}/images", "--labels", f"{tmp_path}/labels"]
    assert main(["index", *roots, "--output", f"{tmp_path}/m.parquet", *patterns]) == 1
    assert "share their key with another object (first key: 'case_00000')" in capsys.readouterr().err


def test_index_saves_a_manifest_of_the_data_set_in_a_bucket(places, capsys):
    output = "gs://integration/manifests/train.parquet"
    roots = ["--images", f"{places.gs}images", "--labels", f"{places.gs}labels"]
    assert main(["index", *roots, "--output", output]) == 0
    assert "65 cases, 0 objects in none" in capsys.readouterr().out
    from ingest.manifest import Manifest

    listed = index_cases(f"{places.gs}images", f"{places.gs}labels").manifest
    assert Manifest.load(output).table.equals(listed.table)


def test_inspect_says_what_is_there_and_draws_it(places, tmp_path, capsys):
    picture = tmp_path / "overlay.png"
    roots = ["--images", f"{places.gs}images", "--labels", f"{places.gs}labels"]
    assert main(["inspect", *roots, "--sample", "12", "--picture", str(picture)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for part in ("65 cases, 0 objects in none", "of 12 cases read, 12 are good", "class 0:", "transport: direct: "):
        assert part in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_inspect_names_bad_cases_and_orphans_and_ends_with_status_one(places, tmp_path, capsys):
    folder = few(places, tmp_path)
    (folder / "images/case_00001_x.npy").write_bytes(b"no volume")
    (folder / "labels/case_00003_y.npy").unlink()
    roots = ["--images", f"{tmp_path}/images", "--labels", f"{tmp_path}/labels"]
    assert main(["inspect", *roots, "--picture", str(tmp_path / "p.png")]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 4 images have no label: case_00003_x.npy" in printed
    assert "of 3 cases read, 2 are good and 1 bad" in printed
    assert "case_00001_x.npy: expected an .npy file" in printed


def run_ingest(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ingest", *arguments], capture_output=True, text=True, timeout=240, **options
    )


def test_serve_runs_a_command_against_the_folder_and_returns_its_status(places, tmp_path):
    bucket = tmp_path / "my-bucket"
    shutil.copytree(Path(places.local) / "images", bucket / "images")
    script = (
        "import sys; from ingest.stores import open_store; "
        "sys.exit(len(list(open_store('gs://my-bucket/images').list())))"
    )
    ran = run_ingest("serve", "--data", str(tmp_path), "--", sys.executable, "-c", script)
    assert ran.returncode == 65, ran.stderr


def test_serve_without_a_command_prints_the_line_to_export_and_ends_on_interrupt(tmp_path):
    with subprocess.Popen([sys.executable, "-m", "ingest", "serve"], stdout=subprocess.PIPE, text=True) as server:
        line = server.stdout.readline()
        assert re.search(r"export STORAGE_EMULATOR_HOST=http://127\.0\.0\.1:\d+", line)
        time.sleep(0.2)
        server.send_signal(signal.SIGINT)
        assert server.wait(20) in (0, 130)


def test_a_closed_port_ends_in_a_clear_error_within_its_bound(places):
    environment = os.environ | {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:9"}
    places_of_it = ["--images", "gs://b/i", "--labels", "gs://b/l", "--patch", *"888", "--store.retry-refused-s", "2"]
    ran = run_ingest("digest", *places_of_it, env=environment)
    assert ran.returncode == 1
    assert "expected a server that answers" in ran.stderr
    assert "127.0.0.1:9" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["nonsense"]])
def test_the_commands_are_listed(arguments, capsys):
    assert main(arguments) == (0 if arguments == ["--help"] else 2)
    printed = capsys.readouterr()
    assert "prepare" in printed.out + printed.err


def test_what_a_user_reads_of_a_bad_case_is_the_one_line_and_nothing_of_ray(places, tmp_path):
    folder = few(places, tmp_path)
    (folder / "images/case_00001_x.npy").write_bytes(b"no volume")
    ran = run_ingest("digest", "--images", f"{folder}/images", "--labels", f"{folder}/labels", "--patch", *"888")
    assert ran.returncode == 1
    assert ran.stderr == (
        f"error: {folder}/images/case_00001_x.npy: expected an .npy file, found one that starts with b'no vol'; "
        "upload it anew or leave the case out\n"
    )
