"""Agreement against the libraries that define it."""

import json

import krippendorff
import numpy as np
import pytest
from scipy import stats

from granulon_hf.errors import GranulonError
from granulon_hf.evaluation.agreement import agreement, alpha, alpha_of_many, panel_agreement, read_scores, weighted_kappa


def scores(values):
    return {str(i): {"accuracy": value, "hallucination": None} for i, value in enumerate(values)}


@pytest.mark.parametrize("seed", range(5))
def test_alpha_is_that_of_the_krippendorff_package(seed):
    random = np.random.default_rng(seed)
    a = random.integers(0, 101, 40).astype(float)
    b = np.clip(a + random.normal(0, 5 + 20 * seed, 40), 0, 100).round()
    oracle = krippendorff.alpha(reliability_data=np.stack([a, b]), level_of_measurement="interval")
    assert alpha(a, b) == pytest.approx(oracle, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_weighted_kappa_is_that_of_scikit_learn(seed):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(seed)
    a = random.integers(0, 101, 40)
    b = np.clip(a + random.normal(seed, 5 + 10 * seed, 40), 0, 100).astype(int)
    oracle = sklearn_metrics.cohen_kappa_score(a, b, weights="quadratic", labels=range(101))
    assert weighted_kappa(a, b) == pytest.approx(oracle, abs=1e-12)


def test_coefficients_over_the_ids_that_both_scored():
    random = np.random.default_rng(0)
    a = random.integers(0, 101, 60).tolist()
    b = [int(np.clip(x + random.normal(0, 15), 0, 100)) for x in a]
    (found,) = agreement(scores([*a, 5, None]), scores([*b, None, 50]))
    assert (found.score, found.n) == ("accuracy", 60)
    assert found.spearman == pytest.approx(stats.spearmanr(a, b).statistic)
    assert found.mean_difference == pytest.approx(np.mean(a) - np.mean(b))
    assert found.limits == pytest.approx(found.mean_difference + np.array([-1.96, 1.96]) * np.std(np.subtract(a, b), ddof=1))
    for value, (low, high) in (
        (found.spearman, found.spearman_ci),
        (found.alpha, found.alpha_ci),
        (found.kappa, found.kappa_ci),
    ):
        assert low < value < high
        assert 0.02 < high - low < 0.4


def test_what_is_undefined_is_none():
    (found,) = agreement(scores([50, 50, 50]), scores([50, 50, 50]), n_resamples=20)
    assert found.spearman is None and found.alpha is None and found.mean_difference == 0


def test_perfect_and_opposite():
    values = list(range(0, 101, 5))
    (same,) = agreement(scores(values), scores(values), n_resamples=50)
    (opposite,) = agreement(scores(values), scores(values[::-1]), n_resamples=50)
    assert same.spearman == pytest.approx(1) and same.alpha == 1
    assert opposite.spearman == pytest.approx(-1) and opposite.alpha < -0.9


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"accuracy": 5}], "lacks an id"),
        ([{"id": 1}], "any score"),
        ([{"id": 1, "accuracy": 5}, {"id": "1", "accuracy": 5}], "a second time"),
        ([{"id": 1, "accuracy": 101}], "not 0 to 100"),
        ([{"id": 1, "accuracy": True}], "not 0 to 100"),
        ([{"id": 1, "accuracy": "90"}], "not 0 to 100"),
    ],
)
def test_bad_files_are_named(tmp_path, rows, message):
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(GranulonError, match=message) as error:
        read_scores(path)
    assert "labels.jsonl" in str(error.value)


def test_nothing_in_common():
    with pytest.raises(GranulonError, match="0 in common"):
        agreement(scores([1, 2]), {"x": {"accuracy": 1}, "y": {"accuracy": 2}})


def test_agreement_of_a_panel_leaves_out_what_nobody_was_asked():
    judges = {
        "a": {"accuracy_scores": [10, 50, 90, 0], "accuracy_samples": [[10, 12], [50, 40], [90, None], [0, 0]]},
        "b": {"accuracy_scores": [20, 50, None, 0], "accuracy_samples": [[20, 20], [50, 50], [None, None], [0, 0]]},
    }
    for one in judges.values():
        one |= {name.replace("accuracy", "hallucination"): values for name, values in list(one.items())}
    found = panel_agreement({"empty": [False, False, False, True], "samples": 2, "judges": judges})
    gaps = [[10, 50, 90], [20, 50, np.nan]]
    oracle = krippendorff.alpha(reliability_data=gaps, level_of_measurement="interval")
    assert found["accuracy"]["judges"] == pytest.approx(oracle)
    assert found["hallucination"]["samples"]["a"] == pytest.approx(alpha(np.array([10, 50]), np.array([12, 40])))
    assert found["accuracy"]["samples"]["b"] == 1
    assert alpha_of_many([[5, 5], [5, 5]]) is None and alpha_of_many([[1, None], [None, 2]]) is None
