"""A run's page: one HTML file with all that there is to see of it, which needs nothing else and no network.

It is made of what the run's folder holds, so that it can be made at any time, of any run, and again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib import resources
from typing import Any, TypeVar

import jinja2
import plotly.io
import plotly.offline
import tyro
from markupsafe import Markup

from ingest.errors import ConfigError, ManifestError, PlaceNotFoundError
from ingest.overlay import class_colour
from ingest.quarantine import QuarantineEntry, load_entries
from ingest.stores import open_store

from .config import flat_settings
from .metrics import METRICS_FILE, read_metrics
from .page_plots import figures
from .passwords import without_password
from .plain_json import is_figure, of_json
from .records import Event, read_events, whole_steps
from .slices import CaseSlices, grey_png, label_png, load_slices
from .waits import why

T = TypeVar("T")

PAGE_FILE = "report.html"
RECIPE_FILE = "recipe.json"
MOST_LISTED = 1000  # quarantined cases and events in their tables


def write_page(run_dir: str) -> str:
    """Write RUN_DIR/report.html of a run that is under way, done, or failed; returns its place.

    Raises:
        ConfigError: there is no run in the folder.
        StoreError: the folder cannot be read or written.
    """
    run_dir = run_dir.rstrip("/")
    store = open_store(run_dir)
    store.put(PAGE_FILE, page_of(run_dir).encode())
    return f"{run_dir}/{PAGE_FILE}"


def page_of(run_dir: str) -> str:
    """The page's HTML."""
    damaged: list[str] = []
    recipe = _recipe(run_dir, damaged)
    rows: list[dict[str, Any]] = _whole(lambda: read_metrics(run_dir), damaged) or []
    events: list[Event] = _whole(lambda: read_events(run_dir), damaged) or []
    steps, of_steps = whole_steps(run_dir)
    damaged += of_steps
    shown = figures(rows, steps, events)
    plots = {name: (heading, _div(name, figure)) for name, (heading, figure) in shown.items()}
    try:
        quarantined: list[QuarantineEntry] | str = load_entries(run_dir)
    except ManifestError as error:
        quarantined = str(error)
    cases: list[CaseSlices] = _whole(lambda: load_slices(run_dir), damaged) or []
    classes = sorted({int(value) for case in cases for value in _classes(case)})
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string((resources.files(__package__) / "page.html").read_text("utf-8"))
    return template.render(
        name=run_dir.rpartition("/")[2],
        run_dir=run_dir,
        made=_written(datetime.now(timezone.utc).timestamp()),
        plotly_js=Markup(plotly.offline.get_plotlyjs()) if plots else "",
        cards=_cards(rows, recipe, events),
        damaged=damaged,
        why=why(rows),
        au_and_stall=_au_and_stall(rows),
        plots=plots,
        events=[(_written(event.at_unix_s), event.kind, event.text) for event in events[-MOST_LISTED:]],
        quarantined=quarantined,
        most=MOST_LISTED,
        cases=[_shown(case) for case in cases],
        legend=[(value, class_colour(value)) for value in classes],
        settings=list(flat_settings(recipe)),
        scored=[row for row in rows if is_figure(row.get("mean_dice"))],
        rows=rows,
    )


def _div(name: str, figure: Any) -> Markup:
    """A plot without plotly.js, which the page has once; plotly escapes `<` in its data."""
    config = {"displayModeBar": False, "responsive": True}
    return Markup(
        plotly.io.to_html(figure, include_plotlyjs=False, full_html=False, div_id=f"plot-{name}", config=config)
    )


def _whole(read: Callable[[], T], damaged: list[str]) -> T | None:
    """What a file holds; None of a damaged one, which is added to `damaged`."""
    try:
        return read()
    except ConfigError as error:
        damaged.append(str(error))
        return None


def _recipe(run_dir: str, damaged: list[str]) -> dict[str, Any]:
    store = open_store(run_dir)
    try:
        entries = {entry.name: entry for entry in store.list() if entry.name in (RECIPE_FILE, METRICS_FILE)}
    except PlaceNotFoundError as error:
        raise ConfigError(f"expected a run's folder, found none at {run_dir}; check the path") from error
    if RECIPE_FILE not in entries:
        raise ConfigError(f"expected a run in {run_dir}, found no {RECIPE_FILE}; give the folder that --run-dir named")
    try:
        saved = of_json(store.fetch([entries[RECIPE_FILE]])[0])
        if not isinstance(saved, dict) or not isinstance(saved.get("trainer", {}), dict):
            raise TypeError("it is no tree of settings")
    except (ValueError, TypeError) as error:
        damaged.append(f"{store.uri_of(RECIPE_FILE)}: expected a run's settings, found something else ({error})")
        return {}
    trainer = saved.get("trainer", {})
    if isinstance(trainer.get("mlflow"), str):  # earlier versions kept a password
        trainer["mlflow"] = without_password(trainer["mlflow"])
    return saved


def _cards(rows: list[dict[str, Any]], recipe: Mapping[str, Any], events: list[Event]) -> list[tuple[str, str]]:
    """What a run is judged by, in a word each."""
    last: Mapping[str, Any] = rows[-1] if rows else {}
    dice = [row["mean_dice"] for row in rows if is_figure(row.get("mean_dice"))]
    epochs = (recipe.get("trainer") or {}).get("epochs", "?")
    state = next((event.kind for event in reversed(events) if event.kind in ("end", "stop", "fault", "start")), None)
    states = {"end": "done", "stop": "stopped", "fault": "failed", "start": "under way, or its driver was killed"}
    starts = sum(event.kind == "start" for event in events)
    wanted = (
        ("state", states.get(state or "", "not known")),
        ("epochs", f"{len(rows)} of {epochs}"),
        ("best mean Dice", f"{max(dice):.4f}" if dice else "not scored"),
        ("loss", _number(last.get("train_loss"), ".4f")),
        ("samples/s", _number(last.get("samples_per_s"), ".1f")),
        ("AU", _number(last.get("au"), ".1%")),
        ("stall", _number(last.get("stall_share"), ".1%")),
        ("quarantined", str(last.get("quarantined", 0))),
        ("restarts", str(max(0, starts - 1))),
    )
    return [(heading, value) for heading, value in wanted]


def _au_and_stall(rows: list[dict[str, Any]]) -> str | None:
    """Why AU and stall, which stand beside each other, can both be high."""
    last = rows[-1] if rows else {}
    if not isinstance(last.get("au"), int | float):
        return None
    first_s, wall_s = (_number(last.get(name), ".1f") for name in ("first_batch_s", "wall_s"))
    of_last = f", here {first_s} s of {wall_s} s" if "-" not in (first_s, wall_s) else ""
    return (
        "AU and stall are those of the last epoch. AU leaves out its first step with the wait for that step's batch"
        f"{of_last}; stall counts this wait too, so in a short epoch both can be high."
    )


def _number(value: object, form: str) -> str:
    return format(float(value), form) if is_figure(value) else "-"


def _written(unix_s: float) -> str:
    return f"{datetime.fromtimestamp(unix_s, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"


def _classes(case: CaseSlices) -> set[int]:
    return ({*case.truth.ravel().tolist()} | {*case.prediction.ravel().tolist()}) - {0}


def _shown(case: CaseSlices) -> dict[str, Any]:
    """A case for the page: names as they are, since the template escapes; pictures as base64 PNG."""
    foreground = (case.truth > 0).sum(axis=(1, 2))
    return {
        "case_id": case.case_id,
        "of_depths": case.of_depths,
        "first": int(foreground.argmax()) if len(foreground) else 0,
        "width": case.image.shape[2],
        "height": case.image.shape[1],
        "slices": {
            "depths": case.depths.tolist(),
            "image": [grey_png(image_HW) for image_HW in case.image],
            "truth": [label_png(label_HW) for label_HW in case.truth],
            "prediction": [label_png(label_HW) for label_HW in case.prediction],
        },
    }


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Write the page of a run, RUN_DIR/report.html."""

    run_dir: tyro.conf.Positional[str]
    """The run's folder or gs:// place."""


def report_run(arguments: list[str]) -> int:
    """`voxflux report RUN_DIR`."""
    config = tyro.cli(ReportConfig, prog="voxflux report", args=arguments)
    print(write_page(config.run_dir))
    return 0
