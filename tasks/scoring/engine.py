"""One forward pass over documents: hidden states, logits in chunks, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.scoring.batching import Tokenized, batches, padded
from tasks.scoring.readout import Readout
from tasks.scoring.rise import Factors, Residuals, Sketcher, sparse_residuals

LOGIT_BYTES = {"cpu": 48 << 20, "cuda": 512 << 20}
"""Memory for one chunk of float32 logits: it bounds what the pass needs above the model, whatever the batch."""


@dataclass(frozen=True)
class Pass:
    """What one pass made of N documents, in their order."""

    signatures: tuple[NDArray[np.float32], ...]
    """φ (N, D), unit length, of each sketcher."""
    losses: NDArray[np.float64] | None
    """Mean negative log-likelihood of a document's predicted tokens, in nats (N,); None unless asked for; NaN for a
    document of one token."""


@dataclass(frozen=True)
class Positions:
    """The positions of a batch's documents that count, each predicting a next token, one document after the other."""

    h_Td: torch.Tensor
    """Final hidden states, where the head lies."""
    label_T: torch.Tensor
    """The tokens that follow."""
    lengths: list[int]
    """Positions of each document: its tokens less one, and less those before its start."""


def read_positions(readout: Readout, documents: Tokenized, batch: range) -> Positions:
    """Run one batch of documents up to the head."""
    ids_BT, device = padded(documents, batch), readout.head.weight.device
    hidden = readout.hidden(ids_BT)
    start_B1 = torch.from_numpy(documents.starts[batch.start : batch.stop]).unsqueeze(1)
    end_B1 = torch.tensor(documents.lengths(batch)).unsqueeze(1) - 1
    place_T = torch.arange(ids_BT.shape[1] - 1)
    real_BT = (start_B1 <= place_T) & (place_T < end_B1)
    lengths = real_BT.sum(1).tolist()
    return Positions(hidden[:, :-1][real_BT.to(hidden.device)].to(device), ids_BT[:, 1:][real_BT].to(device), lengths)


@torch.inference_mode()
def forward(
    readout: Readout,
    documents: Tokenized,
    shard: range,
    *,
    batch_tokens: int,
    sketchers: Sequence[Sketcher] = (),
    losses: bool = False,
    count: Callable[[int], None] | None = None,
) -> Pass:
    """Run the documents of a shard through the model once.

    Position t of a document predicts its token t + 1, so a document of n tokens has n − 1 positions. Those that count
    make its signature and its loss: all, or those of the completion where there is a prompt.

    Args:
        readout: the model.
        documents: tokenized documents, shortest first.
        shard: which of them.
        batch_tokens: token budget of one forward pass.
        sketchers: each makes signatures of the positions; the logits and, where the sketchers agree in them, the sparse
            residuals are computed once for all.
        losses: also return each document's mean negative log-likelihood.
        count: told the number of tokens after each batch.
    """
    signatures: list[list[torch.Tensor]] = [[] for _ in sketchers]
    means: list[torch.Tensor] = []
    for batch in batches(documents, shard, batch_tokens):
        positions = read_positions(readout, documents, batch)
        factors, loss_T = readout_factors(readout, positions.h_Td, positions.label_T, sketchers, losses=losses)
        for made, sketcher, sketched in zip(signatures, sketchers, factors, strict=True):
            made.append(sketcher.signatures(sketched, positions.lengths).cpu())
        if loss_T is not None:
            means.append(torch.stack([part.double().mean() for part in loss_T.split(positions.lengths)]).cpu())
        if count is not None:
            count(sum(documents.lengths(batch)))
    return Pass(
        tuple(torch.cat(made).numpy() for made in signatures),
        torch.cat(means).numpy() if losses else None,
    )


def readout_factors(
    readout: Readout, h_Td: torch.Tensor, label_T: torch.Tensor, sketchers: Sequence[Sketcher], *, losses: bool = False
) -> tuple[list[Factors], torch.Tensor | None]:
    """Each sketcher's factors and the token losses of T positions, the logits of a bounded number at a time."""
    rows = max(1, LOGIT_BYTES.get(h_Td.device.type, 256 << 20) // (4 * readout.vocabulary))
    factors: list[list[Factors]] = [[] for _ in sketchers]
    nll: list[torch.Tensor] = []
    for h_chunk, label_chunk in zip(h_Td.split(rows), label_T.split(rows), strict=True):
        z_TV = readout.head.logits(h_chunk)
        if losses:
            nll.append(torch.nn.functional.cross_entropy(z_TV, label_chunk, reduction="none"))
        residuals: dict[tuple[float, ...], Residuals] = {}
        for made, sketcher in zip(factors, sketchers, strict=True):
            if sketcher.support not in residuals:
                residuals[sketcher.support] = sparse_residuals(z_TV, label_chunk, sketcher.config, readout.head)
            made.append(sketcher.factors(h_chunk, residuals[sketcher.support]))
    joined = [Factors(*(torch.cat([getattr(f, one.name) for f in made]) for one in fields(Factors)))
              for made in factors]  # fmt: skip
    return joined, torch.cat(nll) if losses else None
