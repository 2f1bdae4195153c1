"""The plan of a scoring run: which documents go through the model together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.common.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokenized:
    """Documents as token ids, shortest first and by id where equally long: the order of shards and batches."""

    doc_ids: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.doc_ids)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, doc_ids: Sequence[str], texts: Sequence[str], max_length: int
) -> Tokenized:
    """Token ids of every document, cut at ``max_length``; special tokens as the tokenizer adds them by itself.

    Raises:
        InputError: a text gives no token at all.
    """
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    pairs = sorted(zip(map(len, encoded), doc_ids, map(tuple, encoded), strict=True))
    if pairs and pairs[0][0] == 0:
        raise InputError(f"the document {pairs[0][1]} gives no token", field="text")
    return Tokenized(tuple(pair[1] for pair in pairs), tuple(pair[2] for pair in pairs))


def shards(documents: Tokenized, shard_tokens: int) -> list[range]:
    """Consecutive ranges of documents with about ``shard_tokens`` tokens each."""
    return _cut(documents, range(len(documents)), lambda count, longest, total: total > shard_tokens)


def batches(documents: Tokenized, shard: range, batch_tokens: int) -> list[range]:
    """Consecutive ranges whose padded size stays within ``batch_tokens`` (or a single longer document)."""
    return _cut(documents, shard, lambda count, longest, total: count * longest > batch_tokens)


def _cut(documents: Tokenized, within: range, too_much: Callable[[int, int, int], bool]) -> list[range]:
    """Cut greedily where ``too_much(documents, tokens of the longest, tokens of all)`` first holds."""
    ranges: list[range] = []
    start, total = within.start, 0
    for place in within:
        length = len(documents.tokens[place])
        if place > start and too_much(place - start + 1, length, total + length):
            ranges.append(range(start, place))
            start, total = place, 0
        total += length
    if within.stop > start:
        ranges.append(range(start, within.stop))
    return ranges


def padded(documents: Tokenized, batch: range) -> torch.Tensor:
    """Token ids (B, T) of a batch, padded on the right; what stands in the padding is never read."""
    import torch

    longest = len(documents.tokens[batch[-1]])
    ids_BT = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, place in enumerate(batch):
        ids_BT[row, : len(documents.tokens[place])] = torch.tensor(documents.tokens[place], dtype=torch.long)
    return ids_BT


def padding_share(documents: Tokenized, plan: Iterable[range]) -> float:
    """Share of the positions of a plan that are padding."""
    real = total = 0
    for batch in plan:
        real += sum(len(documents.tokens[place]) for place in batch)
        total += len(batch) * len(documents.tokens[batch[-1]])
    return 1.0 - real / total if total else 0.0
