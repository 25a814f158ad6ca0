"""Output of the commands: tables and key-value lists, styled on a terminal and plain in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from pyinfer.cli.text import safe


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = ()) -> None:
    """A table on stdout. In a pipe: aligned columns, two spaces apart, nothing cut off. `right`: columns of numbers."""
    cells = [[safe(cell) for cell in row] for row in rows]
    to_right = set(right)
    if sys.stdout.isatty():
        _rich_table(columns, cells, to_right)
        return
    widths = [max(len(row[i]) for row in [columns, *cells]) for i in range(len(columns))]
    for row in [[column.upper() for column in columns], *cells]:
        aligned = (
            cell.rjust(width) if column in to_right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        )
        print("  ".join(aligned).rstrip())


def _rich_table(columns: Sequence[str], cells: list[list[str]], to_right: set[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold")
    for column in columns:
        table.add_column(
            column,
            justify="right" if column in to_right else "left",
            overflow="fold",
            no_wrap=column != columns[-1],  # a long path may fold, all else stays on its line
        )
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def print_facts(title: str, facts: Iterable[tuple[str, object]]) -> None:
    """A titled list of `key value` lines; facts that are None are left out."""
    known = [(key, safe(str(value))) for key, value in facts if value is not None]
    if not known:
        return
    bold, dim, reset = ("\x1b[1m", "\x1b[2m", "\x1b[0m") if _styled() else ("", "", "")
    width = max(len(key) for key, _ in known)
    print(f"{bold}{title}{reset}")
    for key, value in known:
        print(f"  {dim}{key.ljust(width)}{reset}  {value}")


def _styled() -> bool:
    import os

    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
