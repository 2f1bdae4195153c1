"""What one run of a curation selects, and the versioned selection with its card that it publishes."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.files import read_json, sha256_file, whole_file, write_json, write_text
from tasks.pool.intake import DOCUMENTS, read_texts
from tasks.scoring.growing import Place, best_query
from tasks.scoring.search import Scores
from tasks.selection.budget import BudgetConfig, choose
from tasks.selection.curation_ledger import DRIFT, SCORES, SELECTED
from tasks.selection.drift import QUANTILES, drift

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
"""Raise when the same inputs give another selection or card: part of every key."""
THIN = 10
"""So many times the documents that its calibration was fitted on, and the card says so."""
RESULT, CARD, CARD_TEXT, DIGESTS = "result.json", "card.json", "card.md", "sha256.json"


def select_best(
    place: Place | None, scores: Scores | None, intakes: Sequence[Path], out: Path, *, budget: BudgetConfig,
    positive: str | None, facts: Mapping[str, Any], same_scores: bool, published: Path | None,
) -> int:  # fmt: skip
    """Select from all documents of all runs and write into ``out`` what the run found.

    Args:
        place: where the index stands, and the documents' lengths; None where there is no document yet.
        scores: of all documents; None as well.
        intakes: of all runs; the last is this run's.
        out: ``scores.parquet`` (doc_id, score), ``selected.parquet`` (doc_id, rank, score, query, source, label, run,
            n_tokens), ``drift.json`` and ``result.json``.
        budget: the limits.
        positive: label whose share is the purity; None where documents have none.
        facts: what the card and the ledger say beside it; goes into ``result.json``.
        same_scores: whether the run before scored its documents by this index and these queries; then only new scores
            are written.
        published: result of the run that published the selection that stands; None where none does.

    Returns:
        The number of selected documents.
    """
    import pyarrow as pa

    run = len(intakes)
    documents = _documents(place, scores, intakes)
    chosen = choose(budget, documents["doc_id"], documents["score"], documents["source"], documents["n_tokens"])
    picked = {name: [values[row] for row in chosen] for name, values in documents.items()}
    queries = best_query(scores, picked.pop("at")) if scores is not None and chosen else []
    selected = pa.table({**picked, "rank": range(1, len(chosen) + 1), "query": pa.array(queries, pa.string())},
                        schema=_selected_schema())  # fmt: skip
    new = [row for row, first in enumerate(documents["run"]) if first == run]
    told = new if same_scores else range(len(documents["run"]))
    _write(out / SCORES, pa.table({"doc_id": pa.array([documents["doc_id"][row] for row in told], pa.string()),
                                   "score": pa.array([documents["score"][row] for row in told], pa.float64())}))
    _write(out / SELECTED, selected)
    before = None if published is None else _read(published / SELECTED)
    earlier = None if published is None else read_json(published / RESULT)
    unchanged = (before is not None and earlier is not None and before.equals(selected)
                 and earlier["basis"] == facts["basis"])  # fmt: skip
    figures = _drift(documents, new, picked, run, None if before is None else before["doc_id"].to_pylist())
    labels = _labels(documents["label"], picked["label"])
    if positive is not None and labels:
        figures["purity"] = labels.get(positive, {"selected": 0.0})["selected"]
    write_json(out / DRIFT, figures)
    write_json(out / RESULT, {
        **facts, "run": run, "documents": len(documents["doc_id"]), "new": len(new), "selected": len(chosen),
        "tokens": sum(picked["n_tokens"]), "publish": bool(chosen) and not unchanged, "labels": labels,
        "positive": positive, "budget": budget.plain(),
        "sources": _sources(documents["source"], picked["source"]),
        "scores": _span(picked["score"]), "drift": figures,
        "earlier": None if earlier is None else earlier["run"],
    })  # fmt: skip
    return len(chosen)


def _documents(place: Place | None, scores: Scores | None, intakes: Sequence[Path]) -> dict[str, list[Any]]:
    """Columns of all documents, in the order of the runs; ``at`` is a document's place in the scores."""
    import pyarrow.parquet as pq

    names = ("doc_id", "source", "label", "run", "n_tokens", "score", "at")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    if place is None or scores is None:
        return columns
    at = {doc_id: number for number, doc_id in enumerate(scores.doc_ids)}
    mean = (scores.mean + 0.0).tolist()  # turns -0.0 into 0.0
    for run, table in enumerate(read_texts(intakes, ("doc_id", "source", "label")), 1):
        counted = pq.read_table(place.tokens(run))
        length = dict(zip(counted["doc_id"].to_pylist(), counted["n_tokens"].to_pylist(), strict=True))
        for row in table.to_pylist():
            doc_id = row["doc_id"]
            values = (doc_id, row["source"], row["label"], run, length[doc_id], mean[at[doc_id]], at[doc_id])
            for name, value in zip(names, values, strict=True):
                columns[name].append(value)
    return columns


def _drift(
    documents: Mapping[str, list[Any]], new: list[int], picked: Mapping[str, list[Any]], run: int,
    before: list[str] | None,
) -> dict[str, float]:  # fmt: skip
    import numpy as np

    score_N = np.array(documents["score"], dtype=np.float64)
    is_new = np.zeros(len(score_N), dtype=bool)
    is_new[new] = True
    return drift(before=score_N[~is_new], now=score_N[is_new], sources=[documents["source"][row] for row in new],
                 selected_sources=picked["source"], selected_now=sum(first == run for first in picked["run"]),
                 selected=picked["doc_id"], selected_before=before)  # fmt: skip


def _labels(pool: Sequence[str | None], picked: Sequence[str | None]) -> dict[str, dict[str, float]]:
    """Label → its share of the labelled documents of the pool and of the selection, and its number there."""
    everywhere = Counter(label for label in pool if label is not None)
    here = Counter(label for label in picked if label is not None)
    return {label: {"pool": count / everywhere.total(), "selected": here[label] / max(1, here.total()),
                    "documents": here[label]} for label, count in sorted(everywhere.items())}  # fmt: skip


def _sources(pool: Sequence[str], picked: Sequence[str]) -> dict[str, dict[str, int]]:
    here = Counter(picked)
    return {source: {"seen": count, "selected": here[source]} for source, count in sorted(Counter(pool).items())}


def _span(scores: Sequence[float]) -> dict[str, float]:
    import numpy as np

    if not scores:
        return {}
    return {f"q{round(100 * q):02d}": float(np.quantile(scores, q)) for q in (0.0, *QUANTILES, 1.0)}


def _selected_schema() -> pa.Schema:
    import pyarrow as pa

    text, number = pa.string(), pa.int32()
    return pa.schema([("doc_id", text), ("source", text), ("label", text), ("score", pa.float64()), ("rank", number),
                      ("n_tokens", number), ("run", number), ("query", text)])  # fmt: skip


def _write(path: Path, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    with whole_file(path) as part:
        pq.write_table(table, part, compression="zstd")


def _read(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    return pq.read_table(path, schema=_selected_schema())


def publish(result: Path, intakes: Sequence[Path], out: Path) -> int:
    """Write the selection that a result chose, with its texts and its card, into ``out``.

    Returns:
        The number of documents.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    selected = _read(result / SELECTED)
    texts: dict[str, str] = {}
    for run in sorted(set(selected["run"].to_pylist())):
        wanted = [row["doc_id"] for row in selected.select(["doc_id", "run"]).to_pylist() if row["run"] == run]
        table = pq.read_table(intakes[run - 1] / DOCUMENTS, columns=["doc_id", "text"],
                              filters=[("doc_id", "in", wanted)])  # fmt: skip
        texts |= dict(zip(table["doc_id"].to_pylist(), table["text"].to_pylist(), strict=True))
    column = pa.array([texts[doc_id] for doc_id in selected["doc_id"].to_pylist()], pa.string())
    _write(out / SELECTED, selected.add_column(1, "text", column))
    card = read_json(result / RESULT)
    write_json(out / CARD, card)
    write_text(out / CARD_TEXT, card_text(card))
    write_json(out / DIGESTS, {name: sha256_file(out / name) for name in (SELECTED, CARD, CARD_TEXT)})
    return len(selected)


def card_text(card: Mapping[str, Any]) -> str:
    """The card as Markdown. Names of sources and labels come out of the pool: they are escaped."""
    limits = [f"{name} {json.dumps(value)}" for name, value in card["budget"].items() if value not in (None, {})]
    by = card["by"]
    sketch = ", ".join(f"{name} {value}" for name, value in by["sketch"].items())
    fitted_on = by.get("fitted_on", card["index_documents"])
    thin = by["calibration"] != "none" and THIN * fitted_on <= card["index_documents"]
    lines = [
        f"# {_plain(card['title'])}: selection {card['run']:04d}", "",
        f"- **What**: {card['selected']:,} of {card['documents']:,} documents, {card['tokens']:,} tokens.",
        f"- **Why**: the highest mean influence on {card['why']['count']:,} queries "
        f"({_plain(card['why']['queries'])}, digest {card['basis']['queries'][:16]}), under the budget "
        f"{_plain('; '.join(limits))}.",
        f"- **From where**: the sources below; new in run {card['run']}: {card['new']:,}; repeats left out: "
        f"{card['duplicates']:,}; bad rows left out: {card['skipped']:,}.",
        f"- **By which model**: {_plain(by['model'])}, digest {by['digest'][:16]}, {_plain(by['precision'])}, "
        f"{by['max_length']} tokens read of a document.",
        f"- **By which configuration**: index {card['basis']['index']}, type {by['stored']}, calibration "
        f"{_plain(by['calibration'])}, sketch {_plain(sketch)}; configuration "
        f"{card['config_digest'][:16]}.",
        *([f"- **A thin fit**: the calibration was fitted on the first {fitted_on:,} documents, and the index has "
           f"{card['index_documents']:,} now. Another `signature.fit.seed` begins an index with a calibration of all, "
           "and scores all of them again."] if thin else []),
        f"- **Selection before**: {'none' if card['earlier'] is None else format(card['earlier'], '04d')}.", "",
        "| source | seen | selected |", "|---|---:|---:|",
        *(f"| {_plain(name)} | {row['seen']:,} | {row['selected']:,} |" for name, row in card["sources"].items()), "",
    ]  # fmt: skip
    if card["labels"]:
        lines += ["| label | share of all | share of the selection |", "|---|---:|---:|",
                  *(f"| {_plain(name)}{' (purity)' if name == card['positive'] else ''} | {row['pool']:.1%} | "
                    f"{row['selected']:.1%} |" for name, row in card["labels"].items()), ""]  # fmt: skip
    lines += ["| against earlier runs | |", "|---|---:|",
              *(f"| {_plain(what)} | {value:.4f} |" for what, value in card["drift"].items()), "",
              "Columns of `selected.parquet`: doc_id, text, source, label, score (mean over the queries), rank, "
              "n_tokens (whole document), run (in which it was found), query (the best matching one).", ""]  # fmt: skip
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text that neither Markdown nor HTML acts on, on one line."""
    shown = "".join(sign if sign.isprintable() else " " for sign in str(text)[:200])
    return "".join(f"\\{sign}" if sign in "\\`*_[]|~!" else sign for sign in html.escape(shown))
