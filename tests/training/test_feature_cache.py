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
