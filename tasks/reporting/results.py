"""Table 4 of a study, read from its ledger."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tasks.reporting.paper import SOURCE, TABLE_4
from tasks.selection.ledger import rows, scalar

if TYPE_CHECKING:
    import duckdb

BASE, RANDOM, ORACLE = "base", "random", "oracle"
"""Arms with a part of their own: the untrained model, and the two ends of the gain that is there to be had."""
NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """A column of Table 4."""

    key: str
    """``purity``, or the metric's name in ``evaluations``."""
    title: str
    short: str
    """The title in the terminal."""
    higher: bool
    """Whether more is better."""
    percent: bool
    """Stored as a share, shown in per cent."""
    paper: int | None
    """Its place in a row of :data:`tasks.reporting.paper.TABLE_4`."""

    @property
    def arrow(self) -> str:
        """The direction that is better."""
        return "↑" if self.higher else "↓"

    def show(self, value: float | None) -> str:
        """A stored value as text."""
        return NOTHING if value is None else self._text(value, value)

    def show_half(self, estimate: Estimate) -> str:
        """A value and half the width of its interval, both with the value's decimals."""
        if estimate.low is None or estimate.high is None:
            return self.show(estimate.value)
        return f"{self.show(estimate.value)} ±{self._text((estimate.high - estimate.low) / 2, estimate.value)}"

    def show_range(self, estimate: Estimate) -> str:
        """The interval, or nothing where there is none."""
        if estimate.low is None or estimate.high is None:
            return ""
        return f"{self.show(estimate.low)} – {self.show(estimate.high)}"

    def show_paper(self, value: float) -> str:
        """A figure of the paper with the paper's decimals."""
        return f"{value:.1f}" if self.key == "purity" else f"{value:.2f}"

    def _text(self, value: float, like: float) -> str:
        """Per cent with one decimal, anything else with two where ``like`` is below 100 and one above."""
        return f"{100 * value:.1f}" if self.percent else f"{value:.{1 if abs(like) >= 100 else 2}f}"


@dataclass(frozen=True)
class Estimate:
    """A value and its interval as stored; a bound is None where there is none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Arm:
    """A row of the results table."""

    name: str
    estimates: Mapping[str, Estimate]
    """Column key → estimate; a column that was not measured is missing."""
    gain: float | None
    """Share of the oracle's gain over random on control perplexity (:func:`gain_share`); None for the base."""
    paper_name: str | None
    paper: Mapping[str, float]
    """Column key → the paper's figure, in the units shown."""


@dataclass(frozen=True)
class Results:
    """The results table of a study."""

    columns: tuple[Column, ...]
    arms: tuple[Arm, ...]
    positive: str
    """The label that was looked for."""
    confidence: float | None
    """Mass of the intervals of the selection's statistics."""
    documents: int
    """Documents in the pool."""
    positives: int
    """Documents in the pool with the label ``positive``."""
    selected: int | None
    """K: documents an arm selected (the most, where they differ)."""

    def best(self, column: Column) -> str | None:
        """The arm with the best value among those that chose without labels, or None."""
        found = [
            (arm.estimates[column.key].value, arm.name)
            for arm in self.arms
            if column.key in arm.estimates and arm.name not in (BASE, ORACLE)
        ]
        if not found:
            return None
        return (max if column.higher else min)(found, key=lambda pair: pair[0])[1]


def gain_share(arm: float, random: float, oracle: float) -> float | None:
    """Share of the oracle's gain: (ln P_random − ln P_arm) / (ln P_random − ln P_oracle), P a perplexity.

    None where the oracle has no gain over random.
    """
    if oracle >= random:
        return None
    return math.log(random / arm) / math.log(random / oracle)


def signed_percent(share: float) -> str:
    """A share in whole per cent, with a minus sign where it is one."""
    return f"{100 * share:.0f} %".replace("-0 ", "0 ").replace("-", "−")


def gather(con: duckdb.DuckDBPyConnection) -> Results:
    """Read the results table of an open ledger; arms stand in the order in which they were written."""
    positive = scalar(con, "SELECT any_value(label) FROM purity") or "control"
    columns = _columns(con, positive)
    names = [
        name for (name,) in con.execute("""
            SELECT method FROM (
                SELECT method, 0 AS part, rowid AS place FROM evaluations
                UNION ALL SELECT method, 1, rowid FROM selections
            ) GROUP BY method ORDER BY min((part, place))
        """).fetchall()
    ]  # fmt: skip
    estimates = {name: _estimates(con, name) for name in names}
    control = {name: found[f"perplexity_{positive}"].value for name, found in estimates.items()
               if f"perplexity_{positive}" in found}  # fmt: skip
    arms = []
    for name in [*names, *(name for name in TABLE_4 if name not in names)]:
        paper_name, paper_row = TABLE_4.get(name, (None, ()))
        paper = {
            column.key: value for column in columns
            if column.paper is not None and paper_row and (value := paper_row[column.paper]) is not None
        }  # fmt: skip
        gain = None
        if name != BASE and {name, RANDOM, ORACLE} <= control.keys():
            gain = gain_share(control[name], control[RANDOM], control[ORACLE])
        arms.append(Arm(name, estimates.get(name, {}), gain, paper_name, paper))
    return Results(
        columns=columns,
        arms=tuple(arms),
        positive=positive,
        confidence=scalar(con, "SELECT any_value(confidence) FROM purity"),
        documents=scalar(con, "SELECT count(*) FROM documents WHERE split = 'pool'"),
        positives=scalar(con, "SELECT count(*) FROM documents WHERE split = 'pool' AND label = ?", [positive]),
        selected=scalar(con, "SELECT max(rank) FROM selections"),
    )


def _columns(con: duckdb.DuckDBPyConnection, positive: str) -> tuple[Column, ...]:
    """Purity, the perplexity on the positive label and on every other, RULER-CWE and ARC-Challenge."""
    measured = {metric for (metric,) in con.execute("SELECT DISTINCT metric FROM evaluations").fetchall()}
    labels = sorted(metric.removeprefix("perplexity_") for metric in measured if metric.startswith("perplexity_"))
    others = [label for label in labels if label != positive] or ["junk"]
    return (
        Column("purity", "Purity", "purity %", True, True, 0),
        Column(f"perplexity_{positive}", f"Perplexity, {positive}", f"ppl {positive}", False, False, 1),
        *(
            Column(f"perplexity_{label}", f"Perplexity, {label}", f"ppl {label}", True, False,
                   2 if label == "junk" else None)
            for label in others
        ),
        Column("ruler_cwe", "RULER-CWE", "CWE %", True, True, 3),
        # Length-normalised accuracy, the usual one; the paper does not say which of lm-eval's two it means.
        Column("arc_challenge_acc_norm", "ARC-Challenge", "ARC-C %", True, True, 4),
    )  # fmt: skip


def _estimates(con: duckdb.DuckDBPyConnection, method: str) -> dict[str, Estimate]:
    found = {
        row["metric"]: Estimate(row["value"], row["low"], row["high"])
        for row in rows(con, "SELECT * FROM evaluations WHERE method = ?", [method])
    }
    pure = rows(
        con,
        "SELECT purity AS value, purity_low AS low, purity_high AS high FROM purity "
        "WHERE method = $1 AND k = (SELECT max(rank) FROM selections WHERE method = $1) AND purity IS NOT NULL",
        [method],
    )
    return {"purity": Estimate(**pure[0]), **found} if pure else found


def measured(results: Results) -> list[Arm]:
    """The arms of this study, without those that only the paper has."""
    return [arm for arm in results.arms if arm.estimates]


def plain(results: Results) -> dict[str, Any]:
    """The results table as JSON types; values as stored, the paper's in the units it prints."""
    return {
        "arms": [
            {
                "method": arm.name,
                "metrics": {key: asdict(estimate) for key, estimate in arm.estimates.items()},
                "share_of_oracle_gain": arm.gain,
                "paper": dict(arm.paper),
            }
            for arm in results.arms
        ],
        "columns": [column.key for column in results.columns],
        "paper": SOURCE,
        "positive": results.positive,
        "confidence": results.confidence,
        "pool": {"documents": results.documents, "positives": results.positives, "selected": results.selected},
    }
