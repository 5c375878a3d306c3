"""What every benchmark prints and writes."""

import io

from rich.console import Console

from benchmarks.report import Report


def test_a_table_is_printed_whole_however_narrow_the_terminal():
    fields = {f"a_field_with_a_long_name_{number}": "{:,.0f}" for number in range(10)}
    report = Report(name="x", rows=[dict.fromkeys(fields, 123456.0), {}], meta={})
    printed = io.StringIO()
    report.print(Console(file=printed, width=80), fields)
    lines = printed.getvalue().splitlines()
    assert all(any(field in line for line in lines) for field in fields)
    (values,) = [line for line in lines if "123,456" in line]
    assert values.count("123,456") == len(fields)
