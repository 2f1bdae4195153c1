"""What one run of a curation selects, and the versioned selection with its card that it publishes."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.files import read_json, sha256_file, whole_file, write_json, write_text
from tasks.pool.intake import DOCUMENTS, texts_of
from tasks.selection.budget import BudgetConfig, choose
from tasks.selection.candidates import candidates
from tasks.selection.curation_ledger import DRIFT, SCORES, SELECTED
from tasks.selection.drift import QUANTILES, drift

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 2
"""Raise when the same inputs give another selection or card: part of every key."""
THIN = 10
"""So many times the documents that its calibration was fitted on, and the card says so."""
RESULT, CARD, CARD_TEXT, DIGESTS = "result.json", "card.json", "card.md", "sha256.json"


def select_best(
    directory: Path, intake: Path, scored: pa.Table, out: Path, *, run: int, since: int, documents: int,
    budget: BudgetConfig, positive: str | None, facts: Mapping[str, Any], published: Path | None,
) -> int:  # fmt: skip
    """Select from all documents of all runs and write into ``out`` what the run found.

    Args:
        directory: of the curation, with the ledger of its earlier runs.
        intake: of this run.
        scored: what the run's queries say of the documents that it scored: doc_id, score, n_tokens, query.
        out: ``scores.parquet`` (``scored``), ``selected.parquet`` (doc_id, rank, score, query, source, label, run,
            n_tokens), ``drift.json`` and ``result.json``.
        run: its number.
        since: as of :func:`tasks.selection.candidates.candidates`.
        documents: how many all runs took in.
        budget: the limits.
        positive: label whose share is the purity; None where documents have none.
        facts: what the card and the ledger say beside it; goes into ``result.json``.
        published: result of the run that published the selection that stands; None where none does.

    Returns:
        The number of selected documents.

    Raises:
        InputError: the ledger does not have the scores of all earlier documents, or a file is damaged.
    """
    import pyarrow as pa

    before = None if published is None else _read(published / SELECTED)
    earlier = None if published is None else read_json(published / RESULT)
    with candidates(directory, intake / DOCUMENTS, scored, run=run, since=since, count=documents) as all_of_them:
        chosen = choose(budget, all_of_them.best())
        taken, now = Counter(one.source for one in chosen), all_of_them.scores(new=True)
        figures = drift(
            before=all_of_them.scores(new=False), now=now, new=all_of_them.count("source", new=True), selected=taken,
            selected_now=sum(one.run == run for one in chosen), chosen=[one.doc_id for one in chosen],
            chosen_before=None if before is None else before["doc_id"].to_pylist(),
        )  # fmt: skip
        seen = all_of_them.count("source")
        labels = _labels(all_of_them.count("label"), Counter(one.label for one in chosen if one.label is not None))
    selected = pa.Table.from_pylist([asdict(one) | {"rank": rank} for rank, one in enumerate(chosen, 1)],
                                    schema=_selected_schema())  # fmt: skip
    _write(out / SCORES, scored)
    _write(out / SELECTED, selected)
    unchanged = (before is not None and earlier is not None and before.equals(selected)
                 and earlier["basis"] == facts["basis"])  # fmt: skip
    if positive is not None and labels:
        figures["purity"] = labels.get(positive, {"selected": 0.0})["selected"]
    write_json(out / DRIFT, figures)
    write_json(out / RESULT, {
        **facts, "run": run, "since": since, "documents": documents, "new": len(now), "selected": len(chosen),
        "tokens": sum(one.n_tokens for one in chosen), "publish": bool(chosen) and not unchanged, "labels": labels,
        "positive": positive, "budget": budget.plain(),
        "sources": {source: {"seen": count, "selected": taken[source]} for source, count in seen.items()},
        "scores": _span([one.score for one in chosen]), "drift": figures,
        "earlier": None if earlier is None else earlier["run"],
    })  # fmt: skip
    return len(chosen)


def _labels(pool: Mapping[str, int], picked: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Label → its share of the labelled documents of the pool and of the selection, and its number there."""
    everywhere, here = sum(pool.values()), sum(picked.values())
    return {label: {"pool": count / everywhere, "selected": picked.get(label, 0) / max(1, here),
                    "documents": picked.get(label, 0)} for label, count in sorted(pool.items())}  # fmt: skip


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

    selected = _read(result / SELECTED)
    texts: dict[str, str] = {}
    for run in sorted(set(selected["run"].to_pylist())):
        wanted = [row["doc_id"] for row in selected.select(["doc_id", "run"]).to_pylist() if row["run"] == run]
        texts |= texts_of(intakes[run - 1], wanted)
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
