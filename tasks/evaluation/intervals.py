"""Percentile bootstrap intervals over documents or questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.common.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from tasks.evaluation.config import EvaluationConfig


@dataclass(frozen=True)
class Estimate:
    """A metric's value and how far another sample of the same size might have moved it."""

    value: float
    """The metric over all samples."""
    stderr: float
    """Standard deviation of the metric over the bootstrap resamples."""
    low: float
    """Lower end of the percentile interval."""
    high: float
    """Upper end of the percentile interval."""
    n: int
    """Number of samples."""


def mean(scores: NDArray[np.float64], config: EvaluationConfig) -> Estimate:
    """The mean of ``scores`` (N,) with its interval.

    Raises:
        InputError: fewer than two scores.
    """
    return _bootstrap((scores,), lambda x, axis: x.mean(axis=axis), config)


def perplexity(nll: NDArray[np.float64], tokens: NDArray[np.int64], config: EvaluationConfig) -> Estimate:
    """exp(total NLL / total tokens) over documents, with its interval.

    Args:
        nll: summed negative log-likelihood of each document (N,), in nats.
        tokens: number of predicted tokens of each document (N,), all positive.
        config: resamples, confidence and seed.

    Raises:
        InputError: fewer than two documents.
    """
    import numpy as np

    return _bootstrap((nll, tokens), lambda x, t, axis: np.exp(x.sum(axis=axis) / t.sum(axis=axis)), config)


def _bootstrap(columns: tuple[NDArray[Any], ...], statistic: Callable[..., Any], config: EvaluationConfig) -> Estimate:
    import numpy as np
    from scipy.stats import bootstrap

    n = len(columns[0])
    if n < 2:
        raise InputError(f"an interval needs at least two samples, there are {n}; evaluate on more")
    result = bootstrap(
        columns, statistic, paired=True, vectorized=True, axis=-1, method="percentile",
        n_resamples=config.resamples, confidence_level=config.confidence, rng=np.random.default_rng(config.seed),
    )  # fmt: skip
    interval = result.confidence_interval
    return Estimate(
        float(statistic(*columns, axis=-1)), float(result.standard_error), float(interval.low), float(interval.high), n
    )
