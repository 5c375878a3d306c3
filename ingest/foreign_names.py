"""Refuses folders whose modules would take the places of `ingest` and `train` in Ray's workers."""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from .errors import ConfigError

PACKAGES = ("ingest", "train")
ROOT = Path(__file__).resolve().parents[1]


def refuse_foreign_modules() -> None:
    """Refuse to start where Ray's workers would import another `ingest` or `train` than this process did.

    Ray puts the driver's current folder, and its script's folder, in front of the workers' import path
    (`ray._private.worker.connect`). A user's `train.py` there is found before ours. A folder without an `__init__.py`,
    such as one of data, does no harm: our modules are found in spite of it.

    Raises:
        ConfigError: such a folder holds a module of one of these names, and this process uses our package.
    """
    folders = dict.fromkeys([str(Path.cwd()), *_script_folder()])
    for name in PACKAGES:
        ours = ROOT / name / "__init__.py"
        for folder in folders if _uses(name) else ():
            spec = PathFinder.find_spec(name, [folder])
            if spec is None or spec.origin is None or Path(spec.origin).resolve() == ours:
                continue
            raise ConfigError(
                f"expected no other module named `{name}` in {folder}, found {spec.origin}; Ray's processes look in "
                f"this folder first and would import it in place of voxflux's own ({ours.parent}); start voxflux from "
                "another folder, or rename that module"
            )


def _script_folder() -> list[str]:
    """The folder of the script that runs, where Ray passes it on to workers."""
    folder = os.path.dirname(os.path.realpath(sys.argv[0]))  # noqa: PTH120  compared with sys.path as Ray does
    return [folder] if folder in sys.path else []


def _uses(name: str) -> bool:
    """Whether this process has imported modules of our package: a user's own `train` may use our `ingest`."""
    inside = f"{ROOT / name}{os.sep}"
    return any(
        os.path.realpath(getattr(module, "__file__", None) or "").startswith(inside)
        for loaded, module in list(sys.modules.items())
        if loaded.partition(".")[0] == name
    )
