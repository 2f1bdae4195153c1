"""Fact tracing: how early the passages that state a fact stand in a ranking for it (Table 17)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from tasks.common.config import Config
from tasks.common.errors import InputError
from tasks.common.files import whole_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VERSION = 1
"""Raise when the same inputs give other metrics: part of every cache key."""
RANKS, TRACES = "ranks.parquet", "traces.parquet"


class TracingConfig(Config):
    """How a traced pool is judged."""

    ks: tuple[int, ...] = Field((10,), min_length=1)
    """The Ks of Recall@K and Hits@K."""
    resamples: int = Field(1000, ge=1, le=1_000_000)
    """Bootstrap resamples of the facts behind every interval."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Mass of the percentile intervals."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the bootstrap."""


@dataclass(frozen=True)
class Trace:
    """One figure of a traced pool."""

    formulation: str
    """What of the queries counted (``tasks.pool.facts``)."""
    metric: str
    """``mrr``: mean over the facts of 1/rank of the first passage that is evidence; ``recall``: mean share of a fact's
    evidence among its best K; ``hits``: share of the facts with any of their evidence there. The last two are the same
    where each fact has one passage."""
    k: int | None
    """K; None of ``mrr``."""
    value: float
    low: float
    high: float
    """Bootstrap interval."""
    n: int
    """Facts."""


def trace(config: TracingConfig, pool: Path, scored: Path, out: Path) -> int:
    """Write the metrics of one traced pool to ``out/traces.parquet``, a row each (see :class:`Trace`).

    Args:
        config: how it is judged.
        pool: directory with ``queries.parquet``, whose labels are the formulations.
        scored: directory with ``ranks.parquet``: query_id, doc_id, rank.
        out: directory to write to.

    Returns:
        The number of rows.

    Raises:
        InputError: a query has no rank.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    ranks: dict[str, list[int]] = {}
    table = pq.read_table(scored / RANKS)
    for query_id, rank in zip(table["query_id"].to_pylist(), table["rank"].to_pylist(), strict=True):
        ranks.setdefault(query_id, []).append(rank)
    asked: dict[str, list[list[int]]] = {}
    queries = pq.read_table(pool / "queries.parquet", columns=["doc_id", "label"])
    for query_id, formulation in zip(queries["doc_id"].to_pylist(), queries["label"].to_pylist(), strict=True):
        if query_id not in ranks:
            raise InputError(f"the query {query_id} has no rank; score the pool again", file=scored / RANKS)
        asked.setdefault(formulation, []).append(ranks[query_id])
    found = [row for formulation, some in sorted(asked.items()) for row in _judge(config, formulation, some)]
    with whole_file(out / TRACES) as part:
        pq.write_table(pa.Table.from_pylist([vars(row) for row in found], schema=pa.schema([
            ("formulation", pa.string()), ("metric", pa.string()), ("k", pa.int32()), ("value", pa.float64()),
            ("low", pa.float64()), ("high", pa.float64()), ("n", pa.int32()),
        ])), part)  # fmt: skip
    return len(found)


def fact_values(ranks: Sequence[Sequence[int]], ks: Sequence[int]) -> NDArray[np.float64]:
    """Every fact's part of the metrics, (F, 1 + 2 len(ks)): 1/rank of its first evidence, recall and hit at each K.

    Args:
        ranks: for each fact the ranks of its evidence, from 1 on, at least one.
        ks: the Ks.
    """
    import numpy as np

    return np.array([[1 / min(some), *(value for k in ks for within in [sum(rank <= k for rank in some)]
                                       for value in (within / len(some), float(within > 0)))] for some in ranks])


def bootstrap_means(
    values_FM: NDArray[np.float64], *, resamples: int, confidence: float, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Percentile intervals (low, high) of the means (M,) under resampling of the F facts with replacement.

    The resamples depend on the seed and F alone: arms and pools are compared on the same facts.
    """
    import numpy as np

    size = len(values_FM)
    draws_RF = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=resamples)
    tail = (1 - confidence) / 2
    low_M, high_M = np.quantile(draws_RF @ values_FM / size, (tail, 1 - tail), axis=0)
    return low_M, high_M


def _judge(config: TracingConfig, formulation: str, ranks: Sequence[Sequence[int]]) -> list[Trace]:
    values_FM = fact_values(ranks, config.ks)
    low_M, high_M = bootstrap_means(values_FM, resamples=config.resamples, confidence=config.confidence,
                                    seed=config.seed)  # fmt: skip
    names = [("mrr", None), *((metric, k) for k in config.ks for metric in ("recall", "hits"))]
    return [Trace(formulation, metric, k, float(value), float(low), float(high), len(ranks))
            for (metric, k), value, low, high in zip(names, values_FM.mean(axis=0), low_M, high_M, strict=True)]
