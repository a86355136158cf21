"""Intervals and tests of means (seed 0, so that a table is the same each time it is made)."""

from collections.abc import Sequence

import numpy as np

N_RESAMPLES = 2000


def bootstrap_mean(values: Sequence[float], n_resamples: int = N_RESAMPLES) -> tuple[float, float, float]:
    """Return the mean and its 95 % percentile bootstrap interval.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("There is nothing to average.")
    from scipy.stats import bootstrap

    data = np.asarray(values, dtype=float)
    mean = float(data.mean())
    if len(data) == 1:  # nothing varies; scipy refuses a single value
        return mean, mean, mean
    options = {"n_resamples": n_resamples, "method": "percentile", "rng": np.random.default_rng(0)}
    interval = bootstrap((data,), np.mean, **options).confidence_interval
    return mean, float(interval.low), float(interval.high)


def paired_difference(
    a: Sequence[float], b: Sequence[float], n_resamples: int = N_RESAMPLES
) -> tuple[float, float, float, float]:
    """Return the mean of a − b over the same samples, its 95 % interval, and the p-value of a sign-flip permutation test.

    Raises:
        ValueError: the lengths differ, or there are no values.
    """
    if len(a) != len(b):
        raise ValueError(f"Paired scores need the same samples; got {len(a)} and {len(b)}.")
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    mean, low, high = bootstrap_mean(difference, n_resamples)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(n_resamples, len(difference)))
    flipped = np.abs((signs * difference).mean(1))
    return mean, low, high, float((1 + (flipped >= abs(mean) - 1e-12).sum()) / (1 + n_resamples))


def estimate(values: Sequence[float]) -> dict[str, float]:
    """Return the `score` of samples with its interval, `low` to `high`."""
    return dict(zip(("score", "low", "high"), bootstrap_mean(values), strict=True))


def difference(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Return the `difference` of paired scores with its interval, `difference_low` to `difference_high`, and `p`."""
    names = ("difference", "difference_low", "difference_high", "p")
    return dict(zip(names, paired_difference(values, base), strict=True))
