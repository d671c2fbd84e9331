"""The difference of two models on the same items, and how far to trust it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from red.errors import REDError

REPLICATES = 4000  # the standard error is then known to about 1 %
DRAWS = 4_000_000  # indices that are drawn at once: 32 MB


@dataclass(frozen=True)
class Difference:
    """Student minus teacher. None where there is no number: one item only, or no standard error from the task."""

    value: float
    stderr: float | None
    low: float | None  # the 95 % interval
    high: float | None
    paired: bool  # resampled over the items both answered; else the two standard errors, as if they had read different items


def paired_difference(teacher: Sequence, student: Sequence, statistic: Callable[[np.ndarray], np.ndarray] | None = None, *,
                      replicates: int = REPLICATES, seed: int = 0) -> Difference:
    """Bootstrap over items (Efron, 1979): each replicate draws items with replacement and takes both models' scores of them.

    What makes an item hard for both cancels, so the error is smaller than that of two independent scores.

    Args:
        teacher, student: a number per item [n], or (sum, weight) pairs [n, 2], in the same order.
        statistic: of the mean [replicates], or of sum over weight; None takes it as it is.
        replicates: of the bootstrap; seed: of its draws.

    Raises:
        REDError: unequal numbers of items, or none.
    """
    first, second = np.asarray(teacher, float), np.asarray(student, float)
    if first.shape != second.shape or not len(first):
        raise REDError(f"A paired difference needs the same items of both models; there are {first.shape} and {second.shape} values.")
    if first.ndim == 1:
        first, second = (np.stack([values, np.ones_like(values)], -1) for values in (first, second))
    statistic = statistic or (lambda mean: mean)
    whole = [statistic(values[:, 0].sum() / values[:, 1].sum()) for values in (first, second)]
    value, count = float(whole[1] - whole[0]), len(first)
    if count == 1 or not math.isfinite(value):
        return Difference(value, None, None, None, True)
    rng, found = np.random.default_rng(seed), []
    while (left := replicates - sum(map(len, found))) > 0:
        chosen = rng.integers(count, size=(min(left, max(1, DRAWS // count)), count))
        scores = [statistic(values[chosen, 0].sum(-1) / values[chosen, 1].sum(-1)) for values in (first, second)]
        found.append(scores[1] - scores[0])
    draws = np.concatenate(found)
    low, high = np.quantile(draws, (0.025, 0.975))
    return Difference(value, float(draws.std(ddof=1)), float(low), float(high), True)


def unpaired_difference(teacher: float, student: float, errors: tuple[float | None, float | None]) -> Difference:
    """Where the items' own scores are not to be had: `sqrt(e² + e²)`, which is too large for scores of the same items."""
    value = student - teacher
    if any(not isinstance(error, (int, float)) or not math.isfinite(error) for error in errors):
        return Difference(value, None, None, None, False)
    error = math.hypot(*errors)
    return Difference(value, error, value - 1.96 * error, value + 1.96 * error, False)


def ratio_error(sums: np.ndarray, weights: np.ndarray) -> float | None:
    """Standard error of `Σ sums / Σ weights` when whole documents, not tokens, are what was drawn: linearised ratio estimator.

    Tokens of one document are alike, so counting each as independent would make the error too small.
    """
    count = len(sums)
    if count < 2:
        return None
    residual = sums - sums.sum() / weights.sum() * weights
    return float(math.sqrt(count / (count - 1) * (residual**2).sum()) / weights.sum())
