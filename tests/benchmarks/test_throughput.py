"""The throughput benchmark: every loader gives the same work, and the ratios are those of the rows."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.__main__ import main
from benchmarks.place import patch_of, side_of
from benchmarks.report import Report, meta_of, spread
from benchmarks.throughput import FIELDS, draw, targets
from benchmarks.tree import TreeMeter


def row(loader: str, latency_ms: float, samples_per_s: float, cpu_ms: float) -> dict[str, object]:
    return {
        "loader": loader,
        "latency_ms": latency_ms,
        "pair_kb": 160,
        "pairs": 100,
        "samples_per_s": samples_per_s,
        "samples_per_s_low": samples_per_s - 1,
        "samples_per_s_high": samples_per_s + 1,
        "mb_per_s": 1.0,
        "client_cpu_ms_per_sample": cpu_ms,
        "first_batch_s": 0.1,
        "peak_rss_mb": 100.0,
    }


ROWS = [
    row("ours-auto", 0.0, 1000, 0.9),
    row("ours-auto", 30.0, 900, 1.0),
    row("reference", 0.0, 400, 1.5),
    row("reference", 30.0, 450, 1.6),
    row("floor", 0.0, 2000, 0.5),
    row("ours-local", 0.0, 2500, 0.5),
    row("local-loop", 0.0, 4000, 0.25),
]


def test_ratios_are_those_of_the_rows_and_say_whether_they_hold():
    found = {target["name"]: (round(target["found"], 3), target["held"]) for target in targets(ROWS)}
    assert found == {
        "samples/s at 30 ms, auto against reference": (2.0, False),
        "client CPU a sample at 0 ms, auto against floor": (1.8, False),
        "client CPU a sample at 0 ms, auto against reference": (0.6, True),
        "local files, samples/s of a core's CPU": (2000.0, True),
        "local files, samples a CPU second against a np.load loop": (0.5, False),
    }


def test_large_volumes_are_held_to_ratios_and_memory_of_their_own():
    rows = [
        row("ours-boxes", 0.0, 10, 90) | {"pair_kb": 147_000, "above_idle_mb": 2500},
        row("ours-whole", 0.0, 2, 500) | {"pair_kb": 147_000, "above_idle_mb": 900},
    ]
    assert [(target["found"], target["held"]) for target in targets(rows)] == [(2500, False), (5.0, True)]


def test_a_report_is_json_beside_a_picture_and_a_table(tmp_path: Path):
    report = Report(name="throughput", rows=ROWS, meta=meta_of(3, targets=targets(ROWS)))
    saved, picture = report.save(tmp_path / "deep" / "t.json", lambda axes: draw(axes, ROWS))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert '"samples_per_s": 1000' in saved.read_text()
    console = Console(file=io.StringIO(), width=200)
    report.print(console, FIELDS)
    assert "2,500" in console.file.getvalue()


def test_the_spread_is_median_and_range():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}


@pytest.mark.parametrize(("pair_kb", "side", "patch"), [(160, 32, 32), (1024, 59, 32), (16384, 150, 128)])
def test_pairs_have_the_size_that_is_asked_for(pair_kb: int, side: int, patch: int):
    assert side_of(pair_kb) == side
    assert patch_of(side) == (patch, patch, patch)


def test_cpu_time_of_processes_below_counts_and_that_of_a_server_does_not():
    import subprocess
    import sys

    burn = "import time; t = time.process_time()\nwhile time.process_time() - t < 3: pass\ntime.sleep(2)"
    with subprocess.Popen([sys.executable, "-c", burn]) as child:
        with TreeMeter() as all_of_it, TreeMeter(leave_out=(child.pid,)) as without:
            before = all_of_it.cpu_s(), without.cpu_s()
            child.wait(timeout=60)
            assert all_of_it.cpu_s() - before[0] > 2.5
            assert without.cpu_s() - before[1] < 1.5


def test_the_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    assert "utilization" in capsys.readouterr().out
    assert main(["nonsense"]) == 2
