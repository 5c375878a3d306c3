"""Chooses the rows of a long table that are printed: a run of 512 epochs fills no terminal with 512 rows."""

from __future__ import annotations

from collections.abc import Collection

from rich.table import Table

LONGEST = 40  # rows that are all printed
ENDS = 5  # first rows, and last ones, of a longer table
PROBLEMS = 20  # rows with problems, the first ones, of a longer table


def printed_rows(count: int, problems: Collection[int], best: int | None = None) -> list[int]:
    """Choose the rows to print.

    Args:
        count: of all rows.
        problems: positions of rows with a problem.
        best: position of the best row; None if there is none.

    Returns:
        Positions, ascending: all of a short table; else the first, the last, the best and those with problems.
    """
    if count <= LONGEST:
        return list(range(count))
    chosen = {*range(ENDS), *range(count - ENDS, count), *sorted(problems)[:PROBLEMS]}
    return sorted(chosen if best is None else {*chosen, best})


def add_chosen(table: Table, cells: list[tuple[str, ...]], problems: Collection[int], best: int | None = None) -> None:
    """Add the rows of a table that `printed_rows` chooses, and a caption that says which are left out.

    A line stands where rows are left out.

    Args:
        table: with its columns.
        cells: the text of every row.
        problems: positions of rows with a problem.
        best: position of the best row; None if there is none.
    """
    chosen = printed_rows(len(cells), problems, best)
    for place, at in enumerate(chosen):
        left_out = place + 1 < len(chosen) and chosen[place + 1] != at + 1
        table.add_row(*cells[at], end_section=left_out)
    if len(chosen) < len(cells):
        kinds = [f"the first and last {ENDS}", *(["the best"] if best is not None else [])]
        if problems:
            of = f" (the first {PROBLEMS} of {len(problems):,})" if len(problems) > PROBLEMS else ""
            kinds.append(f"those with problems{of}")
        table.caption = f"{len(chosen)} of {len(cells):,} epochs: {', '.join(kinds)}"
