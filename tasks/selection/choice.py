"""The rule by which a study chooses its default, derived from its figures alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field

from tasks.common.config import Config
from tasks.common.errors import InputError

CHOOSING = ("pq_auprc", "purity")
"""Metrics that arms are ranked by, more is better."""


class RuleConfig(Config):
    """Who can become the default of a study."""

    candidates: tuple[str, ...] = Field(min_length=1)
    """Arms that the rule chooses among."""
    max_bytes: float | None = Field(None, gt=0)
    """Most bytes a document that the default may keep on disk; an arm whose bytes are not known is then out."""
    by: Literal["rank", "shortfall"] = "rank"
    """rank: the candidate with the best worst rank. shortfall: the one whose figures are the least behind those of the
    best candidate where they are furthest behind; a rank makes as much of .99 against .98 as of .8 against .4."""

    @property
    def statement(self) -> str:
        """The rule in words."""
        wins = {"rank": "The best worst-case rank wins",
                "shortfall": "The one that is nowhere far behind the best of them wins: its largest shortfall is the "
                             "smallest"}  # fmt: skip
        return ("The candidates that are small enough are ranked on every dev pool by auPRC (per query, averaged over "
                "K) and by purity, under the predict paradigm, means over the seeds, ties sharing the average rank. "
                f"{wins[self.by]}; ties by mean rank, then by fewer bytes a document, then by name.")


@dataclass(frozen=True)
class Placed:
    """A candidate and its ranks; 1 is best."""

    arm: str
    ranks: Mapping[tuple[str, str], float]
    """(pool, metric) → rank among the candidates that are small enough."""
    worst: float
    """The largest of them."""
    mean: float
    """Their mean."""
    shortfall: float
    """How far its figures are behind the best candidate's, where they are furthest behind; infinite where one is not
    known."""
    bytes_a_document: float | None
    chosen: bool


def choose(
    rule: RuleConfig,
    figures: Mapping[tuple[str, str], Mapping[str, float | None]],
    bytes_a_document: Mapping[str, float | None],
) -> list[Placed]:
    """Rank the candidates by :attr:`RuleConfig.statement`, the chosen one first.

    Args:
        rule: candidates and the bound on their size.
        figures: (dev pool, metric) → arm → value, more is better; one that is None or missing comes last.
        bytes_a_document: arm → bytes on disk, None where not known.

    Raises:
        InputError: a candidate has no figure at all, there is no dev pool, or every candidate is too large.
    """
    if not figures:
        raise InputError("the rule chooses on dev pools under the predict paradigm, and none of them is scored",
                         field="rule")  # fmt: skip
    for arm in rule.candidates:
        if not any(arm in values for values in figures.values()):
            raise InputError(f"the candidate {arm!r} is scored on no dev pool", field="rule.candidates")
    arms = sorted({arm for arm in rule.candidates if _small_enough(bytes_a_document.get(arm), rule.max_bytes)})
    if not arms:
        raise InputError(f"no candidate keeps at most {rule.max_bytes:g} bytes a document", field="rule.max_bytes")
    ranks = {place: _ranks([values.get(arm) for arm in arms]) for place, values in figures.items()}
    placed = []
    for number, arm in enumerate(arms):
        own = {place: ranked[number] for place, ranked in ranks.items()}
        behind = max(_behind(values, arm, arms) for values in figures.values())
        placed.append(Placed(arm, own, max(own.values()), sum(own.values()) / len(own), behind,
                             bytes_a_document.get(arm), False))  # fmt: skip

    def order(one: Placed) -> tuple[float, float, float, str]:
        size = math.inf if one.bytes_a_document is None else one.bytes_a_document
        return one.worst if rule.by == "rank" else round(one.shortfall, 12), one.mean, size, one.arm

    first, *others = sorted(placed, key=order)
    return [replace(first, chosen=True), *others]


def _behind(values: Mapping[str, float | None], arm: str, arms: Sequence[str]) -> float:
    """How far an arm's value is behind the best."""
    own = values.get(arm)
    known = [value for one in arms if (value := values.get(one)) is not None]
    return math.inf if own is None else max(known) - own


def _small_enough(size: float | None, most: float | None) -> bool:
    return most is None or (size is not None and size <= most)


def _ranks(values: list[float | None]) -> list[float]:
    """Rank of every value, 1 the largest; equal ones share the average. Twelve decimals tell values apart."""
    from scipy.stats import rankdata

    return [float(rank) for rank in rankdata([float("inf") if value is None else -round(value, 12)
                                              for value in values])]  # fmt: skip
