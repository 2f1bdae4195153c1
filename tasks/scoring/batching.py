"""The plan of a scoring run: which documents go through the model together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tasks.common.errors import InputError
from tasks.pool.documents import PROMPT_CHARS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_TEXTS = 1024
"""Texts tokenized at once: what the tokenizer makes of them is not kept."""


@dataclass(frozen=True)
class Tokenized:
    """Documents as token ids, shortest first and by id where equally long: the order of shards and batches.

    All ids stand in one array, four bytes a token; make it with :meth:`of`.
    """

    doc_ids: tuple[str, ...]
    flat: NDArray[np.int32]
    """Token ids of all documents, one after the other."""
    offsets: NDArray[np.int64]
    """Where each document begins in ``flat``, and the end: (N + 1,)."""
    starts: NDArray[np.int64]
    """The first position of each document that counts, (N,): 0, or the last before the completion of a prompt."""

    @classmethod
    def of(
        cls, doc_ids: Sequence[str], tokens: Sequence[ArrayLike], starts: Sequence[int] | None = None
    ) -> Tokenized:
        """Documents in any order; without ``starts`` all their positions count."""
        order = sorted(range(len(doc_ids)), key=lambda place: (len(tokens[place]), doc_ids[place]))  # type: ignore[arg-type]
        arrays = [np.asarray(tokens[place], dtype=np.int32) for place in order]
        offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        flat = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32)
        first = np.zeros(len(order), dtype=np.int64) if starts is None else np.asarray(starts, dtype=np.int64)[order]
        return cls(tuple(doc_ids[place] for place in order), flat, offsets, first)

    def __len__(self) -> int:
        return len(self.doc_ids)

    def length(self, place: int) -> int:
        """Tokens of one document."""
        return int(self.offsets[place + 1] - self.offsets[place])

    def lengths(self, places: range) -> list[int]:
        """Tokens of each document of a consecutive range."""
        lengths: list[int] = np.diff(self.offsets[places.start : places.stop + 1]).tolist()
        return lengths

    def ids(self, place: int) -> NDArray[np.int32]:
        """Token ids of one document."""
        return self.flat[self.offsets[place] : self.offsets[place + 1]]

    def digest(self) -> str:
        """SHA-256 over the document ids, their tokens and, where not all positions count, the first that do."""
        digest = hashlib.sha256("\0".join(self.doc_ids).encode())
        digest.update(self.offsets.tobytes())
        digest.update(self.flat.tobytes())
        if self.starts.any():
            digest.update(self.starts.tobytes())
        return digest.hexdigest()


def read_columns(documents: Path) -> tuple[list[str], list[str], list[int] | None]:
    """Ids, texts and, where it has them, ``prompt_chars`` of a Parquet file of documents."""
    import pyarrow.parquet as pq

    known = pq.read_schema(documents).names
    table = pq.read_table(documents, columns=[name for name in ("doc_id", "text", PROMPT_CHARS) if name in known])
    prompts = table[PROMPT_CHARS].to_pylist() if PROMPT_CHARS in known else None
    return table["doc_id"].to_pylist(), table["text"].to_pylist(), prompts


def tokenize(
    tokenizer: PreTrainedTokenizerBase, doc_ids: Sequence[str], texts: Sequence[str], max_length: int,
    prompts: Sequence[int] | None = None,
) -> Tokenized:  # fmt: skip
    """Token ids of every document, cut at ``max_length``; special tokens as the tokenizer adds them by itself.

    Args:
        tokenizer: the scorer's.
        doc_ids: one a text.
        texts: prompt and completion, where there are prompts.
        max_length: tokens read of a text.
        prompts: characters at the beginning of each text that are its prompt: of such a text only the positions count
            that predict a token of the completion, one that reaches into it included. None: every position counts.

    Raises:
        InputError: a text gives no token at all, or its prompt fills all that are read.
    """
    if prompts is not None and any(prompts):
        return _completions(tokenizer, doc_ids, texts, max_length, prompts)
    tokens: list[NDArray[np.int32]] = []
    for start in range(0, len(texts), _TEXTS):
        encoded = tokenizer(list(texts[start : start + _TEXTS]), truncation=True, max_length=max_length)["input_ids"]
        tokens += [np.array(ids, dtype=np.int32) for ids in encoded]
    for doc_id, ids in zip(doc_ids, tokens, strict=True):
        if not len(ids):
            raise InputError(f"the document {doc_id} gives no token", field="text")
    return Tokenized.of(doc_ids, tokens)


def _completions(
    tokenizer: PreTrainedTokenizerBase, doc_ids: Sequence[str], texts: Sequence[str], max_length: int,
    prompts: Sequence[int],
) -> Tokenized:  # fmt: skip
    """:func:`tokenize` where there are prompts: which characters a token stands for says where a completion begins."""
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer {type(tokenizer).__name__} does not say which characters a token stands for, "
                         "so where a prompt ends is not known; leave the prompts out", field="prompt")  # fmt: skip
    tokens: list[NDArray[np.int32]] = []
    starts: list[int] = []
    for doc_id, text, chars in zip(doc_ids, texts, prompts, strict=True):
        encoded = tokenizer(text, truncation=True, max_length=max_length, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        if not ends:
            raise InputError(f"the document {doc_id} gives no token", field="text")
        first = next((place for place, end in enumerate(ends) if end > chars), None) if chars else 0
        if first is None:
            raise InputError(f"the prompt of the document {doc_id} fills all {len(ends)} tokens that are read of it; "
                             "shorten it, or read more", field="prompt")  # fmt: skip
        tokens.append(np.array(encoded["input_ids"], dtype=np.int32))
        starts.append(max(first - 1, 0))
    return Tokenized.of(doc_ids, tokens, starts)


def shards(documents: Tokenized, shard_tokens: int) -> list[range]:
    """Consecutive ranges of documents with about ``shard_tokens`` tokens each."""
    return _cut(documents, range(len(documents)), lambda count, longest, total: total > shard_tokens)


def batches(documents: Tokenized, shard: range, batch_tokens: int) -> list[range]:
    """Consecutive ranges whose padded size stays within ``batch_tokens`` (or a single longer document).

    A batch that is a third full ends where more than 3 % of it would be padding: among the longest documents of a pool,
    which are few, the lengths differ most.
    """

    def too_much(count: int, longest: int, total: int) -> bool:
        size = count * longest
        return size > batch_tokens or (size > batch_tokens / 3 and size - total > 0.03 * size)

    return _cut(documents, shard, too_much)


def _cut(documents: Tokenized, within: range, too_much: Callable[[int, int, int], bool]) -> list[range]:
    """Cut greedily where ``too_much(documents, tokens of the longest, tokens of all)`` first holds."""
    ranges: list[range] = []
    start, total = within.start, 0
    for place in within:
        length = documents.length(place)
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

    ids_BT = torch.zeros(len(batch), documents.length(batch[-1]), dtype=torch.long)
    for row, place in enumerate(batch):
        ids_BT[row, : documents.length(place)] = torch.from_numpy(documents.ids(place))
    return ids_BT


def padding_share(documents: Tokenized, plan: Iterable[range]) -> float:
    """Share of the positions of a plan that are padding."""
    real = total = 0
    for batch in plan:
        real += sum(documents.lengths(batch))
        total += len(batch) * documents.length(batch[-1])
    return 1.0 - real / total if total else 0.0
