"""Accuracy against visual tokens: means, intervals over images, and the interpolated curve, from made-up scores."""

import json

import numpy as np
import pytest

from granulon_hf.evaluation.budgets import curve, interpolate, write_curve
from granulon_hf.stats import estimate

ARMS = {"pixel": "pixel", "adata@4": "adata", "adata@16": "adata", "adata at price 0.1": "adata"}
CHOSEN = ["adata at price 0.1"]


@pytest.fixture
def result():
    """Twelve questions about six images; the budget that is chosen is 4 for the coarse ones and 16 for the fine ones."""
    random = np.random.default_rng(0)
    levels = ["coarse", "fine"] * 6
    scores = {arm: random.integers(0, 2, 12).astype(float).tolist() for arm in ARMS}
    tokens = {"pixel": [196] * 12, "adata@4": [4] * 12, "adata@16": [16] * 12, "adata at price 0.1": [4, 16] * 6}
    return {
        "data": ["scenes"],
        "clusters": {"scenes": [i // 2 for i in range(12)]},
        "levels": {"scenes": levels},
        "scores": {arm: {"scenes": {"recall": [0.0] * 12, "exact": values}} for arm, values in scores.items()},
        "visual_tokens": {arm: {"scenes": values} for arm, values in tokens.items()},
    }


def test_every_arm_against_the_first(result):
    found = curve(result, "scenes", ARMS, CHOSEN)
    assert (found["metric"], found["samples"], found["images"], found["reference"]) == ("exact", 12, 6, "pixel")
    scores = {arm: np.array(one["scenes"]["exact"]) for arm, one in result["scores"].items()}
    for arm, one in found["arms"].items():
        assert one["score"] == pytest.approx(scores[arm].mean())
        assert one["levels"] == pytest.approx({"coarse": scores[arm][::2].mean(), "fine": scores[arm][1::2].mean()})
        assert one.get("difference", 0) == pytest.approx(scores[arm].mean() - scores["pixel"].mean())
    assert "difference" not in found["arms"]["pixel"]
    assert [one["visual_tokens"] for one in found["arms"].values()] == [196, 4, 16, 10]


def test_a_chosen_budget_is_compared_with_the_fixed_ones_at_its_own_mean(result):
    arms = curve(result, "scenes", ARMS, CHOSEN)["arms"]
    assert [name for name, one in arms.items() if "interpolated" in one] == CHOSEN
    between = (arms["adata@4"]["score"] + arms["adata@16"]["score"]) / 2  # 10 is in the middle of 4 and 16
    assert arms[CHOSEN[0]]["interpolated"]["difference"] == pytest.approx(arms[CHOSEN[0]]["score"] - between)


def test_intervals_are_over_images(result):
    """Questions about one image are no independent samples: twice the same score of each image gives the image's interval."""
    for one in result["scores"].values():
        one["scenes"]["exact"] = np.repeat(one["scenes"]["exact"][:6], 2).tolist()
    found = curve(result, "scenes", ARMS, CHOSEN)["arms"]["pixel"]
    alone = estimate(result["scores"]["pixel"]["scenes"]["exact"][::2])
    assert (found["low"], found["high"]) == pytest.approx((alone["low"], alone["high"]))


def test_scores_with_weights_and_gaps(result):
    """A ratio, such as F1, is a mean with weights; a question that lacks a score of one arm counts for none."""
    random = np.random.default_rng(1)
    result["scores"] = {arm: {"scenes": {"f1": random.random(12).tolist()}} for arm in ARMS}
    result["weights"] = {arm: {"scenes": {"f1": random.integers(0, 4, 12).tolist()}} for arm in ARMS}
    result["scores"]["adata@4"]["scenes"]["f1"][3] = None
    found, kept = curve(result, "scenes", ARMS, CHOSEN), np.delete(np.arange(12), 3)
    assert found["samples"] == 11
    sums = {}
    for arm, one in found["arms"].items():
        values, weights = (np.array(result[what][arm]["scenes"]["f1"], float)[kept] for what in ("scores", "weights"))
        sums[arm] = (values @ weights, weights.sum())
        assert one["score"] == pytest.approx(np.average(values, weights=weights))
        fine = kept % 2 == 1
        assert one["levels"]["fine"] == pytest.approx(np.average(values[fine], weights=weights[fine]))
    between = np.add(sums["adata@4"], sums["adata@16"])
    own = found["arms"][CHOSEN[0]]
    assert own["interpolated"]["difference"] == pytest.approx(own["score"] - between[0] / between[1])


@pytest.mark.parametrize(
    ("place", "weights"), [(4, [1, 0, 0]), (10, [0.5, 0.5, 0]), (26, [0, 0.5, 0.5]), (99, [0, 0, 1]), (1, [1, 0, 0])]
)
def test_interpolation(place, weights):
    np.testing.assert_allclose(interpolate(place, [4, 16, 36]), weights)


def test_files(result, tmp_path):
    costs = {arm: {"prefill_flops": 2e9, "first_token_seconds": 0.25} for arm in ARMS}
    write_curve(result, ARMS, CHOSEN, costs, tmp_path)
    kept = json.loads((tmp_path / "tokens.json").read_text())
    assert list(kept["curves"]["scenes"]["arms"]) == list(ARMS) and kept["costs"] == costs
    table = (tmp_path / "tokens.md").read_text()
    assert "| 2 | 250 |" in table and "interpolated" in table
    assert (tmp_path / "tokens.png").stat().st_size > 5000
