"""What a job takes along to the cluster: our two packages, the resolved recipe, and a script that starts them."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ingest.errors import ConfigError

from .config import Recipe

RECIPE_NAME = "recipe.json"
SCRIPT_NAME = "job.sh"
ENTRYPOINT = f"sh {SCRIPT_NAME}"

# Ray's GCS takes packages of up to 512 MiB (its largest gRPC message), but the dashboard, which a job's package goes
# through, takes requests of up to 100 MiB (DASHBOARD_CLIENT_MAX_SIZE): the smaller one counts.
PACKAGE_LIMIT_BYTES = 100 * 2**20

# An entrypoint `python` would be whatever the head's PATH has. The raylet, an ancestor of every job, has the
# interpreter that it starts workers with on its command line; where there is no /proc, the PATH's Pythons are tried.
SCRIPT = """\
ray_python=""
pid=$$
while [ -z "$ray_python" ] && [ -r "/proc/$pid/status" ]; do
  ray_python=$(tr '\\0' '\\n' < "/proc/$pid/cmdline" \\
    | sed -n 's/^--python_worker_command=\\([^ ]*\\) .*/\\1/p')
  pid=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$pid/status")
done
for python in {given} "$ray_python" python3 python; do
  if [ -n "$python" ] && "$python" -c '
import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) is None for name in ("ray", "torch", "train")))' 2> /dev/null; then
    exec "$python" -m train run --config {recipe} --name {name}
  fi
done
echo "error: expected a Python on this node that has Ray, torch and voxflux, found none (tried {given}" \\
  "$ray_python, python3 and python of PATH $PATH);" \\
  "install voxflux there with constraints.txt, or name one by --python" >&2
exit 1
"""


@contextlib.contextmanager
def job_package(recipe: Recipe, name: str, *, with_code: bool = True, python: str | None = None) -> Iterator[Path]:
    """A temporary folder that is the job's working directory.

    Only what a run needs is copied, so that no environment, data, results or git history can come along, and Ray meets
    no .gitignore that would leave out some of it.

    Args:
        recipe: resolved; written as one file.
        name: of the recipe.
        with_code: whether `ingest` and `train` go along; without, the cluster's own are used.
        python: an interpreter on the head to try first.

    Raises:
        ConfigError: the folder is larger than Ray takes.
    """
    with tempfile.TemporaryDirectory(prefix="voxflux-job-") as folder:
        place = Path(folder)
        if with_code:
            root = Path(__file__).resolve().parents[1]
            for package in ("ingest", "train"):
                shutil.copytree(root / package, place / package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        (place / RECIPE_NAME).write_text(recipe.to_json())
        script = SCRIPT.format(given=shlex.quote(python or ""), recipe=RECIPE_NAME, name=shlex.quote(name))
        (place / SCRIPT_NAME).write_text(script)
        check_size(place)
        yield place


def check_size(place: Path, limit_bytes: int = PACKAGE_LIMIT_BYTES) -> int:
    """The bytes of a working directory; Ray packs it without compression.

    Raises:
        ConfigError: they are more than Ray takes; it names the largest files.
    """
    sizes = {str(file.relative_to(place)): file.stat().st_size for file in place.rglob("*") if file.is_file()}
    total = sum(sizes.values())
    if total >= limit_bytes:
        largest = sorted(sizes, key=lambda file: sizes[file], reverse=True)[:3]
        raise ConfigError(
            f"expected a package below {limit_bytes / 2**20:.0f} MiB, the most that Ray's dashboard takes, found "
            f"{total / 2**20:.1f} MiB; its largest files: "
            + ", ".join(f"{file} ({sizes[file] / 2**20:.1f} MiB)" for file in largest)
            + "; move what is no code out of `ingest` and `train`, or install voxflux on the cluster and give "
            "--no-package"
        )
    return total
