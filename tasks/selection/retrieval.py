"""The paper's retrieval metrics of one scored pool (section 3.1, Tables 2 and 20–34), with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from tasks.common.config import Config
from tasks.common.errors import InputError
from tasks.common.files import whole_file
from tasks.selection.metrics import KS, bootstrap, statistics
from tasks.selection.select import read_pool, read_ranking

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

VERSION = 1
"""Raise when the same inputs give other metrics: part of every cache key."""
METRICS = "metrics.parquet"


class RetrievalConfig(Config):
    """How a scored pool is judged."""

    positive: str = Field(min_length=1)
    """Label of the documents that the queries look for."""
    ks: tuple[int, ...] = Field(KS, min_length=1)
    """The Ks of the per-query metric: every query is judged on its K best and its K worst documents."""
    resamples: int = Field(1000, ge=1, le=1_000_000)
    """Bootstrap resamples behind every interval: of the queries for the per-query metric, of the documents for purity
    and for the curves of the mean ranking."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Mass of the percentile intervals."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the bootstrap."""


@dataclass(frozen=True)
class Metric:
    """One figure of a scored pool."""

    metric: str
    """``pq_auprc_at`` and ``pq_auroc_at``: mean over the queries at one K; ``pq_auprc`` and ``pq_auroc``: its mean over
    the Ks; ``purity``: share of positive documents among the best n by the mean score, n as many as there are in the
    pool; ``auprc`` and ``auroc``: of the whole ranking by the mean score."""
    k: int | None
    """K, or the n of purity."""
    value: float | None
    """None where it is not defined: at that K no query has both classes among its 2K documents."""
    low: float | None
    high: float | None
    """Bootstrap interval; None where there is none."""
    n: int
    """Queries or documents it was taken over."""


def retrieve(config: RetrievalConfig, pool: Path, scored: Path, out: Path) -> int:
    """Write the metrics of one scored pool to ``out/metrics.parquet``, a row each (see :class:`Metric`).

    Args:
        pool: directory with ``pool.parquet`` and ``queries.parquet``.
        scored: directory with ``scores.parquet`` and, for a method that looks at queries, ``per_query.parquet``. The
            one ranking of another method stands for every query.

    Returns:
        The number of rows.

    Raises:
        InputError: scores that are no ranking of the pool, a pool without documents of both classes, or one of fewer
            than 2K documents.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pool / "pool.parquet"
    documents = read_pool(file).sort_by("doc_id")
    ranking = read_ranking(scored / "scores.parquet", documents, file).sort_by("doc_id")
    labels_N = np.array([label == config.positive for label in documents["label"].to_pylist()])
    if labels_N.all() or not labels_N.any():
        raise InputError(f"all or none of its documents have the label {config.positive!r}", file=file, field="label")
    if 2 * max(config.ks) > len(labels_N):
        raise InputError(f"the metric at K = {max(config.ks)} needs {2 * max(config.ks)} documents, and there are "
                         f"{len(labels_N)}", file=file, field="ks")  # fmt: skip
    mean_N = ranking["score"].to_numpy()
    queries = pq.read_metadata(pool / "queries.parquet").num_rows
    per_query = scored / "per_query.parquet"
    looks = per_query.is_file()
    scores_QN = read_per_query(per_query, queries, documents["doc_id"]) if looks else mean_N[None, :]
    found = _per_query(config, query_values(scores_QN, labels_N, config.ks), queries, looks)
    found += _ranking(config, mean_N, labels_N)
    with whole_file(out / METRICS) as part:
        pq.write_table(pa.Table.from_pylist([vars(row) for row in found], schema=pa.schema([
            ("metric", pa.string()), ("k", pa.int32()), ("value", pa.float64()), ("low", pa.float64()),
            ("high", pa.float64()), ("n", pa.int32()),
        ])), part)  # fmt: skip
    return len(found)


def query_values(
    scores_QN: NDArray[np.float64], labels_N: NDArray[np.bool_], ks: Sequence[int]
) -> NDArray[np.float64]:
    """auPRC and auROC of every query at every K, (Q, len(ks), 2): what :func:`per_query_metrics` takes the mean of.

    Args:
        scores_QN: (queries, candidates), higher is better; candidates in order of their ids, which breaks ties.
        labels_N: (candidates,), True for what the queries look for.
        ks: each at most half the candidates.

    A query whose 2K candidates are all positive or all negative has nan there.
    """
    import numpy as np

    positive = labels_N.astype(np.float64)
    order_QN = np.argsort(-scores_QN, axis=1, kind="stable")
    values = np.full((len(scores_QN), len(ks), 2), np.nan)
    for query, order_N in enumerate(order_QN):
        for place, k in enumerate(ks):
            chosen = np.concatenate((order_N[:k], order_N[-k:]))
            found = statistics(scores_QN[query, chosen], positive[chosen])
            if not np.isnan(found.auroc):
                values[query, place] = found.auprc, found.auroc
    return values


def read_per_query(file: Path, queries: int, doc_ids: pa.ChunkedArray) -> NDArray[np.float64]:
    """The scores (Q, N) of a per-query file, documents in the order of ``doc_ids``, queries in that of their ids.

    Raises:
        InputError: it does not hold one finite score for every pair.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(file).sort_by([("query_id", "ascending"), ("doc_id", "ascending")])
    whole = pa.chunked_array(doc_ids.chunks * queries, pa.string())
    if len(set(table["query_id"].to_pylist())) != queries or not table["doc_id"].equals(whole):
        raise InputError(f"does not hold a score for each of {queries} queries and {len(doc_ids)} documents; score the "
                         "pool again", file=file)  # fmt: skip
    scores_QN: NDArray[np.float64] = table["score"].to_numpy().astype(np.float64).reshape(queries, -1)
    if not np.isfinite(scores_QN).all():
        raise InputError("a score of a query is not a finite number; score the pool again", file=file, field="score")
    return scores_QN


def _per_query(config: RetrievalConfig, values_QK2: NDArray[np.float64], queries: int, looks: bool) -> list[Metric]:
    """The paper's metric, with intervals under resampling of the queries where they differ."""
    import numpy as np

    size = len(values_QK2)
    mean_K2 = _means(values_QK2, np.ones((1, size)))[0]
    random = np.random.default_rng(config.seed)
    draws_RQ = random.multinomial(size, np.full(size, 1 / size), size=config.resamples).astype(np.float64)
    drawn_R2 = _means(values_QK2, draws_RQ).mean(axis=1)
    tail = (1 - config.confidence) / 2
    found: list[Metric] = []
    for side, name in enumerate(("pq_auprc", "pq_auroc")):
        for place, k in enumerate(config.ks):
            defined = int(np.sum(~np.isnan(values_QK2[:, place, side])))
            found.append(_metric(f"{name}_at", k, mean_K2[place, side], defined if looks else queries * defined))
        drawn_R = drawn_R2[~np.isnan(drawn_R2[:, side]), side]
        value = mean_K2[:, side].mean()
        low, high = np.quantile(drawn_R, (tail, 1 - tail)) if looks and not np.isnan(value) else (np.nan, np.nan)
        found.append(_metric(name, None, value, queries, (low, high)))
    return found


def _metric(
    name: str, k: int | None, value: float, n: int, interval: tuple[float, float] = (math.nan, math.nan)
) -> Metric:
    known = [None if math.isnan(number) else float(number) for number in (value, *interval)]
    return Metric(name, k, known[0], known[1], known[2], n)


def _means(values_QK2: NDArray[np.float64], weights_RQ: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over the queries, (R, K, 2), where query q counts ``weights_RQ[r, q]`` times; nan where none is defined."""
    import numpy as np

    shape = (len(weights_RQ), *values_QK2.shape[1:])
    flat = values_QK2.reshape(len(values_QK2), -1)
    total = weights_RQ @ np.nan_to_num(flat)
    count = weights_RQ @ (~np.isnan(flat)).astype(np.float64)
    means: NDArray[np.float64] = np.full(total.shape, np.nan)
    np.divide(total, count, out=means, where=count > 0)
    return means.reshape(shape)


def _ranking(config: RetrievalConfig, mean_N: NDArray[np.float64], labels_N: NDArray[np.bool_]) -> list[Metric]:
    """Purity and the curves of the ranking by the mean score, with intervals under resampling of the documents."""
    import numpy as np

    positive = labels_N.astype(np.float64)
    wanted = int(positive.sum())
    value = statistics(mean_N, positive, [wanted])
    bounds = bootstrap(mean_N, positive, [], resamples=config.resamples, confidence=config.confidence,
                       seed=config.seed)  # fmt: skip
    size = len(labels_N)
    return [
        _metric("purity", wanted, value.purity[0], size, _purity_interval(config, mean_N, positive)),
        _metric("auprc", None, value.auprc, size, bounds.auprc),
        _metric("auroc", None, value.auroc, size, bounds.auroc),
    ]


def _purity_interval(
    config: RetrievalConfig, mean_N: NDArray[np.float64], positive: NDArray[np.float64]
) -> tuple[float, float]:
    """Interval of purity at n under resampling of the documents, where n is what each resample has of positive ones.

    With the pool's own n a resample that has fewer could not reach 1, and a perfect ranking would look uncertain.
    """
    import numpy as np

    order = np.argsort(-mean_N, kind="stable")
    hit_N = positive[order]
    random = np.random.default_rng(config.seed)
    size, drawn = len(mean_N), []
    for _ in range(config.resamples):
        count_N = np.bincount(random.integers(0, size, size), minlength=size)[order]
        if wanted := count_N @ hit_N:
            above_N = np.cumsum(count_N) - count_N
            drawn.append(np.clip(wanted - above_N, 0, count_N) @ hit_N / wanted)
    tail = (1 - config.confidence) / 2
    low, high = np.quantile(drawn, (tail, 1 - tail)) if drawn else (np.nan, np.nan)
    return float(low), float(high)
