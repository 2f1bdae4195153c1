"""Every method behind one interface: a pool and queries in, scores out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.common.errors import InputError
from tasks.common.files import sha256_json, whole_file
from tasks.common.models import load_tokenizer, locate
from tasks.common.progress import Report
from tasks.common.usage import searching
from tasks.scoring.batching import tokenize
from tasks.scoring.build import build_indexes
from tasks.scoring.config import (
    Bm25Config,
    EkfacConfig,
    EmbeddingConfig,
    FitConfig,
    GShapleyConfig,
    HiddenConfig,
    IndexType,
    LengthConfig,
    LmHeadConfig,
    LoGraConfig,
    MethodConfig,
    PerplexityConfig,
    RandomConfig,
    RapidInConfig,
    RiseConfig,
    ScorerConfig,
    SketchConfig,
    TmcShapleyConfig,
    TrackStarConfig,
    ZoInfConfig,
)
from tasks.scoring.convert import convert_index
from tasks.scoring.index import Index
from tasks.scoring.search import Scores, score
from tasks.scoring.shards import IndexSpec

VERSION = 1
"""Version of what the methods compute; part of every key made from it."""
LOSSES = "losses"
"""Name of a readout's index that keeps losses and no signatures."""


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
    """Where :func:`read_out` put the indexes of the method's sketch before; None lets the method make what it needs."""
    report: Report | None = None
    """Told the share done."""


def read_out(
    request: Request, out: Path, *, sketches: Mapping[str, SketchConfig], stored: IndexType = "fp16",
    losses: bool = False,
) -> int:  # fmt: skip
    """One forward pass of the scorer over pool and queries, kept as indexes: all that RISE and perplexity need.

    The few queries are kept as fp32 where the pool's type rounds to 8 bits or fewer. Bits take a pass over the pool for
    each sketch.

    Args:
        request: pool, queries and scorer.
        out: where the indexes go: ``NAME/pool`` and ``NAME/queries`` for each sketch; without one ``losses/pool``.
        sketches: the sketches that share the pass, by name.
        stored: type of the pool's signatures.
        losses: also keep each document's mean negative log-likelihood.

    Returns:
        The number of documents in the pool.
    """
    pools = [IndexSpec(out / name / "pool", sketch, stored) for name, sketch in sketches.items()]
    pools = pools or [IndexSpec(out / LOSSES / "pool", None)]
    for specs in [[spec] for spec in pools] if stored == "bit" else [pools]:
        rows = build_indexes(request.pool, specs, request.scorer, losses=losses, label="pool", report=request.report)
    if sketches:
        kept: IndexType = "fp32" if stored in ("int8", "bit") else stored
        build_indexes(request.queries, [IndexSpec(out / name / "queries", sketch, kept) for name, sketch in
                                        sketches.items()], request.scorer, losses=losses, label="queries")  # fmt: skip
    return rows


def sketch_name(sketch: SketchConfig) -> str:
    """The name under which a readout keeps a sketch's indexes for the stages after it."""
    return sha256_json(sketch.plain())[:8]


def shared_type(rises: Iterable[RiseConfig]) -> IndexType:
    """The type of a readout that several methods share; each makes its own type of index from its floats."""
    return "fp32" if any(rise.index_type == "fp32" for rise in rises) else "fp16"


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
                read_out(request, request.work, sketches={readout.name: config.sketch}, stored=config.index_type)
            pool = _as_type(Index(readout / "pool"), config, request.work / "index")
            with searching():
                return score(pool, Index(readout / "queries"), calibrated=config.calibration)
        case PerplexityConfig():
            readout = request.readout or request.work / LOSSES
            if request.readout is None:
                read_out(request, request.work, sketches={}, losses=True)
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
            per_query = embedding_scores(texts, queries, config, request.work / "embedding", report=request.report)
            return _with_queries(doc_ids, query_ids, per_query)
        case HiddenConfig():
            from tasks.scoring.rivals.hidden import hidden_scores

            return hidden_scores(config, request)
        case LmHeadConfig(variant="sparse-sketch"):
            return score_pool(config.channel(), request)
        case LmHeadConfig():
            from tasks.scoring.rivals.head import head_scores

            return head_scores(config, request)
        case RapidInConfig():
            from tasks.scoring.rivals.rapidin import rapidin_scores

            return _with_queries(*rapidin_scores(config, request))
        case ZoInfConfig():
            from tasks.scoring.rivals.rapidin import zo_inf_scores

            return _with_queries(*zo_inf_scores(config, request))
        case LoGraConfig():
            from tasks.scoring.rivals.logra import logra_scores

            return _with_queries(*logra_scores(config, request))
        case TrackStarConfig():
            from tasks.scoring.rivals.trackstar import trackstar_scores

            return _with_queries(*trackstar_scores(config, request))
        case EkfacConfig():
            from tasks.scoring.rivals.ekfac import ekfac_scores

            return _with_queries(*ekfac_scores(config, request))
        case TmcShapleyConfig() | GShapleyConfig():
            from tasks.scoring.rivals.shapley import shapley_scores

            return _with_queries(*shapley_scores(config, request))


def _as_type(pool: Index, config: RiseConfig, work: Path) -> Index:
    """The pool's index in the method's type: a shared readout holds floats, whatever its methods keep."""
    if pool.stored == config.index_type:
        return pool
    fitted = config.calibration != "none" and config.index_type == "bit"
    convert_index(pool, work, stored=config.index_type, fit=FitConfig(name=config.calibration) if fitted else None)
    return Index(work)


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
