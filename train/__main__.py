"""The command `voxflux`: dispatches to the commands of both packages; also `python -m train`."""

from __future__ import annotations

import logging
import pkgutil
import sys

from .own_ingest import check_own_ingest

check_own_ingest()  # before the first import of it

import ingest.__main__  # noqa: E402
from ingest.command import run_command  # noqa: E402
from ingest.terminal import log_to_stderr  # noqa: E402

COMMANDS = {
    "run": ("train.commands:run_recipe", "RECIPE [--run-dir DIR] [overrides]", "train on this machine or its cluster"),
    "report": ("train.page:report_run", "RUN_DIR", "write a run's page, RUN_DIR/report.html"),
    "grafana": ("train.grafana:print_dashboard", "", "print a Grafana dashboard of a run's metrics"),
    "evaluate": (
        "train.inference:evaluate_command",
        "--checkpoint RUN_DIR|CHECKPOINT --images URI --labels URI",
        "per-case and mean Dice",
    ),
    "predict": (
        "train.inference:predict_command",
        "--checkpoint RUN_DIR|CHECKPOINT --images URI --output URI",
        "write label maps",
    ),
    "submit": ("train.submit:submit_recipe", "RECIPE [--address URL] [overrides]", "train as a job on a Ray cluster"),
    "status": ("train.jobs:job_status", "JOB [--address URL]", "how a submitted job stands"),
    "logs": ("train.jobs:job_logs", "JOB [--follow] [--address URL]", "what it printed"),
    "stop": ("train.jobs:stop_job", "JOB [--address URL]", "have it save and end"),
    "list": ("train.jobs:list_jobs", "[--address URL]", "the cluster's jobs"),
    "size": ("train.size:print_size", "--gpus N --step-s S --batch B", "how many data workers keep the GPUs busy"),
    "cluster": (
        "train.cluster_file:print_cluster",
        "--project PROJECT --zone ZONE [--data-workers N]",
        "print a cluster file for `ray up`",
    ),
    "audit": ("train.commands:audit_run", "RUN_DIR [--ledger DIR]", "hold a run's ledger against its checkpoints"),
}
"""Name: function that takes the rest of the arguments and gives the exit status, its arguments, what it does."""


def usage() -> str:
    """Return how to call each command of both packages, and the recipes."""
    from .recipes import RECIPES  # torch and Ray Data load here: commands that ask a cluster need neither

    groups = {
        "data": ingest.__main__.command_lines(),
        "training": {f"{name} {arguments}".rstrip(): about for name, (_, arguments, about) in COMMANDS.items()},
        "recipes": {name: about for name, (about, _) in RECIPES.items()},
    }
    lines = ["usage: voxflux COMMAND ..., or COMMAND --help (run RECIPE --help)"]
    for heading, entries in groups.items():
        width = max(map(len, entries))
        lines += ["", f"{heading}:", *(f"  {entry:<{width}}  {about}" for entry, about in entries.items())]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 for an error it explains, 2 for one in the options."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in ingest.__main__.COMMANDS:
        return ingest.__main__.main(given)
    # A run of hours does not end because the program that its output was piped into has ended.
    return run_command(lambda: _run(given), goes_on=given[:1] == ["run"])


def _run(arguments: list[str]) -> int:
    log_to_stderr(logging.WARNING)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        names = ", ".join([*ingest.__main__.COMMANDS, *COMMANDS])
        print(f"expected one of the commands {names}; found {command!r}\n\n{usage()}", file=sys.stderr)
        return 2
    return int(pkgutil.resolve_name(COMMANDS[command][0])(rest))


if __name__ == "__main__":
    sys.exit(main())
