"""What an arm trains on: documents as tokens, in an order that only the seed and the ids decide."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""Label of a position without a target: padding, and a document's last token."""


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents in the order of their ids."""

    tokens: tuple[tuple[int, ...], ...]
    """Token ids of every document, 2 to ``max_length`` of them."""
    left_out: int
    """Documents of fewer than two tokens, in which there is nothing to predict."""
    digest: str
    """SHA-256 over the ids and tokens of the documents."""


def read_corpus(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Corpus:
    """Tokenise the documents of a Parquet file, one a row, each cut at ``max_length`` tokens.

    A BOS token is there only if the tokenizer adds one by itself.

    Raises:
        InputError: the file cannot be read, has not the columns ``doc_id`` and ``text`` as strings, names a document
            twice, or holds no document of two tokens or more.
    """
    texts = _read(path)
    ids = sorted(texts)
    encoded = (
        tokenizer([texts[doc_id] for doc_id in ids], truncation=True, max_length=max_length)["input_ids"] if ids else []
    )
    kept = [(doc_id, tuple(tokens)) for doc_id, tokens in zip(ids, encoded, strict=True) if len(tokens) >= 2]
    if not kept:
        raise InputError(
            f"nothing to train on: none of the {len(ids)} selected documents has two tokens or more", file=path
        )
    digest = hashlib.sha256()
    for doc_id, tokens in kept:
        digest.update(f"{doc_id}\0{' '.join(map(str, tokens))}\n".encode())
    return Corpus(tuple(tokens for _, tokens in kept), len(ids) - len(kept), digest.hexdigest())


def _read(path: Path) -> dict[str, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        for name in ("doc_id", "text"):
            if name not in names:
                raise InputError("no such column", file=path, field=name)
        table = pq.read_table(path, columns=["doc_id", "text"])
    except FileNotFoundError:
        raise InputError("no such file of selected documents", file=path) from None
    except pa.ArrowInvalid as error:
        raise InputError(f"not a Parquet file that can be read ({str(error).splitlines()[0]})", file=path) from None
    texts: dict[str, str] = {}
    columns = (table.column("doc_id").to_pylist(), table.column("text").to_pylist())
    for row, (doc_id, text) in enumerate(zip(*columns, strict=True), start=1):
        for name, value in (("doc_id", doc_id), ("text", text)):
            if not isinstance(value, str):
                raise InputError(f"must be a string, is {type(value).__name__}", file=path, row=row, field=name)
        if doc_id in texts:
            raise InputError(f"{doc_id!r} is there twice", file=path, row=row, field="doc_id")
        texts[doc_id] = text
    return texts


def steps_per_epoch(documents: int, batch_size: int) -> int:
    """Optimizer steps of one epoch; the last has the documents that are left over."""
    return -(-documents // batch_size)


def batch(documents: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the documents in optimizer step ``step`` (from 0), a pure function of its arguments.

    Every epoch is a permutation of all documents, drawn from (seed, epoch).
    """
    epoch, place = divmod(step, steps_per_epoch(documents, batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(documents)
    return [int(index) for index in order[place * batch_size : (place + 1) * batch_size]]


def pieces(lengths: Sequence[int], accumulation: int, processes: int, rank: int) -> list[list[int]]:
    """The places in a batch that process ``rank`` computes, in ``accumulation`` pieces.

    Documents of like length come into the same piece, so that little is padded; the pieces of a batch add up to the
    same gradient whatever the split. Every process has the same number of pieces, some of them perhaps empty.
    """
    by_length = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    return [
        [int(place) for place in piece[rank::processes]] for piece in np.array_split(np.array(by_length), accumulation)
    ]


def padded(documents: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and labels of documents, padded on the right to the longest; both int64 (documents, length).

    A label is the next token, or :data:`IGNORE` where there is none. No document gives one row without a target: a
    process whose piece is empty takes part in the step all the same.
    """
    shape = (max(1, len(documents)), max((len(tokens) for tokens in documents), default=1))
    ids, labels = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
    for row, tokens in enumerate(documents):
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens) - 1] = tokens[1:]
    return ids, labels
