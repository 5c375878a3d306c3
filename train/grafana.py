"""Our Grafana dashboard, `grafana.json`: panels of the metrics in `gauges.METRICS`, to stand beside Ray's own."""

from __future__ import annotations

from importlib import resources

import tyro


def dashboard() -> str:
    """The dashboard's JSON, as Grafana imports it; it asks for a Prometheus data source and for runs."""
    return (resources.files(__package__) / "grafana.json").read_text("utf-8")


def print_dashboard(arguments: list[str]) -> int:
    """`voxflux grafana > FILE`."""
    tyro.cli(_no_options, prog="voxflux grafana", args=arguments)
    print(dashboard(), end="")
    return 0


def _no_options() -> None:
    """Print a Grafana dashboard of a run's metrics, to be imported beside Ray's own."""
