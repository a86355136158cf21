"""Cached features: the same loss as from pixels, and what cannot be cached."""

import json

import pytest
import torch

from granulon_hf.data.collator import GranulonCollator
from granulon_hf.data.datasets.shapes import Shapes
from granulon_hf.errors import GranulonError
from granulon_hf.training import set_stage
from granulon_hf.training.feature_cache import INDEX, VALUES, FeatureCache

SAMPLES = Shapes(10)
IMAGES = [image for i in range(10) for image in SAMPLES[i].images]


@pytest.fixture
def parts(build):
    model, processor = build()
    set_stage(model, "projector")
    return model, processor


def filled(folder, parts, images=IMAGES):
    cache = FeatureCache(str(folder), *parts)
    cache.fill(images, batch_size=4)
    return cache


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_that_of_the_pixels(tmp_path, parts, packing):
    model, processor = parts
    collator = GranulonCollator(processor, packing=packing)
    rows = [SAMPLES[i] for i in range(6)]
    expected = model(**collator(rows)).loss
    collator.image_features = filled(tmp_path, parts)
    batch = collator(rows)
    assert batch["pixel_values"].dtype == torch.bfloat16 and batch["pixel_values"].ndim == 3
    assert model(**batch).loss.item() == pytest.approx(expected.item(), abs=1e-3)  # bfloat16


@pytest.mark.parametrize("reducer", ["pool", "queries", "question-dpp", "region-attention"])
@pytest.mark.parametrize("packing", [False, True])
def test_reducers_and_budgets_take_them(tmp_path, build, reducer, packing):
    model, processor = build("granulon-compact-qwen2.5", reducer=reducer)
    set_stage(model, "projector")
    collator = GranulonCollator(processor, packing=packing)
    rows = [SAMPLES[i] for i in range(3)]
    plain = collator(rows)
    collator.image_features = filled(tmp_path, (model.eval(), processor))
    cached = collator(rows)
    for choice in ({"granularity": torch.tensor([0, 2, 1])}, {"visual_tokens": 7}):
        expected = model(**plain, **choice).loss
        assert model(**cached, **choice).loss.item() == pytest.approx(expected.item(), abs=5e-3)  # bfloat16


def test_a_killed_fill_goes_on(tmp_path, parts):
    whole = filled(tmp_path / "a", parts)
    filled(tmp_path / "b", parts, IMAGES[:4])
    with open(tmp_path / "b" / VALUES, "ab") as values:  # written, but not named
        values.write(b"x" * 1000)
    with open(tmp_path / "b" / INDEX, "a") as index:
        index.write('{"key": "')
    calls = []
    parts[0].model.vision_tower.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    resumed = filled(tmp_path / "b", parts)
    assert sum(calls) == 6
    assert all(torch.equal(whole(image), resumed(image)) for image in IMAGES)
    filled(tmp_path / "b", parts)
    assert sum(calls) == 6  # nothing is computed again


def test_features_that_lost_their_end_are_refused(tmp_path, parts):
    filled(tmp_path, parts)
    path = tmp_path / VALUES
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(GranulonError, match="remove the folder"):
        FeatureCache(str(tmp_path), *parts)


def test_the_same_picture_is_kept_once_and_broken_ones_are_named(tmp_path, parts):
    cache = filled(tmp_path, parts, [IMAGES[0], IMAGES[0], {"bytes": b"broken", "path": None}])
    assert len(cache.rows) == 1
    with pytest.raises(ValueError, match="unusable image"):
        cache({"bytes": b"broken", "path": None})
    with pytest.raises(ValueError, match="feature cache"):
        cache(IMAGES[5])


def test_what_cannot_be_cached(tmp_path, parts, build):
    filled(tmp_path, parts)
    other, processor = build()
    with torch.no_grad():
        next(other.model.vision_tower.parameters()).add_(1)
    set_stage(other, "projector")
    with pytest.raises(GranulonError, match="tower"):
        FeatureCache(str(tmp_path), other, processor)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(GranulonError, match="preprocessing"):
        FeatureCache(str(tmp_path), parts[0], processor)
    set_stage(other, "full")
    with pytest.raises(GranulonError, match="frozen"):
        FeatureCache(str(tmp_path / "new"), other, processor)
    attention, processor = build(relation="attention")
    set_stage(attention, "projector")
    with pytest.raises(GranulonError, match="attention"):
        FeatureCache(str(tmp_path / "new"), attention, processor)
    for reducer in ("attention-merge", "adaptive-prune", "downsample"):
        other, processor = build("granulon-compact-qwen2.5", reducer=reducer)
        set_stage(other, "projector")
        with pytest.raises(GranulonError, match=reducer):
            FeatureCache(str(tmp_path / "new"), other, processor)
    assert json.loads((tmp_path / "cache.json").read_text())["shape"]


# --- AdaTA's clusters ------------------------------------------------------------------------------------------------

THREE = [
    {"name": "few", "alpha": 5, "beta": 3, "gamma": 0.5},
    {"name": "some", "alpha": 2, "beta": 9, "gamma": 1.0},
    {"name": "many", "alpha": 1, "beta": 30, "gamma": 1.5},
]
FORMS = {
    "both": ("granulon-qwen2.5", {}, None),
    "ragged": (
        "granulon-qwen2.5",
        {"granularity_levels": THREE, "default_granularity": "some", "num_semantic_tokens": 12},
        None,
    ),
    "places": ("granulon-qwen2.5", {"slot_position": "all"}, None),
    "compact": ("granulon-compact-qwen2.5", {"slot_position": "semantic"}, None),
    "relation": ("granulon-compact-qwen2.5", {"clustering": "relation", "filter_weights": [0.0, 1.0, 3.0]}, None),
    "budget": ("granulon-qwen2.5", {}, 7),
    "compact-budget": ("granulon-compact-qwen2.5", {}, 5),
}


@pytest.mark.parametrize("form", FORMS)
def test_no_step_looks_for_clusters_again(tmp_path, build, monkeypatch, form):
    name, options, budget = FORMS[form]
    model, processor = build(name, **options)
    set_stage(model, "projector")
    if model.model.multi_modal_projector.position is not None:
        torch.nn.init.normal_(model.model.multi_modal_projector.position)
    cache = FeatureCache(str(tmp_path), model, processor, budget=budget)
    cache.fill(IMAGES)
    if budget is not None and model.config.compact:
        processor.num_semantic_tokens = budget
    collator = GranulonCollator(processor, packing=form not in ("both", "budget"), image_features=cache)
    rows = [SAMPLES[i] for i in (0, 1, 2, 1)]
    plain = collator(rows)
    assert "clusters" not in plain
    cache.fill_clusters(batch_size=3)
    collator.image_clusters = cache.clusters_of
    kept = collator(rows)
    choices = [{"visual_tokens": budget}] if budget else [{}, {"granularity": torch.tensor([0, 2, 1, 2])}, {"granularity": 2}]
    expected = [model(**plain, **choice) for choice in choices]
    monkeypatch.setattr(model.model, "reducer", None)
    for choice, before in zip(choices, expected, strict=True):
        after = model(**kept, **choice)
        torch.testing.assert_close(after.loss, before.loss, atol=1e-6, rtol=0)
        torch.testing.assert_close(after.aggregation.tokens, before.aggregation.tokens, atol=0, rtol=0)
        torch.testing.assert_close(after.aggregation.positions, before.aggregation.positions, atol=1e-6, rtol=0)
        assert torch.equal(after.aggregation.keep, before.aggregation.keep)
        weight = model.model.multi_modal_projector.linear_1.weight
        gradients = [torch.autograd.grad(out.loss, weight, retain_graph=True)[0] for out in (before, after)]
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)


CHANGES = {
    "relation_weight": 0.5,
    "clustering": "relation",
    "clustering_steps": 3,
    "filter_weights": [1.0, 0.0, 1.0],
    "num_semantic_tokens": 6,
}


@pytest.mark.parametrize("change", [*CHANGES, "alpha", "beta", "levels", "budget", "code", "gamma"])
def test_other_settings_have_other_clusters(tmp_path, parts, monkeypatch, change):
    model, processor = parts
    cache = filled(tmp_path, parts)
    cache.fill_clusters()
    assert cache.count_clusters() == len(IMAGES)
    config, budget, levels = model.config, None, [dict(level) for level in model.config.granularity_levels]
    if change in CHANGES:
        setattr(config, change, CHANGES[change])
    elif change == "levels":
        config.granularity_levels = levels[:2]
    elif change == "budget":
        budget = 4
    elif change == "code":
        other = tmp_path / "aggregation_granulon.py"
        other.write_text("# another version")
        monkeypatch.setattr("granulon_hf.modeling.aggregation_granulon.__file__", str(other))
    else:
        levels[1][change] += 1
        config.granularity_levels = levels
    other = FeatureCache(str(tmp_path), model, processor, budget=budget)
    # Gamma weighs tokens, and finds no others.
    assert other.count_clusters() == (len(IMAGES) if change == "gamma" else 0)
    other.fill_clusters()
    assert other.count_clusters() == len(IMAGES)
    key = {"visual_tokens": 4} if change == "budget" else {"granularity": 1}
    found = other.clusters_of(IMAGES[3])[0 if change == "budget" else 1][0]
    expected = model.model.aggregate(other(IMAGES[3])[None], **key)
    assert found.max() + 1 == expected.keep.sum()


def test_a_killed_fill_of_clusters_goes_on(tmp_path, parts, monkeypatch):
    whole = filled(tmp_path / "a", parts)
    whole.fill_clusters()
    part = filled(tmp_path / "b", parts, IMAGES[:4])
    part.fill_clusters()
    with open(part.clusters, "ab") as file:
        file.write(b"x" * 101)
    part = filled(tmp_path / "b", parts)
    calls, aggregate = [], parts[0].aggregate
    monkeypatch.setattr(
        parts[0], "aggregate", lambda features, **choice: calls.append(len(features)) or aggregate(features, **choice)
    )
    part.fill_clusters()
    part.fill_clusters()
    assert calls == [6, 6, 6]  # three levels
    assert all(torch.equal(whole.clusters_of(image), part.clusters_of(image)) for image in IMAGES)
    # Other rows, other clusters.
    (tmp_path / "b" / INDEX).unlink()
    again = filled(tmp_path / "b", parts, IMAGES[:4:-1])
    assert again.count_clusters() == 0


@pytest.mark.parametrize("reducer", ["pool", "queries", "question-dpp", "region-attention", "random"])
def test_other_reducers_have_no_clusters_to_keep(tmp_path, build, reducer):
    model, processor = build("granulon-compact-qwen2.5", reducer=reducer)
    set_stage(model, "projector")
    assert not filled(tmp_path, (model, processor)).choices
