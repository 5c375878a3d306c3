"""Every stage has a row, and what is left over of the whole is Ray's."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks.stages import STAGES, StagesConfig, cpu_s_of, draw, measure_pieces, rows_of
from ingest.errors import ConfigError
from ingest.index import index_cases
from ingest.stores import open_store
from ingest.testing import make_cases

PIECES = {"fetch": [0.5], "read": [0.6], "decode": [0.1], "crop": [0.1], "sample": [0.3], "tensors": [0.05]}
WHOLE = {"cpu_ms": [1.9, 2.0, 2.5], "samples_per_s": [900.0, 1000.0, 1100.0]}
BY_ROLE = {"own": [0.2], "readers": [1.5], "coordinator": [0.1], "raylet": [0.1], "services": [0.1]}


def test_stages_and_the_whole_have_a_row_each_and_add_up() -> None:
    rows = rows_of("direct", PIECES, WHOLE | BY_ROLE)
    spent = {row["stage"]: row["cpu_ms_per_sample"] for row in rows}
    roles = {f"by process: {role}": value for role, (value,) in BY_ROLE.items()}
    assert tuple(spent) == (*STAGES, *roles, "whole")
    assert roles.items() <= spent.items()
    assert spent["columns"] == pytest.approx(0.1)
    assert spent["augment"] == pytest.approx(0.2)
    assert spent["ray"] == pytest.approx(2.0 - 0.5 - 0.1 - 0.1 - 0.1 - 0.2 - 0.05)
    assert sum(spent[stage] for stage in STAGES) == pytest.approx(spent["whole"])
    assert sum(row["share"] for row in rows) == pytest.approx(3.0)  # by stages, by processes, and the whole
    draw(Figure().add_subplot(), rows)


def test_pieces_are_measured_on_real_cases(tmp_path: Path) -> None:
    images, labels = str(tmp_path / "images"), str(tmp_path / "labels")
    make_cases(open_store(images), open_store(labels), 128)
    uri = f"{tmp_path}/manifest.parquet"
    index_cases(images, labels).manifest.save(uri)
    found = measure_pieces(manifest_uri=uri, transport="direct", patch=(8, 8, 8), samples=64, rounds=2, seed=0)
    assert found.keys() == PIECES.keys()
    assert all(len(values) == 2 for values in found.values())
    assert all(value > 0 for name in ("fetch", "read", "decode", "crop", "sample") for value in found[name])


def test_waiting_is_not_cpu_time() -> None:
    assert cpu_s_of(lambda: time.sleep(0.2)) < 0.1


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="rounds"):
        StagesConfig(rounds=0)
