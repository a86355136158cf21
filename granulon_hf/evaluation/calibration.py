"""What a few human labels say about a judge: means without its bias, and whether it favors long answers.

The labeled answers have to be a random sample of those that were judged.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from granulon_hf.stats import SAME

Estimate = tuple[float, float | None, float | None]


@dataclass
class Calibration:
    """Means over all judged answers, with 95 % intervals.

    Args:
        n_labels, n_rest (`int`): answers with a label, and those that the judge alone scored.
        judge (`float`): the judge's own mean, over all of them.
        labels (`tuple`): mean of the labels alone, and its interval, None and None where nothing varies.
        corrected (`tuple`): prediction-powered mean, and its interval.
        weight (`float`): how much the judge counts in it, 0 (labels alone) to 1.
    """

    n_labels: int
    n_rest: int
    judge: float
    labels: Estimate
    corrected: Estimate
    weight: float


def group_sums(values: np.ndarray, groups: Sequence[Hashable]) -> np.ndarray:
    """Add up values [N x ...] by group: answers about one image are not independent."""
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    sums = np.zeros((len(places), *values.shape[1:]))
    np.add.at(sums, [places[group] for group in groups], values)
    return sums


def prediction_powered_mean(
    human: Sequence[float],
    judge: Sequence[float],
    rest: Sequence[float],
    groups: Sequence[Hashable] | None = None,
) -> Calibration | None:
    """Estimate the mean that people would give, by the few labels that there are and the judge's scores of all.

    The labels' mean is moved by what the judge says of the rest: `mean(human) + w (mean(rest) - mean(judge))`, with the weight
    `w` that makes the variance smallest. It is unbiased whatever the judge's errors are, and the better the judge, the shorter
    the interval. This is PPI++ (Angelopoulos, Duchi and Zrnic 2023, arXiv:2311.01453) after prediction-powered inference
    (Angelopoulos et al. 2023, Science 382, arXiv:2301.09633), with Student's t for few labels, and sums by group.

    Args:
        human, judge (`list[float]`): scores of the labeled answers, in the same order.
        rest (`list[float]`): the judge's scores of the others.
        groups (`list`, *optional*): what belongs together, such as images, of the labeled answers and then the others.

    Returns:
        `Calibration`, or None for labels of fewer than two groups.
    """
    y, f, u = (np.asarray(values, dtype=float) for values in (human, judge, rest))
    names = list(groups) if groups is not None else list(range(len(y) + len(u)))
    n_groups = len(set(names[: len(y)]))
    if n_groups < 2:
        return None
    every = np.concatenate([f, u])
    varies = len(u) and every.var() > 0
    weight = float(np.clip(np.cov(y, f)[0, 1] / ((1 + len(y) / len(u)) * every.var(ddof=1)), 0, 1)) if varies else 0.0
    t = float(stats.t.ppf(0.975, n_groups - 1))

    def estimate(w: float) -> Estimate:
        corrected = y - w * f
        mean = float(corrected.mean() + (w * u.mean() if w else 0.0))
        # Of each answer, what it moves the mean by.
        influence = np.concatenate([(corrected - corrected.mean()) / len(y), w * (u - u.mean()) / len(u) if w else 0 * u])
        variance = (group_sums(influence, names) ** 2).sum() * n_groups / (n_groups - 1)
        half = t * float(variance) ** 0.5
        return (mean, mean - half, mean + half) if half > SAME else (mean, None, None)

    return Calibration(len(y), len(u), float(every.mean()), estimate(0.0), estimate(weight), weight)


def length_bias(
    human: Sequence[float], judge: Sequence[float], words: Sequence[int], groups: Sequence[Hashable]
) -> tuple[float, float, float] | None:
    """Return by how many points the judge's error changes with every 100 words at equal human label, and its 95 % interval.

    A least-squares fit of judge - human to the label and the number of words; the interval allows for errors of unequal size
    (HC3), and for groups. None where the answers are too few, do not differ in length, or the judge's errors do not differ.
    """
    y, n_groups = np.asarray(human, dtype=float), len(set(groups))
    error = np.asarray(judge, dtype=float) - y
    if n_groups < 6 or np.ptp(error) <= SAME:
        return None
    columns = [np.ones(len(y)), np.asarray(words) / 100, *([y] if np.ptp(y) else [])]
    x = np.stack(columns, axis=1)
    if np.linalg.matrix_rank(x) < x.shape[1]:
        return None
    inverse = np.linalg.inv(x.T @ x)
    coefficients = inverse @ x.T @ error
    residuals = error - x @ coefficients
    leverage = np.einsum("ij,jk,ik->i", x, inverse, x)
    scores = group_sums(x * (residuals / np.maximum(1 - leverage, 1e-9))[:, None], groups)
    deviation = float((inverse @ scores.T @ scores @ inverse)[1, 1]) ** 0.5
    half = float(stats.t.ppf(0.975, n_groups - x.shape[1])) * deviation
    return float(coefficients[1]), float(coefficients[1]) - half, float(coefficients[1]) + half
