"""The results table as text: for the terminal, and as Markdown for Prefect's artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tasks.reporting.results import NOTHING, Arm, Column, gather, measured, signed_percent
from tasks.selection.ledger import open_ledger

WIDTH = 100
"""Columns of the terminal that the table keeps to."""
_NAME = 16


def results_table(ledger: Path) -> str:
    """The results table as plain text of at most 100 columns, the paper's figures below ours.

    Raises:
        InputError: there is no ledger to read.
    """
    with open_ledger(ledger) as con:
        results = gather(con)
    titles = [f"{clean_name(column.short, _NAME)} {column.arrow}" for column in results.columns]
    head = ["method", *titles, "oracle's gain"]
    ours = [
        [clean_name(arm.name, _NAME), *(_half(column, arm) for column in results.columns), _gain(arm)]
        for arm in measured(results)
    ]
    paper = [
        [arm.paper_name, *(_paper(column, arm) for column in results.columns), ""]
        for arm in results.arms if arm.paper_name
    ]  # fmt: skip
    widths = [max(len(row[place]) for row in [head, *ours, *paper]) for place in range(len(head))]
    ruler = "  ".join("─" * width for width in widths)
    lines = [
        _line(head, widths), ruler, *(_line(row, widths) for row in ours), ruler,
        "the paper, Table 4 (32B scorer, pool of 50,000, Pythia-1B)", *(_line(row, widths) for row in paper),
        "± is half the width of the interval; oracle's gain: see the report",
    ]  # fmt: skip
    return "\n".join(line[:WIDTH].rstrip() for line in lines)


def results_markdown(ledger: Path) -> str:
    """The results table as a Markdown table with intervals, for Prefect's artifacts.

    Raises:
        InputError: there is no ledger to read.
    """
    with open_ledger(ledger) as con:
        results = gather(con)
    titles = [f"{_escape(column.title)}{', %' if column.percent else ''} {column.arrow}" for column in results.columns]
    lines = [_row(["Method", *titles, "Oracle's gain"]), _row(["---", *["---:"] * (len(titles) + 1)])]
    lines += [
        _row([_escape(clean_name(arm.name, 60)), *(_range(column, arm) for column in results.columns), _gain(arm)])
        for arm in measured(results)
    ]
    return "\n".join(lines)


def _half(column: Column, arm: Arm) -> str:
    estimate = arm.estimates.get(column.key)
    return column.show_half(estimate) if estimate else NOTHING


def _range(column: Column, arm: Arm) -> str:
    estimate = arm.estimates.get(column.key)
    if estimate is None:
        return NOTHING
    bounds = column.show_range(estimate)
    return f"{column.show(estimate.value)} ({bounds})" if bounds else column.show(estimate.value)


def _paper(column: Column, arm: Arm) -> str:
    return column.show_paper(arm.paper[column.key]) if column.key in arm.paper else NOTHING


def _gain(arm: Arm) -> str:
    return NOTHING if arm.gain is None else signed_percent(arm.gain)


def text_table(head: list[str], body: Sequence[list[str]]) -> list[str]:
    """Lines of a table: head, ruler, rows; the first column to the left, the others to the right."""
    widths = [max(len(row[place]) for row in [head, *body]) for place in range(len(head))]
    return [_line(head, widths), "  ".join("─" * width for width in widths),
            *(_line(row, widths) for row in body)]  # fmt: skip


def _line(cells: list[str], widths: list[int]) -> str:
    """One line of a table, its cells as wide as their columns."""
    name, *figures = cells
    return "  ".join([name.ljust(widths[0]), *map(str.rjust, figures, widths[1:])])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def clean_name(name: str, width: int) -> str:
    """A name for the terminal: no control characters (they steer it), and no wider than ``width``."""
    text = "".join(letter if letter.isprintable() else "?" for letter in name)
    return text if len(text) <= width else text[: width - 1] + "…"


def _escape(text: str) -> str:
    """Text without a meaning in Markdown or HTML: every mark becomes an entity or is escaped."""
    entities = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "|": "&#124;"}
    return "".join(entities.get(letter, f"\\{letter}" if letter in "\\`*_{}[]()#+!~$" else letter) for letter in text)
