"""What every benchmark prints and writes."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from benchmarks.child import in_child
from benchmarks.report import Report, keeping, status_of
from ingest.errors import IngestError


def test_a_table_is_printed_whole_however_narrow_the_terminal():
    fields = {f"a_field_with_a_long_name_{number}": "{:,.0f}" for number in range(10)}
    report = Report(name="x", rows=[dict.fromkeys(fields, 123456.0), {}], meta={})
    printed = io.StringIO()
    report.print(Console(file=printed, width=80), fields)
    lines = printed.getvalue().splitlines()
    assert all(any(field in line for line in lines) for field in fields)
    (values,) = [line for line in lines if "123,456" in line]
    assert values.count("123,456") == len(fields)


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_a_figure_that_is_not_finite_is_null_in_the_json(tmp_path):
    rows = [{"au": math.nan, "rate": np.float64("inf"), "parts": (1.0, -math.inf)}]
    report = Report(name="x", rows=rows, meta={"least": math.nan, "seed": 3})
    file, _ = report.save(tmp_path / "x.json", lambda axes: None)
    saved = json.loads(file.read_text(), parse_constant=no_constant)
    assert saved == {"meta": {"least": None, "seed": 3}, "rows": [{"au": None, "rate": None, "parts": [1.0, None]}]}


def test_a_process_of_its_own_answers_with_none_for_what_is_not_finite():
    assert in_child("tests.benchmarks.test_report:echo", value=math.nan) == {"value": None, "answer": None}


def echo(value: float | None) -> dict[str, float | None]:
    return {"value": value, "answer": math.inf}


def test_rows_that_were_measured_before_one_failed_are_kept_and_the_status_says_so(capsys):
    def measured():
        yield {"a": 1}
        yield {"a": 2}
        raise IngestError("expected x, found y")

    rows, failed = [], []
    with keeping(rows, failed):
        rows.extend(measured())
    assert rows == [{"a": 1}, {"a": 2}]
    assert status_of(failed) == 1
    assert capsys.readouterr().err == "error: expected x, found y; what is printed was measured before\n"


def test_where_nothing_was_measured_the_error_ends_the_benchmark():
    with pytest.raises(IngestError, match="expected x"):
        with keeping([], []):
            raise IngestError("expected x, found y")
    assert status_of([]) == 0
