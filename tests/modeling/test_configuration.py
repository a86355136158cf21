"""The configuration: defaults of the method, round trips, and one clear error for each wrong level or option."""

import json

import pytest
from transformers import AutoConfig

from granulon_hf import GranulonConfig

LEVEL = {"name": "a", "alpha": 2, "beta": 3, "gamma": 1.0}


def test_defaults_are_those_of_the_method():
    config = GranulonConfig()
    assert [(level["name"], level["alpha"], level["beta"], level["gamma"]) for level in config.granularity_levels] == [
        ("coarse", 4, 5, 1.0),
        ("middle", 2, 10, 1.0),
        ("fine", 1, 20, 1.0),
    ]
    assert (config.num_semantic_tokens, config.default_granularity, config.relation) == (20, "middle", "cosine")
    assert (config.filter_weights, config.clustering_steps) == ([1.0, 1.0, 1.0], 10)
    assert (config.pixel_loss_weight, config.semantic_loss_weight) == (0, 0)
    assert (config.vision_config.model_type, config.vision_config.patch_size) == ("dinov3_vit", 16)
    assert config.tie_word_embeddings is config.text_config.tie_word_embeddings is True


@pytest.mark.parametrize("levels", [None, [], [LEVEL]])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path, levels, tied):
    text = {"model_type": "llama", "hidden_size": 64, "tie_word_embeddings": tied}
    config = GranulonConfig(text_config=text, granularity_levels=levels, num_semantic_tokens=7, relation="attention")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, GranulonConfig)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert loaded.tie_word_embeddings is tied
    assert json.loads((tmp_path / "config.json").read_text())["granularity_levels"] == config.granularity_levels


def test_two_configs_share_no_level():
    one, other = GranulonConfig(), GranulonConfig()
    one.granularity_levels[0]["beta"] = 99
    assert other.granularity_levels[0]["beta"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity_levels": [{"name": "a", "alpha": 1}]}, "has the keys name, alpha, beta and gamma"),
        ({"granularity_levels": [LEVEL | {"alpha": 0}]}, "alpha must be an integer of at least 1; got 0"),
        ({"granularity_levels": [LEVEL | {"beta": 2.5}]}, "beta must be an integer"),
        ({"granularity_levels": [LEVEL | {"gamma": 0}]}, "gamma must be a number above 0"),
        ({"granularity_levels": [LEVEL | {"name": ""}]}, "non-empty string"),
        ({"granularity_levels": [LEVEL, LEVEL]}, "must differ"),
        ({"default_granularity": "medium"}, r"default_granularity='medium' is not one of the levels \['coarse'"),
        ({"num_semantic_tokens": 0}, "num_semantic_tokens must be at least 1"),
        ({"vision_feature_select_strategy": "full"}, "no place on the grid"),
        ({"filter_weights": [1.0, 1.0]}, "three numbers"),
        ({"clustering_steps": -1}, "clustering_steps must not be negative"),
        ({"slot_position": "semantic", "granularity_levels": []}, "needs granularity levels; without them use 'all'"),
        (
            {"slot_position": "all", "granularity_levels": [], "vision_feature_select_strategy": "full"},
            "CLS and register tokens have no place: use 'default'",
        ),
        ({"slot_position_bins": 1}, "slot_position_bins must be at least 2; got 1"),
    ],
)
def test_wrong_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GranulonConfig(**options)


@pytest.mark.parametrize("options", [{"relation": "euclid"}, {"clustering": "dbscan"}, {"slot_position": "pixel"}])
def test_unknown_choices_are_refused(options):
    with pytest.raises(Exception, match=next(iter(options))):
        GranulonConfig(**options)
