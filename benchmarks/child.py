"""Runs one measurement in a Python process of its own: fresh memory, fresh Ray, nothing left over."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ingest.errors import IngestError
from train.plain_json import to_json


def in_child(
    function: str, env: Mapping[str, str] | None = None, python: Path | None = None, **arguments: Any
) -> dict[str, Any]:
    """Call a function in a fresh process.

    Args:
        function: as ``benchmarks.scale:measure_plan``; takes keywords that JSON can say, and returns such a dict.
        env: environment variables beside this process's own.
        python: the interpreter; None is this one.
        arguments: for the function; a figure that is NaN or infinite arrives as None, and so does one of the answer.

    Raises:
        IngestError: it failed; what it wrote went to our own standard error.
    """
    done = subprocess.run(
        [str(python or sys.executable), "-m", "benchmarks.child", function, to_json(arguments, indent=None)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, **(env or {})},
        check=False,
    )
    if done.returncode:
        raise IngestError(
            f"expected {function} to end well with {arguments}, found status {done.returncode}; its error stands above"
        )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    print("\n" + to_json(result, indent=None), flush=True)
