"""Virtual environments of their own for peers whose releases do not install beside our pins.

Each sees everything of this environment and, before it, what the peer wants otherwise: litdata's boto3 wants
python-dateutil below 3, mosaicml-streaming wants numpy below 2.2 and google-cloud-storage below 3.3 (October 2026).
So a peer runs on the same torch, and on the same decoding and transforms, as every other loader.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

from ingest.errors import MissingDependencyError

from ..place import DATA_DIR

REQUIREMENTS = {"litdata-raw": "litdata==0.2.76", "mosaic": "mosaicml-streaming==0.13.0"}


def folder_of(peer: str) -> Path:
    """Where the peer's environment lies, or would."""
    return DATA_DIR.resolve() / f"venv-{peer}"


def python_of(peer: str) -> Path:
    """The interpreter to run a peer with; its environment is made on the first call, which takes a minute.

    Args:
        peer: one of `REQUIREMENTS`.

    Raises:
        MissingDependencyError: pip could not install it; the message ends with what pip said last.
    """
    folder = folder_of(peer)
    python, done = folder / "bin" / "python", folder / ".made"
    if done.exists() and done.read_text() == REQUIREMENTS[peer]:
        return python
    _checked([sys.executable, "-m", "venv", "--clear", str(folder)], peer)
    ours, theirs = sysconfig.get_path("purelib"), sysconfig.get_path("purelib", vars={"base": str(folder)})
    # A line of a .pth comes after the environment's own packages, and pip counts what lies there as installed.
    # `addsitedir`, not the bare path, since our own installation may be an editable one, which is a .pth there.
    Path(theirs, "voxflux-parent.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    # Else torchvision brings the newest torch, and CUDA with it: 5 GB, and another torch than everybody's.
    pins = folder / "constraints.txt"
    pins.write_text(f"torch=={importlib.metadata.version('torch')}\n")
    _checked([str(python), "-m", "pip", "install", "--quiet", "--constraint", str(pins), REQUIREMENTS[peer]], peer)
    done.write_text(REQUIREMENTS[peer])
    return python


def _checked(command: list[str], peer: str) -> None:
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if ended.returncode:
        said = "\n".join((ended.stdout + ended.stderr).splitlines()[-5:])
        raise MissingDependencyError(
            f"expected {REQUIREMENTS[peer]} to install under {folder_of(peer)}, found status {ended.returncode}; "
            f"leave {peer} out of --loaders, or mend what pip says:\n{said}"
        )
