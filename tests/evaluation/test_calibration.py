"""Means and bias by a few human labels: simulations whose truth is known."""

import numpy as np
import pytest
from scipy import stats

from granulon_hf.evaluation.calibration import length_bias, prediction_powered_mean

TRUTH = 60.0


def simulate(random, n, n_labels, noise=8.0, per_image=1):
    """People's scores of `n` answers, and a judge's that is 6 points too kind; some answers share what their image is like."""
    images = np.repeat(np.arange(n // per_image), per_image)
    shared = random.normal(0, 12, n // per_image)[images] if per_image > 1 else random.normal(0, 12, n)
    human = TRUTH + shared + random.normal(0, 5, n)
    judge = human + 6 + random.normal(0, noise, n)
    if per_image > 1:
        judge += random.normal(0, 8, n // per_image)[images]  # its error too belongs to the image
    order = random.permutation(n // per_image)
    labeled = np.isin(images, order[: n_labels // per_image])
    return human, judge, labeled, images


def powered(human, judge, labeled, images):
    groups = [*images[labeled], *images[~labeled]]
    return prediction_powered_mean(human[labeled], judge[labeled], judge[~labeled], groups)


def covers(interval):
    return interval[1] <= TRUTH <= interval[2]


@pytest.mark.parametrize("n_labels", [20, 60])
def test_the_corrected_interval_covers_where_the_judges_does_not(n_labels):
    random = np.random.default_rng(0)
    hits = {"judge": 0, "labels": 0, "corrected": 0}
    widths = {"labels": [], "corrected": []}
    for _ in range(1_000):
        human, judge, labeled, images = simulate(random, 500, n_labels)
        found = powered(human, judge, labeled, images)
        half = stats.norm.ppf(0.975) * judge.std(ddof=1) / len(judge) ** 0.5
        hits["judge"] += covers((found.judge, found.judge - half, found.judge + half))
        for name in widths:
            interval = getattr(found, name)
            hits[name] += covers(interval)
            widths[name].append(interval[2] - interval[1])
    assert hits["judge"] < 10  # of 1,000: the judge's bias is many standard errors
    assert 925 <= hits["corrected"] <= 980 and 935 <= hits["labels"] <= 965
    assert np.mean(widths["corrected"]) < 0.75 * np.mean(widths["labels"])


def test_answers_about_one_image_count_as_one():
    random = np.random.default_rng(0)
    hits = {"by image": 0, "as if independent": 0}
    for _ in range(600):
        human, judge, labeled, images = simulate(random, 600, 120, per_image=6)
        hits["by image"] += covers(powered(human, judge, labeled, images).corrected)
        hits["as if independent"] += covers(powered(human, judge, labeled, np.arange(600)).corrected)
    assert hits["by image"] >= 0.92 * 600 and hits["as if independent"] < 0.8 * 600


def test_it_is_the_published_estimator():
    """PPI++ of arXiv:2311.01453, example of the mean, written out with weight and variances of its own."""
    random = np.random.default_rng(1)
    human, judge, labeled, images = simulate(random, 300, 100)
    found = powered(human, judge, labeled, images)
    y, f, u = human[labeled], judge[labeled], judge[~labeled]
    n, rest = len(y), len(u)
    weight = np.cov(y, f)[0, 1] / ((1 + n / rest) * np.var(judge, ddof=1))
    error = (weight**2 * u.var() / rest + (y - weight * f).var() / n) ** 0.5
    assert found.weight == pytest.approx(weight) and 0 < weight < 1
    assert found.corrected[0] == pytest.approx(weight * u.mean() + (y - weight * f).mean())
    assert found.corrected[2] - found.corrected[0] == pytest.approx(1.96 * error, rel=0.03)
    assert (found.n_labels, found.n_rest) == (100, 200)


def test_a_judge_that_knows_nothing_changes_little():
    random = np.random.default_rng(2)
    human, rest = random.normal(TRUTH, 10, 40), random.normal(30, 10, 400)
    found = prediction_powered_mean(human, random.normal(30, 10, 40), rest)
    assert found.weight < 0.3 and found.corrected[2] - found.corrected[1] < 1.05 * (found.labels[2] - found.labels[1])


@pytest.mark.parametrize("rest", [[], [50.0, 50.0]])
def test_without_more_than_the_labels_their_mean_is_all_there_is(rest):
    found = prediction_powered_mean([10, 20, 60], [50, 50, 50], rest)
    assert found.weight == 0 and found.corrected == found.labels and found.labels[0] == 30
    half = stats.t.ppf(0.975, 2) * np.std([10, 20, 60], ddof=1) / 3**0.5
    assert found.labels[2] == pytest.approx(30 + half)
    assert prediction_powered_mean([10], [50], rest) is None


@pytest.mark.parametrize("label", [0.0, 50.0, 33.3, 100.0])
@pytest.mark.parametrize("groups", [None, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]])
def test_constant_labels_have_no_interval(label, groups):
    found = prediction_powered_mean([label] * 6, [10, 20, 30, 40, 50, 60], [5, 6, 7, 8], groups)
    assert found.labels == found.corrected == (pytest.approx(label), None, None)


def lengths(random, slope, n=80, per_image=1):
    """Labels that rise with length, as they may; the judge adds `slope` for every 100 words to its errors."""
    words = random.integers(5, 200, n // per_image).repeat(per_image)
    human = 40 + 0.1 * words + random.normal(0, 10, n)
    own = random.normal(0, 6, n // per_image).repeat(per_image) if per_image > 1 else 0
    return human, human + slope * words / 100 + own + random.normal(0, 6, n), words, np.arange(n // per_image).repeat(per_image)


@pytest.mark.parametrize("slope", [0.0, 4.0])
@pytest.mark.parametrize("per_image", [1, 4])
def test_bias_towards_length_is_found_at_equal_label(slope, per_image):
    random = np.random.default_rng(3)
    found = [length_bias(*lengths(random, slope, 160, per_image)) for _ in range(400)]
    assert np.mean([one[0] for one in found]) == pytest.approx(slope, abs=0.2)
    assert 0.92 <= np.mean([low <= slope <= high for _, low, high in found]) <= 0.985


def test_bias_towards_length_needs_lengths_that_differ():
    human, judge = list(range(10)), list(range(1, 11))
    assert length_bias(human, judge, [5] * 10, range(10)) is None
    assert length_bias([], [], [], []) is None and length_bias([1, 2], [1, 2], [3, 4], [0, 1]) is None
    for steady in (0, 10, 10.1):  # errors that are all the same say nothing certain
        assert length_bias(human, [x + steady for x in human], [100 * i for i in range(10)], range(10)) is None
    constant = length_bias([50] * 10, [50 + i for i in range(10)], [100 * i for i in range(10)], range(10))
    assert constant[0] == pytest.approx(1)
