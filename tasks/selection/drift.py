"""How the documents of a run differ from those of earlier ones: their scores, their sources, and what was selected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BINS = 10
_LEAST = 1e-4
"""Share that an empty bin counts as, so that PSI is finite."""
READ = ("New documents against earlier ones, scored for the same queries: psi, the population stability index, says "
        "alike below 0.1 and different above 0.25; ks is the Kolmogorov-Smirnov distance, 0 to 1.")  # fmt: skip
"""What the figures mean."""


def psi(before: NDArray[np.float64], now: NDArray[np.float64]) -> float:
    """Population stability index Σ (p − q) ln(p / q) over the deciles of ``before`` (N,); ``now`` (M,)."""
    edges = np.unique(np.quantile(before, np.linspace(0, 1, _BINS + 1)[1:-1]))
    shares = []
    for values in (before, now):
        counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
        shares.append(np.maximum(counts / len(values), _LEAST))
    p, q = shares
    return float(((p - q) * np.log(p / q)).sum())


def drift(
    *, before: NDArray[np.float64], now: NDArray[np.float64], new: Mapping[str, int], selected: Mapping[str, int],
    selected_now: int, chosen: Sequence[str], chosen_before: Sequence[str] | None,
) -> dict[str, float]:  # fmt: skip
    """Figures of a run by name, in the order to be shown.

    Args:
        before: scores (N,) of the documents of earlier runs, for the same queries by the same index.
        now: scores (M,) of this run's documents.
        new: source → how many of them it has.
        selected: source → how many of the selected documents it has.
        selected_now: how many of the selected are of this run.
        chosen: ids of the selected documents.
        chosen_before: those of the selection published before; None without one.
    """
    from scipy.stats import ks_2samp

    figures: dict[str, float] = {}
    for name, values in (("new", now), ("earlier", before)):
        if len(values):
            figures |= {f"score {name} q{round(100 * q):02d}": float(value)
                        for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}  # fmt: skip
    if len(before) and len(now):
        figures["ks"] = float(ks_2samp(before, now, method="asymp").statistic)
        figures["psi"] = psi(before, now)
    for title, counts in (("new", new), ("selected", selected)):
        total = sum(counts.values())
        figures |= {f"share of {title}: {source}": count / total for source, count in sorted(counts.items())}
    if chosen:
        figures["share of the selection that is new"] = selected_now / len(chosen)
    if chosen and chosen_before is not None:
        figures["share of the selection that stayed"] = len({*chosen} & {*chosen_before}) / len(chosen)
    return figures
