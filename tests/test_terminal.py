"""Commands on any terminal, pipe or closed output; names with brackets; and the signals that end a command."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from ingest import signals, terminal
from ingest.__main__ import main as ingest_main
from ingest.command import run_command
from ingest.stores import open_store
from ingest.testing import make_cases
from train.inference import scores_table
from train.stop import on_signals
from train.validate import CaseScore, Scores

MAINS = ["ingest", "train", "benchmarks"]
ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def python(*arguments: str, env: dict[str, str] | None = None, **more: object) -> subprocess.CompletedProcess[str]:
    options: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    return subprocess.run(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
        text=True,
        check=False,
        timeout=200,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize("package", MAINS)
def test_help_into_a_pipe_that_nobody_reads_ends_silently_as_by_sigpipe(package: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = python("-m", package, "--help", stdout=write_end)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("package", ["ingest", "benchmarks"])  # they share what is under test with train
def test_help_with_a_closed_output_ends_silently(package: str) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", package, "--help"],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_under_the_output_is_one_message() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123  it is no file
        done = python("-m", "ingest", "--help", stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("error: expected to write to standard output, found No space left on device")
    assert done.stderr.count("\n") == 1


def test_a_closed_output_is_not_given_to_the_next_file_that_is_opened(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom ingest import terminal\nterminal.settle()\n"
        f"file = open({str(tmp_path / 'data')!r}, 'w')\nos.write(1, b'words')\nos.write(2, b'words')\nfile.close()\n"
    )
    subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&- <&-', "sh", sys.executable, "-c", code], check=True, timeout=240)
    assert (tmp_path / "data").read_text() == ""


def test_an_ascii_terminal_gets_plain_characters() -> None:
    code = (
        "import sys\nfrom ingest.command import run_command\nfrom ingest.terminal import plain_console\n"
        "def work():\n"
        "    plain_console().print('patches of 64\\xb3, kidney_\\xe4\\udce4.npy \\u2026')\n"
        "    print('\\xd7', file=sys.stderr)\n"
        "    return 0\n"
        "sys.exit(run_command(work))"
    )
    done = python("-c", code, env=ASCII)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "patches of 64^3, kidney_\\xe4\\udce4.npy ...\n"
    assert done.stderr == "x\n"


def test_the_list_of_recipes_is_printed_on_an_ascii_terminal() -> None:
    done = python("-m", "train", "--help", env=ASCII)
    assert done.returncode == 0, done.stderr
    assert "64^3" in done.stdout


def test_a_name_that_is_no_utf_8_is_printed_on_any_terminal() -> None:
    code = (
        "import sys\nfrom ingest.command import run_command\nsys.exit(run_command(lambda: print('b\\udce4d.npy') or 0))"
    )
    done = python("-c", code, env={"PYTHONIOENCODING": "utf-8"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "b\\udce4d.npy\n", "")


def test_a_table_of_scores_prints_names_in_brackets_as_they_are() -> None:
    names = ["a[/b]_x.npy", "o[left].npy", "[bold]c"]
    by_case = [CaseScore(index, name, [0.5], [True]) for index, name in enumerate(names)]
    scores = Scores(mean_dice=0.5, by_class=[0.5], by_case=by_case)
    file = io.StringIO()
    Console(file=file, width=200).print(scores_table(scores))
    assert all(name in file.getvalue() for name in names)


def test_a_console_prints_markup_and_names_of_emoji_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.plain_console().print("a[/b]:heart:[red]_x.npy")
    assert capsys.readouterr().out == "a[/b]:heart:[red]_x.npy\n"


def ended_by(code: str, number: signal.Signals, *, ignored: bool = False) -> tuple[int, str, str]:
    """Run code that prints `ready`, then send it a signal; its status, and what it wrote after, on both streams."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN) if ignored else None
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        if ignored:
            signal.signal(signal.SIGHUP, before)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        if ignored:
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=240)
    return process.returncode, out, err


WAITS = """
import sys, time
from ingest.command import run_command
def work():
    try:
        print("ready", flush=True)
        time.sleep(100)
    finally:
        print("cleaned up")
sys.exit(run_command(work))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_with_one_line_after_it_cleaned_up(number: signal.Signals) -> None:
    assert ended_by(WAITS, number) == (128 + number, "cleaned up\n", f"ended by {number.name}\n")


def test_ctrl_c_ends_a_command_with_one_line() -> None:
    assert ended_by(WAITS, signal.SIGINT) == (130, "cleaned up\n", "interrupted\n")


def test_under_nohup_sighup_ends_nothing() -> None:
    assert ended_by(WAITS, signal.SIGHUP, ignored=True)[0] == 128 + signal.SIGTERM


def test_handlers_that_ray_sets_at_its_start_are_taken_back() -> None:
    def ours(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def rays(number: int, frame: object) -> None:
        sys.exit(number)

    with signals.handling({signal.SIGTERM: ours}):
        with signals.kept():
            signal.signal(signal.SIGTERM, rays)
        assert signal.getsignal(signal.SIGTERM) is ours
    with signals.handling({signal.SIGTERM: signal.SIG_DFL}):
        with signals.kept():
            signal.signal(signal.SIGTERM, rays)
        assert signal.getsignal(signal.SIGTERM) is rays  # better than none


def test_a_signal_that_meets_the_handler_of_ray_is_told_of_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: sys.exit(signal.SIGTERM)) == 143
    assert capsys.readouterr().err == "ended by SIGTERM\n"


def test_a_run_saves_at_a_sighup_and_a_second_one_changes_nothing() -> None:
    asked: list[int] = []
    with on_signals(lambda: asked.append(1)) as stopped:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert (asked, stopped.signal_number) == ([1], signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_under_nohup_goes_on_at_a_sighup() -> None:
    asked: list[int] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_signals(lambda: asked.append(1)):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not asked


@pytest.mark.parametrize("lost", ["terminal", "pipe"])
def test_a_run_goes_on_to_its_end_when_its_output_is_gone(lost: str, tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from ingest.command import run_command
from ingest.terminal import plain_console
def work():
    plain_console().print("ready")
    input()
    for _ in range(3):
        plain_console().print("more")
        print("words", flush=True)
        print("words", file=sys.stderr, flush=True)
    Path({str(tmp_path / "end")!r}).touch()
    return 5
sys.exit(run_command(work, goes_on=True))
"""
    ours, theirs = pty.openpty() if lost == "terminal" else os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, text=True
    ) as process:
        os.close(theirs)
        assert os.read(ours, 5) == b"ready"
        os.close(ours)
        process.communicate("\n", timeout=240)
    assert process.returncode == 5
    assert (tmp_path / "end").exists()


def test_outside_the_main_thread_a_command_runs_and_leaves_signals_alone() -> None:
    found: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: found.append(run_command(lambda: 4)))
    thread.start()
    thread.join()
    assert found == [4]
    assert signal.getsignal(signal.SIGTERM) is before


def test_names_of_files_that_the_locale_cannot_read_are_refused_with_the_way_out(tmp_path: Path) -> None:
    for role in ("images", "labels"):
        (tmp_path / role).mkdir()
        (tmp_path / role / f"kidney_ä_{role[0]}.npy").write_bytes(b"x")
    places = ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")]
    done = python("-m", "ingest", "inspect", *places, env=ASCII)
    assert done.returncode == 1
    assert "found b'kidney_\\xc3\\xa4_i.npy' in" in done.stdout
    assert "set PYTHONUTF8=1" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_picture_that_cannot_be_written_is_told_of_and_nothing_else_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cases(open_store(str(tmp_path / "images")), open_store(str(tmp_path / "labels")), 2)
    monkeypatch.chdir("/proc")  # nobody can write here, root included
    places = ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")]
    assert ingest_main(["inspect", *places]) == 1
    printed = capsys.readouterr().out
    assert "wrong: expected to write inspect.png, found" in printed
    assert "give another --picture" in printed
    assert printed.endswith("wrong: no picture was written\n")
