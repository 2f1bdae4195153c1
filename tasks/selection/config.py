"""Configuration of the selection: how many documents an arm trains on, and how sure its statistics are."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from tasks.common.config import Config
from tasks.common.errors import InputError

Amount = Annotated[float, Field(gt=0)]
"""A share of the pool below 1, a number of documents from 1 on."""


class SelectionConfig(Config):
    """What is selected of a ranking. Without ``share`` and ``k`` it is a tenth, as in the paper (section 3.3)."""

    share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the pool that is selected, above 0 and below 1. Either this or ``k``."""
    k: int | None = Field(default=None, ge=1)
    """Number of documents that are selected, 1 or more. Either this or ``share``."""
    positive: str = Field(default="control", min_length=1)
    """Label of the documents that should be selected: purity is their share."""
    resamples: int = Field(default=1000, ge=1, le=1_000_000)
    """Bootstrap resamples of the pool behind every interval."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Mass of the percentile intervals, above 0 and below 1."""
    purity_at: tuple[Amount, ...] = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5)
    """Where purity is taken beside the selection itself: shares of the pool below 1, numbers of documents from 1 on."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of the bootstrap, and of the oracle's draw among the positive documents."""

    @model_validator(mode="before")
    @classmethod
    def _a_tenth(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("share") is None and values.get("k") is None:
            return {**values, "share": 0.1}
        return values

    @model_validator(mode="after")
    def _one_size(self) -> SelectionConfig:
        if self.share is not None and self.k is not None:
            raise ValueError("give share or k, not both")
        for amount in self.purity_at:
            if amount >= 1 and amount != int(amount):
                raise ValueError(f"purity_at takes shares below 1 or whole numbers of documents, not {amount}")
        return self

    def size(self, documents: int) -> int:
        """K: how many of ``documents`` are selected (a share is rounded to the nearest document, at least one).

        Raises:
            InputError: K is larger than the pool.
        """
        amount = self.k if self.k is not None else self.share
        assert amount is not None  # _a_tenth and _one_size saw to it
        return _count(amount, documents, "selection.k")

    def cuts(self, documents: int) -> list[int]:
        """The ks of ``purity_at`` in a pool of ``documents``, ascending, each once.

        Raises:
            InputError: one of them is larger than the pool.
        """
        return sorted({_count(amount, documents, "selection.purity_at") for amount in self.purity_at})


def _count(amount: float, documents: int, field: str) -> int:
    if amount < 1:
        return min(documents, max(1, round(amount * documents)))
    if amount > documents:
        raise InputError(
            f"{int(amount)} documents are wanted, and the pool has {documents}; take fewer or a share below 1",
            field=field,
        )
    return int(amount)
