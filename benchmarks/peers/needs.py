"""The packages that loaders need beyond voxflux's own; asked before anything is made or measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from ingest.errors import MissingDependencyError

from . import own_venv

NEEDS = {
    "ray-stock": "gcsfs",
    "torch-obstore": "obstore",
    "litdata-raw": "obstore",
    "reference": "dataflux_pytorch",
    "reference-readonly": "dataflux_pytorch",
}
"""Loader: module that its extra, `bench`, or voxflux itself installs."""


def check_needs(loaders: Iterable[str], needs: dict[str, str] | None = None) -> None:
    """Check the packages of all loaders, and make the environments of those that have their own.

    Args:
        loaders: names of those that will run.
        needs: the module of each loader that has one; None is `NEEDS`.

    Raises:
        MissingDependencyError: a package is missing; all that are missing are named.
    """
    needs = NEEDS if needs is None else needs
    names = list(dict.fromkeys(loaders))
    missing = {name: needs[name] for name in names if name in needs and importlib.util.find_spec(needs[name]) is None}
    if missing:
        each = ", ".join(f"{module} (of {name})" for name, module in missing.items())
        rest = [name for name in names if name not in missing]
        instead = f", or give --loaders {' '.join(rest)}" if rest else ""
        raise MissingDependencyError(
            f"expected the packages of all --loaders, found these missing: {each}; do: pip install -c constraints.txt "
            f"-e '.[bench]'{instead}"
        )
    for name in names:
        if name in own_venv.REQUIREMENTS:
            own_venv.python_of(name)  # so that no installation falls into a measurement
