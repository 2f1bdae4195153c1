"""TMC- and G-Shapley: games whose values are known, and training against torch's own optimiser."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from flows.cli import rise
from tasks.common.errors import InputError
from tasks.common.models import load_causal_lm, load_tokenizer, locate
from tasks.scoring.config import GShapleyConfig, MethodConfig, TmcShapleyConfig
from tasks.scoring.methods import score_pool
from tasks.scoring.rivals import gradients
from tasks.scoring.rivals.gradients import Gradients
from tasks.scoring.rivals.shapley import HeadGame, WholeGame, shapley, walk
from tests.golden.heads import HEADS
from tests.tiny import VOCAB, tiny_gpt_neox, tiny_llama, tiny_model
from tests.unit.test_gradient_rivals import SMALL, TEXTS, ask, matrix

Utility = Callable[[frozenset[int]], Sequence[float]]


class SetGame:
    """A game by the utilities of its coalitions; counts how many it was asked for."""

    def __init__(self, players: int, utility: Utility) -> None:
        self.players, self.utility, self.asked = players, utility, 0
        self.there: set[int] = set()

    def start(self) -> np.ndarray:
        self.there = set()
        return np.array(self.utility(frozenset()), dtype=float)

    def join(self, player: int) -> np.ndarray:
        assert player not in self.there
        self.there.add(player)
        self.asked += 1
        return np.array(self.utility(frozenset(self.there)), dtype=float)


WEIGHTS = [0.5, -2.0, 3.0, 0.0]


def additive(there: frozenset[int]) -> list[float]:
    return [1.0 + sum(WEIGHTS[player] for player in there)]


def gloves(there: frozenset[int]) -> list[float]:
    """Player 0 has a left glove, 1 and 2 a right one each."""
    return [float(0 in there and bool(there & {1, 2}))]


def voting(there: frozenset[int]) -> list[float]:
    """Majority of 4, 3, 2, 1 votes."""
    return [float(sum(4 - player for player in there) > 5)]


def both(there: frozenset[int]) -> list[float]:
    """Two queries."""
    return [*voting(there), sum(4.0 - player for player in there) ** 2]


KNOWN: dict[str, tuple[int, Utility, list[list[float]] | None]] = {
    "additive": (4, additive, [[weight] for weight in WEIGHTS]),
    "gloves": (3, gloves, [[2 / 3], [1 / 6], [1 / 6]]),
    "voting": (4, voting, [[5 / 12], [1 / 4], [1 / 4], [1 / 12]]),
    "both": (4, both, None),
}


def enumerated(players: int, utility: Utility) -> np.ndarray:
    """Shapley's formula over all coalitions, (n, Q)."""
    values = np.zeros((players, len(utility(frozenset()))))
    for player in range(players):
        others = [other for other in range(players) if other != player]
        for size in range(players):
            weight = math.factorial(size) * math.factorial(players - size - 1) / math.factorial(players)
            for some in combinations(others, size):
                there = frozenset(some)
                values[player] += weight * np.subtract(utility(there | {player}), utility(there))
    return values


@pytest.mark.parametrize("name", KNOWN)
def test_games_whose_values_are_known(name: str) -> None:
    players, utility, known = KNOWN[name]
    values = enumerated(players, utility)
    if known is not None:
        np.testing.assert_allclose(values, known)
    game = SetGame(players, utility)
    walks = np.array([walk(game, np.array(order)) for order in permutations(range(players))])
    np.testing.assert_allclose(walks.mean(axis=0), values)
    count = 2000
    drawn = shapley(game, permutations=count, seed=3)
    assert (np.abs(drawn - values) <= 4 * walks.std(axis=0) / count**0.5 + 1e-12).all()
    gain = np.subtract(utility(frozenset(range(players))), utility(frozenset()))
    np.testing.assert_allclose(drawn.sum(axis=0), gain)
    np.testing.assert_array_equal(drawn, shapley(game, permutations=count, seed=3))
    if name != "additive":
        assert (shapley(game, permutations=5, seed=3) != shapley(game, permutations=5, seed=4)).any()


def test_truncation_saves_utilities_and_gives_nothing_to_the_players_left() -> None:
    def saturating(there: frozenset[int]) -> list[float]:
        return [1.0 - 0.5 ** len(there)]

    whole, cut = SetGame(30, saturating), SetGame(30, saturating)
    exact = shapley(whole, permutations=40, seed=0)
    told: list[int] = []
    values = shapley(cut, permutations=40, seed=0, tolerance=0.05, told=told.append)
    assert whole.asked == 40 * 30
    assert cut.asked == 30 + 39 * 5  # 1 − 2^−5 is the first within 0.05 of the gain, at every permutation but the first
    assert sum(told) == 40 * 30
    assert exact.sum() == pytest.approx(1 - 0.5**30)
    assert 0.95 < values.sum() < exact.sum()
    np.testing.assert_array_equal(shapley(cut, permutations=1, seed=0, tolerance=0.05),
                                  shapley(whole, permutations=1, seed=0))  # fmt: skip
    first = walk(cut, np.arange(30), within=(1.0, 0.05))
    assert (first[:5] > 0).all()
    assert (first[5:] == 0).all()


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt_neox(tmp_path_factory.mktemp("neox"), **SMALL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"), **SMALL, num_key_value_heads=1)


def trained(model: Path, order: list[list[int]], *, rate: float, head: bool, pool: list[str]) -> np.ndarray:
    """−NLL per token of each query after torch.optim.SGD's step on each chunk of an order, (steps + 1, Q)."""
    located = locate(str(model))
    tokenizer, lm = load_tokenizer(located), load_causal_lm(located, dtype=torch.float32)
    output = lm.get_output_embeddings()
    if head:
        lm.requires_grad_(False)
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
    optimizer = torch.optim.SGD([p for p in lm.parameters() if p.requires_grad], lr=rate)

    def loss(text: str) -> torch.Tensor:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        return lm(input_ids=ids, labels=ids).loss

    def utilities() -> list[float]:
        with torch.no_grad():
            return [-loss(query).item() for query in TEXTS["queries"]]

    made = [utilities()]
    for chunk in order:
        optimizer.zero_grad()
        torch.stack([loss(pool[document]) for document in chunk]).mean().backward()
        optimizer.step()
        made.append(utilities())
    return np.array(made)


KINDS = ["llama tied", "phi with head bias", "gemma2 soft-capped", "granite divided logits"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_walk_of_the_head_is_that_of_torchs_sgd(kind: str, tmp_path: Path) -> None:
    config = HEADS[kind]()
    config.vocab_size = VOCAB
    model = tiny_model(tmp_path / "model", config)
    follow(model, tmp_path, head=True, rate=0.3)


@pytest.mark.parametrize("which", ["model", "untied"])
def test_a_walk_of_all_parameters_is_that_of_torchs_sgd(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    follow(request.getfixturevalue(which), tmp_path, head=False, rate=0.3)


def follow(model: Path, folder: Path, *, head: bool, rate: float) -> None:
    """Walk twice (the second must begin anew), by the game and by torch, chunks of one and of several documents."""
    reading = Gradients(ask(folder / "request", model))
    texts = {f"p{number}": text for number, text in enumerate(TEXTS["pool"])}
    chunks = [[0], [4, 1], [2, 3, 5]]
    game = (HeadGame if head else WholeGame)(reading, chunks, rate)
    order = [2, 0, 1]
    pool = [texts[doc_id] for doc_id in reading.pool.doc_ids]
    expected = trained(model, [chunks[player] for player in order], rate=rate, head=head, pool=pool)
    for _ in range(2):
        made = np.array([game.start(), *(game.join(player) for player in order)])
        np.testing.assert_allclose(made[:, np.argsort(reading.queries.doc_ids)], expected, atol=2e-5)
    assert np.abs(np.diff(expected, axis=0)).min() > 1e-3


FAST: dict[str, Any] = {"permutations": 3, "learning_rate": 0.1}
CONFIGS = [TmcShapleyConfig(**FAST, tolerance=0.5), GShapleyConfig(**FAST, trained="all", chunk=4)]


@pytest.mark.parametrize("config", CONFIGS, ids=["tmc", "g all chunk"])
def test_scores_do_not_depend_on_batches_or_order(config: MethodConfig, tmp_path: Path, model: Path) -> None:
    first = matrix(score_pool(config, ask(tmp_path / "first", model)))
    np.testing.assert_array_equal(matrix(score_pool(config, ask(tmp_path / "again", model, reverse=True))), first)
    other = matrix(score_pool(config, ask(tmp_path / "batches", model, batch_tokens=1)))
    np.testing.assert_allclose(other, first, atol=1e-5 * np.abs(first).max())
    assert (first != matrix(score_pool(config.model_copy(update={"seed": 1}), ask(tmp_path / "seed", model)))).any()


def test_values_add_up_to_the_mean_gain_and_a_chunk_shares_alike(tmp_path: Path, untied: Path) -> None:
    config = GShapleyConfig(**FAST, chunk=4)
    made = score_pool(config, ask(tmp_path / "request", untied, pool=[*TEXTS["pool"], "x"]))
    assert made.per_query is not None
    for row in made.per_query:
        assert sorted(np.unique(row, return_counts=True)[1].tolist()) == [3, 4]
    reading = Gradients(ask(tmp_path / "again", untied, pool=[*TEXTS["pool"], "x"]))
    texts = {f"p{number}": text for number, text in enumerate([*TEXTS["pool"], "x"])}
    players: dict[float, list[str]] = {}
    for doc_id, value in zip(made.doc_ids, made.per_query[0].tolist(), strict=True):
        players.setdefault(value, []).append(texts[doc_id])
    game = HeadGame(reading, [[0, 1, 2], [3, 4, 5, 6]], 0.1)
    assert game.players == len(players) == 2
    # Over the permutations of two chunks a pass ends at one of two utilities.
    ends = []
    for order in permutations(players.values()):
        pool = [text for chunk in order for text in chunk]
        places = [[pool.index(text) for text in chunk] for chunk in order]
        steps = trained_head(untied, places, pool)
        ends.append(steps[-1] - steps[0])
    gain = made.per_query.sum(axis=1)[np.argsort(made.query_ids)]
    share = np.array([k / 3 for k in range(4)])
    possible = share[:, None] * ends[0] + (1 - share)[:, None] * ends[1]
    assert np.abs(possible - gain).max(axis=1).min() < 1e-5


def trained_head(model: Path, order: list[list[int]], pool: list[str]) -> np.ndarray:
    """:func:`trained`, where a document of one token has the loss 0."""
    located = locate(str(model))
    tokenizer, lm = load_tokenizer(located), load_causal_lm(located, dtype=torch.float32)
    lm.requires_grad_(False)
    weight = lm.get_output_embeddings().weight.requires_grad_(True)

    def loss(text: str) -> torch.Tensor:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        return lm(input_ids=ids, labels=ids).loss if ids.shape[1] > 1 else weight.sum() * 0.0

    made = []
    for chunk in [None, *order]:
        if chunk is not None:
            mean = torch.stack([loss(pool[document]) for document in chunk]).mean()
            with torch.no_grad():
                weight -= 0.1 * torch.autograd.grad(mean, weight)[0]
        made.append([-loss(query).item() for query in TEXTS["queries"]])
    return np.array(made)


def test_tmc_is_g_until_it_is_cut(tmp_path: Path, model: Path) -> None:
    whole = matrix(score_pool(GShapleyConfig(**FAST), ask(tmp_path / "g", model)))
    same = matrix(score_pool(TmcShapleyConfig(**FAST, tolerance=0.0), ask(tmp_path / "tmc", model)))
    np.testing.assert_array_equal(same, whole)
    cut = matrix(score_pool(TmcShapleyConfig(**FAST, tolerance=0.6), ask(tmp_path / "cut", model)))
    assert (cut != whole).any()


@pytest.mark.parametrize("trained", ["head", "all"])
def test_a_document_of_one_token_has_the_value_zero(trained: Any, tmp_path: Path, model: Path) -> None:
    config = GShapleyConfig(**FAST, trained=trained)
    made = matrix(score_pool(config, ask(tmp_path / "one", model, pool=[*TEXTS["pool"], "x"])))
    assert (made[:, -1] == 0).all()
    assert (made[:, :-1] != 0).all()


def test_a_killed_call_goes_on(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TmcShapleyConfig(**FAST, tolerance=0.5)
    expected = score_pool(config, ask(tmp_path / "whole", model))
    request, join, calls = ask(tmp_path / "killed", model), HeadGame.join, 0

    def counted(game: HeadGame, player: int) -> np.ndarray:
        nonlocal calls
        if calls == 7:
            raise KeyboardInterrupt
        calls += 1
        return join(game, player)

    with monkeypatch.context() as killed:
        killed.setattr(HeadGame, "join", counted)
        with pytest.raises(KeyboardInterrupt):
            score_pool(config, request)
    assert [file.name for file in request.work.rglob("*.npy")] == ["00000.npy"]
    calls = -1000
    with monkeypatch.context() as goes_on:
        goes_on.setattr(HeadGame, "join", counted)
        np.testing.assert_array_equal(matrix(score_pool(config, request)), matrix(expected))
    assert calls + 1000 <= 12
    assert not list(request.work.rglob("*.npy"))


@pytest.mark.parametrize("trained", ["head", "all"])
def test_what_cannot_fit_is_refused_before_anything_is_loaded(
    trained: Any, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TmcShapleyConfig(**FAST, trained=trained)
    request = ask(tmp_path / "request", model)
    with monkeypatch.context() as little:
        free = psutil.virtual_memory()._replace(available=1 << 16)
        little.setattr(psutil, "virtual_memory", lambda: free)
        with pytest.raises(InputError, match=r"^.*out of memory: tmc-shapley needs about .* GiB, this machine has"):
            score_pool(config, request)
    with monkeypatch.context() as little:
        usage = gradients.shutil.disk_usage(tmp_path)._replace(free=0)
        little.setattr(gradients.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(InputError, match="out of disk: tmc-shapley"):
            score_pool(config, request)
    assert not list(request.work.iterdir())


@pytest.mark.parametrize("trained", ["head", "all"])
def test_a_step_that_diverges_is_refused(trained: Any, tmp_path: Path, model: Path) -> None:
    config = GShapleyConfig(permutations=1, learning_rate=1e38, trained=trained)
    with pytest.raises(InputError, match="not finite after a step of SGD; take a smaller one") as refused:
        score_pool(config, ask(tmp_path / "request", model))
    assert refused.value.field == "learning_rate"


def files(folder: Path, model: Path) -> list[str]:
    """Arguments of ``rise score`` for the texts."""
    made = {"--pool": folder / "pool.jsonl", "--queries": folder / "queries.jsonl", "--model": model,
            "--out": folder / "out.parquet", "--per-query": folder / "pairs.parquet"}  # fmt: skip
    for name, texts in TEXTS.items():
        made[f"--{name}"].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [str(part) for pair in made.items() for part in pair]


@pytest.mark.parametrize("method", ["tmc-shapley", "g-shapley"])
def test_rise_score_knows_the_method(method: str, tmp_path: Path, model: Path) -> None:
    options = ["--option", "permutations=2", "--option", "learning_rate=0.1", "--option", "chunk=2"]
    done = CliRunner().invoke(rise, ["score", "--method", method, *options, *files(tmp_path, model)])
    assert done.exit_code == 0, done.output
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["rank"].to_pylist() == list(range(1, 7))
    assert len(set(table["score"].to_pylist())) == 3
    assert len(pq.read_table(tmp_path / "pairs.parquet")) == 12


@pytest.mark.parametrize(("method", "option", "field"), [
    ("g-shapley", "tolerance=0.1", "field tolerance: Extra inputs are not permitted"),
    ("tmc-shapley", "tolerance=1", "field tolerance"), ("tmc-shapley", "trained=mlp", "field trained"),
    ("g-shapley", "chunk=0", "field chunk")])  # fmt: skip
def test_a_bad_option_is_one_line(method: str, option: str, field: str, tmp_path: Path, model: Path) -> None:
    done = CliRunner().invoke(rise, ["score", "--method", method, "--option", option, *files(tmp_path, model)])
    assert done.exit_code != 0
    assert isinstance(done.exception, InputError)
    assert field in str(done.exception)
    assert len(str(done.exception).splitlines()) == 1
    assert not (tmp_path / "out.parquet").exists()
