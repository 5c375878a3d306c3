"""`make demo` and `make test` find a Python, or say what to install."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAKE = shutil.which("make") or "make"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout without an environment, and a folder `bin` that holds nothing but a shell."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "env"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or tool)
    return tmp_path


def python(checkout: Path, name: str, *, makes_environments: bool) -> None:
    """Put a Python on the path that takes the question for its venv module, and answers it."""
    script = checkout / "bin" / name
    script.write_text(f"#!/bin/sh\nexit {0 if makes_environments else 1}\n")
    script.chmod(0o755)


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MAKE, *arguments], cwd=checkout, env={"PATH": str(checkout / "bin")}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["python3.10", "python3.11", "python3.12", "python3.13"], "python3.11"),
        (["python3.10", "python3.12"], "python3.12"),
        (["python3.13"], "python3.13"),
    ],
)
def test_make_takes_the_python_that_is_there(checkout: Path, there: list[str], taken: str) -> None:
    for name in there:
        python(checkout, name, makes_environments=True)
    assert f'"{taken}" -m venv .venv' in make(checkout, "-n", "setup").stdout


def test_make_leaves_out_a_python_that_cannot_make_an_environment(checkout: Path) -> None:
    python(checkout, "python3.11", makes_environments=False)
    python(checkout, "python3.13", makes_environments=True)
    assert '"python3.13" -m venv .venv' in make(checkout, "-n", "demo").stdout


def test_make_without_a_python_says_what_to_install(checkout: Path) -> None:
    python(checkout, "python3.12", makes_environments=False)
    done = make(checkout, "test")
    assert done.returncode == 2
    assert "expected one of python3.11 python3.12 python3.10 python3.13 with its venv module, found none" in done.stderr
    assert "apt install python3-venv" in done.stderr


def test_make_takes_the_python_that_it_is_given(checkout: Path) -> None:
    assert '"/opt/a b/python" -m venv .venv' in make(checkout, "-n", "PYTHON=/opt/a b/python", "setup").stdout
