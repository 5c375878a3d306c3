"""Runs commands in odd environments: other users, terminals, folders, limits, proxies and clusters.

`python -m tests.integration.environments` runs the rows that CI runs, `--all` the costly ones too, and `--row NAME`
one. It prints a line a row, and the output of each row that fails. Exit status 1 if a row failed. A row whose
environment cannot be made here (most need root) says why, and does not count as passed.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TIMEOUT_S = 240.0

TINY = [
    *("--demo.cases", "16", "--demo.shape", "16", "16", "16", "--data.crop.patch", "8", "8", "8"),
    *("--model.filters", "4", "8", "--model.bottleneck", "8", "--trainer.num-workers", "1", "--trainer.epochs", "1"),
]
"""Settings of `run demo` for a run of some seconds."""
RUN = f"voxflux run demo {shlex.join(TINY)}"


class CannotError(Exception):
    """The environment of a row cannot be made on this machine."""


class Row(NamedTuple):
    """One odd environment.

    Attributes:
        name: of it, as `--row` takes it.
        command: run by bash in a scratch folder.
        prints: regular expressions that its output must match.
        status: exit status that it must have.
        around: makes the environment: is given the scratch folder, and yields variables for the command. A variable
            that is empty is removed.
        costly: whether only `--all` runs it.
        never: texts that its output must not have, beside those of all rows.
    """

    name: str
    command: str
    prints: tuple[str, ...] = ()
    status: int = 0
    around: Callable[[Path], contextlib.AbstractContextManager[dict[str, str]]] | None = None
    costly: bool = False
    never: tuple[str, ...] = ()


NEVER = ("Traceback", "Fatal Python error", "core_worker.cc")
"""What no user should see, whatever the environment."""
MADE = ("making or finding",)
"""Printed when a demo makes its data: a refusal must come before."""


def _with(**variables: str) -> Callable[[Path], contextlib.AbstractContextManager[dict[str, str]]]:
    @contextlib.contextmanager
    def around(folder: Path) -> Iterator[dict[str, str]]:
        yield {name: value.replace("FOLDER", str(folder)) for name, value in variables.items()}

    return around


def _need_root() -> None:
    if os.geteuid() != 0:
        raise CannotError("only root can make it")


@contextlib.contextmanager
def _root(_folder: Path) -> Iterator[dict[str, str]]:
    _need_root()
    yield {}


@contextlib.contextmanager
def _nameless(folder: Path) -> Iterator[dict[str, str]]:
    """A user without an entry in passwd, and without a home."""
    _need_root()
    (folder / "tmp").mkdir()
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 12345, 12345)
    yield {"HOME": "/nonexistent", "USER": "", "LOGNAME": "", "TMPDIR": ""}


@contextlib.contextmanager
def _user_modules(folder: Path) -> Iterator[dict[str, str]]:
    (folder / "train.py").write_text("raise SystemExit('a script of the user ran')\n")
    yield {}


@contextlib.contextmanager
def _spaced(folder: Path) -> Iterator[dict[str, str]]:
    """Our environment, and the folder of temporary files, in folders whose names have a space."""
    environment, temporary = folder / "My Projects" / "venv", folder / "a b"
    environment.parent.mkdir()
    environment.symlink_to(BIN.parent)
    temporary.mkdir()
    yield {"SPACED": str(environment), "TMPDIR": str(temporary)}


@contextlib.contextmanager
def _long_folder(folder: Path) -> Iterator[dict[str, str]]:
    long = folder / ("a" * 80)
    long.mkdir()
    yield {"TMPDIR": str(long)}


@contextlib.contextmanager
def _mounted(size: str, variables: dict[str, str], where: Path) -> Iterator[dict[str, str]]:
    _need_root()
    where.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(where)], capture_output=True)
    if done.returncode != 0:
        raise CannotError(f"no tmpfs can be mounted: {done.stderr.decode().strip()}")
    try:
        yield variables
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def _small_tmp(folder: Path) -> contextlib.AbstractContextManager[dict[str, str]]:
    return _mounted("1m", {"TMPDIR": str(folder / "small")}, folder / "small")


@contextlib.contextmanager
def _dashboard(_folder: Path) -> Iterator[dict[str, str]]:
    """An HTTP server, as a Ray dashboard is one, given as the address of a cluster."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_arguments: object) -> None:
            """Print nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {"RAY_ADDRESS": f"http://127.0.0.1:{server.server_address[1]}"}
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def _dead_port(_folder: Path) -> Iterator[dict[str, str]]:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it
        yield {"RAY_ADDRESS": f"127.0.0.1:{unheard.getsockname()[1]}"}


@contextlib.contextmanager
def _dead_proxy(_folder: Path) -> Iterator[dict[str, str]]:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        variables = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), dead)
        yield variables | {"NO_PROXY": "", "no_proxy": ""}


@contextlib.contextmanager
def _buckets(folder: Path) -> Iterator[dict[str, str]]:
    """Two pairs below a folder that `serve` takes."""
    for role, suffix in (("images", "x"), ("labels", "y")):
        place = folder / "data" / "mine" / role
        place.mkdir(parents=True)
        for number in range(2):
            array = np.zeros((1, 16, 16, 16), np.float32 if suffix == "x" else np.uint8)
            array[0, number + 4 :, 8:] = 1
            np.save(place / f"case_{number}_{suffix}.npy", array)
    yield {}


@contextlib.contextmanager
def _buckets_behind_a_dead_proxy(folder: Path) -> Iterator[dict[str, str]]:
    with _buckets(folder), _dead_proxy(folder) as variables:
        yield variables


ASCII = _with(LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")
INSPECT = "voxflux serve --data data -- voxflux inspect --images gs://mine/images --labels gs://mine/labels"

ROWS = [
    Row("ascii-help", "voxflux --help", (r"demo-quality.*64",), around=ASCII),
    Row("ascii-size", "voxflux size --gpus 8 --step-s 0.2 --batch 32 --cpu-ms-per-sample 2", ("data",), around=ASCII),
    Row("closed-output", "voxflux --help >&-"),
    Row("closed-pipe", "set +o pipefail; voxflux --help | head -n 1", ("usage: voxflux",)),
    Row(
        "closed-pipe-benchmarks",
        "set +o pipefail; PYTHONPATH=$ROOT python -m benchmarks --help | head -n 1",
        ("usage",),
    ),
    Row(
        "users-train-py",
        RUN,
        (r"train\.py",),
        status=1,
        around=_user_modules,
        never=MADE,
    ),
    Row("long-tmpdir", RUN, ("bytes in TMPDIR", "set RAY_TMPDIR"), 1, _long_folder, never=MADE),
    Row("small-tmpdir", RUN, ("expected 100 MiB free for Ray's session",), 1, _small_tmp, never=MADE),
    Row("100-files", f"ulimit -n 100; {RUN}", ("expected that a process may open 256 files",), 1, never=MADE),
    Row("address-garbage", RUN, ("expected RAY_ADDRESS=HOST:PORT",), 1, _with(RAY_ADDRESS="no address"), never=MADE),
    Row("address-dead-port", RUN, ("nothing takes a connection there",), 1, _dead_port, never=MADE),
    Row("address-dashboard", RUN, ("expected RAY_ADDRESS=HOST:PORT",), 1, _dashboard, never=MADE),
    Row(
        "relative-token",
        RUN,
        ("expected an absolute path in RAY_AUTH_TOKEN_PATH",),
        1,
        _with(RAY_ADDRESS="127.0.0.1:6379", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH="./token"),
        never=MADE,
    ),
    Row(
        "relative-token-submit",
        RUN.replace(" run ", " submit "),
        ("expected an absolute path in RAY_AUTH_TOKEN_PATH",),
        1,
        _with(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH="./token"),
    ),
    Row("dead-proxy", INSPECT, ("2 cases",), around=_buckets_behind_a_dead_proxy),
    Row(
        "umask-077",
        "umask 077; voxflux prepare --source mni152 --output cases --cases 2 --shape 16 16 16; "
        'test -z "$(find cases -type f -perm /077)"',
        ("made 2 cases",),
    ),
    Row(
        "nameless-user",
        # The capability lets the user read an interpreter that lies below another's home, as root's pyenv does.
        "umask 077; setpriv --reuid 12345 --regid 12345 --clear-groups --inh-caps +dac_read_search "
        f'--ambient-caps +dac_read_search env "PATH=$PATH" {RUN}; test -z "$(find runs -type f -perm /077)"',
        ("checkpoint: ",),
        around=_nameless,
    ),
    Row(
        "space-in-path",
        f'"$SPACED/bin/python" -m train {RUN.removeprefix("voxflux ")}',
        ("checkpoint: ",),
        around=_spaced,
        costly=True,
    ),
    Row("demo-behind-a-dead-proxy", RUN, ("checkpoint: ",), around=_dead_proxy, costly=True),
    Row("256-files", f"ulimit -n 256; {RUN}", ("may open 256 files here", "checkpoint: "), costly=True),
    Row(
        "small-shm",
        f"unshare --mount bash -c 'mount -t tmpfs -o size=64m tmpfs /dev/shm; {RUN}'",
        ("/dev/shm has 64 MiB", "checkpoint: "),
        around=_root,
        costly=True,
    ),
]


def run_row(row: Row) -> str | None:
    """Run one row; return the words of what is wrong, with the command's output, or None.

    Raises:
        CannotError: its environment cannot be made here.
    """
    scratch = Path(tempfile.mkdtemp(prefix="vf-env-", dir="/tmp"))
    scratch.chmod(0o755)
    try:
        with (row.around or _with())(scratch) as variables:
            env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "STORAGE_"))}
            env |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0", "ROOT": str(ROOT)}
            env |= variables
            env = {name: value for name, value in env.items() if value}
            return _judged(row, scratch, env)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _judged(row: Row, folder: Path, env: dict[str, str]) -> str | None:
    process = subprocess.Popen(
        ["bash", "-eo", "pipefail", "-c", row.command],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=TIMEOUT_S)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0].decode(errors="replace")
        return f"expected an end within {TIMEOUT_S:g} s, found none\n{output}"
    wrong = []
    if process.returncode != row.status:
        wrong.append(f"expected exit status {row.status}, found {process.returncode}")
    wrong += [f"expected {words!r} in the output" for words in row.prints if not re.search(words, output)]
    wrong += [f"expected no {words!r} in the output" for words in (*NEVER, *row.never) if words in output]
    return "\n".join([*wrong, output]) if wrong else None


def main() -> int:
    """Run the rows that are asked for; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="the costly rows too")
    parser.add_argument("--row", choices=[row.name for row in ROWS], help="one row only")
    options = parser.parse_args()
    chosen = [row for row in ROWS if (row.name == options.row if options.row else options.all or not row.costly)]
    failed, not_run = 0, 0
    for row in chosen:
        started_s = time.monotonic()
        try:
            wrong = run_row(row)
            said = "ok" if wrong is None else "FAILED"
        except CannotError as error:
            wrong, said, not_run = None, f"not run: {error}", not_run + 1
        print(f"{row.name}: {said} ({time.monotonic() - started_s:.1f} s)", flush=True)
        if wrong is not None:
            failed += 1
            print(wrong, flush=True)
    print(f"{len(chosen) - failed - not_run} rows as expected, {failed} not, {not_run} not run")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
