"""Finds another module named `ingest` before it is imported in place of ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def check_own_ingest() -> None:
    """End with a message where `import ingest` would import another module than the package beside this one.

    `python -m train` looks in the current folder first. Nothing of the other module is run.

    Raises:
        SystemExit: it would.
    """
    ours = Path(__file__).resolve().parents[1] / "ingest"
    spec = importlib.util.find_spec("ingest")
    found = None if spec is None else spec.origin
    if found is not None and Path(found).resolve().parent != ours:
        raise SystemExit(
            f"error: expected voxflux's own package `ingest` in {ours}, found {found}, since Python looks in the "
            "current folder first; start from another folder, or rename that module"
        )
