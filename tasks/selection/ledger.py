"""``study.duckdb``: every score, selection, loss and result of a study, and the statistics as SQL over those rows.

This module is the ledger's only writer. It builds the whole file beside its place and renames it, so a reader sees
the old study or the new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.stage import Ref
from tasks.selection.config import SelectionConfig
from tasks.selection.database import digest_tables, insert_stages, new_tables, open_tables
from tasks.selection.metrics import bootstrap
from tasks.selection.select import read_pool, read_ranking

if TYPE_CHECKING:
    import duckdb

POOL = "pool"
"""The split whose documents are ranked; the others are the queries and the held-out documents."""

TABLES = {
    "documents": "doc_id VARCHAR, text VARCHAR, label VARCHAR, source VARCHAR, n_tokens BIGINT, split VARCHAR",
    "scores": "method VARCHAR, doc_id VARCHAR, score DOUBLE, rank INTEGER",
    "selections": "method VARCHAR, doc_id VARCHAR, rank INTEGER",
    "purity": (
        "method VARCHAR, k INTEGER, purity DOUBLE, auprc DOUBLE, auroc DOUBLE, "
        "purity_low DOUBLE, purity_high DOUBLE, auprc_low DOUBLE, auprc_high DOUBLE, auroc_low DOUBLE, "
        "auroc_high DOUBLE, hits INTEGER, n INTEGER, positives INTEGER, label VARCHAR, confidence DOUBLE"
    ),
    "shortcuts": "shortcut VARCHAR, k INTEGER, purity DOUBLE, auprc DOUBLE, auroc DOUBLE",
    "training": "method VARCHAR, step INTEGER, loss DOUBLE, lr DOUBLE, epoch DOUBLE, tokens BIGINT",
    "evaluations": (
        "method VARCHAR, metric VARCHAR, value DOUBLE, stderr DOUBLE, n INTEGER, low DOUBLE, high DOUBLE"
    ),
    "stages": (
        "stage VARCHAR, method VARCHAR, seconds DOUBLE, cached BOOLEAN, digest VARCHAR, rows BIGINT, key VARCHAR, "
        "path VARCHAR"
    ),
}
"""Tables and their columns. ``purity`` has a row for every method and k: ``hits`` positive documents are among the
first k; ``n`` labelled documents are ranked, ``positives`` of them with the label ``label``; auprc and auroc are of the
whole ranking. ``shortcuts`` ranks the pool by what needs no model at all."""

UNDIGESTED = frozenset({("stages", "seconds"), ("stages", "cached"), ("stages", "path")})
"""Columns in which two equal runs differ."""

SHORTCUTS = {
    "longest first": "length(text)",
    "shortest first": "-length(text)",
    "fewest URLs first": r"-len(regexp_extract_all(text, '(https?://|www\.)'))",
}
"""Rankings that need no model: name → score in SQL. One of them near a method's purity says the pool is too easy."""


@dataclass(frozen=True)
class ArmFiles:
    """What the stages made for one arm; None where the arm has no such stage."""

    scores: Path | None = None
    """Parquet: doc_id, score for every document of the pool."""
    selected: Path | None = None
    """Parquet: doc_id, rank."""
    history: Path | None = None
    """Parquet: step, epoch, tokens, loss, lr."""
    metrics: Path | None = None
    """Parquet: metric, value, stderr, low, high, n."""


def write_ledger(
    path: Path,
    *,
    config: SelectionConfig,
    documents: Mapping[str, Path],
    tokens: Path | None,
    arms: Mapping[str, ArmFiles],
    stages: Sequence[Ref],
) -> None:
    """Build ``study.duckdb`` from the stages' files and rename it into its place.

    Args:
        path: where the ledger shall stand; one that is there is replaced when the new one is whole.
        config: positive label, cuts of the purity curve, bootstrap.
        documents: split → Parquet with doc_id, text, label, source; the ranked split is ``"pool"``.
        tokens: Parquet with doc_id, n_tokens of the scorer; None leaves ``n_tokens`` empty.
        arms: name → files.
        stages: what was made or found whole, in the order to be shown.

    Raises:
        InputError: scores that are no ranking of the pool, or a cut larger than the pool.
    """
    with new_tables(path, TABLES) as con:
        _insert_documents(con, documents, tokens)
        pool = read_pool(documents[POOL])
        for method, files in arms.items():
            if files.scores is not None:
                con.register("ranking", read_ranking(files.scores, pool, documents[POOL]))
                con.execute("INSERT INTO scores SELECT ?, doc_id, score, rank FROM ranking", [method])
            _insert_files(con, method, files)
        _insert_statistics(con, config)
        insert_stages(con, stages)


def _insert_documents(con: duckdb.DuckDBPyConnection, documents: Mapping[str, Path], tokens: Path | None) -> None:
    con.execute("CREATE TEMP TABLE tokens (doc_id VARCHAR, n_tokens BIGINT)")
    if tokens is not None:
        con.execute("INSERT INTO tokens SELECT doc_id, n_tokens FROM read_parquet(?)", [str(tokens)])
    for split, file in documents.items():
        con.execute(
            "INSERT INTO documents SELECT doc_id, text, label, source, n_tokens, ? "
            "FROM read_parquet(?) LEFT JOIN tokens USING (doc_id) ORDER BY doc_id",
            [split, str(file)],
        )


def _insert_files(con: duckdb.DuckDBPyConnection, method: str, files: ArmFiles) -> None:
    for table, file, columns, order in (
        ("selections", files.selected, "doc_id, rank", "rank"),
        ("training", files.history, "step, loss, lr, epoch, tokens", "step"),
        ("evaluations", files.metrics, "metric, value, stderr, n, low, high", "metric"),
    ):
        if file is not None:
            con.execute(
                f"INSERT INTO {table} SELECT ?, {columns} FROM read_parquet(?) ORDER BY {order}", [method, str(file)]
            )


# judged: one row for every ranked document; positive is 1, 0, or NULL without a label.
# cuts: the ks at which purity is taken of every ranking.

_JUDGED = """
CREATE OR REPLACE TEMP TABLE judged AS
SELECT method, doc_id, score, rank, CAST(label = $positive AS INTEGER) AS positive
FROM {ranked} JOIN documents USING (doc_id) WHERE split = 'pool'
"""

_PURITY = """
SELECT method, k, avg(positive) AS purity, coalesce(sum(positive), 0) AS hits
FROM judged JOIN cuts USING (method) WHERE rank <= k GROUP BY method, k
"""

# Average precision: the precision at the end of every run of equal scores, weighted by the recall gained in it.
_AUPRC = """
WITH ties AS (
    SELECT method, score, count(*) AS n, sum(positive) AS hits
    FROM judged WHERE positive IS NOT NULL AND score IS NOT NULL GROUP BY method, score
), curve AS (
    SELECT method, score, hits, sum(n) OVER down AS taken, sum(hits) OVER down AS found,
           sum(hits) OVER (PARTITION BY method) AS positives
    FROM ties WINDOW down AS (PARTITION BY method ORDER BY score DESC)
)
SELECT method, sum(hits / positives * (found / taken) ORDER BY score DESC) AS auprc
FROM curve WHERE positives > 0 GROUP BY method
"""

# Mann–Whitney: the positive documents' mean rank from below, tied documents sharing the mean of their ranks.
_AUROC = """
WITH ranked AS (
    SELECT method, positive,
           rank() OVER (PARTITION BY method ORDER BY score)
           + (count(*) OVER (PARTITION BY method, score) - 1) / 2 AS place
    FROM judged WHERE positive IS NOT NULL AND score IS NOT NULL
), sums AS (
    SELECT method, sum(place) FILTER (positive = 1) AS places, sum(positive) AS p, count(*) - sum(positive) AS q
    FROM ranked GROUP BY method
)
SELECT method, (places - p * (p + 1) / 2) / (p * q) AS auroc FROM sums WHERE p > 0 AND q > 0
"""

_STATISTICS = f"""
WITH pure AS ({_PURITY}), prc AS ({_AUPRC}), roc AS ({_AUROC}), sizes AS (
    SELECT method, count(positive) AS n, coalesce(sum(positive), 0) AS positives FROM judged GROUP BY method
)
SELECT * FROM pure LEFT JOIN prc USING (method) LEFT JOIN roc USING (method) JOIN sizes USING (method)
"""

# An arm without scores (the oracle) has its selection for a ranking: a purity, but no curve.
_RANKED_ARMS = """(
    SELECT method, doc_id, score, rank FROM scores
    UNION ALL
    SELECT method, doc_id, NULL, rank FROM selections ANTI JOIN scores USING (method)
)"""


def _insert_statistics(con: duckdb.DuckDBPyConnection, config: SelectionConfig) -> None:
    size = scalar(con, "SELECT count(*) FROM documents WHERE split = 'pool'")
    con.execute("CREATE TEMP TABLE ks AS SELECT unnest(?)::INTEGER AS k", [config.cuts(size)])

    con.execute(_JUDGED.format(ranked=_RANKED_ARMS), {"positive": config.positive})
    con.execute("""
        CREATE OR REPLACE TEMP TABLE cuts AS
        SELECT method, max(rank) AS k FROM selections GROUP BY method
        UNION SELECT DISTINCT method, k FROM scores, ks
    """)
    con.execute(
        f"INSERT INTO purity BY NAME SELECT *, ? AS label, ? AS confidence FROM ({_STATISTICS}) ORDER BY method, k",
        [config.positive, config.confidence],
    )
    _update_intervals(con, config)

    arms = " UNION ALL ".join(
        f"SELECT '{name}' AS method, doc_id, {score} AS score FROM documents WHERE split = 'pool'"
        for name, score in SHORTCUTS.items()
    )
    ranked = (
        "(SELECT method, doc_id, CAST(score AS DOUBLE) AS score, "
        f"row_number() OVER (PARTITION BY method ORDER BY score DESC, doc_id) AS rank FROM ({arms}))"
    )
    con.execute(_JUDGED.format(ranked=ranked), {"positive": config.positive})
    con.execute(
        "CREATE OR REPLACE TEMP TABLE cuts AS SELECT DISTINCT method, ?::INTEGER AS k FROM judged", [config.size(size)]
    )
    con.execute(
        "INSERT INTO shortcuts BY NAME SELECT method AS shortcut, k, purity, auprc, auroc "
        f"FROM ({_STATISTICS}) ORDER BY shortcut"
    )


def _update_intervals(con: duckdb.DuckDBPyConnection, config: SelectionConfig) -> None:
    for (method,) in con.execute("SELECT DISTINCT method FROM scores ORDER BY method").fetchall():
        ks = [k for (k,) in con.execute("SELECT k FROM purity WHERE method = ? ORDER BY k", [method]).fetchall()]
        columns = con.execute(
            "SELECT score, CAST(positive AS DOUBLE) AS positive FROM judged WHERE method = ? ORDER BY doc_id", [method]
        ).fetchnumpy()
        positive = columns["positive"]
        found = bootstrap(
            columns["score"],
            positive.filled(float("nan")) if hasattr(positive, "filled") else positive,  # a masked array has NULLs
            ks, resamples=config.resamples, confidence=config.confidence, seed=config.seed,
        )  # fmt: skip
        for k, purity in zip(ks, found.purity, strict=True):
            bounds = [None if bound != bound else bound for bound in (*purity, *found.auprc, *found.auroc)]
            con.execute(
                "UPDATE purity SET purity_low = ?, purity_high = ?, auprc_low = ?, auprc_high = ?, auroc_low = ?, "
                "auroc_high = ? WHERE method = ? AND k = ?",
                [*bounds, method, k],
            )


def open_ledger(path: Path) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
    """A read-only connection to a ledger.

    Raises:
        InputError: there is no ledger, another process holds it for writing, or the file is none.
    """
    return open_tables(path, TABLES, maker="rise run")


Parameters = Sequence[Any] | Mapping[str, Any]
"""Values of a query: for ? in turn, or for $name by name."""


def rows(con: duckdb.DuckDBPyConnection, sql: str, parameters: Parameters = ()) -> list[dict[str, Any]]:
    """The rows of a query as dictionaries."""
    con.execute(sql, parameters)
    names = [column[0] for column in con.description or ()]
    return [dict(zip(names, values, strict=True)) for values in con.fetchall()]


def scalar(con: duckdb.DuckDBPyConnection, sql: str, parameters: Parameters = ()) -> Any:
    """The single value of a query, or None where it has no row."""
    row = con.execute(sql, parameters).fetchone()
    return None if row is None else row[0]


def ledger_digest(path: Path) -> str:
    """SHA-256 over all rows of all tables, whatever their order in the file, but :data:`UNDIGESTED`.

    Raises:
        InputError: as :func:`open_ledger`.
    """
    with open_ledger(path) as con:
        return digest_tables(con, TABLES, UNDIGESTED)
