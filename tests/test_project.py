"""What the project promises of itself as a whole."""

import ast
import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest

import ingest
import ingest.testing
import train

from .needs import needs_dataflux

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("package", [ingest, train])
def test_the_generic_names_are_our_packages(package):
    assert Path(package.__file__).is_relative_to(ROOT)


@needs_dataflux
def test_dataflux_is_googles_and_not_the_stranger_of_that_name():
    import dataflux_core

    files = importlib.metadata.distribution("gcs-torch-dataflux").files
    assert Path(dataflux_core.__file__).resolve() in {Path(f.locate()).resolve() for f in files}


def test_no_file_is_a_junk_drawer():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in tracked.stdout.splitlines() if (ROOT / name).exists()]
    assert len(names) > 50
    assert [n for n in names if Path(n).name in {"utils.py", "helpers.py"}] == []


@pytest.mark.parametrize("folder", ["ingest", "benchmarks"])
def test_no_json_of_ours_holds_a_nan(folder):
    found, calls = [], 0
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("json.dumps", "json.dump"):
                continue
            calls += 1
            if "allow_nan=False" not in [f"{keyword.arg}={ast.unparse(keyword.value)}" for keyword in node.keywords]:
                found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert calls
    assert found == []


def test_private_uses_of_ray_stand_where_they_are_looked_for():
    private = re.compile(r"^\s*(?:from|import) ray[\w.]*\._\w", re.MULTILINE)
    files = [file for folder in ("ingest", "train") for file in (ROOT / folder).rglob("*.py")]
    found = {str(file.relative_to(ROOT)) for file in files if private.search(file.read_text())}
    older = {"train/nodes.py", "train/preflight.py"}  # one use each, to be moved
    assert found == {"ingest/ray_compat.py", "ingest/execution.py", "train/ray_compat.py"} | older


def test_every_direct_dependency_is_pinned():
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    metadata = importlib.metadata.requires("voxflux")
    direct = {re.split(r"[\[<>=! ;]", requirement)[0].lower() for requirement in metadata}
    assert len(direct) > 15
    assert direct - pinned == set()


def test_the_store_contract_is_found_where_the_design_says():
    assert ingest.testing.StoreContract.__name__ == "StoreContract"
