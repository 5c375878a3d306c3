"""The plots of a run's page, by plotly. Texts are escaped: plotly takes a part of HTML in them."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import plotly.graph_objects as go

from ingest.overlay import COLOURS

from .records import Event, StepRecord
from .waits import CAUSES

Row = Mapping[str, Any]
MOST_STEPS = 4000  # shown in one plot; of more, the longest of neighbours stands for them

_BLUE, _SKY, _GREEN, _RED, _ORANGE = COLOURS[6], COLOURS[1], COLOURS[2], COLOURS[5], COLOURS[0]
_CAUSE_COLOURS = dict(zip(CAUSES, (*COLOURS[4:6], _BLUE, _ORANGE, _SKY, _GREEN, "#999999"), strict=True))
_EVENTS = {
    "start": ("triangle-up", _GREEN),
    "fault": ("x", _RED),
    "warning": ("x-open", _ORANGE),
    "retry": ("circle-open", _ORANGE),
    "quarantine": ("diamond", COLOURS[4]),
    "stop": ("square", "#666666"),
    "end": ("star", _BLUE),
}


def figures(
    rows: Sequence[Row], starts: Mapping[str, Sequence[StepRecord]], events: Sequence[Event]
) -> dict[str, tuple[str, go.Figure]]:
    """The plots that there is something to show in.

    Args:
        rows: of metrics.json.
        starts: steps of rank 0 by start, oldest first.
        events: of the run.

    Returns:
        By a name that is fit for an element's id: heading, figure.
    """
    newest = {record.step: record for records in starts.values() for record in records}
    steps = [newest[step] for step in sorted(newest)]
    found = {
        "loss": ("Training loss", _loss(rows, steps)),
        "dice": ("Held-out Dice", _dice(rows)),
        "rate": ("Learning rate", _by_epoch(rows, {"learning_rate": ("learning rate", _BLUE)}, ".3g")),
        "speed": ("Samples a second", _by_epoch(rows, {"samples_per_s": ("samples/s", _GREEN)}, ".1f")),
        "au": (
            "Accelerator utilisation and stall",
            _by_epoch(rows, {"au": ("AU", _BLUE), "stall_share": ("stall", _RED)}, ".1%"),
        ),
        "stall": ("Stall by cause", _stall(rows)),
        "timeline": ("Time-line of steps", _timeline(starts, events)),
    }
    return {name: (heading, figure) for name, (heading, figure) in found.items() if len(figure.data)}


def _figure(x: str, y: str, **layout: Any) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        height=300,
        margin={"l": 60, "r": 16, "t": 12, "b": 48},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        font={"family": "system-ui, sans-serif", "size": 12},
        xaxis={"title": x},
        yaxis={"title": y},
        hoverlabel={"namelength": -1},
        **layout,
    )
    return figure


def _numbers(rows: Sequence[Row], field: str, x: str = "epoch") -> tuple[list[float], list[float]]:
    points = [(row[x], row[field]) for row in rows if _is_number(row.get(x)) and _is_number(row.get(field))]
    shift = 1 if x == "epoch" else 0  # people count epochs from 1, as the lines of a run do
    return [at + shift for at, _ in points], [value for _, value in points]


def _by_epoch(rows: Sequence[Row], fields: Mapping[str, tuple[str, str]], form: str) -> go.Figure:
    figure = _figure("epoch", next(iter(fields.values()))[0] if len(fields) == 1 else "share")
    for field, (name, colour) in fields.items():
        x, y = _numbers(rows, field)
        if x:
            figure.add_scatter(x=x, y=y, name=name, mode="lines+markers", line={"color": colour}, marker={"size": 5})
    figure.update_yaxes(tickformat=form, rangemode="tozero")
    return _whole_epochs(figure, rows)


def _whole_epochs(figure: go.Figure, rows: Sequence[Row]) -> go.Figure:
    if len(rows) <= 10:  # beyond that plotly's own choice has whole numbers
        figure.update_xaxes(dtick=1)
    return figure


def _loss(rows: Sequence[Row], steps: Sequence[StepRecord]) -> go.Figure:
    figure = _figure("step", "loss")
    shown = _thinned(steps)
    if shown:
        figure.add_scatter(
            x=[record.step for record in shown],
            y=[_finite(record.loss) for record in shown],
            name="step (rank 0)",
            mode="lines",
            line={"color": _SKY, "width": 1},
        )
    x, y = _numbers(rows, "train_loss", "step")
    if x:
        figure.add_scatter(x=x, y=y, name="mean of the epoch", mode="lines+markers", line={"color": _BLUE})
    figure.update_yaxes(rangemode="tozero")
    return figure


def _dice(rows: Sequence[Row]) -> go.Figure:
    figure = _figure("epoch", "Dice")
    x, y = _numbers(rows, "mean_dice")
    if x:
        figure.add_scatter(x=x, y=y, name="mean", mode="lines+markers", line={"color": "#222222", "width": 3})
    for number in range(max((len(row.get("dice_by_class") or []) for row in rows), default=0)):
        of_class = [
            {"epoch": row.get("epoch"), "dice": row["dice_by_class"][number]}
            for row in rows
            if len(row.get("dice_by_class") or []) > number
        ]
        x, y = _numbers(of_class, "dice")
        colour = COLOURS[number % len(COLOURS)]
        figure.add_scatter(x=x, y=y, name=f"class {number + 1}", mode="lines+markers", line={"color": colour})
    figure.update_yaxes(range=[0, 1])
    return _whole_epochs(figure, rows)


def _stall(rows: Sequence[Row]) -> go.Figure:
    figure = _figure("epoch", "seconds, mean over ranks", barmode="stack")
    known = [row for row in rows if row.get("stall_by_cause_s") and _is_number(row.get("epoch"))]
    for cause, about in CAUSES.items():
        seconds = [float(row["stall_by_cause_s"].get(cause) or 0.0) for row in known]
        if any(second > 0 for second in seconds):
            figure.add_bar(
                x=[row["epoch"] + 1 for row in known],
                y=seconds,
                name=cause,
                marker={"color": _CAUSE_COLOURS[cause]},
                hovertemplate=f"%{{y:.2f}} s<br>{about}",
            )
    return _whole_epochs(figure, rows)


def _timeline(starts: Mapping[str, Sequence[StepRecord]], events: Sequence[Event]) -> go.Figure:
    figure = _figure("time (UTC)", "seconds of a step, rank 0", hovermode="closest")
    steps = _thinned(sorted((step for steps in starts.values() for step in steps), key=lambda step: step.ended_unix_s))
    for field, name, colour in (("compute_s", "computing", _SKY), ("wait_s", "waiting for data", _RED)):
        if steps:
            figure.add_scatter(
                x=[_when(step.ended_unix_s) for step in steps],
                y=[getattr(step, field) for step in steps],
                customdata=[[step.step, step.epoch + 1] for step in steps],
                name=name,
                mode="markers",
                marker={"color": colour, "size": 4},
                hovertemplate="step %{customdata[0]}, epoch %{customdata[1]}: %{y:.3f} s",
            )
    above = 1.08 * max((max(step.compute_s, step.wait_s) for step in steps), default=1.0)
    for kind, (symbol, colour) in _EVENTS.items():
        of_kind = [event for event in events if event.kind == kind]
        if of_kind:
            figure.add_scatter(
                x=[_when(event.at_unix_s) for event in of_kind],
                y=[above] * len(of_kind),
                name=kind,
                mode="markers",
                marker={"color": colour, "size": 11, "symbol": symbol},
                hovertext=[html.escape(event.text) for event in of_kind],
                hovertemplate=f"{kind}: %{{hovertext}}<extra></extra>",
                cliponaxis=False,
            )
        if kind in ("start", "fault", "stop"):
            for event in of_kind[:200]:
                figure.add_vline(x=_when(event.at_unix_s), line={"color": colour, "width": 1, "dash": "dot"})
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(height=360)
    return figure


def _thinned(steps: Sequence[StepRecord]) -> list[StepRecord]:
    """All steps, or of each few neighbours the one that waited longest."""
    few = -(-len(steps) // MOST_STEPS)
    return [max(steps[at : at + few], key=lambda step: step.wait_s) for at in range(0, len(steps), max(1, few))]


def _when(unix_s: float) -> datetime:
    return datetime.fromtimestamp(unix_s, timezone.utc).replace(tzinfo=None)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
