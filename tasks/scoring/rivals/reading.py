"""The scorer's forward pass over a pool and its queries, for methods that keep something else of it than RISE does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.common.models import load_causal_lm, load_tokenizer, locate, torch_dtype
from tasks.scoring.batching import Tokenized, batches, padded, read_columns, shards, tokenize
from tasks.scoring.engine import Positions, read_positions
from tasks.scoring.readout import Readout
from tasks.scoring.rivals.similarity import Make, kept

if TYPE_CHECKING:
    from tasks.scoring.methods import Request


class Reading:
    """Tokenized pool and queries of a request, and the scorer, which is loaded when it is first needed.

    Raises:
        InputError: the model cannot be used, or a text gives no token.
    """

    def __init__(self, request: Request) -> None:
        scorer = request.scorer
        self.scorer, self._report = scorer, request.report
        self.located = locate(scorer.model, revision=scorer.revision)
        tokenizer = load_tokenizer(self.located)
        self.pool, self.queries = (
            tokenize(tokenizer, doc_ids, texts, scorer.max_length, prompts)
            for doc_ids, texts, prompts in map(read_columns, (request.pool, request.queries))
        )

    @cached_property
    def readout(self) -> Readout:
        """The scorer.

        Raises:
            InputError: it cannot be loaded, or a document has more tokens than it has positions.
        """
        scorer = self.scorer
        if scorer.threads is not None:
            torch.set_num_threads(scorer.threads)
        model = load_causal_lm(self.located, dtype=torch_dtype(scorer.precision), device_map=scorer.device_map)
        readout = Readout(model, self.located.spec)
        longest = max(max(side.lengths(range(len(side)))) for side in (self.pool, self.queries))
        if readout.positions is not None and longest > readout.positions:
            raise InputError(f"the scorer has {readout.positions} positions, a document {longest} tokens; cut "
                             f"documents at {readout.positions}", file=self.located.spec, field="max_length")
        return readout

    def batches(self, documents: Tokenized, places: range) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """Token ids (B, T) of the batches of consecutive documents, padded on the right, and each one's tokens."""
        for batch in batches(documents, places, self.scorer.batch_tokens):
            yield padded(documents, batch), documents.lengths(batch)

    def positions(self, documents: Tokenized, places: range) -> Iterator[Positions]:
        """One forward pass over consecutive documents, a batch at a time."""
        for batch in batches(documents, places, self.scorer.batch_tokens):
            yield read_positions(self.readout, documents, batch)

    def keep(
        self, directory: Path, documents: Tokenized, identity: Mapping[str, Any], make: Make, *, label: str
    ) -> list[NDArray[Any]]:
        """What ``make`` makes of the documents, on disk a shard at a time; see :func:`kept`."""
        scorer = self.scorer
        plan = [(places, sum(documents.lengths(places))) for places in shards(documents, scorer.shard_tokens)]
        whole = {"model": self.located.digest, "precision": str(torch_dtype(scorer.precision)),
                 "batch_tokens": scorer.batch_tokens, "shard_tokens": scorer.shard_tokens,
                 "documents": documents.digest(), **identity}  # fmt: skip
        return kept(directory, whole, plan, make, label=label, unit="tokens", report=self._report)


def require_memory(need: float, device: torch.device, what: str, way_out: str) -> None:
    """Refuse what does not fit before it starts.

    Args:
        need: bytes, beside what is in use already.
        device: where.
        what: what they are for.
        way_out: what the user can do.

    Raises:
        InputError: fewer bytes are free.
    """
    import psutil  # type: ignore[import-untyped]

    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if need > free:
        raise InputError(f"out of memory: {what} needs about {need / 2**30:.1f} GiB, this machine has "
                         f"{free / 2**30:.1f} free; {way_out}")  # fmt: skip
