"""What a batch of data is cut into before its first forward pass: shards, and the pieces that are read at a time."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks.common.models import Located, load_tokenizer
from tasks.scoring.batching import Tokenized, batches, read_columns, shards, tokenize
from tasks.scoring.config import FitConfig, ScorerConfig

PIECE = 256
"""Documents whose float32 signatures stand in memory at once; those of one batch where that has more."""


@dataclass(frozen=True)
class Batch:
    """Tokenized documents and how they are cut into shards."""

    groups: list[Tokenized]
    """The sample that a median is fitted on, where there is one, and the others."""
    plan: list[tuple[Tokenized, range]]
    """The documents of each shard; those of the sample come first."""
    sampled: int
    """Shards of the sample."""
    digest: str
    """SHA-256 over all ids and tokens."""

    @property
    def count(self) -> int:
        """Number of documents."""
        return sum(map(len, self.groups))

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(group.length(len(group) - 1) for group in self.groups if len(group))

    def tokens(self, number: int) -> int:
        """Tokens of one shard, counted from the batch's first."""
        documents, places = self.plan[number]
        return sum(documents.lengths(places))


def read_batch(located: Located, documents: Path, scorer: ScorerConfig, fit: FitConfig | None) -> Batch:
    """Read, tokenize and cut; with ``fit``, the documents whose hashed texts come first make up the first shards."""
    doc_ids, texts, prompts = read_columns(documents)
    tokenized = tokenize(load_tokenizer(located), doc_ids, texts, scorer.max_length, prompts)
    groups = [tokenized]
    if fit is not None:
        drawn = heapq.nsmallest(fit.documents, ((hashlib.sha256(f"{fit.seed}/{text}".encode()).digest(), doc_id)
                                                for doc_id, text in zip(doc_ids, texts, strict=True)))  # fmt: skip
        sample = {doc_id for _, doc_id in drawn}
        groups = [_taken(tokenized, [place for place, doc_id in enumerate(tokenized.doc_ids)
                                     if (doc_id in sample) is inside]) for inside in (True, False)]  # fmt: skip
    cuts = [[(group, places) for places in shards(group, scorer.shard_tokens)] for group in groups]
    return Batch(groups, [cut for group in cuts for cut in group], len(cuts[0]) if fit else 0, tokenized.digest())


def _taken(documents: Tokenized, places: list[int]) -> Tokenized:
    return Tokenized.of([documents.doc_ids[place] for place in places], [documents.ids(place) for place in places],
                        [int(documents.starts[place]) for place in places])  # fmt: skip


def pieces(documents: Tokenized, places: range, batch_tokens: int) -> Iterator[range]:
    """Consecutive batches of a shard together, up to some hundred documents: the batches are those of the shard."""
    start = stop = places.start
    for batch in batches(documents, places, batch_tokens):
        if stop > start and batch.stop - start > PIECE:
            yield range(start, stop)
            start = stop
        stop = batch.stop
    yield range(start, stop)
