"""Loading refuses what transformers only warns of: weights that are missing, of another shape, or left out."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from granulon_hf import GranulonForConditionalGeneration
from granulon_hf.modeling.adapter_granulon import ADAPTER_WEIGHTS, load_whole

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"num_key_value_heads": 2, "vocab_size": 99, "tie_word_embeddings": True}
VISION = SIZES | {"image_size": 32, "patch_size": 16}


@pytest.fixture
def backbones(tmp_path):
    """Folders of a tower (beside a text tower, as CLIP's) and of a decoder."""
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(vision_config=VISION, text_config=SIZES | {"vocab_size": 99})).save_pretrained(tmp_path / "vision")
    Qwen2ForCausalLM(Qwen2Config(**TEXT)).save_pretrained(tmp_path / "text")
    return tmp_path


@pytest.fixture
def adapter(backbones):
    """An adapter that fits these backbones."""
    model = GranulonForConditionalGeneration.from_vision_text_pretrained(
        str(backbones / "vision"), str(backbones / "text"), image_token_id=5
    )
    folder = backbones / "adapter"
    model.config.save_pretrained(folder)
    trained = {key.removeprefix("model."): value for key, value in model.state_dict().items()}
    parts = ("multi_modal_projector", "controller")
    save_file({key: value for key, value in trained.items() if key.startswith(parts)}, folder / ADAPTER_WEIGHTS)
    return model, folder


def places(**others):
    return {"vision": {"name": str(others["vision"])}, "text": {"name": str(others["text"])}}


def test_fitting_backbones_are_taken(adapter, backbones):
    model, folder = adapter
    shutil.copytree(backbones / "text", backbones / "moved")
    for given in ({}, {"backbones": places(vision=backbones / "vision", text=backbones / "moved")}):
        loaded = GranulonForConditionalGeneration.from_pretrained(folder, **given)
        for key, value in model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[key]), key


def decoder(kind=Qwen2ForCausalLM, config=Qwen2Config, **options):
    return kind(config(**TEXT | options))


FOREIGN = {
    "another architecture": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99)),
    "a like one without biases": lambda: decoder(LlamaForCausalLM, LlamaConfig),
    "a like one with more norms": lambda: decoder(Qwen3ForCausalLM, Qwen3Config, head_dim=8),
    "more layers": lambda: decoder(num_hidden_layers=3),
    "fewer layers": lambda: decoder(num_hidden_layers=1),
    "another width": lambda: decoder(hidden_size=64),
    "another vocabulary": lambda: decoder(vocab_size=98),
    "other positions": lambda: decoder(rope_parameters={"rope_type": "default", "rope_theta": 5000.0}),
    "another activation": lambda: decoder(hidden_act="gelu"),
    "other heads": lambda: decoder(num_attention_heads=2),
}


@pytest.mark.parametrize("which", FOREIGN)
def test_foreign_decoders_are_refused(adapter, backbones, which):
    _, folder = adapter
    FOREIGN[which]().save_pretrained(backbones / "foreign")
    for options in ({}, {"output_loading_info": True}):
        with pytest.raises(ValueError, match="foreign "):
            GranulonForConditionalGeneration.from_pretrained(
                folder, backbones=places(vision=backbones / "vision", text=backbones / "foreign"), **options
            )


@pytest.mark.parametrize("which", ["a like one without biases", "a like one with more norms", "more layers", "another width"])
def test_weights_that_a_config_has_no_place_for_are_refused(tmp_path, which):
    FOREIGN[which]().save_pretrained(tmp_path / "foreign")
    config = Qwen2Config(**TEXT) if which in ("more layers", "another width") else LlamaConfig(**TEXT)
    if which == "a like one without biases":
        decoder().save_pretrained(tmp_path / "foreign")
    with pytest.raises(ValueError, match="does not fit"):
        load_whole(AutoModelForCausalLM.from_pretrained, tmp_path / "foreign", config=config)


def test_a_decoder_that_lacks_its_head_is_refused(backbones):
    Qwen2Model(Qwen2Config(**TEXT | {"tie_word_embeddings": False})).save_pretrained(backbones / "headless")
    with pytest.raises(ValueError, match="lm_head.weight"):
        GranulonForConditionalGeneration.from_vision_text_pretrained(
            str(backbones / "vision"), str(backbones / "headless"), image_token_id=5
        )


@pytest.mark.parametrize("options", [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"patch_size": 8}])
def test_foreign_towers_are_refused(adapter, backbones, options):
    _, folder = adapter
    for foreign in (
        CLIPModel(CLIPConfig(vision_config=VISION | options, text_config=SIZES | {"vocab_size": 99})),
        Dinov2ForImageClassification(Dinov2Config(**VISION)),
    ):
        foreign.save_pretrained(backbones / "foreign")
        with pytest.raises(ValueError, match="foreign "):
            GranulonForConditionalGeneration.from_pretrained(
                folder, backbones=places(vision=backbones / "foreign", text=backbones / "text")
            )
        shutil.rmtree(backbones / "foreign")


@pytest.mark.parametrize(
    "lost", ["multi_modal_projector.linear_1.weight", "controller.fc2.bias", "layers.1.mlp.up_proj.weight"]
)
def test_whole_checkpoints_must_be_whole(adapter, tmp_path, lost):
    model, _ = adapter
    model.save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    weights = load_file(file)
    some = {key: value for key, value in weights.items() if not key.endswith(lost)}
    save_file(some, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=lost):
        GranulonForConditionalGeneration.from_pretrained(tmp_path / "whole")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="controller"):
        GranulonForConditionalGeneration.from_pretrained(tmp_path / "whole", controller_hidden_size=8)
    more = weights | {"model.qformer.weight": torch.zeros(2)}
    save_file(more, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="qformer"):
        GranulonForConditionalGeneration.from_pretrained(tmp_path / "whole")
    save_file(weights, file, metadata={"format": "pt"})
    GranulonForConditionalGeneration.from_pretrained(tmp_path / "whole", granularity_levels=[])
    plain, info = GranulonForConditionalGeneration.from_pretrained(
        tmp_path / "whole", granularity_levels=[], output_loading_info=True
    )
    assert plain.config.granularity_levels == []
    assert all("controller" in key for key in info["unexpected_keys"])
