"""RapidIn (Lin et al., 2024): inner products of per-example gradients that are kept in 65,536 numbers each; and ZO-Inf,
the same index from forward passes alone.

Written from the papers and read against the authors' public code (huawei-lin/RapidIn), which has no zeroth-order part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.common.models import Located, device, locate
from tasks.common.usage import searching
from tasks.scoring.batching import Tokenized, shards
from tasks.scoring.rivals.gradients import (
    WAY_OUT,
    Gradients,
    PerQuery,
    Told,
    document_gradient,
    document_losses,
    feature_scores,
    ids,
    skeleton,
)
from tasks.scoring.rivals.reading import require_memory
from tasks.scoring.rivals.similarity import kept

if TYPE_CHECKING:
    from tasks.scoring.config import RapidInConfig, ZoInfConfig
    from tasks.scoring.methods import Request


class Compression:
    """OPORP: shuffle a vector, flip random signs, cut it into K equal segments and sum each.

    The reference shuffles the vector itself, in λ rounds of a row and a column shuffle (it is read as a matrix whose
    shape is drawn anew for each), then multiplies with the signs and sums. Shuffles, signs and segments are the same
    for all vectors, so together they say for each entry to which sum it goes and with which sign. That is what is kept:
    the numbers of the segments are put through the shuffles once (a shuffle's inverse is drawn just as it is), and a
    vector is added to the sums entry by entry, without a copy that is shuffled. The sum is the same. It is linear, and
    E⟨c(x), c(y)⟩ = ⟨x, y⟩ over the signs; with K at least the vector's length every entry has a sum of its own, and the
    product is exact. On a GPU the order of the additions is not fixed, and with it the last bit.
    """

    def __init__(self, count: int, k: int, *, shuffles: int, seed: int, where: torch.device) -> None:
        self.k = k
        rng = np.random.default_rng(seed)
        segment = -(-count // k)  # the vector is padded with zeros up to K equal segments
        places = np.repeat(np.arange(k, dtype=np.int32), segment)
        factors = _prime_factors(len(places))
        for _ in range(shuffles):
            rows = _divisor(factors, rng)
            places = places.reshape(rows, -1)[rng.permutation(rows)]
            columns = _divisor(factors, rng)
            places = np.take(places.reshape(-1, columns), rng.permutation(columns), axis=1)
        places = places.reshape(-1)[:count]
        places[rng.integers(0, 2, count, dtype=np.int8) == 1] += np.int32(k)  # these are taken off
        self._places = torch.from_numpy(places).to(where)

    def __call__(self, parts: Iterable[torch.Tensor]) -> NDArray[np.float32]:
        """c of a vector given in parts (tensors of any shape, one after the other), (K,)."""
        sums = torch.zeros(2 * self.k, device=self._places.device)
        start = 0
        for part in parts:
            flat = part.reshape(-1).to(sums.device)
            sums.index_add_(0, self._places[start : start + len(flat)], flat)
            start += len(flat)
        compressed: NDArray[np.float32] = (sums[: self.k] - sums[self.k :]).cpu().numpy()
        return compressed


def _prime_factors(number: int) -> list[int]:
    factors: list[int] = []
    divisor = 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return [*factors, number] if number > 1 else factors


def _divisor(factors: list[int], rng: np.random.Generator) -> int:
    """The product of a quarter to a half of the prime factors, drawn at random."""
    count = int(rng.integers(len(factors) // 4, len(factors) // 2 + 1))
    return math.prod(rng.permutation(factors)[:count].tolist())


def rapidin_scores(config: RapidInConfig, request: Request) -> PerQuery:
    """Σ_c η_c ⟨c(g_c(x)), c(g_c(q))⟩ over the checkpoints c (TracIn), g the gradient of ℓ by all parameters.

    Without ``checkpoints`` the scorer is the only one, with η = 1. As in the reference each parameter's gradient is
    first scaled to unit length (``layer_normalize``).

    Raises:
        InputError: it cannot fit on this machine, or a checkpoint has other parameters than the scorer.
    """
    reading = Gradients(request)
    checkpoints = [locate(spec) for spec in config.checkpoints] or [reading.located]
    for checkpoint in checkpoints:
        if _shapes(skeleton(checkpoint)) != _shapes(reading.skeleton):
            raise InputError("has other parameters than the scorer, whose checkpoint it shall be", file=checkpoint.spec,
                             field="checkpoints")  # fmt: skip
    # Weights, gradients and the segments' numbers; these stand twice while they are shuffled, before any gradient.
    reading.check_room("rapidin", request.work, model=12 * reading.count, tokens=reading.longest, backward=True,
                       stored=4 * config.k * reading.rows * len(checkpoints))  # fmt: skip
    per_query = np.zeros((len(reading.queries), len(reading.pool)), dtype=np.float32)
    for number, rate in enumerate(config.learning_rates or [1.0] * len(checkpoints)):
        pool, queries = _compressed(reading, checkpoints[number], config, request.work / "rapidin" / f"{number}")
        with searching():
            per_query += np.float32(rate) * feature_scores(pool, np.concatenate(queries), normalize=config.normalize,
                                                           calibration=config.calibration)  # fmt: skip
    return *ids(reading), per_query


def _shapes(model: torch.nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in model.named_parameters()]


def _compressed(
    reading: Gradients, checkpoint: Located, config: RapidInConfig, out: Path
) -> list[list[NDArray[np.float32]]]:
    """c(g(x)) (n, K) of the shards of pool and queries at one checkpoint, made document by document."""
    compression = Compression(reading.count, config.k, shuffles=config.shuffles, seed=config.seed, where=device())
    model = reading.load(checkpoint)
    parameters = list(model.parameters())

    def gradients(documents: Tokenized, places: range, told: Told) -> NDArray[np.float32]:
        rows = []
        for place in places:
            gradient: Iterable[torch.Tensor] = document_gradient(model, parameters, documents.ids(place))
            if config.layer_normalize:
                gradient = (torch.nn.functional.normalize(part.reshape(-1), dim=0) for part in gradient)
            rows.append(compression(gradient))
            told(documents.length(place))
        return np.stack(rows)

    identity = {"checkpoint": checkpoint.digest,
                **config.model_dump(mode="json", include={"k", "shuffles", "layer_normalize", "seed"})}
    return [reading.keep(out / side, documents, identity, partial(gradients, documents), label=f"rapidin {side}")
            for side, documents in reading.sides]  # fmt: skip


def zo_inf_scores(config: ZoInfConfig, request: Request) -> PerQuery:
    """⟨ĝ(x), ĝ(q)⟩ with ĝ(x) = c(1/n Σ_j d_j(x) z_j), d_j(x) = (ℓ(x; θ + εz_j) − ℓ(x; θ − εz_j)) / 2ε, z_j ~ N(0, I).

    The n directions are the same for all documents. Were each document given its own, ⟨ĝ(x), ĝ(q)⟩ would have the
    right mean, but a deviation of about ‖g(x)‖‖g(q)‖ √P/n for P parameters, which drowns it. Shared ones have one of at
    most ‖g(x)‖‖g(q)‖ √(2/n), after the factor (P + n + 1)/n is taken off by which the product's mean is too large:
    E d_j(x) d_j(q) ‖z_j‖² = (P + 2) ⟨g(x), g(q)⟩, and E d_j(x) d_k(q) ⟨z_j, z_k⟩ = ⟨g(x), g(q)⟩.

    ĝ is linear in the n numbers d_j, so the losses are all that is kept of a document: ⟨ĝ(x), ĝ(q)⟩ = d(x)ᵀ G d(q) / n²
    with G_jk = ⟨c(z_j), c(z_k)⟩ is what the K numbers would give. The directions come from seeded generators and are
    never stored. RapidIn's ``layer_normalize`` has no part here: z_j spreads evenly over the parameters, so what it
    would leave is the cosine of d, which ``normalize`` gives.

    Raises:
        InputError: it cannot fit on this machine.
    """
    reading = Gradients(request)
    # Weights and a copy of them, then the segments' numbers twice.
    reading.check_room("zo-inf", request.work, model=8 * reading.count, backward=False,
                       tokens=max(request.scorer.batch_tokens, reading.longest),
                       stored=16 * config.samples * reading.rows)  # fmt: skip
    if config.calibration != "none":
        require_memory(4 * reading.rows * config.k, torch.device("cpu"), "zo-inf with a calibration", WAY_OUT)
    pool_Nj, query_Qj = _slopes(reading, config, request)
    with searching():
        basis_jF = _directions(reading, config) / math.sqrt(config.samples * (reading.count + config.samples + 1))
        pool = [(part @ basis_jF).astype(np.float32) for part in np.array_split(pool_Nj, -(-len(pool_Nj) // 256))]
        per_query = feature_scores(pool, query_Qj @ basis_jF, normalize=config.normalize,
                                   calibration=config.calibration)  # fmt: skip
    return *ids(reading), per_query


def direction(config: ZoInfConfig, sample: int, parameters: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """z_j, parameter by parameter: drawn on the CPU, so that it is the same on every machine."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([config.seed, sample]).generate_state(1)[0]))
    for parameter in parameters:
        yield torch.randn(parameter.shape, generator=generator)


def _slopes(reading: Gradients, config: ZoInfConfig, request: Request) -> list[NDArray[np.float64]]:
    """d (N, n) of pool and queries: directional derivatives by central differences, a pass for each j and sign."""
    model = reading.load(reading.located)
    origins = [parameter.detach().clone() for parameter in model.parameters()]
    passes = [(sample, sign) for sample in range(config.samples) for sign in (1, -1)]

    @torch.no_grad()
    def move(sample: int, sign: int) -> None:
        """Set the weights to θ ± εz_j, from θ itself: adding and taking off would leave rounding behind."""
        moved = zip(model.parameters(), origins, direction(config, sample, origins), strict=True)
        for parameter, origin, z in moved:
            parameter.copy_(origin.add(z.to(origin.device), alpha=sign * config.epsilon))

    def losses(documents: Tokenized) -> Callable[[range, Told], NDArray[np.float64]]:
        """ℓ at the rows of a shard, of all passes one after the other."""
        standing = -1

        @torch.inference_mode()
        def make(places: range, told: Told) -> NDArray[np.float64]:
            nonlocal standing
            number, first = divmod(places.start, len(documents))
            if number != standing:
                move(*passes[number])
                standing = number
            made = []
            for ids_BT, tokens in reading.batches(documents, range(first, first + len(places))):
                made.append(document_losses(model, ids_BT, tokens).cpu().numpy())
                told(sum(tokens))
            return np.concatenate(made)

        return make

    slopes = []
    for side, documents in reading.sides:
        cut = [(shard, sum(documents.lengths(shard))) for shard in shards(documents, reading.scorer.shard_tokens)]
        starts = range(0, len(passes) * len(documents), len(documents))
        plan = [(range(start + shard.start, start + shard.stop), tokens) for start in starts for shard, tokens in cut]
        identity = {"model": reading.located.digest, "documents": documents.digest(),
                    **reading.scorer.model_dump(mode="json", include={"batch_tokens", "shard_tokens"}),
                    **config.model_dump(mode="json", include={"epsilon", "samples", "seed"})}  # fmt: skip
        parts = kept(request.work / "zo-inf" / side, identity, plan, losses(documents), label=f"zo-inf {side}",
                     unit="tokens", report=request.report)  # fmt: skip
        loss_jsN = np.concatenate(parts).reshape(config.samples, 2, len(documents))
        slopes.append((loss_jsN[:, 0] - loss_jsN[:, 1]).T / (2 * config.epsilon))
    return slopes


def _directions(reading: Gradients, config: ZoInfConfig) -> NDArray[np.float64]:
    """c(z_j), (n, K); without a calibration, which works on the K numbers, rows (n, n) with the same inner products."""
    compression = Compression(reading.count, config.k, shuffles=config.shuffles, seed=config.seed,
                              where=torch.device("cpu"))  # fmt: skip
    parameters = list(reading.skeleton.parameters())
    compressed_jK = np.stack([compression(direction(config, sample, parameters)) for sample in range(config.samples)])
    if config.calibration != "none":
        return compressed_jK.astype(np.float64)
    triangle_jj: NDArray[np.float64] = np.linalg.qr(compressed_jK.T.astype(np.float64)).R
    return triangle_jj.T
