"""Intervals and tests of scores, by cluster where samples share one (seed 0, so that a table is the same each time it is made).

Questions about one image stand or fall together: taken as independent they give intervals that are too narrow. So what is drawn
and what is swapped are clusters, such as all samples of an image.

A score is a mean, plain or with weights. Precision, F1 or an accuracy of pairs are means with weights too: each is a sum of
what counts over a sum of what could have, and a sample's weight is its part of the latter.
"""

import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np

N_RESAMPLES = 2000
DRAWN = 2**22  # numbers that are drawn at once, which bounds memory
SAME = 1e-9  # between what would be equal but for rounding
Numbers = Sequence[float]


def clusters_of(keys: Iterable[Iterable[Hashable]]) -> list[int]:
    """Number the clusters of samples: whoever shares a key with another, directly or through others, is in its cluster."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    listed = list(keys)
    count, known = len(listed), dict[Hashable, int]()
    pairs = [(i, known.setdefault(key, len(known))) for i, own in enumerate(listed) for key in own]
    rows, columns = np.array(pairs, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns + count)), shape=(count + len(known),) * 2)
    return connected_components(graph, directed=False)[1][:count].tolist()


def bootstrap_mean(
    values: Numbers,
    clusters: Sequence[int] | None = None,
    weights: Numbers | None = None,
    n_resamples: int = N_RESAMPLES,
    top: float = 1.0,
) -> tuple[float, float, float]:
    """Return the mean and its 95 % bootstrap interval over clusters: not a number with a single cluster.

    Percentiles are those of Hesterberg's expanded interval (2015, "What Teachers Should Know About the Bootstrap"), as wide as
    Student's t: plain percentiles of few clusters are too close. Where all clusters have the same mean no resample differs, and
    there is no interval; but where all values are 0, or all are the highest, the other end is that of Clopper and Pearson's
    interval, with clusters as trials.

    Args:
        values (`list[float]`): of the samples.
        clusters (`list[int]`, *optional*): the cluster of each; by default each is its own.
        weights (`list[float]`, *optional*): of the samples in the mean, 0 for what does not count.
        n_resamples (`int`): of the bootstrap.
        top (`float`): the highest value that there can be.

    Raises:
        ValueError: there are no values.
    """
    sums = cluster_sums(clusters, (values, weights))
    mean = float(ratio(*sums.sum(1)))
    low, high = interval(ratio, sums, mean, n_resamples)
    if high - low <= SAME * top:
        bound = top * 0.025 ** (1 / np.count_nonzero(sums[1]))
        low, high = (0.0, top - bound) if mean == 0 else (bound, top) if mean == top else (np.nan, np.nan)
    return mean, low, high


def paired_difference(
    a: Numbers,
    b: Numbers,
    clusters: Sequence[int] | None = None,
    weights: Numbers | None = None,
    base_weights: Numbers | None = None,
    n_resamples: int = N_RESAMPLES,
) -> tuple[float, float, float, float]:
    """Return the mean of a minus that of b over the same samples, its 95 % interval, and the p-value of a permutation test.

    The test swaps a and b in all samples of a cluster at once, which for plain means is to flip signs of differences.

    Raises:
        ValueError: the lengths differ, or there are no values.
    """
    if len(a) != len(b):
        raise ValueError(f"Paired scores need the same samples; got {len(a)} and {len(b)}.")
    sums = cluster_sums(clusters, (a, weights), (b, base_weights))

    def change(*sums, axis=None):
        return ratio(*sums[:2], axis=axis) - ratio(*sums[2:], axis=axis)

    found = float(change(*sums.sum(1)))
    low, high = interval(change, sums, found, n_resamples)
    rng, own, base = np.random.default_rng(0), sums[:2], sums[2:]
    beyond, portion = 0, max(1, DRAWN // sums.shape[1])
    for start in range(0, n_resamples, portion):
        shape = (min(portion, n_resamples - start), sums.shape[1])
        swapped = (rng.choice([-1.0, 1.0], size=shape) < 0) @ (base - own).T
        permuted = change(*(own.sum(1) + swapped).T, *(base.sum(1) - swapped).T)
        # A side without anything that counts is no smaller a difference.
        beyond += int((~(np.abs(permuted) < abs(found) - 1e-12)).sum())
    return found, low, high, (1 + beyond) / (1 + n_resamples)


def cluster_sums(clusters: Sequence[int] | None, *scored: tuple[Numbers, Numbers | None]) -> np.ndarray:
    """Add up, cluster by cluster, weighted values and weights of each side [2 · sides x clusters]."""
    if not len(scored[0][0]):
        raise ValueError("There is nothing to average.")
    _, places = np.unique(np.arange(len(scored[0][0])) if clusters is None else clusters, return_inverse=True)
    rows = []
    for values, weights in scored:
        weight = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
        rows += [np.bincount(places, weight * np.asarray(values, dtype=float)), np.bincount(places, weight)]
    return np.stack(rows)


def ratio(numerators: np.ndarray, denominators: np.ndarray, axis: int | None = None) -> Any:
    """Divide sums, which are along an axis yet to be made; not a number where nothing counts."""
    if axis is not None:
        numerators, denominators = numerators.sum(axis), denominators.sum(axis)
    with np.errstate(invalid="ignore"):
        return np.divide(numerators, denominators)


def interval(statistic: Any, sums: np.ndarray, found: float, n_resamples: int) -> tuple[float, float]:
    """Return the 95 % interval of a statistic of sums over clusters, which are drawn with replacement."""
    count = sums.shape[1]
    if count < 2 or np.isnan(found):
        return float("nan"), float("nan")
    drawn = resampled(statistic, tuple(sums), n_resamples, paired=True, batch=max(1, DRAWN // count))
    low, high = np.nanquantile(drawn, tails(count))
    return float(low), float(high)


def resampled(statistic: Any, data: tuple[np.ndarray, ...], n_resamples: int, **options: Any) -> np.ndarray:
    """Return a statistic of resamples of clusters."""
    from scipy.stats import bootstrap

    options |= {"method": "percentile", "rng": np.random.default_rng(0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scipy, about resamples in which nothing counts
        return bootstrap(data, statistic, n_resamples=n_resamples, **options).bootstrap_distribution


def tails(count: int) -> tuple[float, float]:
    """Return the quantiles of resamples of so many clusters that are an interval's ends."""
    from scipy.stats import norm, t

    tail = float(norm.cdf(-np.sqrt(count / (count - 1)) * t.ppf(0.975, count - 1)))
    return tail, 1 - tail


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], clusters: Sequence[int], n_resamples: int = N_RESAMPLES
) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval over clusters of a statistic that is no ratio of sums, such as a rank correlation.

    None where there is a single cluster, where all resamples agree, or where one of them has no such statistic (NaN).

    Args:
        statistic (`Callable`): takes the places of the samples that are drawn, with repetitions.
        clusters (`list[int]`): the cluster of each sample.
        n_resamples (`int`): of the bootstrap.
    """
    names, own = np.unique(clusters, return_inverse=True)
    if len(names) < 2:
        return None

    def of_clusters(drawn: np.ndarray) -> float:
        return statistic(np.repeat(np.arange(len(own)), np.bincount(drawn, minlength=len(names))[own]))

    found = resampled(of_clusters, (np.arange(len(names)),), n_resamples, vectorized=False)
    low, high = np.quantile(found, tails(len(names)))
    return (float(low), float(high)) if high - low > SAME else None


def estimate(
    values: Numbers, clusters: Sequence[int] | None = None, weights: Numbers | None = None, top: float = 1.0
) -> dict[str, Any]:
    """Return the `score` of samples with its interval, `low` to `high`; None for what there is none of, as in JSON."""
    return named(("score", "low", "high"), bootstrap_mean(values, clusters, weights, top=top))


def difference(
    values: Numbers,
    base: Numbers,
    clusters: Sequence[int] | None = None,
    weights: Numbers | None = None,
    base_weights: Numbers | None = None,
) -> dict[str, Any]:
    """Return the `difference` of paired scores with its interval, `difference_low` to `difference_high`, and `p`."""
    names = ("difference", "difference_low", "difference_high", "p")
    return named(names, paired_difference(values, base, clusters, weights, base_weights))


def named(names: Sequence[str], found: Sequence[float]) -> dict[str, Any]:
    return {name: None if np.isnan(value) else value for name, value in zip(names, found, strict=True)}
