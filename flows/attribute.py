"""``rise attribute``: the documents that moved a model towards a text, a file of texts, or what it says itself."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.errors import InputError, printable
from tasks.common.files import check_output, write_json
from tasks.pool.cleaning import lone_surrogate
from tasks.pool.documents import COLUMNS, content_id, read_documents, write_documents

if TYPE_CHECKING:
    from tasks.scoring.explain import TokenShare
    from tasks.scoring.search import Hit

EXCERPT = 80
"""Characters of a text that are shown."""


def attribute(
    *, index: Path, text: str | None, queries: Path | None, prompt: str | None, max_new_tokens: int,
    data: Sequence[Path], top: int, tokens: int | None, out: Path | None, model: str | None, calibration: str | None,
) -> str:  # fmt: skip
    """Find the documents of an index that moved its model most towards a text, a file of queries, or its own words.

    Args:
        index: the index.
        text: one query.
        queries: a file of queries.
        prompt: what the index's model continues first; prompt and continuation are one query.
        max_new_tokens: most tokens of the continuation.
        data: files that hold the documents' texts, to show their beginnings.
        top: documents to name.
        tokens: positions to name of each document: those that gave the most to its score.
        out: JSON to write as well: the ranking, its channels, and a ranking a query.
        model: where the index's model lies now; None takes the place it was read from.
        calibration: None takes the index's own; another is fitted on the index first.

    Returns:
        A table: rank, score, its parts from the channels that the index has, document; below each its tokens,
        where they are asked for.

    Raises:
        InputError: a file cannot be used, the model is another one, or a query has no signature.
    """
    import numpy as np

    from tasks.scoring import search
    from tasks.scoring.build import query_index
    from tasks.scoring.calibration import empty
    from tasks.scoring.config import SketchConfig
    from tasks.scoring.index import Index

    if [text, queries, prompt].count(None) != 2:
        raise InputError("give either --text or --queries, or --prompt")
    if tokens is not None and not data:
        raise InputError("--tokens needs --data, the file with the documents' texts")
    if out is not None:
        check_output(out, queries, *data)
    whole = Index(index)
    fitted = search.fitted_for(whole, whole.calibration_name if calibration is None else calibration)
    generation: str | None = None
    if prompt is not None:
        from tasks.scoring.explain import generate

        generation = generate(whole, _checked(prompt, "--prompt"), max_new_tokens, model=model)
        print(f"generated: {printable(generation)}", file=sys.stderr)
        text = prompt + generation
    with tempfile.TemporaryDirectory() as folder:
        documents = Path(folder) / "queries.parquet"
        _write_queries(documents, text, queries)
        asked = query_index(whole, documents, Path(folder) / "queries", model=model)
        query_ids, query_QD = asked.doc_ids, np.concatenate(list(asked.blocks()))
    for query_id, silent in zip(query_ids, empty(query_QD), strict=True):
        if silent:
            raise InputError(f"the query {query_id} is a single token, so nothing in it is predicted; give more text",
                             file=queries, field="text")  # fmt: skip
    hits = search.mean_pooled(whole, query_QD, top, fitted=fitted)
    texts = _texts(data, hits)
    sketch = SketchConfig(**whole.manifest["sketch"])
    there = [name for name, numbers in sketch.channels.items() if numbers]
    parts = search.channels(whole, query_QD, hits, fitted=fitted).tolist()
    rows = _rows(hits, [dict(zip(sketch.channels, part, strict=True)) for part in parts], there, texts)
    if tokens is not None:
        from tasks.scoring.explain import explain

        shares = explain(whole, query_QD, hits, texts, tokens, fitted=fitted, model=model)
        rows = [{**row, "tokens": _tokens(some)} for row, some in zip(rows, shares, strict=True)]
    if out is not None:
        each = search.per_query(whole, query_QD, top, fitted=fitted)
        write_json(out, {
            "index": str(index), "model": whole.manifest["model"], "type": whole.stored,
            "calibration": whole.calibration_name if calibration is None else calibration, "ranking": rows,
            "per_query": [
                {"query_id": query_id, "ranking": [{"rank": rank, "doc_id": hit.doc_id, "score": hit.score}
                                                   for rank, hit in enumerate(found, 1)]}
                for query_id, found in sorted(zip(query_ids, each, strict=True), key=lambda pair: pair[0])
            ],
            **({} if generation is None else {"prompt": prompt, "generation": generation}),
        })  # fmt: skip
    return _table(rows, there)


def _write_queries(path: Path, text: str | None, queries: Path | None) -> None:
    if queries is not None:
        write_documents(path, read_documents(queries, prompts=True).table)
        return
    import pyarrow as pa

    text = _checked(text or "", "--text").strip()
    row = dict(zip(COLUMNS, (content_id(text), text, None, None), strict=True))
    write_documents(path, pa.Table.from_pylist([row], schema=pa.schema([(name, pa.string()) for name in COLUMNS])))


def _checked(text: str, option: str) -> str:
    if not text.strip() or lone_surrogate(text) is not None:
        raise InputError(f"{option} is not UTF-8" if text.strip() else f"{option} is empty")
    return text


def _texts(data: Sequence[Path], hits: Sequence[Hit]) -> dict[str, str]:
    """The texts of the documents that were found, as far as the files have them."""
    wanted = {hit.doc_id for hit in hits}
    texts: dict[str, str] = {}
    for path in data:
        table = read_documents(path).table
        pairs = zip(table.column("doc_id").to_pylist(), table.column("text").to_pylist(), strict=True)
        texts |= {doc_id: text for doc_id, text in pairs if doc_id in wanted}
    return texts


def _rows(
    hits: Sequence[Hit], parts: Sequence[Mapping[str, float]], there: Sequence[str], texts: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The ranking with the parts of the channels that are there."""
    return [
        {"rank": rank, "doc_id": hit.doc_id, "score": hit.score,
         **{name: part[name] for name in there},
         **({"text": shown(texts[hit.doc_id])} if hit.doc_id in texts else {})}
        for rank, (hit, part) in enumerate(zip(hits, parts, strict=True), 1)
    ]  # fmt: skip


def _tokens(shares: Sequence[TokenShare]) -> list[dict[str, Any]]:
    return [{"token": one.token, "text": printable(one.text), "context": printable(one.context), "share": one.share}
            for one in shares]  # fmt: skip


def shown(text: str) -> str:
    """The beginning of a text on one line, with whatever a terminal would act on spelled out."""
    return printable(text[:EXCERPT])


def _table(rows: Sequence[dict[str, Any]], there: Sequence[str]) -> str:
    names = ["score", *there]
    heads = "  ".join(f"{name if name == 'score' else name.upper():>9}" for name in names)
    lines = [f"{'rank':>4}  {heads}  document"]
    for row in rows:
        text = f"  {row['text']}" if "text" in row else ""
        values = "  ".join(f"{row[name]:>9.5f}" for name in names)
        lines.append(f"{row['rank']:>4}  {values}  {shown(row['doc_id'])}{text}")
        lines += [f"{'':>4}  {token['share']:>+9.5f}  {token['context']} predicts →{token['text']}←"
                  for token in row.get("tokens", [])]  # fmt: skip
    return "\n".join(lines)
