"""The shell blocks of README, run as they stand, one after the other in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
FENCE = re.compile(
    r"(?:<!-- not run by the tests: (?P<reason>[^\n]+) -->\n)?```(?P<kind>\S*)\n(?P<text>.*?)\n```\n", re.DOTALL
)


class Block(NamedTuple):
    """A fenced block: its language, its text, and why it is not run; None where it is."""

    kind: str
    text: str
    reason: str | None

    @property
    def name(self) -> str:
        """Its first commands."""
        return " ".join(self.text.split()[:2])


BLOCKS = [Block(found["kind"], found["text"], found["reason"]) for found in FENCE.finditer(README.read_text())]
RUN = [block for block in BLOCKS if block.kind == "sh" and block.reason is None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("block", RUN, ids=[block.name for block in RUN])
def test_a_block_of_readme_runs_as_it_stands(block, folder):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "STORAGE_"))}
    env |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text], cwd=folder, env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if "digest" in block.text:
        digests = re.findall(r"^digest [0-9a-f]{64} samples \d+$", done.stdout, re.MULTILINE)
        assert len(digests) == 2
        assert len(set(digests)) == 1


def test_each_command_of_readme_stands_in_a_block_of_shell():
    commands = re.compile(r"^\s*(voxflux|make|ray|pip|python) ", re.MULTILINE)
    with_commands = [block for block in BLOCKS if commands.search(block.text)]
    assert len(RUN) >= 6
    assert [block.name for block in with_commands if block.kind not in ("sh", "yaml")] == []


def test_no_block_that_is_run_holds_a_placeholder():
    assert [
        block.name for block in RUN if re.search(r"…|\bgs://bucket\b|\b(?:RUN|JOB|RECIPE|DIR|URI)\b", block.text)
    ] == []
