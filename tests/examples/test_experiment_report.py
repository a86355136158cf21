"""The experiment's report on runs whose truth is known: drawn from given accuracies by arm and type."""

import json
import math
import re
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from examples.experiment import report, second
from granulon_hf.errors import GranulonError

LEVELS = {"coarse": {"amount": 1 / 3, "presence": 0.5}, "middle": {"where": 0.25, "relation": 0.5}, "fine": {"letter": 0.125}}
TYPES = {kind: (level, chance) for level, kinds in LEVELS.items() for kind, chance in kinds.items()}
DONE = {"steps": 400, "validation": 0.5, "seconds_training": 60.0}
PLATEAU = {"window": 1, "min_gain": 0.004, "min_steps": 400}
DONE |= {
    "flops_per_question": 1e9,
    "training_flops_per_sample": 1e9,
    "trainable_parameters": 1000,
}


def truth(level_gain=0.0, **by_level):
    """Accuracy by type."""
    base = {"coarse": 0.7, "middle": 0.6, "fine": 0.5} | by_level
    return {kind: base[level] + level_gain for kind, (level, _) in TYPES.items()}


def make_run(
    out,
    arm,
    seed,
    accuracy,
    *,
    scenes=120,
    spread=0.0,
    common=0.85,
    control=None,
    tokens=0,
    maker="none",
    group="main",
    **changed,
):
    """Accuracies are as given; which questions are hard is mostly common to all arms and seeds."""
    folder = out / "runs" / arm / str(seed)
    folder.mkdir(parents=True)
    stem = report.parts(arm)[1]
    own = {"tokens": tokens, "pixels": group == "main", "maker": maker, "policy": "none", "clustering": "cosine"}
    manifest = {"arm_name": arm, "group": group, "arm": own, "seed": seed}
    manifest["settings"] = {"learning_rate": 1e-3, "batch_size": 8, **PLATEAU} | changed.pop("settings", {})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if changed.pop("unfinished", False):
        return
    draw = np.random.default_rng([seed, sum(map(ord, arm)), len(arm)])
    shift = spread * draw.standard_normal()
    rows = []
    for number, split in enumerate(("test", "test_heldout")):
        shared, own_draw = np.random.default_rng(number).random((scenes, len(TYPES))), draw.random((scenes, len(TYPES)))
        hard = np.where(draw.random((scenes, len(TYPES))) < common, shared, own_draw)
        for what in ("none", "blind", "shuffled"):
            for scene in range(scenes):
                for column, (kind, (level, chance)) in enumerate(TYPES.items()):
                    p = chance if what != "none" else accuracy[kind] + shift
                    if control and (what, kind) == control[:2]:
                        p = control[2]
                    right = int((hard[scene, column] if what == "none" else draw.random()) < p)
                    row = {"scene": f"{split}-{scene}", "question": f"{kind}?", "split": split, "control": what, "type": kind}
                    row |= {"level": level, "chance": chance, "reference": "yes", "prediction": "yes" if right else "no"}
                    used = level if stem == "adaptive" and draw.random() < 0.95 else "coarse" if stem == "adaptive" else None
                    rows.append(row | {"correct": right, "level_used": used, "visual_tokens": 196 + tokens})
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    final = float(np.mean(list(accuracy.values()))) + shift
    history = [
        {"step": step, "seconds": step / 10, "loss": 1.0, "validation": {"accuracy": final * min(1, step / 300), "by_type": {}}}
        for step in range(100, 401, 100)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    (folder / "done.json").write_text(
        json.dumps(
            DONE
            | {"flops_per_question": 1e9 * (1 + tokens / 50), "training_flops_per_sample": 1e9 * (1 + tokens / 50)}
            | changed
        )
    )


def make_study(out, accuracies, seeds=3, **options):
    out.mkdir(exist_ok=True)
    by_type = {kind: level for kind, (level, _) in TYPES.items()}
    experiment = {
        "config": {"quick": True},
        "made_by": [{"command": f"python -m examples.experiment --seeds {n}", "versions": {"torch": "2.9"}} for n in range(2)],
        "chance": {},
    }
    experiment |= {"language_model": {"name": "tiny", "accuracy_by_form": {"cells": dict.fromkeys(TYPES, 0.99)}}}
    experiment["level_of_type"] = by_type
    (out / "experiment.json").write_text(json.dumps(experiment))
    for arm, accuracy in accuracies.items():
        for seed in range(seeds):
            make_run(out, arm, seed, accuracy, **options)
    return out


def stop_early(run):
    """Take the last validation away."""
    path = run / "history.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def analyse(out, resamples=2000):
    return report.analyse(report.read(out), resamples)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Adaptive is better than pixel by .1, few clusters suit coarse questions and many fine ones; one run is unfinished."""
    out = tmp_path_factory.mktemp("study")
    accuracies = {"pixel": truth(), "pixel+adaptive": truth(0.1), "pixel+oracle": truth(0.1), "pixel+random": truth(-0.05)}
    accuracies |= {"pixel+fixed5": truth(coarse=0.8, fine=0.3), "pixel+fixed20": truth(coarse=0.6, fine=0.6)}
    make_study(out, accuracies, seeds=6, spread=0.003, common=0.97)
    make_run(out, "pixel", 9, truth(), unfinished=True)
    for tokens in (1, 4):
        for maker in ("pool", "clusters"):
            make_run(out, f"{maker}-{tokens}", 0, truth(-0.1), tokens=tokens, maker=maker, group="budget")
    return out


@pytest.fixture(scope="module")
def found(study):
    return analyse(study, 4000)


def test_a_cell_is_the_mean_of_the_types_of_the_raw_predictions(study, found):
    by_seed = []
    for seed in range(6):
        right = defaultdict(list)
        for line in (study / f"runs/pixel+fixed5/{seed}/predictions.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["split"] == "test_heldout" and row["control"] == "none":
                right[row["level"], row["type"]].append(row["prediction"] == row["reference"])
        accuracy = {key: sum(values) / len(values) for key, values in right.items()}
        by_seed.append({"overall": np.mean(list(accuracy.values()))})
        by_seed[-1] |= {level: np.mean([x for (at, _), x in accuracy.items() if at == level]) for level in LEVELS}
    for level in ("overall", *LEVELS):
        cell = found["arms"]["main"]["pixel+fixed5"]["test_heldout"][level]
        assert cell["per_seed"] == pytest.approx([row[level] for row in by_seed], abs=1e-12)
        assert cell["mean"] == pytest.approx(np.mean(cell["per_seed"]))
        assert cell["sd"] == pytest.approx(np.std(cell["per_seed"], ddof=1))


def test_estimates_cover_the_truth(found):
    family = found["comparisons"]["test"]
    for name, expected in (
        ("pixel", 0.1),
        ("random", 0.15),
        ("oracle", 0.0),
        ("coarse", 0.2),
        ("fine", 0.3),
        ("interaction", 0.5),
    ):
        low, high = family[name]["interval"]
        assert low < expected < high and high - low < 0.25, name
    cell = found["arms"]["main"]["pixel"]["test"]["coarse"]
    assert cell["interval"][0] < 0.7 < cell["interval"][1]


def test_intervals_cover_at_their_rate_where_seeds_differ_much(tmp_path):
    """Three seeds: drawing again from them would leave the truth out in about one case of six."""
    draw = np.random.default_rng(0)
    outside = 0
    for _ in range(400):
        values = draw.normal(0, 0.1, 3)
        drawn = values + draw.normal(0, 0.001, (1000, 1))
        low, high = report.interval(report.replicates(drawn, values.var(ddof=1), len(values) - 1))
        outside += not low < 0 < high
    assert 5 <= outside <= 35  # 20 expected


def test_verdicts_of_a_study_whose_truth_is_known(found):
    verdicts = {claim["number"]: claim["verdict"] for claim in found["claims"]}
    assert verdicts == {
        1: "supported",
        2: "undecided",
        3: "supported",
        4: "supported",
        5: "undecided",
        6: "undecided",
        7: "undecided",
        8: "undecided",
        9: "undecided",
        10: "undecided",
        11: "supported",
    }
    missing = found["claims"][1]["why"]
    assert "pixel+fixed10" in missing and "points towards supported, as far as it was measured" in missing


def test_scenes_that_both_arms_share_narrow_the_interval_of_the_difference(study):
    """Against the interval from scenes that are drawn for each arm on its own."""
    scores = report.Scores(report.read(study), 2000)
    adaptive, pixel = (scores.contrast([(1, arm, "overall")])[2][:, 0] for arm in ("pixel+adaptive", "pixel"))
    paired = scores.contrast([(1, "pixel+adaptive", "overall"), (-1, "pixel", "overall")])[2][:, 0]
    assert paired.std() < 0.75 * (adaptive - np.random.default_rng(5).permutation(pixel)).std()


def test_scenes_not_questions_are_drawn(tmp_path):
    """Where all answers of a scene are right or wrong together, five questions are worth one."""
    make_study(tmp_path, {"pixel": truth()}, seeds=1, scenes=300)
    path = tmp_path / "runs/pixel/0/predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["prediction"] = ["no", "yes"][int(row["scene"].split("-")[1]) % 2]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cell = analyse(tmp_path)["arms"]["main"]["pixel"]["test"]["overall"]
    assert cell["mean"] == 0.5
    assert cell["interval"][1] - cell["interval"][0] == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(300), rel=0.1)


def test_only_shared_seeds_are_compared(tmp_path):
    make_study(tmp_path, {"pixel": truth()}, seeds=4, scenes=30)
    for seed in (2, 3, 7):
        make_run(tmp_path, "pixel+adaptive", seed, truth(), scenes=30)
    result = analyse(tmp_path)["comparisons"]["test"]["pixel"]
    assert result["seeds"] == [2, 3] and result["obstacles"][0] == "2 shared seeds of 3"
    cells = analyse(tmp_path)["arms"]["main"]
    own = {
        arm: dict(zip(c["test"]["overall"]["seeds"], c["test"]["overall"]["per_seed"], strict=True)) for arm, c in cells.items()
    }
    assert result["per_seed"] == pytest.approx([own["pixel+adaptive"][s] - own["pixel"][s] for s in (2, 3)])


def test_arms_without_a_shared_seed_are_said_to_have_none(tmp_path):
    make_study(tmp_path, {"pixel": truth()}, seeds=1, scenes=30)
    make_run(tmp_path, "pixel+adaptive", 3, truth(), scenes=30)
    assert analyse(tmp_path)["comparisons"]["test"]["pixel"]["missing"] == "its arms share no seed"
    assert "its arms share no seed" in report.write(tmp_path, 200).read_text()


def test_holm_as_by_hand():
    # 4 × .01 = .04; 3 × .02 = .06; 2 × .03 = .06; 1 × .04 is below .06, which holds
    assert report.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert report.holm([0.9, 0.6]) == [1.0, 1.0]
    assert report.holm([0.001, 1.0, 1.0]) == pytest.approx([0.003, 1.0, 1.0])


def test_the_family_counts_what_is_missing(found):
    family = found["comparisons"]["test"]
    assert set(family) == set(report.FAMILY) and "missing" in family["dummy"] and family["dummy"]["p"] == 1.0
    best = min(result["p"] for result in family.values())
    assert min(result["p_holm"] for result in family.values()) == pytest.approx(len(report.FAMILY) * best)
    for result in family.values():  # the decision and the interval of Holm's level agree
        if "missing" not in result and result["p_holm"] < 0.04:
            low, high = (x + result["margin"] for x in result["holm_interval"])
            assert low > 0 or high < 0


def test_effect_sizes_by_hand(study, found):
    result = found["comparisons"]["test"]["pixel"]
    one, other = (found["arms"]["main"][arm]["test"]["overall"] for arm in ("pixel+adaptive", "pixel"))
    assert result["estimate"] == pytest.approx(one["mean"] - other["mean"])
    assert result["h"] == pytest.approx(2 * math.asin(one["mean"] ** 0.5) - 2 * math.asin(other["mean"] ** 0.5))
    assert np.mean(list(result["by_type"].values())) == pytest.approx(result["estimate"])
    assert family_of(found)["interaction"]["by_type"] is None


def family_of(found):
    return found["comparisons"]["test"]


def test_the_spread_between_seeds_is_that_of_an_analysis_of_variance(tmp_path, found):
    """Arms and seeds as factors, in a whole table by hand; with two arms it is that of their differences."""
    table = np.array([cells["test"]["overall"]["per_seed"] for cells in found["arms"]["main"].values()])
    left = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    free = (len(table) - 1) * (table.shape[1] - 1)
    result = family_of(found)["pixel"]
    assert result["degrees_of_freedom"] == free
    assert result["seed_sd"] == pytest.approx(math.sqrt(2 * (left**2).sum() / free))
    make_study(tmp_path, {"pixel": truth(), "pixel+adaptive": truth()}, seeds=4, spread=0.02, scenes=40)
    make_run(tmp_path, "pixel", 8, truth(), scenes=40)  # a seed of one arm alone says nothing
    make_run(tmp_path, "semantic+adaptive", 0, truth(), scenes=40)  # nor does another kind of arm
    result = family_of(analyse(tmp_path, 200))["pixel"]
    assert result["degrees_of_freedom"] == 3 and result["seed_sd"] == pytest.approx(np.std(result["per_seed"], ddof=1))


def test_no_difference_is_decided_where_it_is_small(tmp_path):
    accuracies = {"pixel": truth(), "pixel+adaptive": truth(0.002), "pixel+dummy": truth(-0.02)}
    make_study(tmp_path, accuracies, seeds=4, scenes=400, common=1.0)
    found = analyse(tmp_path, 4000)
    claim, family = found["claims"][0], family_of(found)
    assert claim["verdict"] == "no difference" and claim["why"] == "within ±0.03: pixel+adaptive − pixel"
    assert family["pixel"]["equal"] and family["pixel"]["sign"] == 0
    assert family["dummy"]["sign"] == 1 and not family["dummy"]["equal"]  # small, but there
    assert report.headline(found).startswith("Pixel + adaptive makes no difference to pixel only here")


def test_a_difference_of_nothing_at_all_is_no_difference(tmp_path, monkeypatch):
    """Where p is 1 because the estimate lies on zero, not because something stands in the way."""
    make_study(tmp_path, {"pixel": truth(), "pixel+adaptive": truth()}, seeds=3, scenes=400, common=1.0)
    monkeypatch.setattr(report, "p_value", lambda samples, null: 1.0)
    result = family_of(analyse(tmp_path))["pixel"]
    assert not result["obstacles"] and result["equal"]


def test_the_tests_of_no_difference_by_hand():
    samples = np.linspace(-0.05, 0.04, 91)  # 21 at or below −.03, 11 at or above .03
    assert report.p_no_difference(samples) == pytest.approx(22 / 92)


def test_what_a_run_says_is_right_is_not_believed(tmp_path):
    make_study(tmp_path, {"pixel": truth()}, seeds=1, scenes=20)
    before = analyse(tmp_path)["arms"]
    path = tmp_path / "runs/pixel/0/predictions.jsonl"
    path.write_text(path.read_text().replace('"correct": 0', '"correct": 1'))
    assert analyse(tmp_path)["arms"] == before


def result(estimate=0.1, p=0.001, margin=0.0, obstacles=(), equal=False, **more):
    sign = 0 if p > 0.05 or equal else 1 if estimate > -margin else -1
    more |= {"interval": [estimate - 0.02, estimate + 0.02], "equal": equal}
    return {"title": "a − b", "estimate": estimate, "margin": margin, "obstacles": list(obstacles), "sign": sign} | more


@pytest.mark.parametrize(
    ("results", "word", "why"),
    [
        ([result()], "supported", ""),
        ([result(-0.1)], "contradicted", ""),
        ([result(p=0.2)], "undecided", "points towards supported; 1 of 1 comparison not decided"),
        ([result(-0.1, p=0.2)], "undecided", "points towards contradicted"),
        ([result(obstacles=["2 shared seeds of 3"])], "undecided", "points towards supported; 2 shared seeds of 3"),
        ([result(-0.1, obstacles=["b/1 had not reached its plateau"])], "undecided", "points towards contradicted; b/1"),
        ([result(), result(p=0.2)], "undecided", "points towards supported; 1 of 2"),
        ([result(), result(-0.1, p=0.2)], "undecided", "points both ways"),
        ([result(), result(-0.1)], "contradicted", ""),
        ([result(0.01, p=0.2)], "undecided", "no direction; 1 of 1"),
        ([result(0.01, equal=True)], "no difference", "within ±0.03: a − b"),
        ([result(), result(0.01, equal=True)], "no difference", "within"),
        ([result(-0.1), result(0.01, equal=True)], "contradicted", ""),
        ([result(-0.01, margin=0.03)], "supported", ""),
        ([result(-0.05, margin=0.03)], "contradicted", ""),
        (
            [{"title": "a − c", "missing": "no finished run of c", "p": 1.0}],
            "undecided",
            "not measured; a − c: no finished run of c",
        ),
    ],
)
def test_verdict_at_its_edges(results, word, why):
    got, reason = report.verdict(results)
    assert got == word and reason.startswith(why)


@pytest.mark.parametrize(
    ("intervals", "word"),
    [
        ([(0.8, 0.9)], "supported"),
        ([(0.79, 0.9)], "undecided"),
        ([(0.9, 0.95), (0.5, 0.6)], "undecided"),
        ([(0.9, 0.95), (0.3, 1 / 3)], "contradicted"),
        ([], "undecided"),
    ],
)
def test_verdict_of_the_controller_at_its_edges(intervals, word):
    found = {str(i): {"mean": sum(pair) / 2, "interval": pair} for i, pair in enumerate(intervals)}
    assert report.controller_verdict(found, 1 / 3)[0] == word


@pytest.mark.parametrize("control", ["blind", "shuffled"])
def test_a_control_that_leaks_is_loud_and_decides_nothing(tmp_path, control):
    make_study(tmp_path, {"pixel": truth()}, seeds=3, scenes=200)
    for seed in range(3):
        make_run(tmp_path, "pixel+adaptive", seed, truth(0.2), scenes=200, control=(control, "letter", 0.3))
    path = report.write(tmp_path, 2000)
    found = json.loads((tmp_path / "report.json").read_text())
    above = {(test["arm"], test["control"], test["type"]) for test in found["controls"] if test["above"]}
    assert ("pixel+adaptive", control, "letter") in above and not [test for test in above if test[0] == "pixel"]
    assert found["claims"][0]["verdict"] == "undecided"
    assert f"the {control} control of pixel+adaptive is above chance" in found["claims"][0]["why"]
    assert "WARNING: a control of `pixel+adaptive` is above chance" in path.read_text()


def test_controls_at_chance_are_not_loud(found):
    assert not [test for test in found["controls"] if test["above"]]
    assert not found["obstacles"]


def test_without_controls_nothing_is_decided(tmp_path):
    make_study(tmp_path, {"pixel": truth(), "pixel+adaptive": truth(0.2)}, seeds=3, scenes=50)
    path = tmp_path / "runs/pixel/1/predictions.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if '"blind"' not in line))
    claim = analyse(tmp_path)["claims"][0]
    assert claim["verdict"] == "undecided" and "pixel/1 has no blind control" in claim["why"]


def test_before_the_plateau_nothing_is_decided(tmp_path):
    make_study(tmp_path, {"pixel": truth(), "pixel+adaptive": truth(0.3)}, seeds=3, scenes=60)
    stop_early(tmp_path / "runs/pixel/1")
    claim = analyse(tmp_path)["claims"][0]
    assert claim["verdict"] == "undecided" and "pixel/1 had not reached its plateau" in claim["why"]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("done.json", "{", "done.json' cannot be read"),
        ("done.json", "null", "done.json of the run pixel/0 is damaged"),
        ("manifest.json", "[]", "manifest.json of the run pixel/0 is damaged"),
        ("manifest.json", None, "manifest.json' cannot be read"),
        ("predictions.jsonl", '{"split": "test"}', "A row of the run pixel/0 is damaged"),
        ("predictions.jsonl", "[1]", "A row of the run pixel/0 is damaged"),
        ("predictions.jsonl", '{"split', "predictions.jsonl' cannot be read"),
        ("history.jsonl", "[1]", "A row of the run pixel/0 is damaged"),
        ("history.jsonl", '{"step": "x", "validation": {"accuracy": 1}}', "A row of the run pixel/0 is damaged"),
        ("done.json", json.dumps(dict.fromkeys(report.DONE, "x")), "done.json of the run pixel/0 is damaged"),
        ("predictions.jsonl", json.dumps(dict.fromkeys([*report.QUESTION, "prediction", "split"])), "A row of the run pixel/0"),
        ("../../../experiment.json", "{}", "experiment.json' cannot be read (it does not hold level_of_type"),
    ],
)
def test_a_damaged_run_is_named(tmp_path, name, damage, message):
    make_study(tmp_path, {"pixel": truth()}, seeds=1, scenes=20)
    path = tmp_path / "runs/pixel/0" / name
    path.unlink() if damage is None else path.write_text(damage)
    with pytest.raises(GranulonError, match=re.escape(message)) as error:
        report.read(tmp_path)
    assert "remove" in str(error.value)


def test_a_run_in_the_wrong_folder_is_refused(tmp_path):
    make_study(tmp_path, {"pixel": truth()}, seeds=1, scenes=20)
    (tmp_path / "runs/pixel/0").rename(tmp_path / "runs/pixel/7")
    with pytest.raises(GranulonError, match="pixel/7 .* pixel/0"):
        report.read(tmp_path)


def test_what_was_not_measured_is_not_without_difference(tmp_path):
    """One fixed level is like adaptive, the others were not run: the claim is about all of them."""
    make_study(tmp_path, {"pixel+adaptive": truth(), "pixel+fixed5": truth()}, seeds=5, scenes=300, common=0.99)
    claim = analyse(tmp_path)["claims"][1]
    assert claim["verdict"] == "undecided" and "points towards no difference; " in claim["why"]


def test_the_intervals_of_agreement_are_over_types(tmp_path):
    """A type whose phrasings are not understood counts once, however many scenes ask it."""
    make_study(tmp_path, {"pixel+adaptive": truth()}, seeds=2, scenes=200)
    for seed in range(2):
        path = tmp_path / f"runs/pixel+adaptive/{seed}/predictions.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["level_used"] = "fine" if row["type"] == "presence" else row["level"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    agreement = analyse(tmp_path)["level_choice"]["agreement"]["test"]
    assert agreement["mean"] == pytest.approx(1 - 1 / len(TYPES))
    draws = np.random.default_rng(1).binomial(len(TYPES), 1 / len(TYPES), 20000) / len(TYPES)
    assert agreement["interval"] == pytest.approx([1 - np.quantile(draws, 0.975), 1 - np.quantile(draws, 0.025)], abs=1e-9)


def test_times_are_ratios_where_they_were_taken(tmp_path):
    make_study(tmp_path, {"pixel": truth(), "pixel+adaptive": truth()}, seeds=1, scenes=20)
    times = {"ratio": 1.04, "range": [0.9, 1.2], "pixel_seconds": 0.1}
    (tmp_path / "timing.json").write_text(json.dumps({"pixel+adaptive": {"answer": times, "step": {**times, "ratio": 1.5}}}))
    text = report.write(tmp_path, 100).read_text()
    assert "| 1.04 (0.90 to 1.20) | 1.50 (0.90 to 1.20) | 1,000 |" in text and "| – | – | 1,000 |" in text


def test_one_seed_decides_nothing_and_says_so(tmp_path):
    make_study(tmp_path, {"pixel": truth(), "pixel+adaptive": truth(0.3)}, seeds=1, scenes=60)
    text = report.write(tmp_path, 2000).read_text()
    assert "Fewer than 3 seeds: pixel (1), pixel+adaptive (1)." in text and "spread between seeds is unknown" in text
    assert (
        "**undecided** (points towards supported)" in text
        and "**supported**" not in text.split("*The rule.*")[0].split("6. ")[0]
    )


@pytest.mark.parametrize(
    ("gain", "seeds", "start"),
    [
        (-0.2, 6, "**Pixel + adaptive is worse than pixel only here. "),
        (-0.2, 2, "**It is not decided whether pixel + adaptive beats pixel only. "),
        (0.2, 6, "**Pixel + adaptive beats pixel only here. "),
        (0.2, 2, "**It is not decided whether pixel + adaptive beats pixel only"),
    ],
)
def test_the_first_line_says_which_way_it_went(tmp_path, gain, seeds, start):
    make_study(tmp_path, {"pixel": truth(), "pixel+adaptive": truth(gain)}, seeds=seeds, scenes=100)
    assert report.write(tmp_path, 2000).read_text().startswith(start)


def test_report_is_whole(study):
    path = report.write(study, 2000)
    text = path.read_text()
    assert path == study / "report.md"
    assert "Unfinished and left out: pixel/9." in text
    for name in ("accuracy", "curves", "levels", "budget"):
        assert f"]({name}.png)" in text and (study / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    lines = text.splitlines()
    assert all(f"    python -m examples.experiment --seeds {n}" in lines for n in range(2)) and lines.count("torch 2.9.") == 1
    tables = [i for i, line in enumerate(lines) if line.startswith("|---")]
    assert len(tables) >= 10
    for i in tables:  # every row of a table has the cells of its head
        end = next(j for j in range(i, len(lines) + 1) if j == len(lines) or not lines[j].startswith("|"))
        assert end > i + 1 and lines[i - 2] == ""
        assert {line.count("|") for line in lines[i - 1 : end]} == {lines[i].count("|")}, lines[i - 1]
    numbers = json.loads((study / "report.json").read_text())
    assert f"{numbers['arms']['main']['pixel']['test']['overall']['mean']:.3f}" in text
    assert "nan" not in text.lower().split("## how it was made")[0]


def test_equal_steps_and_equal_compute(tmp_path):
    make_study(tmp_path, {"pixel": truth(coarse=0.8, middle=0.8, fine=0.8)}, seeds=2, scenes=20)
    make_run(tmp_path, "pixel+fixed50", 0, truth(coarse=0.8, middle=0.8, fine=0.8), scenes=20, tokens=50)
    tables = analyse(tmp_path)["budgets"]
    assert tables["steps"]["budgets"] == [100, 200, 400]
    assert tables["steps"]["arms"]["pixel"][2] == tables["steps"]["arms"]["pixel+fixed50"][2] == pytest.approx([0.8] * 3)
    assert tables["flops"]["budgets"][2] == 400 * 1e9 * 8  # what the cheapest had spent: half of the other's steps
    assert tables["flops"]["arms"]["pixel+fixed50"][2] == pytest.approx([0.8 * 2 / 3] * 3)
    assert tables["flops"]["arms"]["pixel+fixed50"][0] is None  # no evaluation so early


def test_other_settings_are_refused(tmp_path):
    make_study(tmp_path, {"pixel": truth()}, seeds=2, scenes=5)
    make_run(tmp_path, "pixel+adaptive", 0, truth(), scenes=5, settings={"learning_rate": 2e-3})
    with pytest.raises(GranulonError, match=r"pixel/0 .*pixel\+adaptive/0 .*settings.learning_rate .*0.001 .*0.002"):
        report.read(tmp_path)


def test_an_arm_that_differs_between_seeds_is_refused(tmp_path):
    make_study(tmp_path, {"pixel": truth()}, seeds=1, scenes=5)
    make_run(tmp_path, "pixel", 1, truth(), scenes=5, tokens=5)
    with pytest.raises(GranulonError, match=r"pixel/0 .*pixel/1 .*arm.tokens"):
        report.read(tmp_path)


def test_other_questions_are_refused(tmp_path):
    make_study(tmp_path, {"pixel": truth()}, seeds=1, scenes=5)
    make_run(tmp_path, "pixel+adaptive", 0, truth(), scenes=6)
    with pytest.raises(GranulonError, match="questions"):
        report.read(tmp_path)


def test_a_run_without_a_split_is_refused(tmp_path):
    make_study(tmp_path, {"pixel": truth()}, seeds=2, scenes=5)
    path = tmp_path / "runs/pixel/1/predictions.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if '"test_heldout"' not in line))
    with pytest.raises(GranulonError, match="pixel/0 .*pixel/1 .*questions"):
        report.read(tmp_path)


def test_no_finished_run_is_refused(tmp_path):
    make_run(tmp_path, "pixel", 0, truth(), unfinished=True)
    with pytest.raises(GranulonError, match="no finished run"):
        report.write(tmp_path)


def test_order_of_rows_does_not_matter(tmp_path):
    make_study(tmp_path, {"pixel": truth(), "pixel+adaptive": truth(0.1)}, seeds=1, scenes=40)
    before = analyse(tmp_path)
    path = tmp_path / "runs/pixel+adaptive/0/predictions.jsonl"
    lines = path.read_text().splitlines()
    np.random.default_rng(0).shuffle(lines)
    path.write_text("\n".join(lines) + "\n")
    assert report.plain(analyse(tmp_path)) == report.plain(before)


def test_level_choice_is_counted_and_framed(found):
    shares = found["level_choice"]["shares"]["test"]
    fine = shares[list(TYPES).index("letter")]
    assert found["level_choice"]["levels"] == ["coarse", "middle", "fine"]
    assert fine[0] == pytest.approx(0.05, abs=0.03) and fine[1] == 0 and sum(fine) == pytest.approx(1)
    # middle and fine are hit 95 % of the time, coarse always: two, two and one types
    assert found["level_choice"]["agreement"]["test"]["mean"] == pytest.approx((2 + 3 * 0.95) / 5, abs=0.02)


def test_a_type_that_a_split_lacks_is_a_dash_and_decides_nothing(tmp_path):
    """As in a quick run: few scenes, and a level of which nothing was asked on the test split."""
    make_study(tmp_path, {"pixel+fixed5": truth(), "pixel+fixed20": truth(), "pixel": truth()}, seeds=3, scenes=3)
    for path in tmp_path.glob("runs/*/*/predictions.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [row for row in rows if row["level"] != "fine" or row["split"] != "test"]
        kept = [row for row in kept if row["control"] == "none" or row["scene"] == "test-1"]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    text = report.write(tmp_path, 500).read_text()
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["comparisons"]["test"]["fine"]["missing"] == "no such questions in the split test"
    assert found["comparisons"]["test"]["interaction"]["p_holm"] == 1.0
    assert found["arms"]["main"]["pixel"]["test"]["fine"]["mean"] is None
    assert found["arms"]["main"]["pixel"]["test"]["overall"]["mean"] is not None
    row = next(line for line in text.splitlines() if line.startswith("| pixel | 3 |"))
    assert row.split(" | ")[5] == "–" and "nan" not in text


def test_what_cannot_be_decided_leaves_no_room_to_the_others_in_the_correction(tmp_path):
    """A difference that is large, of arms that are not to be trusted, counts as p = 1."""
    make_study(tmp_path, {"pixel": truth(), "pixel+adaptive": truth(0.3), "pixel+dummy": truth()}, seeds=3, scenes=80)
    stop_early(tmp_path / "runs/pixel+dummy/0")
    family = analyse(tmp_path)["comparisons"]["test"]
    assert family["dummy"]["p"] < 0.05 and family["dummy"]["p_holm"] == 1.0
    assert family["pixel"]["p_holm"] == pytest.approx(min(1.0, len(report.FAMILY) * family["pixel"]["p"]))


def test_command_says_in_one_sentence_what_is_wrong(tmp_path):
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(report.main)
    result = CliRunner().invoke(app, [str(tmp_path)])
    assert result.exit_code == 2 and "holds no finished run" in result.output and "Traceback" not in result.output


RESULTS = Path(report.__file__).parent / "results"
COMMITTED = {"first": report, "first/longer": report, "second": second}


@pytest.mark.slow
@pytest.mark.parametrize("folder", COMMITTED)
def test_a_committed_report_is_what_its_raw_predictions_say(tmp_path, folder):
    module, folder = COMMITTED[folder], RESULTS / folder
    name = module.__name__.rpartition(".")[2]
    with tarfile.open(folder / "runs.tar.xz") as file:
        file.extractall(tmp_path, filter="data")
    found = module.analyse(report.read(tmp_path), 200)
    written = json.loads((folder / f"{name}.json").read_text())
    assert found["experiment"] == written["experiment"]
    arms, written_arms = (one["arms"].get("main", one["arms"]) for one in (found, written))
    assert set(arms) == set(written_arms)
    for arm, splits in arms.items():
        for split, cells in splits.items():
            for level, cell in cells.items():
                assert cell["mean"] == pytest.approx(written_arms[arm][split][level]["mean"]), (arm, split, level)
    for one, result in found["comparisons"]["test"].items():
        assert result.get("estimate") == pytest.approx(written["comparisons"]["test"][one].get("estimate")), one
    text = (folder / f"{name}.md").read_text()
    for claim in written["claims"]:
        title = f"{claim.get('number') or claim['letter']}. {claim['claim']}"
        assert f"| {title} | **{claim['verdict']}**" in text
        if claim.get("results", True):  # a claim that is not tested has no paragraph in the second part
            assert f"**{title}: {claim['verdict']}" in text
    assert all((folder / name).exists() for name in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text))
