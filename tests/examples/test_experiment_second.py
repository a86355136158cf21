"""The second part's report on runs whose truth is known."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from examples.experiment import report, second
from examples.experiment.arms import ARMS, BUDGETS, PRICES
from examples.experiment.run import arguments, jobs_of

from .test_experiment_report import make_run, make_study, truth

GAIN = dict(zip(BUDGETS, (-0.2, -0.12, -0.06, -0.01, 0.0), strict=True))  # against all pixel tokens


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Clusters beat all others by .1; question-dpp beats them at the fewest tokens; chosen budgets are as good as 64 tokens."""
    out = make_study(tmp_path_factory.mktemp("second"), {"pixel+places": truth(), "pixel": truth(-0.05)}, seeds=5, scenes=40)
    options = {"group": "budget", "maker": "reducer", "scenes": 40}
    for seed in range(5):
        for name in ("adata", "pool", "random", "downsample", "question-dpp"):
            for count in BUDGETS:
                gain = GAIN[count] - 0.1 * (name != "adata") + (0.25 if (name, count) == ("question-dpp", 4) else 0)
                make_run(out, second.at(name, count), seed, truth(gain), tokens=count - 196, **options)
        for price, tokens in zip(PRICES, (25, 16, 9), strict=True):
            make_run(out, f"adata+price{price:g}+place", seed, truth(0.2), tokens=tokens - 196, **options)
        for count in second.ALONE:
            make_run(out, f"adata{count}+place", seed, truth(GAIN[count]), tokens=count - 196, **options)
    return out


@pytest.fixture(scope="module")
def found(study):
    return second.analyse(report.read(study), 2000)


@pytest.fixture(scope="module")
def scores(study):
    return report.Scores(report.read(study), 50)


def test_verdicts_of_a_study_whose_truth_is_known(found):
    words = {claim["letter"]: claim["verdict"] for claim in found["claims"]}
    assert {letter: words[letter] for letter in "BCD"} == dict.fromkeys("BCD", "supported")
    assert words["F"] == "undecided"  # no times were taken
    alone = [result["estimate"] for name, result in found["comparisons"]["test"].items() if name.startswith("alone")]
    assert max(map(abs, alone)) < 0.03


def test_every_reducer_must_be_faster_with_fewer_tokens_without_overlap():
    times = {
        second.at(name, count): {"answer": {"range": [count, count + 20]}} for name in second.REDUCERS for count in BUDGETS
    }
    assert second.time_verdict(times) == ("supported", "9 of 9 reducers")
    times["queries4+nested+place"] = {"answer": {"range": [4, 70]}}
    assert second.time_verdict(times) == ("undecided", "8 of 9 reducers")
    assert second.time_verdict({"adata4+nested+place": times["adata4+nested+place"]})[0] == "undecided"


def test_one_reducer_is_enough_for_the_first_claim():
    won, lost, open_ = ({"sign": sign, "obstacles": [], "title": str(sign)} for sign in (1, -1, 0))
    assert second.any_verdict([lost, won, open_])[0] == "supported"
    assert second.any_verdict([lost, lost])[0] == "contradicted"
    stopped = {**won, "obstacles": ["no plateau"]}
    for results in ([stopped], [lost, {**lost, "obstacles": ["few seeds"]}], [lost, {"missing": "no run", "title": ""}]):
        results = [{"margin": 0.02, "interval": [-1, 1], "equal": False, **one} if "sign" in one else one for one in results]
        assert second.any_verdict(results)[0] in ("undecided", "contradicted")
    assert second.any_verdict([{**stopped, "margin": 0, "interval": [-1, 1], "equal": False}])[0] == "undecided"


def test_a_curve_is_interpolated_between_neighbors():
    assert second.curve_weights(4) == {4: 1.0} and second.curve_weights(64) == {64: 1.0}
    for tokens in (5.0, 12.5, 40, 63.9):
        weights = second.curve_weights(tokens)
        assert sum(weights.values()) == pytest.approx(1) and len(weights) == 2
        assert sum(count * weight for count, weight in weights.items()) == pytest.approx(tokens)


def test_chosen_budgets_are_compared_at_their_own_number_of_tokens(scores, found):
    for split in ("test", "test_heldout"):
        for price, tokens in zip(PRICES, (25, 16, 9), strict=True):
            own = scores.arm(f"adata+price{price:g}+place", split)["mean"]
            fixed = scores.arm(second.at("adata", tokens), split)["mean"]
            assert found["comparisons"][split][f"price {price:g}"]["estimate"] == pytest.approx(own - fixed)


def test_means_over_budgets_by_hand(scores, found):
    ones = [scores.arm(second.at("adata", count))["mean"] - scores.arm(second.at("pool", count))["mean"] for count in BUDGETS]
    result = found["comparisons"]["test"]["adata pool"]
    assert result["estimate"] == pytest.approx(np.mean(ones)) and result["degrees_of_freedom"] == 4
    assert result["seed_sd"] == pytest.approx(np.std(result["per_seed"], ddof=1))


def test_the_bound_is_of_the_least_budget_that_is_right(found):
    bound = found["oracle"]["test"]["adata"]
    best = max(found["arms"][second.at("adata", count)]["test"]["overall"]["mean"] for count in BUDGETS)
    assert best <= bound["accuracy"] <= 1 and min(BUDGETS) <= bound["tokens"] <= max(BUDGETS) and bound["seeds"] == 5


def test_tokens_are_counted_for_each_level(study):
    known, arm, block = report.read(study), f"adata+price{PRICES[0]:g}+place", ("test", "none")
    given = dict(zip(known.levels, (4, 9, 64), strict=True))
    for run in known.runs:
        if run.arm == arm:
            run.visual_tokens[block] = [given[question[3]] for question in known.questions[block]]
    found = second.mean_tokens(known, arm, "test")
    assert {level: found[level] for level in given} == given
    assert found["overall"] == pytest.approx(np.mean([given[question[3]] for question in known.questions[block]]))


def test_the_report_is_whole(study):
    text = second.write(study, 200).read_text()
    assert (study / "tokens.png").stat().st_size > 10_000
    written = json.loads((study / "second.json").read_text())
    for claim in written["claims"]:
        assert f"| {claim['letter']}. {claim['claim']} | **{claim['verdict']}**" in text
    for arm in written["arms"]:
        assert text.count(f"| {arm} | ") >= 3


def test_what_is_declared_can_be_run():
    """Every comparison's arms are runs, or views of runs, of second.yaml, at as many seeds as a decision needs."""
    path = Path(second.__file__).with_name("second.yaml")
    jobs = jobs_of(yaml.safe_load(path.read_text()), arguments([str(path), "--out", "x"]))
    seeds: dict[str, set] = {}
    for name, seed in jobs:
        for arm in [name, *(view for view, (_, one) in ARMS.items() if one.get("view") == name)]:
            seeds.setdefault(arm, set()).add(seed)
    study = report.Study({"level_of_type": {}}, [], {}, [], {})
    for comparison in second.family_of(study, "test").values():
        assert len(set.intersection(*(seeds[arm] for arm in comparison.arms))) >= 5, comparison.title
    assert all(len(seeds[f"adata+price{price:g}+place"]) == 10 for price in PRICES)
