"""TMC-Shapley and G-Shapley (Ghorbani and Zou 2019, Algorithms 1 and 2; Table 18).

A document's value is its marginal v_j − v_{j−1} along a permutation of the pool, averaged over permutations. v_j is the
utility once the first j players of the permutation have been trained on: the negative mean NLL of a query's tokens, for
each query. Values are linear in the utility, so a walk gives the values of every query, and their mean is the value for
the whole set of queries. A player is a document, or a chunk of documents that share its marginal alike.

What tells the two methods apart here. Algorithm 1 (TMC) trains a model to the end on every prefix; for a language
model that is out of the question, and what can be had is one pass: the scorer starts a permutation with its pretrained
weights and takes one step of SGD a player. That is Algorithm 2 (G-Shapley) with pretrained in place of random weights.
So with the same seed the two walk the same permutations through the same weights, and TMC is G-Shapley with truncation:
a permutation ends where the utility is within a tolerance of the full set's, and the players left get nothing. It is
cheaper and biased towards zero. The paper does not say how its two differ; its costs (equal memory, G-Shapley two to
four times the GPU-hours) are what this reading gives. In both the utility of a prefix depends on its order, which
Shapley's axioms do not know: values sum to the mean gain of whole passes (G-Shapley, exactly), and a permutation's late
steps start from weights that its early ones moved.

pyDVL 0.10 does not serve: its permutation sampler asks a utility for the value of every prefix as a set, one number,
from the beginning, which makes a walk quadratic in steps and a run a query, and the package pins numpy below 2.

Shape suffixes beside those of :mod:`tasks.scoring`: n players, S positions of queries.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.common.errors import InputError
from tasks.common.files import intact, whole_file
from tasks.common.models import torch_dtype
from tasks.common.progress import Progress
from tasks.common.usage import searching
from tasks.scoring.batching import Tokenized
from tasks.scoring.engine import Positions
from tasks.scoring.index import begin
from tasks.scoring.readout import Head
from tasks.scoring.rivals.gradients import Gradients, PerQuery, Told, document_gradient, document_losses, ids
from tasks.scoring.rivals.head import residuals

if TYPE_CHECKING:
    from tasks.scoring.config import GShapleyConfig, TmcShapleyConfig
    from tasks.scoring.methods import Request

PART_BYTES = {"cpu": 8 << 20}
"""Logits whose loss is taken at once. On a CPU a part that stays in its cache takes half the time of a larger one."""
Values = NDArray[np.float64]
Walk = Callable[[], Values]


class Game(Protocol):
    """A game whose coalition grows a player at a time, with a utility for each of Q queries."""

    @property
    def players(self) -> int:
        """n; players are counted from 0."""

    def start(self) -> Values:
        """Go back to the coalition of nobody; its utilities (Q,)."""

    def join(self, player: int) -> Values:
        """Add a player; the utilities (Q,) of the coalition with it."""


def walk(game: Game, order: NDArray[np.int64], *, within: tuple[float, float] | None = None, told: Told | None = None
         ) -> Values:  # fmt: skip
    """Marginals of the players along one order, (n, Q).

    Args:
        game: the game.
        order: all players.
        within: the full set's gain and a tolerance: the walk ends once the mean gain over the queries is less than the
            tolerance away from that of the full set, and the players left have the marginal 0; None goes to the end.
        told: told the players that are done.
    """
    none = before = game.start()
    marginal_nQ = np.zeros((game.players, len(none)))
    for place, player in enumerate(order.tolist()):
        if within is not None and abs(within[0] - float((before - none).mean())) < within[1]:
            if told is not None:
                told(len(order) - place)
            break
        after = game.join(player)
        marginal_nQ[player] = after - before
        before = after
        if told is not None:
            told(1)
    return marginal_nQ


def shapley(
    game: Game, *, permutations: int, seed: int, tolerance: float = 0.0, told: Told | None = None,
    keep: Callable[[int, Walk], Values] = lambda _, make: make(),
) -> Values:  # fmt: skip
    """Monte Carlo estimate of the Shapley values (n, Q): the mean of the marginals over random permutations.

    Args:
        game: the game.
        permutations: number of permutations.
        seed: decides them; permutation k is the same however many there are.
        tolerance: share of the full set's gain U(all) − U(none), the mean over the queries, within which a permutation
            is truncated; 0 truncates none. The first permutation is walked to its end, which gives U(all).
        told: told the players that are done.
        keep: handed the number of a permutation and what walks it; returns the marginals, of now or of before.
    """
    total_nQ, within = np.zeros(()), None
    for number in range(permutations):
        order = np.random.default_rng([seed, number + 1]).permutation(game.players)

        def make(order: NDArray[np.int64] = order, within: tuple[float, float] | None = within) -> Values:
            return walk(game, order, within=within, told=told)

        marginal_nQ = keep(number, make)
        if number == 0 and tolerance:
            gain = float(marginal_nQ.sum(axis=0).mean())
            within = gain, tolerance * abs(gain)
        total_nQ = total_nQ + marginal_nQ
    return total_nQ / permutations


def shapley_scores(config: TmcShapleyConfig | GShapleyConfig, request: Request) -> PerQuery:
    """The value of every document for every query; a chunk's is divided by its documents, so that all make up the gain.

    A permutation's marginals are on disk until all are there: a killed call goes on with the permutation it was at.

    Raises:
        InputError: the scorer cannot be used, it cannot fit on this machine, or a step of SGD diverges.
    """
    reading = Gradients(request)
    whole = np.random.default_rng(config.seed).permutation(len(reading.pool))
    players = [whole[start : start + config.chunk].tolist() for start in range(0, len(whole), config.chunk)]
    request.work.mkdir(parents=True, exist_ok=True)
    _check(config, reading, request, players)
    game: HeadGame | WholeGame
    if config.trained == "head":
        game = HeadGame(reading, players, config.learning_rate)
    else:
        game = WholeGame(reading, players, config.learning_rate)
    walks = request.work / config.method
    scorer = reading.scorer
    begin(walks, {"model": reading.located.digest, "precision": str(torch_dtype(scorer.precision)),
                  "batch_tokens": scorer.batch_tokens, **config.plain(),
                  **{side: documents.digest() for side, documents in reading.sides}})  # fmt: skip
    with searching(), Progress(config.method, config.permutations * len(players), "players",
                               report=request.report) as progress:  # fmt: skip

        def keep(number: int, make: Walk) -> Values:
            file = walks / f"{number:05d}.npy"
            if intact(file):
                progress.add(len(players))
            else:
                with whole_file(file, noted=True) as part, part.open("wb") as opened:
                    np.save(opened, make(), allow_pickle=False)
            kept: Values = np.load(file, allow_pickle=False)
            return kept

        value_nQ = shapley(game, permutations=config.permutations, seed=config.seed, told=progress.add, keep=keep,
                           tolerance=config.tolerance if config.method == "tmc-shapley" else 0.0)  # fmt: skip
    value_QN = np.zeros((len(reading.queries), len(reading.pool)), dtype=np.float32)
    for player, documents in enumerate(players):
        value_QN[:, documents] = value_nQ[player][:, None] / len(documents)
    shutil.rmtree(walks)
    return *ids(reading), value_QN


def _check(
    config: TmcShapleyConfig | GShapleyConfig, reading: Gradients, request: Request, players: list[list[int]]
) -> None:
    """Refuse what does not fit, before anything is loaded."""
    width = reading.skeleton.config.get_text_config().hidden_size
    vocabulary = len(reading.skeleton.get_output_embeddings().weight)
    tokens = max(sum(map(reading.pool.length, documents)) for documents in players)
    walks = 8 * len(players) * len(reading.queries)
    if config.trained == "head":
        # The scorer, two heads in float32, the hidden states, the queries' logits; the logits of a step.
        kept = 2 * vocabulary * width + width * (len(reading.pool.flat) + len(reading.queries.flat))
        model = reading.count * torch_dtype(reading.scorer.precision).itemsize
        model += 4 * (kept + vocabulary * len(reading.queries.flat))
    else:
        # Weights, those to go back to, the gradients of a document and of a chunk.
        model, tokens = 16 * reading.count, max(reading.longest, reading.scorer.batch_tokens)
    reading.check_room(config.method, request.work, model=model + 3 * walks, tokens=tokens,
                       backward=config.trained == "all", stored=config.permutations * walks)  # fmt: skip


class HeadGame:
    """Only W of z = W h + b is trained; the hidden states are read once and stay as they are. A tied head is untied.

    A step on a player is W ← W − η Σ_t g_t h_tᵀ in closed form, g_t = r_t / (positions of its document · documents),
    r_t = p_t − 1_{y_t} by the logits at this W. It moves W h_s of a query's position s by −η Σ_t ⟨h_s, h_t⟩ g_t: the
    queries' logits are carried along at T multiplications an entry in place of d.
    """

    def __init__(self, reading: Gradients, players: list[list[int]], rate: float) -> None:
        self._players, self._rate, self._name = players, rate, reading.located.spec
        readout = reading.readout
        self._bias = None if readout.head.bias is None else readout.head.bias.float()
        self._pretrained = readout.head.weight.float()
        self._head = replace(readout.head, weight=torch.empty_like(self._pretrained), bias=self._bias)
        self._pool, self._queries = self._read(reading, reading.pool), self._read(reading, reading.queries)
        self._starts = np.cumsum([0, *self._pool.lengths]).tolist()
        self._a_SV = torch.empty(len(self._queries.h_Td), len(self._pretrained), device=self._pretrained.device)

    @torch.inference_mode()
    def _read(self, reading: Gradients, documents: Tokenized) -> Positions:
        parts = list(reading.positions(documents, range(len(documents))))
        return Positions(torch.cat([part.h_Td.float() for part in parts]), torch.cat([part.label_T for part in parts]),
                         [length for part in parts for length in part.lengths])  # fmt: skip

    @property
    def players(self) -> int:
        """Chunks of documents."""
        return len(self._players)

    @torch.inference_mode()
    def start(self) -> Values:
        """The pretrained head."""
        self._head.weight.copy_(self._pretrained)
        torch.matmul(self._queries.h_Td, self._pretrained.T, out=self._a_SV)
        if self._bias is not None:
            self._a_SV += self._bias
        return _finite(self._utilities(), self._name)

    @torch.inference_mode()
    def join(self, player: int) -> Values:
        """One step on the documents of a chunk."""
        documents = self._players[player]
        places = [slice(self._starts[place], self._starts[place + 1]) for place in documents]
        h_Td = torch.cat([self._pool.h_Td[place] for place in places])
        label_T = torch.cat([self._pool.label_T[place] for place in places])
        counts = torch.tensor([self._pool.lengths[place] for place in documents])
        share_T1 = (1.0 / (counts * len(documents))).repeat_interleave(counts).unsqueeze(1).to(h_Td.device)
        g_TV = residuals(self._head.logits(h_Td), label_T, self._head).mul_(share_T1)
        self._head.weight.addmm_(g_TV.T, h_Td, alpha=-self._rate)
        self._a_SV.addmm_(self._queries.h_Td @ h_Td.T, g_TV, alpha=-self._rate)
        return _finite(self._utilities(), self._name)

    def _utilities(self) -> Values:
        rows = max(1, PART_BYTES.get(self._a_SV.device.type, 256 << 20) // (4 * self._a_SV.shape[1]))
        blocks = zip(self._a_SV.split(rows), self._queries.label_T.split(rows), strict=True)
        nll = [torch.nn.functional.cross_entropy(_logits(self._head, a_SV), label_S, reduction="none")
               for a_SV, label_S in blocks]  # fmt: skip
        parts = torch.cat(nll).double().split(self._queries.lengths)
        means: Values = torch.stack([part.sum() / max(1, len(part)) for part in parts]).cpu().numpy()
        return -means


def _logits(head: Head, a_TV: torch.Tensor) -> torch.Tensor:
    """z of a = W h + b: what :meth:`Head.logits` does after the product."""
    z_TV = a_TV if head.scale == 1.0 else a_TV * head.scale
    return z_TV if head.cap is None else torch.tanh(z_TV / head.cap) * head.cap


class WholeGame:
    """All parameters are trained, in float32; a step on a player is θ ← θ − η · the mean gradient of its documents."""

    def __init__(self, reading: Gradients, players: list[list[int]], rate: float) -> None:
        self._reading, self._players, self._rate = reading, players, rate
        self._model = reading.load(reading.located)
        self._parameters = list(self._model.parameters())
        self._pretrained = [parameter.detach().clone() for parameter in self._parameters]

    @property
    def players(self) -> int:
        """Chunks of documents."""
        return len(self._players)

    @torch.no_grad()
    def start(self) -> Values:
        """The pretrained weights."""
        for parameter, pretrained in zip(self._parameters, self._pretrained, strict=True):
            parameter.copy_(pretrained)
        return self._utilities()

    def join(self, player: int) -> Values:
        """One step on the documents of a chunk."""
        documents, pool = self._players[player], self._reading.pool
        step = document_gradient(self._model, self._parameters, pool.ids(documents[0]))
        for place in documents[1:]:
            for sum_, gradient in zip(step, document_gradient(self._model, self._parameters, pool.ids(place)),
                                      strict=True):  # fmt: skip
                sum_ += gradient
        with torch.no_grad():
            for parameter, gradient in zip(self._parameters, step, strict=True):
                parameter.sub_(gradient, alpha=self._rate / len(documents))
            return self._utilities()

    def _utilities(self) -> Values:
        queries = self._reading.queries
        batches = self._reading.batches(queries, range(len(queries)))
        losses: Values = torch.cat([document_losses(self._model, *batch) for batch in batches]).cpu().numpy()
        return _finite(-losses, self._reading.located.spec)


def _finite(utilities: Values, name: str) -> Values:
    if not np.isfinite(utilities).all():
        raise InputError("the queries' loss is not finite after a step of SGD; take a smaller one", file=name,
                         field="learning_rate")  # fmt: skip
    return utilities
