"""Selection under a budget: documents, a score threshold, tokens and quotas by source, any of them together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Protocol, TypeVar

from pydantic import Field, model_validator

from tasks.common.config import Config

OTHERS = "*"
"""The quota of every source that has none of its own."""
Quota = Annotated[float, Field(ge=0)]


class BudgetConfig(Config):
    """How much is selected. The limits that are given hold together; one of the first three is needed."""

    documents: int | None = Field(None, ge=1)
    """Most documents."""
    threshold: float | None = Field(None, allow_inf_nan=False)
    """Lowest score."""
    tokens: int | None = Field(None, ge=1)
    """Most tokens of the scorer's tokenizer, documents counted whole."""
    quotas: dict[str, Quota] = Field(default_factory=dict)
    """Source → most documents of it: a share of ``documents`` below 1, a number from 1 on, or 0 for none. ``*`` is the
    quota of each source that is not named; without it those have none."""

    @model_validator(mode="after")
    def _bounded(self) -> BudgetConfig:
        if self.documents is None and self.threshold is None and self.tokens is None:
            raise ValueError("one of documents, threshold and tokens is needed")
        for source, quota in self.quotas.items():
            if quota >= 1 and quota != int(quota):
                raise ValueError(f"quotas.{source} takes a share below 1 or a whole number of documents, not {quota}")
            if 0 < quota < 1 and self.documents is None:
                raise ValueError(f"quotas.{source} is a share, which needs documents: the number it is a share of")
        return self

    def quota(self, source: str) -> float:
        """Most documents of a source; infinite without a quota."""
        quota = self.quotas.get(source, self.quotas.get(OTHERS))
        if quota is None:
            return math.inf
        return math.floor(quota * (self.documents or 0) + 1e-9) if quota < 1 else quota


class Ranked(Protocol):
    """What a limit looks at in a document."""

    @property
    def source(self) -> str: ...
    @property
    def score(self) -> float: ...
    @property
    def n_tokens(self) -> int: ...


Document = TypeVar("Document", bound=Ranked)


def choose(budget: BudgetConfig, best: Iterable[Document]) -> list[Document]:
    """The selected documents, in the order in which they come.

    Going down the ranking, a document whose source has had its quota is passed over. The first document that does not
    fit into the rest of the tokens ends the selection, so that nothing worse fills the gap; one longer than the whole
    budget is passed over.

    Args:
        budget: the limits.
        best: the documents, best first; no more of them are taken than is needed.
    """
    chosen: list[Document] = []
    taken: Counter[str] = Counter()
    spent = 0
    for document in best:
        if budget.threshold is not None and document.score < budget.threshold:
            break
        if taken[document.source] >= budget.quota(document.source):
            continue
        if budget.tokens is not None:
            if document.n_tokens > budget.tokens:
                continue
            if spent + document.n_tokens > budget.tokens:
                break
        chosen.append(document)
        taken[document.source] += 1
        spent += document.n_tokens
        if len(chosen) == budget.documents:
            break
    return chosen
