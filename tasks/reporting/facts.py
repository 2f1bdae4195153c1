"""The table of fact tracing: MRR and Recall@K over pools that grow, in the form of Table 17."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.common.errors import InputError
from tasks.common.files import read_json, write_json
from tasks.reporting.results import NOTHING
from tasks.reporting.table import clean_name, text_table
from tasks.selection.study_ledger import cost_of
from tasks.selection.tracing import TRACES

RESULTS = "results.json"
NAMES = {"mrr": "MRR", "recall": "Recall@{k}", "hits": "Hits@{k}"}


@dataclass(frozen=True)
class Traced:
    """A pool that an arm traced, and where its figures are."""

    size: int
    method: str
    seed: int | None
    by_position: bool
    """Whether the formulations of a query make a difference to it."""
    traces: Path | None
    """None where this machine could not do it."""
    scored: Path | None
    readout: Path | None
    reason: str | None
    """What it had too little of."""


def write_results(out: Path, traced: Sequence[Traced]) -> list[dict[str, Any]]:
    """Write ``results.json``: ``traces``, a row a figure, which are returned, ``costs`` and ``absent``.

    A method that always compares prompt and completion has the formulation ``text`` alone.
    """
    import pyarrow.parquet as pq

    figures: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    for one in traced:
        what = {"pool": one.size, "method": one.method, "seed": one.seed}
        if one.traces is None or one.scored is None:
            continue
        rows = pq.read_table(one.traces / TRACES).to_pylist()
        if not one.by_position:
            rows = [{**row, "formulation": "text"} for row in rows if row["formulation"] == rows[0]["formulation"]]
        figures += [{**what, **row} for row in rows]
        costs.append({**what, **cost_of(one.scored, one.readout)})
    absent = [{"pool": one.size, "method": one.method, "seed": one.seed, "reason": one.reason}
              for one in traced if one.reason]  # fmt: skip
    write_json(out / RESULTS, {"traces": figures, "costs": costs, "absent": absent})
    return figures


def facts_table(directory: Path) -> str:
    """MRR and Recall@K of every arm on every pool as plain text, each ± half its interval; means over the seeds.

    Hits@K stands beside Recall@K where a fact has more than one passage.

    Raises:
        InputError: the directory holds no finished run.
    """
    file = directory / RESULTS
    if not file.is_file():
        raise InputError("holds no finished run of `rise facts`", file=directory)
    found = read_json(file)
    pools = list(dict.fromkeys(row["pool"] for row in [*found["traces"], *found["absent"]]))
    cells: dict[tuple[str, str, int, str], list[dict[str, Any]]] = {}
    for row in found["traces"]:
        name = NAMES[row["metric"]].format(k=row["k"])
        cells.setdefault((row["method"], row["formulation"], row["pool"], name), []).append(row)
    metrics = list(dict.fromkeys(key[3] for key in cells))
    for name in [name for name in metrics if name.startswith("Hits")]:
        twin = name.replace("Hits", "Recall")
        if all(row["value"] == other["value"] for key, some in cells.items() if key[3] == name
               for row, other in zip(some, cells[(*key[:3], twin)], strict=True)):  # fmt: skip
            metrics.remove(name)
    arms = list(dict.fromkeys([*(key[:2] for key in cells), *((row["method"], "text") for row in found["absent"])]))
    size = {row["method"]: row["bytes_a_document"] for row in found["costs"]}
    reasons = {(row["method"], row["pool"]): row["reason"] for row in found["absent"]}
    head = ["method", "query", "bytes", *(f"{name} {pool:,}" for name in metrics for pool in pools)]
    body = []
    for method, formulation in sorted(arms, key=lambda arm: list(dict.fromkeys(one for one, _ in arms)).index(arm[0])):
        kept = size.get(method)
        body.append([clean_name(method, 24), formulation, NOTHING if kept is None else f"{kept:,.0f}",
                     *(_cell(cells.get((method, formulation, pool, name)), reasons.get((method, pool)))
                       for name in metrics for pool in pools)])  # fmt: skip
    facts = max((row["n"] for row in found["traces"]), default=0)
    return "\n".join([*(line.rstrip() for line in text_table(head, body)),
                      f"{facts:,} facts; ± is half the interval under resampling of the facts"])  # fmt: skip


def _cell(rows: Sequence[dict[str, Any]] | None, reason: str | None) -> str:
    if not rows:
        return reason or NOTHING
    value, low, high = (sum(row[name] for row in rows) / len(rows) for name in ("value", "low", "high"))
    return f"{value:.3f} ±{(high - low) / 2:.3f}"
