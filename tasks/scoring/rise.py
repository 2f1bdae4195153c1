"""SketchAggregate (Algorithm 2): from hidden states and logits to the signature of a document."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from tasks.scoring.config import SketchConfig
from tasks.scoring.countsketch import CountSketch, sparse_projection
from tasks.scoring.readout import Head

_BLOCK, _ROWS = 32, 48
"""Entries of a block, and positions looked at at a time, in :func:`top_k`: their logits stay in the cache."""


def top_k(z_TV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits of every position, in descending order.

    On a CPU: the k largest entries lie in the k blocks with the largest maxima, so the vocabulary is read once for the
    maxima. The smallest of these k maxima is a floor that little more than k entries of the chosen blocks reach; only
    those are sorted. The selections are numpy's, whose vector instructions make them several times faster than torch's.
    Which of several equal logits is taken is not defined.

    Returns:
        values and vocabulary indices, both (T, k).
    """
    positions, vocabulary = z_TV.shape
    blocks = vocabulary // _BLOCK
    if z_TV.device.type != "cpu" or vocabulary % _BLOCK or blocks < 2 * k or not positions:
        found = z_TV.topk(k, dim=-1)
        return found.values, found.indices
    # A thread a core: numpy works on one, and the others of torch's would spin while they wait for it.
    found_each = _workers(torch.get_num_threads()).map(lambda some: _top_k(some, k), z_TV.split(_ROWS))
    values, index = zip(*found_each, strict=True)
    return torch.cat(values), torch.cat(index)


@functools.cache
def _workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="top_k")


def _top_k(z_TV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    positions, vocabulary = z_TV.shape
    blocks = vocabulary // _BLOCK
    maximum_TB = z_TV.view(positions, blocks, _BLOCK).amax(-1)
    block_Tk = np.argpartition(maximum_TB.numpy(), blocks - k, axis=-1)[:, blocks - k :]
    floor_T = np.take_along_axis(maximum_TB.numpy(), block_Tk, axis=-1).min(axis=-1)
    row = np.arange(positions)[:, None] * blocks
    kept_TE = z_TV.view(-1, _BLOCK).index_select(0, torch.from_numpy((block_Tk + row).ravel())).numpy()
    kept_TE = kept_TE.reshape(positions, k * _BLOCK)
    position, entry = np.divmod(np.flatnonzero(kept_TE >= floor_T[:, None]), k * _BLOCK)
    counts_T = np.bincount(position, minlength=positions)
    # What is left, a few more than k a position, as the rows of a matrix that is filled up with -inf.
    column = np.arange(len(position)) - (np.cumsum(counts_T) - counts_T)[position]
    left_TC = np.full((positions, counts_T.max()), -np.inf, dtype=np.float32)
    entry_TC = np.zeros(left_TC.shape, dtype=np.int64)
    left_TC[position, column], entry_TC[position, column] = kept_TE[position, entry], entry
    order_Tk = np.argsort(-left_TC, axis=-1)[:, :k]
    entry_Tk = np.take_along_axis(entry_TC, order_Tk, axis=-1)
    index_Tk = np.take_along_axis(block_Tk, entry_Tk // _BLOCK, axis=-1) * _BLOCK + entry_Tk % _BLOCK
    return torch.from_numpy(np.take_along_axis(left_TC, order_Tk, axis=-1)), torch.from_numpy(index_Tk)


@dataclass(frozen=True)
class Residuals:
    """Sparse residuals r̃_t of T positions on C candidates; entries outside the support are zero."""

    index_TC: torch.Tensor
    """Vocabulary index of each candidate, by descending logit; the label is among them."""
    value_TC: torch.Tensor
    """r̃_t(v), float32."""


def sparse_residuals(z_TV: torch.Tensor, label_T: torch.Tensor, config: SketchConfig, head: Head) -> Residuals:
    """Lines 4–10 of Algorithm 2.

    The label takes the place of the last candidate where it is not among the K_max largest. Its residual is the
    negative sum of the others, which is p̃(y) − 1 without the cancellation.
    """
    z_TC, index_TC = top_k(z_TV, min(config.max_top, z_TV.shape[-1]))
    is_label = index_TC == label_T.unsqueeze(-1)
    missing = ~is_label.any(-1)
    index_TC[missing, -1] = label_T[missing]
    z_TC[missing, -1] = z_TV[missing, label_T[missing]]
    is_label[missing, -1] = True
    p_TC = torch.softmax(z_TC / config.tau, dim=-1)
    before = p_TC.cumsum(-1) - p_TC
    kept = before < config.rho_cum
    kept[:, : config.min_top] = True
    kept |= is_label
    p_TC = p_TC * kept
    p_TC = p_TC / p_TC.sum(-1, keepdim=True)
    value_TC = p_TC.masked_fill(is_label, 0.0)
    value_TC = torch.where(is_label, -value_TC.sum(-1, keepdim=True), value_TC)
    slope = head.slope(z_TC)
    return Residuals(index_TC, value_TC * slope)


@dataclass(frozen=True)
class Factors:
    """Sketched factors of T positions, unit length; a position whose residual is zero has zero factors."""

    r_TR: torch.Tensor
    """r̂_t = CS_r(r̃_t) / ‖·‖."""
    g_TG: torch.Tensor
    """ĝ_t = CS_g(Wᵀ r̃_t) / ‖·‖."""
    h_TH: torch.Tensor
    """ĥ_t = CS_h(h_t) / ‖·‖, times ‖r̃_t‖^α."""
    m_Td: torch.Tensor
    """h_t / ‖·‖, times ‖r̃_t‖^α; of width 0 without an MH channel."""


class Sketcher:
    """The three CountSketches of a head, and the projection of its hidden states.

    CS_g is linear, so CS_g(Wᵀ r̃) = r̃ᵀ (W S_g): the head is sketched once, and a position's projected error is a
    weighted sum of K_g-wide rows instead of d-wide ones.
    """

    def __init__(self, head: Head, config: SketchConfig) -> None:
        vocabulary, width = head.weight.shape
        self.config = config
        self.support = config.tau, config.rho_cum, config.min_top, config.max_top
        """What :func:`sparse_residuals` reads of the configuration: sketchers that agree in it share the residuals."""
        device = head.weight.device
        residual = CountSketch(vocabulary, config.kr, seed=config.seed, family="residual")
        hidden = CountSketch(width, config.kh, seed=config.seed, family="hidden")
        self.bucket_V, self.sign_V = residual.tensors(device)
        self.hidden_dH = torch.from_numpy(hidden.matrix()).to(device)
        self.head_VG: torch.Tensor | None = None
        if config.kg:
            error = CountSketch(width, config.kg, seed=config.seed, family="error")
            error_dG = torch.from_numpy(error.matrix()).to(device)
            # A few thousand rows at a time: a float32 copy of a large head would not fit beside it.
            self.head_VG = torch.cat([rows.float() @ error_dG for rows in head.weight.detach().split(8192)])
        self.mean_dM: torch.Tensor | None = None
        if config.km:
            mean_dM = sparse_projection(width, config.km, seed=config.seed, family="mean")
            self.mean_dM = torch.from_numpy(mean_dM).to(device)

    def factors(self, h_Td: torch.Tensor, residuals: Residuals) -> Factors:
        """Lines 11–14 of Algorithm 2 for T positions."""
        config = self.config
        index_TC, value_TC = residuals.index_TC, residuals.value_TC
        # Only the support is read: its few entries a position, one position after the other.
        kept = value_TC != 0
        counts_T = kept.sum(-1)
        position, index, value = kept.nonzero()[:, 0], index_TC[kept], value_TC[kept]
        r_TR = torch.zeros(len(value_TC) * config.kr, device=value.device)
        r_TR.index_add_(0, position * config.kr + self.bucket_V[index], value * self.sign_V[index])
        g_TG = value.new_zeros(len(value_TC), 0)
        if self.head_VG is not None:
            g_TG = torch.nn.functional.embedding_bag(
                index, self.head_VG, counts_T.cumsum(0) - counts_T, per_sample_weights=value, mode="sum"
            )
        h_Td = h_Td.float()
        h_TH = _unit(h_Td @ self.hidden_dH)
        m_Td = h_Td[:, :0] if self.mean_dM is None else _unit(h_Td)
        if config.alpha:
            share_T1 = torch.linalg.vector_norm(value_TC, dim=-1, keepdim=True) ** config.alpha
            h_TH, m_Td = h_TH * share_T1, m_Td * share_T1
        return Factors(_unit(r_TR.view(-1, config.kr)), _unit(g_TG), h_TH, m_Td)

    def signatures(self, factors: Factors, lengths: list[int]) -> torch.Tensor:
        """Lines 15–18 of Algorithm 2, and the unit length of Table 6 (normalize_sample); then the MH channel.

        MH is the projected sum of a document's hidden states, brought to the length λ_mh beside the paper's signature
        of length 1: what the text is about, whatever its next tokens are. Without the residual it is no part of the
        gradient; reports/LOG.md says what it finds.

        Args:
            factors: positions of the documents one after the other.
            lengths: positions of each document.

        Returns:
            φ = [φ_RH; φ_GH; φ_MH] (N, D) float32, unit length; zero for a document with no position.
        """
        config = self.config
        if not lengths:
            return factors.r_TR.new_zeros(0, config.dimension)
        error_TE = torch.cat([config.lambda_rh * factors.r_TR, config.lambda_gh * factors.g_TG], dim=-1)
        phi_ND = _unit(torch.stack([
            (error.T @ hidden).flatten()
            for error, hidden in zip(error_TE.split(lengths), factors.h_TH.split(lengths), strict=True)
        ]))  # fmt: skip
        if self.mean_dM is None:
            return phi_ND
        sum_Nd = torch.stack([part.sum(0) for part in factors.m_Td.split(lengths)])
        return _unit(torch.cat([phi_ND, config.lambda_mh * _unit(sum_Nd @ self.mean_dM)], dim=-1))


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Rows at unit length; a zero row stays zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm == 0, 1.0)
