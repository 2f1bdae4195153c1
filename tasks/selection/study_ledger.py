"""``study.duckdb`` of a retrieval study: every metric and cost of every arm, pool, paradigm and seed, and the choice.

This module is its only writer. The file is built beside its place and renamed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.errors import InputError
from tasks.common.files import canonical_json
from tasks.common.stage import Ref
from tasks.common.usage import read_usage
from tasks.selection.choice import CHOOSING, Placed, RuleConfig, choose
from tasks.selection.database import insert_stages, new_tables, open_tables
from tasks.selection.ledger import rows
from tasks.selection.retrieval import METRICS

if TYPE_CHECKING:
    import duckdb

_BOUNDED = {
    "pq_auprc": ("pq_low", "pq_high"), "pq_auroc": ("pq_auroc_low", "pq_auroc_high"),
    "purity": ("purity_low", "purity_high"), "auprc": ("auprc_low", "auprc_high"),
    "auroc": ("auroc_low", "auroc_high"),
}  # fmt: skip
"""Metric of a ranking → the columns of its interval."""
_WHAT = "pool VARCHAR, paradigm VARCHAR, method VARCHAR, seed BIGINT"
TABLES = {
    "pools": (
        "pool VARCHAR, task VARCHAR, split VARCHAR, label VARCHAR, documents INTEGER, positives INTEGER, "
        "queries INTEGER, mean_tokens DOUBLE, mean_tokens_positive DOUBLE, mean_tokens_other DOUBLE"
    ),
    "methods": "method VARCHAR, kind VARCHAR, config VARCHAR",
    "retrieval": f"{_WHAT}, k INTEGER, auprc DOUBLE, auroc DOUBLE, queries INTEGER",
    "rankings": f"{_WHAT}, " + ", ".join(
        f"{name} DOUBLE" for metric, bounds in _BOUNDED.items() for name in (metric, *bounds)
    ) + ", selected INTEGER, confidence DOUBLE",
    "costs": (
        f"{_WHAT}, bytes_a_document DOUBLE, build_seconds DOUBLE, shared BOOLEAN, peak_mib DOUBLE, "
        "query_seconds DOUBLE"
    ),
    "absent": f"{_WHAT}, reason VARCHAR",
    "choice": "arm VARCHAR, worst_rank DOUBLE, mean_rank DOUBLE, worst_shortfall DOUBLE, bytes_a_document DOUBLE, "
              "chosen BOOLEAN",
    "ranks": "arm VARCHAR, pool VARCHAR, metric VARCHAR, rank DOUBLE",
    "stages": (
        "stage VARCHAR, method VARCHAR, seconds DOUBLE, cached BOOLEAN, digest VARCHAR, rows BIGINT, key VARCHAR, "
        "path VARCHAR"
    ),
}  # fmt: skip
"""Tables and their columns. ``seed`` is that of the hashes, NULL for an arm without a sketch. ``retrieval`` has the
per-query metric at one K, ``rankings`` its mean over the Ks (pq_…) and the figures of the ranking by the mean score;
``selected`` is the n of purity. The build of an arm with ``shared`` is a forward pass that other arms use too.
``absent`` says what an arm had too little of on this machine to run. ``choice`` and ``ranks`` hold what
:func:`tasks.selection.choice.choose` made of the other tables."""
DIGESTED = ("pools", "methods", "retrieval", "rankings")
"""Tables in which equal studies are equal; the others hold times."""


@dataclass(frozen=True)
class PoolFiles:
    """One pool of a study."""

    task: str
    split: str
    positive: str
    """Label that the queries look for."""
    directory: Path
    """With pool.parquet and queries.parquet."""
    tokens: Path
    """Parquet: doc_id, n_tokens of the pool's documents."""


@dataclass(frozen=True)
class Judged:
    """What the stages made of one arm on one pool under one paradigm with one seed."""

    pool: str
    paradigm: str
    method: str
    seed: int | None
    """Seed of the hashes; None where the arm has none."""
    metrics: Path
    """Directory with metrics.parquet."""
    scored: Path
    """Directory with the scores and what they cost."""
    readout: Path | None
    """Directory of the forward pass that was shared; None for an arm that made all it needs."""


@dataclass(frozen=True)
class Absent:
    """An arm that this machine cannot run on one pool under one paradigm with one seed."""

    pool: str
    paradigm: str
    method: str
    seed: int | None
    reason: str
    """"out of memory" or "out of disk"."""


def write_study(
    path: Path,
    *,
    pools: Mapping[str, PoolFiles],
    methods: Mapping[str, Mapping[str, Any]],
    judged: Sequence[Judged],
    absent: Sequence[Absent],
    rule: RuleConfig | None,
    confidence: float,
    stages: Sequence[Ref],
) -> None:
    """Build the ledger of a study from its stages' files and rename it into its place.

    Args:
        path: where it shall stand; one that is there is replaced when the new one is whole.
        pools: name → files.
        methods: arm → its configuration as JSON types, in the order to be shown.
        judged: what was scored.
        absent: what this machine could not score.
        rule: how a default is chosen; None, or one that no candidate passes, leaves ``choice`` empty.
        confidence: mass of the intervals.
        stages: what was made or found whole.
    """
    with new_tables(path, TABLES) as con:
        for name, files in pools.items():
            _insert_pool(con, name, files)
        for arm, config in methods.items():
            con.execute("INSERT INTO methods VALUES (?, ?, ?)", [arm, config["method"], canonical_json(config)])
        for one in judged:
            _insert_judged(con, one, confidence)
        for missing in absent:
            con.execute("INSERT INTO absent VALUES (?, ?, ?, ?, ?)", list(vars(missing).values()))
        if rule is not None:
            # A rule that no candidate passes leaves the table empty; `choice_of` says why, when asked.
            with suppress(InputError):
                _insert_choice(con, choice_of(con, rule))
        insert_stages(con, stages)


def _insert_pool(con: duckdb.DuckDBPyConnection, name: str, files: PoolFiles) -> None:
    con.execute(
        """
        INSERT INTO pools
        SELECT $name, $task, $split, $positive, count(*), count(*) FILTER (label = $positive),
               (SELECT count(*) FROM read_parquet($queries)), avg(n_tokens),
               avg(n_tokens) FILTER (label = $positive), avg(n_tokens) FILTER (label IS DISTINCT FROM $positive)
        FROM read_parquet($documents) LEFT JOIN read_parquet($tokens) USING (doc_id)
        """,
        {"name": name, "task": files.task, "split": files.split, "positive": files.positive,
         "documents": str(files.directory / "pool.parquet"), "queries": str(files.directory / "queries.parquet"),
         "tokens": str(files.tokens)},
    )  # fmt: skip


def _insert_judged(con: duckdb.DuckDBPyConnection, one: Judged, confidence: float) -> None:
    what = [one.pool, one.paradigm, one.method, one.seed]
    file = str(one.metrics / METRICS)
    con.execute(
        """
        INSERT INTO retrieval
        SELECT ?, ?, ?, ?, k, any_value(value) FILTER (metric = 'pq_auprc_at'),
               any_value(value) FILTER (metric = 'pq_auroc_at'), any_value(n) FILTER (metric = 'pq_auprc_at')
        FROM read_parquet(?) WHERE metric IN ('pq_auprc_at', 'pq_auroc_at') GROUP BY k ORDER BY k
        """,
        [*what, file],
    )
    columns = ", ".join(f"any_value({column}) FILTER (metric = '{metric}')"
                        for metric in _BOUNDED for column in ("value", "low", "high"))  # fmt: skip
    con.execute(
        f"INSERT INTO rankings SELECT ?, ?, ?, ?, {columns}, any_value(k) FILTER (metric = 'purity'), ? "
        "FROM read_parquet(?)",
        [*what, confidence, file],
    )
    con.execute("INSERT INTO costs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [*what, *cost_of(one.scored, one.readout).values()])  # fmt: skip


def cost_of(directory: Path, readout: Path | None) -> dict[str, Any]:
    """What a scored pool took, as ``costs`` has it: bytes a document, seconds to build, whether a readout was shared,
    peak memory, seconds a query.

    Args:
        directory: where it was scored.
        readout: where the forward pass is that it was scored from, if it was.
    """
    scored = read_usage(directory)
    search = scored.search_seconds
    build, peaks = scored.seconds - (search or 0.0), [scored.peak_mib]
    if readout is not None:
        shared = read_usage(readout)
        build, peaks = build + shared.seconds, [*peaks, shared.peak_mib]
    known = [peak for peak in peaks if peak is not None]
    return {"bytes_a_document": scored.bytes_a_document, "build_seconds": build, "shared": readout is not None,
            "peak_mib": max(known, default=None),
            "query_seconds": search / scored.queries if search is not None and scored.queries else None}  # fmt: skip


def _insert_choice(con: duckdb.DuckDBPyConnection, placed: Sequence[Placed]) -> None:
    for one in placed:
        con.execute("INSERT INTO choice VALUES (?, ?, ?, ?, ?, ?)",
                    [one.arm, one.worst, one.mean, one.shortfall, one.bytes_a_document, one.chosen])  # fmt: skip
        for (pool, metric), rank in one.ranks.items():
            con.execute("INSERT INTO ranks VALUES (?, ?, ?, ?)", [one.arm, pool, metric, rank])


def choice_of(con: duckdb.DuckDBPyConnection, rule: RuleConfig) -> list[Placed]:
    """The rule applied to the rows of an open ledger: dev pools, paradigm predict, means over the seeds.

    Raises:
        InputError: as :func:`tasks.selection.choice.choose`.
    """
    means = ", ".join(f"{mean_of(metric)} AS {metric}" for metric in CHOOSING)
    found = rows(con, f"""
        SELECT pool, method, {means}, max(bytes_a_document) AS bytes
        FROM rankings JOIN pools USING (pool) JOIN costs USING (pool, paradigm, method)
        WHERE split = 'dev' AND paradigm = 'predict' AND rankings.seed IS NOT DISTINCT FROM costs.seed
        GROUP BY pool, method ORDER BY pool, method
    """)  # fmt: skip
    unknown = dict.fromkeys(arm for (arm,) in con.execute("SELECT DISTINCT method FROM absent").fetchall())
    figures: dict[tuple[str, str], dict[str, float | None]] = {}
    sizes: dict[str, float | None] = {}
    for row in found:
        for metric in CHOOSING:
            figures.setdefault((row["pool"], metric), {**unknown})[row["method"]] = row[metric]
        before = sizes.get(row["method"], 0.0)
        sizes[row["method"]] = None if row["bytes"] is None or before is None else max(row["bytes"], before)
    return choose(rule, figures, sizes)


def mean_of(column: str) -> str:
    """SQL for the mean of a column over the seeds: NULL as soon as one of them has none."""
    return f"CASE WHEN count({column}) = count(*) THEN avg({column}) END"


def open_study(path: Path) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
    """A read-only connection to the ledger of a study.

    Raises:
        InputError: there is none, another process holds it for writing, or the file is none.
    """
    return open_tables(path, TABLES, maker="rise study", what="the ledger of a study")


def study_digest(path: Path) -> str:
    """SHA-256 over all rows of :data:`DIGESTED`, whatever their order in the file."""
    digest = hashlib.sha256()
    with open_study(path) as con:
        for table in DIGESTED:
            for row in con.execute(f"SELECT * FROM {table} ORDER BY ALL").fetchall():
                digest.update(f"{table}{canonical_json(row)}\n".encode())
    return digest.hexdigest()
