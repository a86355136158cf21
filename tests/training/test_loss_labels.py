"""Labels by measured value: the loss of an answer at every level, resumable, and priced."""

import pytest
import torch

from granulon_hf.data.collator import GranulonCollator
from granulon_hf.data.datasets.shapes import Shapes
from granulon_hf.errors import GranulonError
from granulon_hf.training.loss_labels import answer_losses, label_by_loss


@pytest.fixture
def samples():
    return [Shapes(6, seed=3)[i] for i in range(6)]


@pytest.mark.parametrize("variant", ["granulon-qwen2.5", "granulon-compact-llama3.2"])
@pytest.mark.parametrize("reducer", ["adata", "attention-merge", "question-dpp"])
@torch.no_grad()
def test_losses_are_those_of_each_sample_alone(build, samples, variant, reducer):
    model, processor = build(variant, reducer=reducer)
    collator = GranulonCollator(processor, last_answer_only=True)
    losses, tokens = answer_losses(model, collator(samples))
    for i, sample in enumerate(samples):
        batch = collator([sample])
        count = (batch["labels"] != -100).sum()
        for level in range(3):
            alone = model(**batch, granularity=level)
            torch.testing.assert_close(losses[i, level], alone.loss * count, atol=1e-4, rtol=1e-4)
            assert tokens[i, level] == alone.image_outputs.slot_mask.sum()


def test_the_tower_runs_once(build, samples):
    model, processor = build("granulon-compact-qwen2.5")
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    answer_losses(model, GranulonCollator(processor)(samples))
    assert len(calls) == 1


def test_what_was_scored_is_kept(build, samples, tmp_path):
    model, processor = build("granulon-compact-qwen2.5")
    journal, seen = tmp_path / "scores.jsonl", []
    whole = label_by_loss(model, processor, samples, tmp_path / "whole.jsonl")
    label_by_loss(model, processor, samples[:3], journal)
    with open(journal, "a") as file:
        file.write('{"id": "torn')  # as kill -9 leaves it
    scored = []
    model.model.language_model.register_forward_hook(lambda *_: scored.append(1))
    again = label_by_loss(model, processor, samples, journal, batch_size=2, on_progress=seen.append)
    assert len(scored) == 2 * 3  # two batches of what was missing, at three levels
    assert seen == [1, 1, 1, 2, 1]
    for row, other in zip(again, whole, strict=True):
        assert row["id"] == other["id"] and row["tokens"] == other["tokens"]
        assert row["losses"] == pytest.approx(other["losses"], abs=1e-4)
    assert [row["text"] for row in whole] == [sample.question for sample in samples]


def test_samples_that_cannot_be_used_are_left_out(build, samples, tmp_path):
    model, processor = build("granulon-compact-qwen2.5")
    samples[2].images[0] = {"bytes": b"no image", "path": None}
    rows = label_by_loss(model, processor, samples, tmp_path / "scores.jsonl")
    assert [row["id"] for row in rows] == [sample.id for i, sample in enumerate(samples) if i != 2]


def test_scores_of_other_levels_and_models_without_a_choice_are_refused(build, samples, tmp_path):
    model, processor = build("granulon-compact-qwen2.5")
    label_by_loss(model, processor, samples[:1], tmp_path / "scores.jsonl")
    levels = [{"name": name, "alpha": 1, "beta": 4, "gamma": 1.0} for name in ("a", "b")]
    for options in ({"granularity_levels": levels}, {"granularity_levels": levels[:1]}):
        model, processor = build("granulon-compact-qwen2.5", **options)
        with pytest.raises(GranulonError):
            label_by_loss(model, processor, samples, tmp_path / "scores.jsonl")
