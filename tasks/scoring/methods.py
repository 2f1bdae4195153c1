"""Every method behind one interface: a pool and queries in, scores out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.common.errors import InputError
from tasks.common.files import whole_file
from tasks.common.models import load_tokenizer, locate
from tasks.common.progress import Report
from tasks.scoring.batching import tokenize
from tasks.scoring.build import build_index
from tasks.scoring.config import (
    Bm25Config,
    EmbeddingConfig,
    IndexType,
    LengthConfig,
    MethodConfig,
    PerplexityConfig,
    RandomConfig,
    RiseConfig,
    ScorerConfig,
    SketchConfig,
)
from tasks.scoring.index import Index
from tasks.scoring.search import Scores, score

VERSION = 1
"""Version of what the methods compute; part of every key made from it."""


@dataclass(frozen=True)
class Request:
    """What a method is asked: score this pool for these queries."""

    pool: Path
    """Parquet with doc_id and text."""
    queries: Path
    """Parquet with doc_id and text."""
    scorer: ScorerConfig
    """The language model, for the methods that need one."""
    work: Path
    """Directory for what the method keeps on the way; what is whole in it is used again."""
    readout: Path | None = None
    """Indexes of pool and queries that :func:`read_out` made before; None lets the method make what it needs."""
    report: Report | None = None
    """Told the share done."""


def read_out(
    request: Request, out: Path, *, sketch: SketchConfig | None, stored: IndexType = "fp16", losses: bool = False
) -> int:
    """One forward pass of the scorer over pool and queries, kept as two indexes: all that RISE and perplexity need.

    The few queries are kept as fp32 where the pool's type rounds to 8 bits or fewer.
    """
    rows = build_index(request.pool, out / "pool", request.scorer, sketch, stored=stored, losses=losses, label="pool",
                       report=request.report)  # fmt: skip
    if sketch is not None:
        build_index(request.queries, out / "queries", request.scorer, sketch, losses=losses, label="queries",
                    stored="fp32" if stored in ("int8", "bit") else stored)  # fmt: skip
    return rows


def token_counts(scorer: ScorerConfig, documents: Path) -> pa.Table:
    """doc_id and n_tokens (the scorer's tokens, cut at its max_length) of a Parquet file of documents, by doc_id."""
    tokenizer = load_tokenizer(locate(scorer.model, revision=scorer.revision))
    tokens = tokenize(tokenizer, *_texts(documents), scorer.max_length)
    counted = pa.table({"doc_id": pa.array(tokens.doc_ids, pa.string()),
                        "n_tokens": pa.array(tokens.lengths(range(len(tokens))), pa.int32())})  # fmt: skip
    return counted.sort_by("doc_id")


def score_pool(config: MethodConfig, request: Request) -> Scores:
    """Scores of the pool's documents by any method."""
    match config:
        case RiseConfig():
            readout = request.readout or request.work / "readout"
            if request.readout is None:
                read_out(request, readout, sketch=config.sketch, stored=config.index_type)
            return score(Index(readout / "pool"), Index(readout / "queries"), calibrated=config.calibration)
        case PerplexityConfig():
            readout = request.readout or request.work / "readout"
            if request.readout is None:
                read_out(request, readout, sketch=None, losses=True)
            pool = Index(readout / "pool")
            # A document of one token has no loss; it comes last, not first.
            loss = pool.documents.column("loss").to_numpy(zero_copy_only=False)
            return _without_queries(pool.doc_ids, np.where(np.isnan(loss), -np.inf, -loss))
        case LengthConfig():
            counted = token_counts(request.scorer, request.pool)
            return _without_queries(counted.column("doc_id").to_pylist(), counted.column("n_tokens").to_numpy())
        case RandomConfig():
            from tasks.scoring.rivals.baselines import random_scores

            doc_ids = _texts(request.pool)[0]
            return _without_queries(doc_ids, random_scores(doc_ids, config.seed))
        case Bm25Config():
            from tasks.scoring.rivals.bm25 import bm25_scores

            (doc_ids, texts), (query_ids, queries) = _texts(request.pool), _texts(request.queries)
            return _with_queries(doc_ids, query_ids, bm25_scores(texts, queries, k1=config.k1, b=config.b))
        case EmbeddingConfig():
            from tasks.scoring.rivals.embedding import embedding_scores

            (doc_ids, texts), (query_ids, queries) = _texts(request.pool), _texts(request.queries)
            return _with_queries(doc_ids, query_ids, embedding_scores(texts, queries, config, report=request.report))


def _texts(documents: Path) -> tuple[list[str], list[str]]:
    table = pq.read_table(documents, columns=["doc_id", "text"])
    return table.column("doc_id").to_pylist(), table.column("text").to_pylist()


def _without_queries(doc_ids: list[str], scores: np.ndarray[Any, Any]) -> Scores:
    return Scores(doc_ids, scores.astype(np.float64), [], None)


def _with_queries(doc_ids: list[str], query_ids: list[str], per_query: np.ndarray[Any, Any]) -> Scores:
    return Scores(doc_ids, per_query.mean(axis=0, dtype=np.float64), query_ids, per_query)


def ranked(scores: Scores) -> pa.Table:
    """doc_id, score, rank: highest score first, ties by doc_id; ranks count from 1."""
    table = pa.table({"doc_id": pa.array(scores.doc_ids, pa.string()), "score": pa.array(scores.mean, pa.float64())})
    table = table.sort_by([("score", "descending"), ("doc_id", "ascending")])
    return table.append_column("rank", pa.array(range(1, len(table) + 1), pa.int32()))


def per_query_table(scores: Scores) -> pa.Table:
    """query_id, doc_id, score: every pair, by query then document.

    Raises:
        InputError: the method has no score per query.
    """
    if scores.per_query is None:
        raise InputError("this method looks at no query, so it has no scores per query")
    queries, documents = scores.per_query.shape
    table = pa.table({
        "query_id": pa.array(np.repeat(np.array(scores.query_ids, dtype=object), documents), pa.string()),
        "doc_id": pa.array(np.tile(np.array(scores.doc_ids, dtype=object), queries), pa.string()),
        "score": pa.array(scores.per_query.astype(np.float64).reshape(-1), pa.float64()),
    })  # fmt: skip
    return table.sort_by([("query_id", "ascending"), ("doc_id", "ascending")])


def write_scores(scores: Scores, out: Path, *, per_query: Path | None = None) -> None:
    """Write :func:`ranked` to ``out`` and, if asked, :func:`per_query_table`; each file is whole or absent."""
    table = ranked(scores)
    if (bad := pc.sum(pc.is_nan(table.column("score"))).as_py()) > 0:
        raise RuntimeError(f"{bad} documents have no finite score; nothing is written")
    if per_query is not None:
        with whole_file(per_query) as part:
            pq.write_table(per_query_table(scores), part)
    with whole_file(out) as part:
        pq.write_table(table, part)
