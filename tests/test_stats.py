"""Intervals and tests: against scipy, and on clustered data whose truth is known."""

import json
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from granulon_hf.evaluation.benchmark import cell_text
from granulon_hf.evaluation.tables import difference_text, score_text
from granulon_hf.stats import bootstrap_mean, clusters_of, difference, estimate, paired_difference

FAST = {"n_resamples": 400}


def test_interval_is_scipys():
    values = np.random.default_rng(1).normal(size=200)
    mean, low, high = bootstrap_mean(values)
    oracle = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=5000, random_state=1).confidence_interval
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((oracle.low, oracle.high), abs=0.02)
    with pytest.raises(ValueError, match="nothing"):
        bootstrap_mean([])


def test_paired_test_is_scipys():
    draw = np.random.default_rng(2)
    b = draw.normal(size=60)
    a = b + 0.15 + 0.5 * draw.normal(size=60)
    mean, low, high, p = paired_difference(a, b)
    oracle = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=9999, random_state=3
    )
    assert mean == pytest.approx(np.mean(a - b)) and low < mean < high
    assert p == pytest.approx(oracle.pvalue, abs=0.02)
    assert paired_difference(a, a)[3] == 1.0
    with pytest.raises(ValueError, match="same samples"):
        paired_difference([1], [1, 2])


def draw(rng, count, effect=0.0):
    """Right and wrong answers of two models to 1 to 11 questions about each of `count` images, some of which are hard."""
    clusters = np.repeat(np.arange(count), rng.integers(1, 12, count))
    easy, shift = rng.beta(0.8, 0.8, count)[clusters], (effect * rng.choice([-1, 1], count))[clusters]
    one, other = ((rng.random(len(clusters)) < np.clip(easy + move, 0, 1)).astype(float) for move in (shift, -shift))
    return one, other, clusters


@pytest.mark.parametrize("count", [12, 60])
def test_intervals_of_clusters_cover_and_those_of_samples_do_not(count):
    rng, hits = np.random.default_rng(count), {"clusters": 0, "samples": 0}
    for _ in range(500):
        values, _, clusters = draw(rng, count)
        for name, known in (("clusters", clusters), ("samples", None)):
            _, low, high = bootstrap_mean(values, known, **FAST)
            hits[name] += low <= 0.5 <= high
    assert 0.93 <= hits["clusters"] / 500 <= 0.97
    assert hits["samples"] / 500 < 0.85


def test_paired_differences_cover_and_are_not_found_where_there_are_none():
    """Of two models as good as each other, each better on other images."""
    rng, covered, found = np.random.default_rng(0), 0, {"clusters": 0, "samples": 0}
    for _ in range(400):
        one, other, clusters = draw(rng, 30, effect=0.3)
        _, low, high, p = paired_difference(one, other, clusters, **FAST)
        covered += low <= 0 <= high
        found["clusters"] += p <= 0.05
        found["samples"] += paired_difference(one, other, **FAST)[3] <= 0.05
    assert 0.93 <= covered / 400 <= 0.975
    assert 0.025 <= found["clusters"] / 400 <= 0.075 < 0.12 < found["samples"] / 400


def test_group_metrics_cover_too():
    """Precision, whose denominator is drawn with the images."""
    rng, hits = np.random.default_rng(5), 0
    for _ in range(400):
        right, said, clusters = draw(rng, 40)
        # What is right depends on the image, and what is said does not.
        said = (rng.random(len(said)) < 0.4).astype(float)
        _, low, high = bootstrap_mean(right, clusters, said, **FAST)
        hits += low <= 0.5 <= high
    assert 0.93 <= hits / 400 <= 0.97


def test_a_cluster_counts_once_however_often_it_is_repeated():
    values = np.random.default_rng(1).normal(size=30)
    once, thrice = estimate(values), estimate(np.repeat(values, 3), np.repeat(np.arange(30), 3))
    assert once == pytest.approx(thrice)
    base = values[::-1]
    clusters = np.repeat(np.arange(30), 3)
    assert difference(values, base) == pytest.approx(difference(np.repeat(values, 3), np.repeat(base, 3), clusters))
    narrow = estimate(np.repeat(values, 3))
    assert narrow["high"] - narrow["low"] < 0.7 * (once["high"] - once["low"])


def test_labels_and_order_of_clusters_say_nothing():
    rng = np.random.default_rng(3)
    values, clusters = rng.random(60), rng.integers(0, 12, 60)
    order = rng.permutation(60)
    assert bootstrap_mean(values, clusters) == pytest.approx(bootstrap_mean(values[order], clusters[order]))


def test_weights_are_those_of_a_weighted_mean():
    values, weights = np.array([1.0, 0, 1, 5]), np.array([2.0, 1, 3, 0])
    mean, low, high = bootstrap_mean(values, weights=weights)
    assert mean == pytest.approx(5 / 6) and 0 <= low <= mean <= high == 1
    found, *_ = paired_difference(values, values, weights=weights, base_weights=[1, 1, 0, 0])
    assert found == pytest.approx(5 / 6 - 1 / 2)


@pytest.mark.parametrize("count", [2, 20, 300])
def test_all_right_is_no_certainty(count):
    clusters = np.repeat(np.arange(count), 3)
    edge = stats.binomtest(count, count).proportion_ci(method="exact").low
    assert bootstrap_mean(np.ones(3 * count), clusters) == pytest.approx((1, edge, 1))
    assert bootstrap_mean(np.zeros(3 * count), clusters) == pytest.approx((0, 0, 1 - edge))
    few = np.r_[np.ones(6), np.zeros(3 * count - 6)]  # of two clusters alone something counts
    assert bootstrap_mean(np.ones(3 * count), clusters, few)[1] == pytest.approx(0.025**0.5)
    assert bootstrap_mean(np.full(3 * count, 100.0), clusters, top=100) == pytest.approx((100, 100 * edge, 100))
    assert bootstrap_mean(np.zeros(3 * count), clusters, top=100) == pytest.approx((0, 0, 100 - 100 * edge))


@pytest.mark.parametrize("values", [[55.0] * 6, [33.3] * 6, [0.1, 0.3] * 3, [0.0, 1.0] * 3])
def test_where_clusters_are_alike_there_is_no_interval(values):
    found = estimate(values, [0, 0, 1, 1, 2, 2])
    assert found == {"score": pytest.approx(np.mean(values)), "low": None, "high": None}


@pytest.mark.parametrize("clusters", [[7, 7, 7], None])
def test_one_image_has_no_interval(clusters):
    values = [1.0, 0.0, 1.0] if clusters else [1.0]
    found = estimate(values, clusters)
    assert found["low"] is None and found["high"] is None
    compared = difference(values, values, clusters)
    assert compared["difference"] == 0 and compared["difference_low"] is None and compared["p"] == 1
    json.dumps([found, compared], allow_nan=False)
    assert "None" not in score_text(found) + difference_text(compared)


def test_what_nothing_counts_in_is_undefined():
    found = estimate([0.0, 0.0], weights=[0, 0])
    assert found == {"score": None, "low": None, "high": None}
    assert score_text(found) == "undefined"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([], []),
        ([["a"], ["b"], ["a"]], [0, 1, 0]),
        ([["a"], ["b"], ["a", "b"], ["c"]], [0, 0, 0, 1]),
        ([[], [], ["x"], []], [0, 1, 2, 3]),
        ([[(1, 2)], [(2, 1)], [(1, 2), 3], [3]], [0, 1, 0, 0]),
    ],
)
def test_samples_that_share_a_key_are_one_cluster(keys, expected):
    assert clusters_of(keys) == expected


def test_chains_are_one_cluster():
    assert set(clusters_of(pairwise(range(200)))) == {0}


def test_the_table_draws_images():
    """The same scores, once each about its own image and once ten about each."""
    rng = np.random.default_rng(0)
    values = np.repeat(rng.integers(0, 2, 12).astype(float), 10).tolist()
    result = {"scores": {"m": {"d": {"exact": values}}}, "failed": {"m": {"d": 0}}}
    texts = [
        cell_text(result | {"clusters": {"d": clusters}}, "m", None, "d", "exact")
        for clusters in (list(range(120)), np.repeat(range(12), 10).tolist())
    ]
    assert texts[0] == cell_text(result, "m", None, "d", "exact")  # results of a version without clusters
    widths = [float(np.ptp([float(end) for end in text.split("[")[1].rstrip("]").split(",")])) for text in texts]
    assert widths[1] > 2 * widths[0]


@pytest.mark.parametrize(("metric", "edge"), [("exact", "26.5"), ("judge", "26.5"), ("hallucination", "26.5")])
def test_no_hallucination_in_ten_answers_is_no_certainty(metric, edge):
    """Clopper and Pearson's interval on the metric's own scale: (0, 1 - 0.025 ** (1 / 12)) of a dozen."""
    result = {"scores": {"m": {"d": {metric: [0.0] * 12}}}, "failed": {"m": {"d": 0}}}
    assert cell_text(result, "m", None, "d", metric) == f"0.0 [0.0, {edge}]"


def test_a_difference_is_that_of_samples_that_both_scored():
    scores = {"a": {"d": {"judge": [1, None, 3, 5]}}, "b": {"d": {"judge": [2, 2, None, 7]}}}
    result = {"scores": scores, "failed": {"a": {"d": 0}, "b": {"d": 0}}, "clusters": {"d": [0, 1, 2, 3]}}
    text = cell_text(result, "b", "a", "d", "judge")
    assert "(1 unscored)" in text and text.split("; ")[1].startswith("+1.5 ")
