"""From configuration to output: naming, copies, going on, guarding, Ray, and every setting that cannot work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ingest.errors import ConfigError, StoreError, UnknownSchemeError
from ingest.prepare import PrepareConfig, PrepareResult, original_case_id, prepare

SHAPE = (16, 16, 16)


def configure(output: Path, **settings) -> PrepareConfig:
    settings = {"source": "mni152", "shape": SHAPE, "cases": 3, "workers": 0} | settings
    return PrepareConfig(output=str(output), **settings)


def run(output: Path, **settings) -> PrepareResult:
    return prepare(configure(output, **settings))


def contents(output: Path) -> dict[str, bytes]:
    files = sorted(path for path in output.rglob("*.npy"))
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def test_an_output_holds_images_and_labels_in_two_folders(tmp_path) -> None:
    result = run(tmp_path / "out", cases=2)
    assert list(contents(tmp_path / "out")) == [
        "images/case_00000_x.npy",
        "images/case_00001_x.npy",
        "labels/case_00000_y.npy",
        "labels/case_00001_y.npy",
    ]
    place = (tmp_path / "out").as_uri()
    assert result == PrepareResult(2, 0, 0, f"{place}/images/", f"{place}/labels/")


def test_a_case_has_the_same_bytes_however_many_are_asked_for(tmp_path) -> None:
    run(tmp_path / "few", cases=2)
    run(tmp_path / "many", cases=5)
    few, many = contents(tmp_path / "few"), contents(tmp_path / "many")
    assert few.items() < many.items()
    assert len(set(many.values())) == len(many)


def test_ray_workers_write_the_same_bytes_as_this_process(tmp_path) -> None:
    run(tmp_path / "here", cases=4, copies=2)
    result = run(tmp_path / "ray", cases=4, copies=2, workers=2)
    assert (result.made, result.copied) == (4, 4)
    assert contents(tmp_path / "here") == contents(tmp_path / "ray")


def test_another_seed_gives_other_cases(tmp_path) -> None:
    run(tmp_path / "a", cases=1, seed=1)
    run(tmp_path / "b", cases=1, seed=2)
    assert contents(tmp_path / "a") != contents(tmp_path / "b")


def test_copies_have_the_bytes_of_their_case_and_a_name_that_tells(tmp_path) -> None:
    result = run(tmp_path / "out", cases=2, copies=3)
    assert (result.made, result.copied, result.already_there) == (2, 4, 0)
    files = contents(tmp_path / "out")
    assert len(files) == 12
    for copy in ("case_00001_copy_00001", "case_00001_copy_00002"):
        assert original_case_id(copy) == "case_00001"
        assert files[f"images/{copy}_x.npy"] == files["images/case_00001_x.npy"]
        assert files[f"labels/{copy}_y.npy"] == files["labels/case_00001_y.npy"]
    assert original_case_id("case_00001") == "case_00001"


def damage_image_missing(output: Path) -> None:
    (output / "images" / "case_00001_x.npy").unlink()


def damage_label_missing(output: Path) -> None:
    (output / "labels" / "case_00001_y.npy").unlink()


def damage_label_empty(output: Path) -> None:
    (output / "labels" / "case_00001_y.npy").write_bytes(b"")


def damage_image_cut(output: Path) -> None:
    path = output / "images" / "case_00001_x.npy"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [damage_image_missing, damage_label_missing, damage_label_empty, damage_image_cut])
def test_a_second_run_makes_only_what_is_missing_or_broken(tmp_path, damage) -> None:
    output = tmp_path / "out"
    run(output)
    before = contents(output)
    damage(output)
    untouched = (output / "images" / "case_00002_x.npy").stat().st_mtime_ns
    result = run(output)
    assert (result.made, result.already_there) == (1, 2)
    assert contents(output) == before
    assert (output / "images" / "case_00002_x.npy").stat().st_mtime_ns == untouched


def test_a_third_run_finds_everything_there(tmp_path) -> None:
    run(tmp_path / "out", copies=2)
    result = run(tmp_path / "out", copies=2)
    assert (result.made, result.copied, result.already_there) == (0, 0, 6)


def test_an_output_can_grow_in_cases_and_copies(tmp_path) -> None:
    run(tmp_path / "out", cases=1)
    result = run(tmp_path / "out", cases=2, copies=2)
    assert (result.made, result.copied, result.already_there) == (1, 2, 1)
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["copies"] == 2


def test_missing_copies_are_taken_from_what_is_there(tmp_path) -> None:
    output = tmp_path / "out"
    run(output, cases=1)
    path = output / "labels" / "case_00000_y.npy"
    marked = path.read_bytes()[:-1] + b"\2"
    path.write_bytes(marked)
    run(output, cases=1, copies=2)
    assert (output / "labels" / "case_00000_copy_00001_y.npy").read_bytes() == marked


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"seed": 1}, "seed 0 before and 1 now"),
        ({"shape": (16, 16, 17)}, r"shape \[16, 16, 16\] before and \[16, 16, 17\] now"),
        ({"cases": 2}, "cases 3 before and 2 now"),
    ],
)
def test_an_output_of_other_settings_is_not_gone_on_with(tmp_path, other, match) -> None:
    run(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match=match):
        run(tmp_path / "out", **other)
    assert contents(tmp_path / "out") == before


def test_an_output_of_unknown_settings_is_not_gone_on_with(tmp_path) -> None:
    run(tmp_path / "out")
    (tmp_path / "out" / "prepare.json").unlink()
    with pytest.raises(ConfigError, match=r"found 6\s+objects, first: images/case_00000_x.npy"):
        run(tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other", "version": 1}'])
def test_settings_that_cannot_be_read_are_refused(tmp_path, text) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "prepare.json").write_text(text)
    with pytest.raises(ConfigError, match=r"prepare.json: expected the settings"):
        run(tmp_path / "out")


def test_an_output_that_cannot_be_written_is_an_error_of_the_store(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError):
        run(tmp_path / "file")


def test_progress_off_a_terminal_is_plain_lines_on_stderr(tmp_path, capsys) -> None:
    run(tmp_path / "out")
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("prepare: 3 of 3 pairs")
    assert told.err.count("\n") == 1


def test_ctrl_c_leaves_whole_pairs_and_the_next_run_goes_on(tmp_path) -> None:
    output = tmp_path / "out"
    script = (
        # A process that a shell has started in the background ignores SIGINT, and hands that on.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from ingest.prepare import *\n"
        f"prepare(PrepareConfig(source='mni152', output={str(output)!r}, shape=(48, 48, 48), cases=1000, workers=0))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    try:
        until_s = time.monotonic() + 60
        while not (output / "labels" / "case_00002_y.npy").exists():
            assert process.poll() is None
            assert time.monotonic() < until_s
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert told.rstrip().endswith("KeyboardInterrupt")
    sizes = {os.path.getsize(path) for path in output.rglob("*.npy")}  # noqa: PTH202
    assert sizes == {128 + 4 * 48**3, 128 + 48**3}
    assert len(list(output.rglob("*.npy"))) < 2000


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"source": "brats"}, "kits19 or mni152, found 'brats'"),
        ({"source": "kits19"}, "give --input DIR"),
        ({"input": "folder"}, "no --input for mni152"),
        ({"spacing": (1.0, 1.0, 1.0)}, "no --spacing for mni152"),
        ({"source": "kits19", "input": "x", "spacing": (1.0, 0.0, 1.0)}, "three numbers above 0 mm"),
        ({"source": "kits19", "input": "x", "spacing": (1.0, float("nan"), 1.0)}, "three numbers above 0 mm"),
        ({"source": "kits19", "input": "x", "cases": 211}, "--cases from 1 to 210, found 211"),
        ({"shape": (16, 16, 15)}, "16 or more for mni152"),
        ({"source": "kits19", "input": "x", "shape": (0, 64, 64)}, "1 or more for kits19"),
        ({"cases": 0}, "--cases from 1"),
        ({"copies": 0}, "--copies from 1"),
        ({"seed": -1}, "--seed from 0"),
        ({"workers": -1}, "--workers from 0"),
        ({"num_cpus": 0.0}, "--num-cpus above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_construction(tmp_path, settings, match) -> None:
    with pytest.raises(ConfigError, match=match):
        configure(tmp_path, **settings)


def test_an_output_of_an_unknown_scheme_is_refused_at_construction() -> None:
    with pytest.raises(UnknownSchemeError, match="s3"):
        PrepareConfig(source="mni152", output="s3://bucket/x")
