"""LoGra (Choe et al., 2024): per-example gradients of the linear layers, projected on both sides before they exist.

Written from the paper and read against the authors' LogIX, whose rank-sized middle matrix between two random ones has
the same gradient as what is kept here.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.common.usage import searching
from tasks.scoring.batching import Tokenized
from tasks.scoring.rivals.gradients import (
    WAY_OUT,
    Gradients,
    PerQuery,
    Told,
    document_losses,
    feature_scores,
    ids,
)
from tasks.scoring.rivals.reading import require_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tasks.scoring.config import LoGraConfig
    from tasks.scoring.methods import Request


def linear_modules(model: PreTrainedModel, which: str, name: str) -> dict[str, torch.nn.Linear]:
    """The linear layers of a model by name: ``all`` but the head, or those of the ``mlp`` blocks.

    Raises:
        InputError: there are none.
    """
    head = model.get_output_embeddings()
    found = {place: module for place, module in model.named_modules()
             if isinstance(module, torch.nn.Linear) and module is not head
             and (which == "all" or "mlp" in place.split("."))}  # fmt: skip
    if not found:
        raise InputError(f"the model has no linear layers that LoGra could watch (modules: {which})", file=name)
    return found


def blocks(modules: dict[str, torch.nn.Linear], rank: int) -> list[slice]:
    """Where each module's projected gradient stands among the features."""
    sizes = [min(rank, module.out_features) * min(rank, module.in_features) for module in modules.values()]
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


class ProjectedGradients:
    """P_out G P_inᵀ of each linear layer and document, G = Σ_t δ_t x_tᵀ the gradient of its weight.

    It is formed as Σ_t (P_out δ_t)(P_in x_t)ᵀ, from the layer's input x_t and the loss's derivative δ_t by its output:
    no gradient of full size stands anywhere, and a batch gives those of all its documents, since a position belongs to
    one of them. P_out and P_in have orthogonal rows of length √(d/k), drawn uniformly: products of the features have
    the mean of the gradients' products, and equal them where k reaches d.
    """

    def __init__(self, model: PreTrainedModel, *, which: str, rank: int, seed: int, name: str) -> None:
        self.model = model.requires_grad_(False)
        model.enable_input_require_grads()
        self._name = name
        self._sums: list[torch.Tensor] = []
        generator = torch.Generator().manual_seed(seed)
        for number, (place, module) in enumerate(linear_modules(model, which, name).items()):
            where = module.weight.device
            p_out = _projection(module.out_features, rank, generator).to(where)
            p_in = _projection(module.in_features, rank, generator).to(where)
            module.register_forward_hook(self._watch(number, place, p_out, p_in))
            self._sums.append(torch.zeros(0, len(p_out), len(p_in), device=where))

    def _watch(self, number: int, place: str, p_out_kd: torch.Tensor, p_in_kd: torch.Tensor) -> Any:
        def forward(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x_BTd = inputs[0].detach()
            if x_BTd.ndim != 3:
                raise InputError(f"the layer {place} sees the positions of all documents in one heap (a mixture of "
                                 "experts?), so LoGra cannot tell them apart; take modules: mlp or another scorer",
                                 file=self._name)  # fmt: skip
            x_BTk = x_BTd @ p_in_kd.T

            def backward(delta_BTd: torch.Tensor) -> None:
                self._sums[number] += torch.einsum("bto,bti->boi", delta_BTd @ p_out_kd.T, x_BTk)

            output.register_hook(backward)

        return forward

    def __call__(self, ids_BT: torch.Tensor, tokens: list[int]) -> NDArray[np.float32]:
        """Features (B, F) of a batch that is padded on the right: one module after the other, its rows first."""
        self._sums = [torch.zeros(len(tokens), *part.shape[1:], device=part.device) for part in self._sums]
        document_losses(self.model, ids_BT, tokens).sum().backward()
        features: NDArray[np.float32] = torch.cat([part.flatten(1).cpu() for part in self._sums], dim=1).numpy()
        return features


def _projection(width: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    """min(k, d) orthogonal rows of length √(d/k), uniform among all such, (k, d)."""
    rank = min(rank, width)
    q_dk, r_kk = torch.linalg.qr(torch.randn(width, rank, generator=generator))
    return (q_dk * r_kk.diagonal().sign()).T.contiguous() * (width / rank) ** 0.5


def logra_scores(config: LoGraConfig, request: Request) -> PerQuery:
    """Σ_m g_m(q)ᵀ (H_m + λ_m I)⁻¹ g_m(x) over the modules m, g_m the projected gradient of m.

    H_m = 1/N Σ_x g_m(x) g_m(x)ᵀ over the pool, and λ_m = ``damping`` times its mean eigenvalue, as in LogIX; without
    ``hessian`` Σ_m g_m(q)ᵀ g_m(x).

    Raises:
        InputError: it cannot fit on this machine, or the scorer has no such modules.
    """
    reading = Gradients(request)
    modules = linear_modules(reading.skeleton, config.modules, reading.located.spec)
    parts = blocks(modules, config.rank)
    stored = 4 * reading.rows * parts[-1].stop
    tokens = max(request.scorer.batch_tokens, reading.longest)
    watched = sum(min(config.rank, module.in_features) for module in modules.values())
    reading.check_room("logra", request.work, model=4 * (reading.count + tokens * watched), tokens=tokens,
                       backward=True, stored=stored)  # fmt: skip
    largest = max(part.stop - part.start for part in parts)
    need = stored + 8 * (4 * largest**2 + 2 * reading.rows * largest) if config.hessian else 0
    require_memory(need, torch.device("cpu"), "logra with its Hessian", f"{WAY_OUT}, or hessian: false")
    pool, queries = _projected(reading, config, request.work / "logra")
    with searching():
        query_QF = np.concatenate(queries)
        if config.hessian:
            pool = [np.concatenate(pool)]
            whiten(pool[0], query_QF, parts, config.damping)
        per_query = feature_scores(pool, query_QF, normalize=config.normalize, calibration=config.calibration)
    return *ids(reading), per_query


def _projected(reading: Gradients, config: LoGraConfig, out: Path) -> list[list[NDArray[np.float32]]]:
    """Features (n, F) of the shards of pool and queries."""
    projected = ProjectedGradients(reading.load(reading.located), which=config.modules, rank=config.rank,
                                   seed=config.seed, name=reading.located.spec)  # fmt: skip

    def features(documents: Tokenized, places: range, told: Told) -> NDArray[np.float32]:
        made = []
        for ids_BT, tokens in reading.batches(documents, places):
            made.append(projected(ids_BT, tokens))
            told(sum(tokens))
        return np.concatenate(made)

    identity = config.model_dump(mode="json", include={"modules", "rank", "seed"})
    return [reading.keep(out / side, documents, identity, partial(features, documents), label=f"logra {side}")
            for side, documents in reading.sides]  # fmt: skip


def whiten(pool_NF: NDArray[np.float32], query_QF: NDArray[np.float32], parts: list[slice], damping: float) -> None:
    """Multiply each module's features with (H + λI)^−½ in place, H of the pool alone: products become those with the
    inverse between them. The symmetric root leaves each coordinate nearest to what it was.
    """
    for part in parts:
        g_NF = pool_NF[:, part].astype(np.float64)
        h_FF = g_NF.T @ g_NF / len(g_NF)
        mean = np.trace(h_FF) / len(h_FF)
        if mean == 0:  # no document has a gradient here
            continue
        values_F, vectors_FF = np.linalg.eigh(h_FF)
        root_FF = (vectors_FF / np.sqrt(values_F.clip(min=0) + damping * mean)) @ vectors_FF.T
        pool_NF[:, part] = g_NF @ root_FF
        query_QF[:, part] = query_QF[:, part] @ root_FF
