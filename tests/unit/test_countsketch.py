"""CountSketch over seeds: Proposition C.1 (unbiased, variance bound), Lemma D.2's setting, and fixed hashes."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.scoring.config import LmHeadConfig, SketchConfig
from tasks.scoring.countsketch import CountSketch, sparse_projection

SEEDS = 4000
FIXED_BUCKETS = [118, 1, 118, 78, 37, 58, 14, 80]
FIXED_SIGNS = [1, 1, -1, -1, -1, -1, 1, 1]
"""The first hashes of seed 42: an index of one version must be read by the next."""


def inner_products(x: np.ndarray, y: np.ndarray, width: int) -> np.ndarray:
    made = np.empty(SEEDS)
    for seed in range(SEEDS):
        sketch = CountSketch(len(x), width, seed=seed, family="test")
        made[seed] = np.dot(np.bincount(sketch.bucket, sketch.sign * x, width),
                            np.bincount(sketch.bucket, sketch.sign * y, width))  # fmt: skip
    return made


@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_inner_products_are_unbiased_and_within_the_variance_bound(width: int, kind: str) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 200))
    y += 0.5 * x
    if kind == "sparse":
        x[rng.permutation(200)[8:]] = 0.0
    made = inner_products(x, y, width)
    bound = (np.dot(x, x) * np.dot(y, y) + np.dot(x, y) ** 2) / width  # Eq. 19
    assert made.mean() == pytest.approx(np.dot(x, y), abs=4 * np.sqrt(bound / SEEDS))
    # The sample variance of 4,000 draws is within a few per cent of the true one, which Eq. 19 bounds.
    assert made.var() <= bound * 1.1
    assert made.var() >= bound * 0.2


def test_products_of_independent_sketches_are_unbiased() -> None:
    """Appendix D: the product of two independent sketched inner products is unbiased for the outer product's."""
    rng = np.random.default_rng(1)
    r, s = rng.normal(size=(2, 120))
    h, k = rng.normal(size=(2, 60))
    made = np.empty(SEEDS)
    for seed in range(SEEDS):
        residual, hidden = (CountSketch(n, 16, seed=seed, family=f) for n, f in ((120, "residual"), (60, "hidden")))
        a = np.dot(*(np.bincount(residual.bucket, residual.sign * x, 16) for x in (r, s)))
        b = np.dot(*(np.bincount(hidden.bucket, hidden.sign * x, 16) for x in (h, k)))
        made[seed] = a * b
    expected = np.dot(r, s) * np.dot(h, k)
    assert made.mean() == pytest.approx(expected, abs=4 * made.std() / np.sqrt(SEEDS))


def test_hashes_are_fixed_for_ever() -> None:
    sketch = CountSketch(8, 128, seed=42, family="residual")
    assert sketch.bucket.tolist() == FIXED_BUCKETS
    assert sketch.sign.astype(int).tolist() == FIXED_SIGNS


def test_hashes_are_uniform_and_families_independent() -> None:
    a, b = (CountSketch(200_000, 10, seed=1, family=family) for family in ("residual", "hidden"))
    assert np.bincount(a.bucket, minlength=10) == pytest.approx(20_000, rel=0.05)
    assert abs(a.sign.mean()) < 0.01
    assert abs(np.corrcoef(a.sign, b.sign)[0, 1]) < 0.01
    assert abs(np.corrcoef(a.bucket, a.sign)[0, 1]) < 0.01


def test_the_matrix_is_the_sketch() -> None:
    sketch = CountSketch(50, 7, seed=3, family="hidden")
    x = np.random.default_rng(2).normal(size=50)
    np.testing.assert_allclose(x @ sketch.matrix(), np.bincount(sketch.bucket, sketch.sign * x, 7), atol=1e-6)


@pytest.mark.parametrize(("dimension", "width"), [(30, 100), (100, 30), (64, 64)])
def test_a_sparse_projection_reads_every_coordinate_alike(dimension: int, width: int) -> None:
    terms = 4
    made = sparse_projection(dimension, width, seed=1, family="test", terms=terms)
    assert made.shape == (dimension, width)
    assert set(np.unique(np.abs(made * 2)).round(6)) <= {0.0, 1.0, 2.0, 3.0, 4.0}  # two entries of a column may meet
    single = np.stack([sparse_projection(dimension, width, seed=seed, family="test", terms=1) for seed in range(20)])
    assert set(np.unique(single)) == {-1.0, 0.0, 1.0}
    assert (np.abs(single).sum(axis=1) == 1).all()
    read = np.abs(single).sum(axis=2)
    assert read.max() - read.min() <= 1
    assert np.ptp(np.abs(single).sum(axis=(0, 2))) <= 20  # and not always the same ones more often


def test_a_sparse_projection_keeps_products() -> None:
    """E⟨Px, Py⟩ = K/D ⟨x, y⟩ over the seeds."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 40))
    projections = (sparse_projection(40, 120, seed=seed, family="test") for seed in range(500))
    made = np.array([(x @ one) @ (y @ one) for one in projections])
    assert made.mean() == pytest.approx(3 * (x @ y), abs=4 * made.std() / np.sqrt(len(made)))


def test_the_paper_s_sketch_is_called_as_before_the_third_channel() -> None:
    assert set(SketchConfig().plain()) == {"kr", "kh", "kg", "lambda_rh", "lambda_gh", "tau", "rho_cum", "min_top",
                                           "max_top", "alpha", "seed"}  # fmt: skip
    third = SketchConfig(km=7)
    assert third.plain()["km"] == 7
    assert SketchConfig(**third.plain()) == third
    assert (SketchConfig().dimension, third.dimension, third.shape) == (6144, 6151, "128/24/128+7")
    assert SketchConfig(lambda_rh=0, kg=0).silent
    assert not SketchConfig(lambda_rh=0, kg=0, km=1).silent


def test_the_lm_head_s_own_channel_reads_no_third_one() -> None:
    asked = LmHeadConfig(variant="sparse-sketch", sketch=SketchConfig(kr=8, kh=3, km=7))
    assert asked.channel().sketch.channels == {"rh": 24, "gh": 3, "mh": 0}
