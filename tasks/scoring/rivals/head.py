"""Influence through the gradient of the LM head, in closed form (Eq. 1, Lemma C.1, Tables 9 and 14).

G(x) = Σ_t r_t h_tᵀ (V × d) with r_t = p_t − 1_{y_t} is never built: the product of two documents' gradients is
⟨G_i, G_q⟩ = Σ_{t,s} ⟨r_t, r_s⟩⟨h_t, h_s⟩ over the positions t of one and s of the other, which costs 2 V
multiplications a pair of positions; and a CountSketch of its V·d coordinates is a sum of circular convolutions.

Shape suffixes beside those of :mod:`tasks.scoring`: S positions of queries, K width of a gradient's sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.common.usage import searching
from tasks.scoring.batching import Tokenized
from tasks.scoring.countsketch import CountSketch
from tasks.scoring.engine import LOGIT_BYTES, Positions
from tasks.scoring.readout import Head, Readout
from tasks.scoring.rise import sparse_residuals
from tasks.scoring.rivals.reading import Reading, require_memory
from tasks.scoring.rivals.similarity import cosine_scores, unit
from tasks.scoring.search import Scores

if TYPE_CHECKING:
    from tasks.scoring.config import LmHeadConfig, SketchConfig
    from tasks.scoring.methods import Request


def head_scores(config: LmHeadConfig, request: Request) -> Scores:
    """Scores of the variants ``exact``, ``sparse`` and ``gradient-sketch``.

    ``exact`` and ``sparse`` keep their scores in ``work/lm-head-VARIANT``, ``gradient-sketch`` its sketches (fp16).

    Raises:
        InputError: the model cannot be used, or the residuals of the queries do not fit into memory.
    """
    reading = Reading(request)
    made = _sketched if config.variant == "gradient-sketch" else _paired
    per_query = made(config, request, reading)
    return Scores(list(reading.pool.doc_ids), per_query.mean(axis=0, dtype=np.float64),
                  list(reading.queries.doc_ids), per_query)  # fmt: skip


@dataclass(frozen=True)
class Gradients:
    """The factors of G = Σ_t r_t h_tᵀ of some documents, their positions one after the other."""

    r_TV: Any
    """Residuals: a torch tensor, or a scipy.sparse matrix in rows."""
    h_Td: torch.Tensor
    """Hidden states, float32; on the CPU beside sparse residuals."""
    lengths: list[int]
    """Positions of each document."""

    def document(self, start: int, length: int) -> Gradients:
        """The document whose positions begin at ``start``."""
        return Gradients(self.r_TV[start : start + length], self.h_Td[start : start + length], [length])


def products(left: Gradients, right: Gradients) -> torch.Tensor:
    """⟨G_i, G_q⟩ of all pairs, float64 (N, Q)."""
    if isinstance(left.r_TV, torch.Tensor):
        k_TS = left.r_TV @ right.r_TV.T
    else:
        k_TS = torch.from_numpy((left.r_TV @ right.r_TV.T).toarray())
    k_TS *= left.h_Td @ right.h_Td.T
    k_TQ = torch.stack([part.sum(1, dtype=torch.float64) for part in k_TS.split(right.lengths, dim=1)], dim=1)
    return torch.stack([part.sum(0) for part in k_TQ.split(left.lengths)])


def norms(gradients: Gradients) -> torch.Tensor:
    """‖G_i‖ of each document, float64 (N,)."""
    starts = np.cumsum([0, *gradients.lengths]).tolist()
    documents = (gradients.document(start, n) for start, n in zip(starts, gradients.lengths, strict=False))
    return torch.cat([products(one, one)[0] for one in documents]).clamp_min(0.0).sqrt()


def exact_gradients(readout: Readout, positions: Positions) -> Gradients:
    """The whole softmax residual of every position."""
    r_TV = torch.empty(len(positions.h_Td), readout.vocabulary, device=positions.h_Td.device)
    start = 0
    for z_TV, _, label_T in _logits(readout, positions, readout.vocabulary):
        r_TV[start : start + len(z_TV)] = residuals(z_TV, label_T, readout.head)
        start += len(z_TV)
    return Gradients(r_TV, positions.h_Td.float(), positions.lengths)


def sparse_gradients(readout: Readout, positions: Positions, config: SketchConfig) -> Gradients:
    """Algorithm 2's RH channel without its sketches: r̃_t/‖r̃_t‖ on the active support, h_t/‖h_t‖ · ‖r̃_t‖^α."""
    from scipy.sparse import csr_matrix

    index: list[NDArray[np.int64]] = []
    value: list[NDArray[np.float32]] = []
    counts: list[NDArray[np.int64]] = []
    lengths_T: list[torch.Tensor] = []
    for z_TV, _, label_T in _logits(readout, positions, readout.vocabulary):
        found = sparse_residuals(z_TV, label_T, config, readout.head)
        length_T1 = torch.linalg.vector_norm(found.value_TC, dim=-1, keepdim=True)
        kept = found.value_TC != 0
        index.append(found.index_TC[kept].cpu().numpy())
        value.append((found.value_TC / length_T1.masked_fill(length_T1 == 0, 1.0))[kept].cpu().numpy())
        counts.append(kept.sum(-1).cpu().numpy())
        lengths_T.append(length_T1)
    start = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    r_TV = csr_matrix((np.concatenate(value), np.concatenate(index), start),
                      shape=(len(positions.h_Td), readout.vocabulary))  # fmt: skip
    h_Td = torch.nn.functional.normalize(positions.h_Td.float(), dim=-1) * torch.cat(lengths_T) ** config.alpha
    return Gradients(r_TV, h_Td.cpu(), positions.lengths)


def residuals(z_TV: torch.Tensor, label_T: torch.Tensor, head: Head) -> torch.Tensor:
    """r_t = p_t − 1_{y_t}, times the head's slope: ∂ℓ_t/∂(W h_t + b), (T, V).

    The label's entry is the negative sum of the others, which is p(y) − 1 without the cancellation.
    """
    label_T1 = label_T.unsqueeze(-1)
    r_TV = torch.softmax(z_TV, dim=-1).scatter_(1, label_T1, 0.0)
    r_TV.scatter_(1, label_T1, -r_TV.sum(-1, keepdim=True))
    return r_TV.mul_(head.slope(z_TV))


def _logits(
    readout: Readout, positions: Positions, width: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Logits, hidden states and labels of a bounded number of positions at a time: rows of ``width`` floats."""
    rows = max(1, _chunk_bytes(positions.h_Td.device) // (4 * width))
    for h_Td, label_T in zip(positions.h_Td.split(rows), positions.label_T.split(rows), strict=True):
        yield readout.head.logits(h_Td), h_Td, label_T


def _chunk_bytes(device: torch.device) -> int:
    return LOGIT_BYTES.get(device.type, 256 << 20)


def _paired(config: LmHeadConfig, request: Request, reading: Reading) -> NDArray[np.float32]:
    """Products or cosines of all pairs, (Q, N): the queries' factors stand in memory, the pool's a batch at a time."""

    def factors(positions: Positions) -> Gradients:
        if config.variant == "exact":
            return exact_gradients(reading.readout, positions)
        return sparse_gradients(reading.readout, positions, config.sketch)

    @cache
    def queries() -> tuple[list[Gradients], torch.Tensor]:
        if config.variant == "exact":
            _check_memory(reading)
        whole = range(len(reading.queries))
        blocks = [factors(positions) for positions in reading.positions(reading.queries, whole)]
        return blocks, torch.cat([norms(block) for block in blocks])

    @torch.inference_mode()
    def make(places: range, count: Callable[[int], None]) -> NDArray[np.float32]:
        blocks, norm_Q = queries()
        scores: list[torch.Tensor] = []
        for positions in reading.positions(reading.pool, places):
            gradients = factors(positions)
            with searching():
                score_NQ = torch.cat([products(gradients, block) for block in blocks], dim=1)
            if config.normalize:
                norm_NQ = norms(gradients).unsqueeze(1) * norm_Q
                score_NQ /= norm_NQ.masked_fill(norm_NQ == 0, 1.0)
            scores.append(score_NQ.float().cpu())
            count(sum(positions.lengths) + len(positions.lengths))
        return torch.cat(scores).numpy()

    identity = {"variant": config.variant, "normalize": config.normalize, "queries": reading.queries.digest(),
                "sketch": config.sketch.plain() if config.variant == "sparse" else None}  # fmt: skip
    parts = reading.keep(request.work / f"lm-head-{config.variant}", reading.pool, identity, make,
                         label=f"LM head, {config.variant}")  # fmt: skip
    return np.ascontiguousarray(np.concatenate(parts).T)


def _check_memory(reading: Reading) -> None:
    """Refuse queries whose residuals do not fit beside those of one batch of the pool."""
    tokens, longest = (len(reading.queries.flat), max(reading.pool.lengths(range(len(reading.pool)))))
    batch = max(reading.scorer.batch_tokens, longest)
    readout = reading.readout
    need = 4 * (readout.vocabulary * (tokens + batch) + readout.width * tokens + 2 * batch * batch)
    require_memory(need + 3 * _chunk_bytes(readout.head.weight.device), readout.head.weight.device,
                   f"--method lm-head, variant exact, with the residuals of the queries' {tokens} tokens on a "
                   f"vocabulary of {readout.vocabulary},", "give fewer or shorter queries (max_length), or take the "
                   "variant gradient-sketch")  # fmt: skip


class GradientSketch:
    """CountSketch of G's V·d coordinates into K, with the bucket (η_r(v) + η_h(j)) mod K and the sign s_r(v) s_h(j).

    With these hashes the sketch of an outer product is the circular convolution of two CountSketches of width K (Pham
    and Pagh's TensorSketch), so that a position costs two Fourier transforms instead of V·d updates; the sum over the
    positions is taken before the one transform back. The whole softmax residual goes in; nothing is truncated, and no
    factor is scaled.
    """

    def __init__(self, readout: Readout, width: int, seed: int) -> None:
        self.readout, self.width = readout, width
        residual = CountSketch(readout.vocabulary, width, seed=seed, family="gradient residual")
        hidden = CountSketch(readout.width, width, seed=seed, family="gradient hidden")
        device = readout.head.weight.device
        self._residual, self._hidden = residual.tensors(device), hidden.tensors(device)

    def __call__(self, positions: Positions) -> torch.Tensor:
        """Sketches (N, K) of the documents' gradients, float32, not of unit length."""
        device, documents = positions.h_Td.device, len(positions.lengths)
        if not len(positions.h_Td):  # documents of one token each; the transform of no row is an error
            return torch.zeros(documents, self.width, device=device)
        document_T = torch.arange(documents).repeat_interleave(torch.tensor(positions.lengths)).to(device)
        sum_NF = torch.zeros(documents, self.width // 2 + 1, dtype=torch.complex64, device=device)
        start = 0
        for z_TV, h_Td, label_T in _logits(self.readout, positions, max(self.width, self.readout.vocabulary)):
            r_TF = self._spectrum(residuals(z_TV, label_T, self.readout.head), self._residual)
            r_TF *= self._spectrum(h_Td.float(), self._hidden)
            sum_NF.index_add_(0, document_T[start : start + len(z_TV)], r_TF)
            start += len(z_TV)
        return torch.fft.irfft(sum_NF, n=self.width)

    def _spectrum(self, x_TD: torch.Tensor, sketch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        bucket_D, sign_D = sketch
        made_TK = torch.zeros(len(x_TD), self.width, device=x_TD.device)
        made_TK.scatter_add_(1, bucket_D.expand(len(x_TD), -1), x_TD * sign_D)
        return torch.fft.rfft(made_TK)


def _sketched(config: LmHeadConfig, request: Request, reading: Reading) -> NDArray[np.float32]:
    """Cosines of whole-head gradient sketches, (Q, N)."""
    sketch = cache(lambda: GradientSketch(reading.readout, config.width, config.sketch.seed))

    def features(documents: Tokenized, side: str, stored: type[np.floating[Any]]) -> list[NDArray[Any]]:
        @torch.inference_mode()
        def make(places: range, count: Callable[[int], None]) -> NDArray[Any]:
            rows: list[NDArray[Any]] = []
            for positions in reading.positions(documents, places):
                rows.append(unit(sketch()(positions).cpu().numpy()).astype(stored))
                count(sum(positions.lengths) + len(positions.lengths))
            return np.concatenate(rows)

        identity = {"variant": config.variant, "width": config.width, "seed": config.sketch.seed}
        return reading.keep(request.work / f"lm-head-{config.variant}" / side, documents, identity, make,
                            label=f"LM head, {config.variant}, {side}")  # fmt: skip

    pool, queries = features(reading.pool, "pool", np.float16), features(reading.queries, "queries", np.float32)
    with searching():
        return cosine_scores(pool, np.concatenate(queries), config.calibration)
