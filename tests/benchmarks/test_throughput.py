"""The throughput benchmark: every loader gives the same work, and the ratios are those of the rows."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.__main__ import main
from benchmarks.peers import floor
from benchmarks.peers.needs import NEEDS
from benchmarks.peers.work import Work
from benchmarks.place import make_pairs, patch_of, served, side_of
from benchmarks.report import Report, meta_of, spread
from benchmarks.room import TOGETHER_BYTES, memory_needed
from benchmarks.throughput import FIELDS, LOADERS, ThroughputConfig, bounded, draw, run, targets
from benchmarks.tree import TreeMeter, forget_peak, peak_rss_bytes, rss_bytes
from ingest.cluster import environment
from ingest.errors import IngestError, MissingDependencyError
from ingest.stores.gcs_clients import close_clients


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
            child.wait(timeout=240)
            assert all_of_it.cpu_s() - before[0] > 2.5
            assert without.cpu_s() - before[1] < 1.5


def test_the_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    assert "utilization" in capsys.readouterr().out
    assert main(["nonsense"]) == 2


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own, which generated pairs are put below."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def measured(function: str, env: dict[str, str], python: object, *, loader: str, **_: object) -> dict[str, object]:
    """What a process that measures answers; that of the floor fails."""
    if loader == "floor":
        raise IngestError(f"expected {function} to end well with {{}}, found status -9; its error stands above")
    figures = ("samples_per_s", "client_cpu_ms_per_sample", "first_batch_s", "peak_rss_mb", "above_idle_mb")
    return {"pairs": 8, "pair_kb": 160, "samples": 8} | dict.fromkeys(figures, 77.0)


def test_a_loader_that_fails_is_marked_and_the_results_of_all_others_are_printed_and_kept(somewhere, capsys):
    config = ThroughputConfig(
        json=somewhere / "t.json", pairs=8, latency_ms=(0.0,), loaders=("floor", "ours-auto", "local-loop"), rounds=3
    )
    console = Console(file=io.StringIO(), width=200)
    assert run(config, console, measured) == 1
    printed = console.file.getvalue()
    assert printed.count("floor: failed, and is left out from now on") == 1
    assert printed.count("ours-auto: 77 samples/s") == 3
    rows = {row["loader"]: row for row in json.loads((somewhere / "t.json").read_text())["rows"]}
    assert rows["ours-auto"]["rounds"] == 3
    assert rows["local-loop"]["samples_per_s"] == 77
    assert rows["floor"]["failed"] == "in round 1: status -9"
    assert "samples_per_s" not in rows["floor"]
    assert (somewhere / "t.png").exists()
    assert "error: expected a measurement of floor at 0 ms, found: in round 1: status -9" in capsys.readouterr().err


def test_results_are_kept_also_when_every_loader_fails(somewhere):
    config = ThroughputConfig(json=somewhere / "t.json", pairs=8, latency_ms=(0.0,), loaders=("floor",), rounds=1)
    assert run(config, Console(file=io.StringIO()), measured) == 1
    assert json.loads((somewhere / "t.json").read_text())["rows"][0]["loader"] == "floor"


def test_a_loader_without_its_package_is_refused_before_pairs_are_made(somewhere, monkeypatch):
    monkeypatch.setitem(NEEDS, "ray-stock", "no_such_module")
    config = ThroughputConfig(pairs=8, loaders=("ray-stock", "floor"))
    with pytest.raises(MissingDependencyError, match=r"no_such_module \(of ray-stock\); do: pip install .*\[bench\].*"):
        run(config, Console(file=io.StringIO()), measured)
    assert not list(somewhere.iterdir())


def test_every_module_that_a_loader_needs_is_one_of_the_extra_or_of_our_own_dependencies():
    declared = Path("pyproject.toml").read_text()
    package = {"dataflux_pytorch": "gcs-torch-dataflux"}
    for loader, module in NEEDS.items():
        assert loader in LOADERS
        assert f'"{package.get(module, module)}>=' in declared


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pair-kb", "1000000000"], r"expected [\d,.]+ GiB of memory for pairs of .*, found [\d.]+ GiB available"),
        (["--pair-kb", "1024", "--pairs", "99999999"], r"expected [\d,.]+ GiB of disk in .*, found [\d,.]+ GiB free"),
    ],
)
def test_pairs_that_the_machine_has_no_room_for_are_refused_before_any_is_made(somewhere, capsys, arguments, message):
    assert main(["throughput", *arguments, "--loaders", "floor"]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not list(somewhere.iterdir())


def test_the_pairs_of_the_large_benchmark_need_less_than_12_gib(monkeypatch):
    pair_bytes, batch_bytes = 147_000 * 1024, 5 * 32 * 128**3
    assert memory_needed(pair_bytes, batch_bytes, workers=2) < 12 * 2**30


def test_large_pairs_are_neither_loaded_at_once_by_the_server_nor_read_at_once_by_the_floor(somewhere):
    pairs, pair_kb = 16, 8 * 1024
    folder = make_pairs(pairs, pair_kb)
    all_bytes = pairs * pair_kb * 1024
    with served(folder, all_bytes, most_loaded_bytes=0) as server:
        status = Path(f"/proc/{server.pid}/status").read_text()
        assert int(status.partition("VmHWM:")[2].split()[0]) * 1024 < all_bytes
        with environment(server.env()):
            uris = [f"gs://voxflux-bench/pairs/{role}" for role in ("images", "labels")]
            work = Work(
                images=uris[0], labels=uris[1], patch=(8, 8, 8), batch=4, transform="none", workers=1, in_flight=16,
                seed=0,
            )  # fmt: skip
            work = bounded(work, TOGETHER_BYTES)
            assert (work.together, work.in_flight) == (1, 2)
            with floor.opened(work) as epoch:
                assert sum(len(image) for image, _ in epoch(2)) == 2
                forget_peak()
                before_bytes = rss_bytes()
                assert sum(len(image) for image, _ in epoch(None)) == pairs
                assert peak_rss_bytes() - before_bytes < all_bytes / 2
            close_clients()


def test_small_pairs_are_bounded_by_nothing_but_what_is_asked_for():
    work = Work(
        images="i", labels="l", patch=(8, 8, 8), batch=32, transform="none", workers=2, in_flight=64, seed=0
    )  # fmt: skip
    small = bounded(work, 160 * 1024)
    assert small.in_flight == 64
    assert small.together >= floor.CHUNK_BATCHES * 32
