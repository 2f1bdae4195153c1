"""The linear datamodeling score on games whose answer is known, and against scipy's Spearman."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr

from flows.lds_config import load
from tasks.common.errors import InputError
from tasks.selection.datamodeling import (
    datamodeling_score,
    half,
    noise,
    predictions,
    read_scores,
    spearman,
)
from tests.unit.test_retrieval import DOCUMENTS, QUERIES, scores_of, write_pool, write_scored

SUBSETS = 60
HALVES = [half(DOCUMENTS, subset, 7) for subset in range(SUBSETS)]


def game(scores_QN: NDArray[np.float64], *, seeds: int = 2, blur: float = 0.0, draw: int = 0) -> NDArray[np.float64]:
    """NLLs (S, R, Q) of a world in which every document takes its score off, and the seed adds noise."""
    exact_SQ = np.array([[5 - 0.01 * sum(row[places]) for row in scores_QN] for places in HALVES])
    return exact_SQ[:, None, :] + blur * np.random.default_rng(draw).normal(size=(SUBSETS, seeds, len(scores_QN)))


def take(scores_QN: NDArray[np.float64], nll_SRQ: NDArray[np.float64], **changed: float) -> tuple[float, float, float]:
    found = datamodeling_score(predictions(scores_QN, HALVES), nll_SRQ, resamples=60, seed=1,
                               confidence=changed.get("confidence", 0.95))  # fmt: skip
    return found.lds, found.low, found.high


def test_a_half_is_half_and_a_function_of_its_arguments_alone() -> None:
    np.random.seed(0)  # noqa: NPY002
    first = half(64, 3, 42)
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(first, half(64, 3, 42))
    assert len(first) == len(set(first.tolist())) == 32
    assert first.min() >= 0
    assert first.max() < 64
    assert np.array_equal(first, np.sort(first))
    assert len(half(7, 0, 0)) == 3
    assert not np.array_equal(first, half(64, 4, 42))
    assert not np.array_equal(first, half(64, 3, 43))
    drawn = np.bincount(np.concatenate([half(20, subset, 0) for subset in range(2000)]), minlength=20) / 2000
    assert np.abs(drawn - 0.5).max() < 5 * 0.5 / 2000**0.5, "every document is in about half of them"


def test_an_additive_game_has_score_one_whatever_the_scale() -> None:
    scores_QN = np.random.default_rng(0).normal(size=(QUERIES, DOCUMENTS))
    assert take(scores_QN, game(scores_QN)) == pytest.approx((1.0, 1.0, 1.0))
    assert take(3 * scores_QN + np.arange(QUERIES)[:, None], game(scores_QN))[0] == pytest.approx(1.0)
    assert take(-scores_QN, game(scores_QN))[0] == pytest.approx(-1.0)


def test_scores_of_other_documents_foretell_nothing() -> None:
    random = np.random.default_rng(1)
    scores_QN = random.normal(size=(QUERIES, DOCUMENTS))
    outcome_QS = -game(scores_QN).mean(axis=1).T
    found = [spearman(predictions(random.permuted(scores_QN, axis=1), HALVES), outcome_QS).mean() for _ in range(20)]
    # A Spearman over 60 subsets has a spread of 1/√59 = .13; the mean over 6 queries and 20 shuffles one of .012.
    assert abs(np.mean(found)) < 0.05
    assert max(map(abs, found)) < 0.3
    assert take(np.ones((QUERIES, DOCUMENTS)) / 3, game(scores_QN)) == (0.0, 0.0, 0.0), "it orders nothing"


def test_it_is_the_mean_of_scipys_spearman_over_the_queries() -> None:
    scores_QN = np.round(10 * scores_of(3))  # whole numbers: sums that tie do so exactly
    nll_SRQ = np.round(game(scores_of(4, pull=2.0), blur=0.02), 2)
    predicted_QS = predictions(scores_QN, HALVES)
    wanted = [spearmanr([scores_QN[query, places].sum() for places in HALVES], -nll_SRQ.mean(axis=1)[:, query])[0]
              for query in range(QUERIES)]  # fmt: skip
    assert take(scores_QN, nll_SRQ)[0] == pytest.approx(np.mean(wanted), abs=1e-12)
    assert 0.05 < np.mean(wanted) < 0.95
    tied = np.round(predicted_QS / 20)
    assert len(set(tied[0].tolist())) < SUBSETS
    assert spearman(tied, predicted_QS) == pytest.approx(
        [spearmanr(left, right)[0] for left, right in zip(tied, predicted_QS, strict=True)], abs=1e-12)  # fmt: skip


def test_the_interval_holds_the_score_and_narrows_with_the_confidence() -> None:
    scores_QN = np.random.default_rng(2).normal(size=(QUERIES, DOCUMENTS))
    nll_SRQ = game(scores_QN, blur=0.05)
    value, low, high = take(scores_QN, nll_SRQ)
    assert -1 < low < value < high < 1
    assert take(scores_QN, nll_SRQ) == (value, low, high)
    _, inner, outer = take(scores_QN, nll_SRQ, confidence=0.5)
    assert low < inner < outer < high


def test_the_interval_covers_chance_although_one_training_moves_all_queries_alike() -> None:
    """Queries that all answer alike: resampling them alone would give an interval of no width."""
    covered = 0
    for draw in range(20):
        random = np.random.default_rng(draw)
        scores_QN = np.tile(random.normal(size=DOCUMENTS), (QUERIES, 1))
        nll_SRQ = np.tile(random.normal(size=(SUBSETS, 1, 1)), (1, 1, QUERIES))
        _, low, high = take(scores_QN, nll_SRQ)
        covered += low <= 0 <= high
    assert covered >= 16, "of 20 at 95 %"


def test_the_ceiling_is_what_exact_foresight_reaches() -> None:
    scores_QN = np.random.default_rng(5).normal(size=(40, DOCUMENTS))
    sharp = noise(game(scores_QN))
    assert (sharp.reliability, sharp.ceiling) == (pytest.approx(1.0), pytest.approx(1.0))
    assert sharp.within == pytest.approx(0.0, abs=1e-12)
    for seeds in (2, 4):
        blurred = game(scores_QN, seeds=seeds, blur=0.03)
        found = noise(blurred)
        assert found.within == pytest.approx(0.03, rel=0.05)
        assert found.ceiling == pytest.approx(take(scores_QN, blurred)[0], abs=0.03)
    nothing = noise(np.random.default_rng(6).normal(size=(SUBSETS, 2, 40)))
    assert nothing.ceiling is not None
    assert nothing.ceiling < 0.35
    assert noise(game(scores_QN, seeds=1)).ceiling is None


def test_scores_are_read_by_id_and_one_ranking_stands_for_every_query(tmp_path: Path) -> None:
    pool, scores_QN = write_pool(tmp_path / "pool"), scores_of(1)
    assert np.array_equal(read_scores(pool, write_scored(tmp_path / "a", scores_QN, order=5)), scores_QN)
    alone = read_scores(pool, write_scored(tmp_path / "b", scores_QN, per_query=False))
    assert alone == pytest.approx(np.tile(scores_QN.mean(axis=0), (QUERIES, 1)))
    lacking = write_scored(tmp_path / "c", scores_QN) / "per_query.parquet"
    pq.write_table(pq.read_table(lacking).slice(1), lacking)
    with pytest.raises(InputError, match="6 queries and 40 documents"):
        read_scores(pool, lacking.parent)


@pytest.mark.parametrize("name", ["lds", "lds-paper"])
def test_the_committed_configurations(name: str) -> None:
    config = load(Path(__file__).parents[2] / "conf" / "studies" / f"{name}.yaml")
    assert config.name == name
    kinds = {method.method for method in config.methods.values()}
    assert {"random", "hidden", "rise"} <= kinds
    assert config.finetuning is not None
    assert config.finetuning.model == config.scorer.model


@pytest.mark.parametrize(("setting", "said"), [
    ("finetuning=null", "finetuning is needed"), ("finetuning.model=other", "must be the scorer's"),
    ("training_seeds=[1,1]", "training_seeds"), ("subsets=2", "greater than or equal to 3"),
    ("default=rise", "nothing is chosen"),
])  # fmt: skip
def test_a_bad_configuration_names_the_field(setting: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load(Path(__file__).parents[2] / "conf" / "studies" / "lds.yaml", (setting,))
