"""Granularity: policies against NumPy, the controller's row against really letting it choose, β and K on the same weights."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from granulon_hf.data.datasets.shapes import Shapes
from granulon_hf.evaluation import granularity as work
from granulon_hf.evaluation.answer import Generation, answer_batch
from granulon_hf.evaluation.granularity import GranularityAnalysis, image_tokens, setting, sweep_cells
from tests.conftest import make_conversation, make_inputs, make_picture

LEVELS = ("coarse", "middle", "fine")


@pytest.fixture(scope="module")
def found():
    """Made up: 6 samples, of which the last has no image."""
    choice = ["coarse", "middle", "fine", "fine", "coarse", None]
    scores = np.array([[1, 0, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 1, 0]], dtype=float)
    return [
        {"id": f"s{9 - i}", "task": "vqa" if i % 2 else "caption", "meta": {"kind": "x" if i < 2 else "y"}, "level": level}
        | {"chosen": choice[i], "probability": 0.8 if level == choice[i] else 0.1, "score": scores[number, i]}
        | {"semantic_tokens": (4, 9, 20)[number]}
        for number, level in enumerate(LEVELS)
        for i in range(6)
    ]


def test_policies_against_numpy(found):
    policies = work.by_policy(found, "score")
    assert policies["controller"].tolist() == [1, 1, 0, 1, 0]
    assert policies["oracle"].tolist() == [1, 1, 0, 1, 1]
    np.testing.assert_allclose(policies["random"], np.array([[1, 0, 0, 1, 0], [1, 1, 0, 0, 0], [0, 1, 0, 1, 1]]).mean(0))
    table = {(row["group"], row["policy"]): row for row in work.policy_table(found, ["task", "kind"])}
    everything = table["all", "oracle"]
    assert everything["score"] == pytest.approx(0.8) and everything["n"] == 5
    assert everything["difference"] == pytest.approx(0.8 - 0.6)
    assert everything["low"] <= everything["score"] <= everything["high"]
    assert table["all", "controller"]["semantic_tokens"] == pytest.approx((4 + 9 + 20 + 20 + 4) / 5)
    assert table["kind=x", "fine"]["score"] == pytest.approx(0.5)
    assert {group for group, _ in table} == {"all", "task=vqa", "task=caption", "kind=x", "kind=y"}


def test_how_often_levels_are_chosen(found):
    table = {(row["group"], row["level"]): row for row in work.choice_table(found, ["task"])}
    assert [table["all", level]["count"] for level in LEVELS] == [2, 1, 2]
    assert table["task=vqa", "middle"]["share"] == 0.5
    assert table["all", "middle"]["mean_probability"] == pytest.approx((4 * 0.1 + 0.8) / 5)


def test_the_controllers_score_is_that_of_letting_it_choose(build, tmp_path):
    model, processor = build()
    samples, seen = list(Shapes(6)), []
    generation = Generation(4, batch_size=3)
    analysis = GranularityAnalysis(
        model, processor, samples, tmp_path, {}, generation, lambda row: len(row["prediction"]), seen.append
    )
    found = analysis.levels()
    assert sum(seen) == 3 * 6
    free = [row for i in (0, 3) for row in answer_batch(model, processor, samples[i : i + 3], generation)]
    assert len({row["granularity"] for row in free}) > 1  # else it would not matter which level is taken
    assert [row["chosen"] for row in found[:6]] == [row["granularity"] for row in free]
    assert work.by_policy(found, "score")["controller"].tolist() == [len(row["prediction"]) for row in free]
    tokens = {row["level"]: (row["pixel_tokens"], row["semantic_tokens"]) for row in found}
    assert tokens == {"coarse": (36, 4), "middle": (36, 9), "fine": (36, 20)}
    # Again from what is stored: nothing is answered.
    analysis.model = None
    again = analysis.answers("level-fine", Generation(4, "fine"))
    assert [row["prediction"] for row in again] == [row["prediction"] for row in found if row["level"] == "fine"]


def test_another_number_of_clusters_is_that_of_a_model_configured_so(build):
    model, processor = build()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    levels = [{"name": name, "alpha": 1, "beta": 30, "gamma": 1.0} for name in LEVELS]
    other, other_processor = build(granularity_levels=levels, num_semantic_tokens=25)
    other.load_state_dict(weights)
    conversation = make_conversation("What is it?", [make_picture(1)])
    before = (model.config.granularity_levels, model.config.num_semantic_tokens, processor.num_semantic_tokens)
    with setting(model, processor, alpha=1, beta=30, slots=25), torch.no_grad():
        inputs = make_inputs(processor, [conversation])
        assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 36 + 25
        changed = model(**inputs).logits
        assert image_tokens(model, processor, Shapes(1), "coarse") == (36, 25)
    with torch.no_grad():
        expected = other(**make_inputs(other_processor, [conversation])).logits
    torch.testing.assert_close(changed, expected)
    assert before == (model.config.granularity_levels, model.config.num_semantic_tokens, processor.num_semantic_tokens)


def test_the_setting_is_restored_after_an_error(build):
    model, processor = build()
    with pytest.raises(KeyError), setting(model, processor, 1, 5, 5):
        raise KeyError
    assert model.config.granularity_levels[0]["alpha"] == 4
    assert (model.config.num_semantic_tokens, processor.num_semantic_tokens) == (20, 20)


def test_sweep_and_report(build, tmp_path):
    model, processor = build()
    analysis = GranularityAnalysis(model, processor, list(Shapes(3)), tmp_path / "answers", {}, Generation(2), work.auto_score)
    found, cells = analysis.levels(), analysis.sweep([5, 50], [5, 10])
    assert [(cell["beta"], cell["k"], cell["semantic_tokens"]) for cell in cells] == [
        (0, 0, 0),
        (5, 5, 5),
        (50, 5, 5),
        (50, 10, 10),
    ]
    result = work.report(tmp_path, found, cells, ["level"], "Title | here", {"seed": 0})
    assert result == json.loads((tmp_path / "granularity.json").read_text())
    text = (tmp_path / "granularity.md").read_text()
    assert "| level=coarse | 1 |" in text and "| all | oracle |" in text and "| all | 50 | 10 | 10 |" in text
    table = pq.read_table(tmp_path / "granularity.parquet").to_pylist()
    assert len(table) == 3 * 3 + 4 * 3
    assert {row["setting"] for row in table} == {"level coarse", "level middle", "level fine", "sweep"}
    for name in ("choices", "levels", "sweep"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert not list((tmp_path / "answers").rglob("*.png"))  # images are not copied into every run


def test_sweep_cells():
    assert sweep_cells([50, 5]) == [(5, 5), (50, 50)]
    assert sweep_cells([5, 50], [20, 5]) == [(5, 5), (50, 5), (50, 20)]
    assert sweep_cells([]) == []
    with pytest.raises(ValueError, match="above"):
        sweep_cells([5], [6])


def test_scores_fit_the_sample():
    row = {"prediction": "A red dog.", "reference": "red dog", "task": "vqa", "choices": None}
    assert work.auto_score(row) == 1.0
    assert work.auto_score({**row, "reference": "red dog runs fast", "task": "caption"}) == 0.25
    assert work.auto_score({**row, "choices": ["blue cat", "red dog"]}) == 1.0
    with pytest.raises(ValueError, match="bleu.* auto"):
        work.find_scorer("bleu")


def test_what_cannot_be_analysed(build, tmp_path):
    model, processor = build("clip-qwen2.5")
    with pytest.raises(ValueError, match="granularity"):
        GranularityAnalysis(model, processor, list(Shapes(1)), tmp_path, {})
