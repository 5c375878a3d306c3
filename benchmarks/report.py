"""What every benchmark leaves: a table, a JSON file of `meta` and `rows`, and a picture."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ingest.errors import IngestError
from train.plain_json import to_json

RESULTS_DIR = Path(__file__).parent / "results"
_PACKAGES = ("ray", "torch", "numpy", "pyarrow", "pycurl", "obstore", "google-cloud-storage", "gcs-torch-dataflux")

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """One benchmark's outcome.

    Attributes:
        name: of the benchmark; its files are called so.
        rows: what was measured, one dict a line, with units in the names of fields.
        meta: where, when, how and with what.
    """

    name: str
    rows: Sequence[Row]
    meta: Mapping[str, Any]

    def save(self, path: Path | None, draw: Callable[[Axes], None]) -> tuple[Path, Path]:
        """Write the JSON and, beside it, the picture.

        Args:
            path: of the JSON; None is `benchmarks/results/NAME.json`.
            draw: draws the rows.

        Returns:
            The two files.
        """
        path = path or RESULTS_DIR / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json({"meta": dict(self.meta), "rows": [dict(row) for row in self.rows]}) + "\n")
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        draw(figure.add_subplot())
        picture = path.with_suffix(".png")
        figure.savefig(picture, dpi=120)
        return path, picture

    def print(self, console: Console, fields: Mapping[str, str]) -> None:
        """Print the rows as a table.

        Args:
            console: where.
            fields: of the rows, each with its format, as ``{"samples_per_s": "{:,.0f}"}``; what a row lacks is a dash.
        """
        table = Table(title=self.name)
        for field in fields:
            table.add_column(field, justify="right")
        for row in self.rows:
            cells = ("-" if row.get(field) is None else form.format(row[field]) for field, form in fields.items())
            table.add_row(*cells)
        # Wider than the terminal rather than cut: who reads it in a file has no narrower one.
        whole = Measurement.get(console, console.options.update(width=1000), table).maximum
        wide = Console(file=console.file, width=max(console.width, whole), soft_wrap=True, markup=False, emoji=False)
        wide.print(table)


@contextlib.contextmanager
def keeping(rows: Sequence[Row], failed: list[str]) -> Iterator[None]:
    """Note the error of a measurement that fails after others gave rows, so that these can be printed and written.

    Args:
        rows: what is measured so far; grows while the context is entered.
        failed: the error is added to it.

    Raises:
        IngestError: nothing was measured before.
    """
    try:
        yield
    except IngestError as error:
        if not rows:
            raise
        failed.append(str(error))


def status_of(failed: Sequence[str]) -> int:
    """Print the errors that `keeping` noted; the exit status of the benchmark."""
    for error in failed:
        print(f"error: {error}; what is printed was measured before", file=sys.stderr)
    return 1 if failed else 0


def meta_of(seed: int, **more: Any) -> dict[str, Any]:
    """What a reader needs to judge and repeat a measurement: versions, machine, seed, command, date, and `more`."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "seed": seed,
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "load_before": os.getloadavg()[0],
        "versions": {name: _version(name) for name in _PACKAGES},
        **more,
    }


def _version(package: str) -> str | None:
    """Return the installed version; None if the package is not installed, as Dataflux on Python 3.13."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the range of repeated measurements."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}
