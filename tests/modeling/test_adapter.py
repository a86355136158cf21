"""Loading refuses what transformers only warns of: weights that are missing, of another shape, or left out."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
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
)

from granulon_hf import GranulonForConditionalGeneration
from granulon_hf.modeling.adapter_granulon import ADAPTER_WEIGHTS

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


def decoders(folder):
    yield "another architecture", GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99))
    yield "a like one without biases", LlamaForCausalLM(LlamaConfig(**TEXT))
    yield "more layers", Qwen2ForCausalLM(Qwen2Config(**TEXT | {"num_hidden_layers": 3}))
    yield "fewer layers", Qwen2ForCausalLM(Qwen2Config(**TEXT | {"num_hidden_layers": 1}))
    yield "another width", Qwen2ForCausalLM(Qwen2Config(**TEXT | {"hidden_size": 64}))
    yield "another vocabulary", Qwen2ForCausalLM(Qwen2Config(**TEXT | {"vocab_size": 98}))


@pytest.mark.parametrize(
    "which",
    ["another architecture", "a like one without biases", "more layers", "fewer layers", "another width", "another vocabulary"],
)
def test_foreign_decoders_are_refused(adapter, backbones, which):
    _, folder = adapter
    foreign = backbones / "foreign"
    dict(decoders(folder))[which].save_pretrained(foreign)
    with pytest.raises(ValueError, match="foreign"):
        GranulonForConditionalGeneration.from_pretrained(folder, backbones=places(vision=backbones / "vision", text=foreign))


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
        with pytest.raises(ValueError, match="foreign"):
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
    plain, info = GranulonForConditionalGeneration.from_pretrained(
        tmp_path / "whole", granularity_levels=[], output_loading_info=True
    )
    assert plain.config.granularity_levels == []
    assert all("controller" in key for key in info["unexpected_keys"])
