"""Every kind of vision tower: prefix tokens are found, the grid is right, and what has no patch features is refused."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CLIPModel, TimmWrapperConfig

from granulon_hf import GranulonConfig, GranulonForConditionalGeneration, GranulonModel, GranulonProcessor, variants
from granulon_hf.modeling.processing_granulon import find_image_token
from granulon_hf.modeling.vision_granulon import image_size, probe_vision_tower, to_patch_tokens
from tests.conftest import build_tiny

VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"model_type": "llama", "vocab_size": 64, **VIT, "num_key_value_heads": 2}
TIMM_VIT = {"img_size": 48, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 4}
TIMM_SWIN = {"embed_dim": 24, "depths": [1, 1, 1, 1]}

TOWERS = {
    "clip": (AutoConfig.for_model("clip_vision_model", image_size=56, patch_size=14, **VIT), (4, 4), 1),
    "siglip": (AutoConfig.for_model("siglip_vision_model", image_size=64, patch_size=16, **VIT), (4, 4), 0),
    "dinov2": (AutoConfig.for_model("dinov2", image_size=56, patch_size=14, mlp_ratio=2, **VIT), (4, 4), 1),
    "dinov2 with registers": (
        AutoConfig.for_model("dinov2_with_registers", image_size=56, patch_size=14, num_register_tokens=3, mlp_ratio=2, **VIT),
        (4, 4),
        4,
    ),
    "dinov3": (AutoConfig.for_model("dinov3_vit", image_size=64, patch_size=16, num_register_tokens=4, **VIT), (4, 4), 5),
    "dinov3 without registers": (
        AutoConfig.for_model("dinov3_vit", image_size=64, patch_size=16, num_register_tokens=0, **VIT),
        (4, 4),
        1,
    ),
    "vit": (AutoConfig.for_model("vit", image_size=64, patch_size=16, **VIT), (4, 4), 1),
    "timm vit": (TimmWrapperConfig(architecture="vit_base_patch16_224", model_args=TIMM_VIT), (3, 3), 1),
    "timm dinov3": (
        TimmWrapperConfig(architecture="vit_small_patch16_dinov3", model_args={"img_size": 64, "depth": 1}),
        (4, 4),
        5,
    ),
    "timm resnet": (TimmWrapperConfig(architecture="resnet18", model_args={}), (7, 7), 0),
    "timm efficientnet": (TimmWrapperConfig(architecture="tf_efficientnet_lite0", model_args={}), (7, 7), 0),
    "timm swin": (TimmWrapperConfig(architecture="swin_tiny_patch4_window7_224", model_args=TIMM_SWIN), (7, 7), 0),
    "convnext": (
        AutoConfig.for_model("convnext", hidden_sizes=[8, 16, 32, 48], depths=[1, 1, 1, 1], image_size=128),
        (4, 4),
        0,
    ),
}


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_grid_prefix_and_features(name):
    config, grid, prefix = TOWERS[name]
    probed = probe_vision_tower(config)
    assert (probed.height, probed.width, probed.prefix_tokens) == (*grid, prefix)
    model = GranulonModel(GranulonConfig(vision_config=config, text_config=dict(TEXT), image_token_id=1)).eval()
    side = probed.patch_size
    pixels = torch.randn(2, 3, grid[0] * side, grid[1] * side)
    patches, outputs = model._patch_features(pixels)
    features, (height, width) = patches.features, patches.grid
    assert (height, width) == grid
    assert features.shape == (2, height * width, model.multi_modal_projector.linear_1.in_features)
    states = outputs.last_hidden_state
    if states.ndim == 3:  # exactly the tokens after CLS and registers
        assert torch.equal(features, states[:, prefix:])
    else:  # row-major over the feature map, whichever axis holds the channels
        pixel = states[1, :, 2, 1] if states.shape[1] == features.shape[2] else states[1, 2, 1]
        assert torch.equal(features[1, 2 * width + 1], pixel)
    assert model.aggregate(pixels, "coarse").assignment.shape == (2, *grid)


@torch.no_grad()
def test_images_that_are_not_square():
    config, _, _ = TOWERS["timm resnet"]
    model = GranulonModel(GranulonConfig(vision_config=config, text_config=dict(TEXT), image_token_id=1)).eval()
    out = model.aggregate(torch.randn(1, 3, 96, 160), "fine")
    assert out.assignment.shape == (1, 3, 5)
    assert out.keep.sum() == 15


UNSUPPORTED = {
    "pixtral": AutoConfig.for_model("pixtral", image_size=64, patch_size=16, **VIT),
    "siglip2 naflex": AutoConfig.for_model("siglip2_vision_model", num_patches=16, patch_size=16, **VIT),
    "swin": AutoConfig.for_model(
        "swin", image_size=64, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    "a decoder": AutoConfig.for_model(**TEXT),
    "a text encoder": AutoConfig.for_model("bert", vocab_size=30, **VIT),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_towers_without_patch_features_are_refused(name):
    with pytest.raises(ValueError, match="patch features") as error:
        probe_vision_tower(UNSUPPORTED[name])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov2 with registers", "dinov3", "vit"])
@torch.no_grad()
def test_attention_and_keys_are_the_last_layers(name):
    """Against the whole tower in eager mode, which returns its weights."""
    config, grid, prefix = TOWERS[name]
    options = dict(text_config=dict(TEXT), image_token_id=1, relation="attention")
    model = GranulonModel(GranulonConfig(vision_config=config, **options)).eval()
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    patches = model._patch_features(pixels)[0]
    relation = patches.relation
    assert model.vision_tower.config._attn_implementation == "sdpa"
    model.vision_tower.set_attn_implementation("eager")
    seen = {}
    layers = [module for name, module in model.vision_tower.named_modules() if name.endswith(("k_proj", ".key"))]
    layers[-1].register_forward_hook(lambda _, inputs, output: seen.update(keys=output))
    outputs = model.vision_tower(pixels, output_attentions=True)
    torch.testing.assert_close(patches.keys, seen["keys"][:, prefix:], atol=1e-6, rtol=1e-5)
    weights = outputs.attentions[-1].mean(1)
    attention = weights[:, 0, prefix:] if prefix else weights.mean(1)  # without CLS token: what a patch receives
    torch.testing.assert_close(patches.attention, attention, atol=1e-6, rtol=1e-5)
    expected = weights[:, prefix:, prefix:]
    torch.testing.assert_close(relation, expected, atol=1e-6, rtol=1e-5)
    assert relation.shape == (2, grid[0] * grid[1], grid[0] * grid[1])


@torch.no_grad()
def test_attention_relation_of_timm():
    config, _, _ = TOWERS["timm dinov3"]
    options = dict(text_config=dict(TEXT), image_token_id=1, relation="attention")
    model = GranulonModel(GranulonConfig(vision_config=config, **options)).eval()
    block = model.vision_tower.timm_model.blocks[-1].attn
    seen = {}
    block.fused_attn = False
    hook = block.attn_drop.register_forward_hook(lambda _, inputs, __: seen.update(weights=inputs[0]))
    pixels = torch.randn(1, 3, 64, 64)
    model.vision_tower(pixels)
    hook.remove()
    block.fused_attn = True
    patches = model._patch_features(pixels)[0]
    torch.testing.assert_close(patches.relation, seen["weights"].mean(1)[:, 5:, 5:], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(patches.attention, seen["weights"].mean(1)[:, 0, 5:], atol=1e-6, rtol=1e-5)
    assert patches.keys.shape[:2] == (1, 16)


@pytest.mark.parametrize("reducer", ["attention-merge", "adaptive-prune", "downsample"])
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_reducers_that_look_at_the_tower(name, reducer):
    config, _, _ = TOWERS[name]
    options = dict(text_config=dict(TEXT), image_token_id=1, visual_tokens="semantic", reducer=reducer)
    fixed_size = ("timm vit", "timm swin")
    if reducer == "downsample" and name in fixed_size:
        with pytest.raises(ValueError, match="adata, pool"):
            GranulonModel(GranulonConfig(vision_config=config, **options))
        return
    model = GranulonModel(GranulonConfig(vision_config=config, **options)).eval()
    height, width = image_size(config)
    images = model.get_image_features(torch.randn(2, 3, height, width), visual_tokens=torch.tensor([4, 9]))
    counts = images.slot_mask.sum(1)
    assert (counts >= 1).all() and (counts <= torch.tensor([4, 9])).all()
    if name.startswith("timm resnet") and reducer != "downsample":  # no attention: the norm of a feature stands in for it
        patches = model._patch_features(torch.randn(1, 3, height, width))[0]
        torch.testing.assert_close(patches.importance, patches.features.norm(dim=-1))


@torch.no_grad()
def test_downsample_is_the_tower_on_a_smaller_image():
    config, _, _ = TOWERS["dinov3"]
    options = dict(text_config=dict(TEXT), image_token_id=1, visual_tokens="semantic", reducer="downsample")
    model = GranulonModel(GranulonConfig(vision_config=config, **options)).eval()
    pixels = torch.randn(2, 3, 64, 64)
    small = torch.nn.functional.interpolate(pixels, (48, 48), mode="bilinear", antialias=True)
    expected = model.vision_tower(small).last_hidden_state[:, 5:]
    torch.testing.assert_close(model.aggregate(pixels, visual_tokens=9).tokens[:, :9], expected)


def test_attention_relation_needs_attention():
    config, _, _ = TOWERS["timm resnet"]
    with pytest.raises(ValueError, match="resnet18.*relation='cosine'"):
        GranulonModel(GranulonConfig(vision_config=config, text_config=dict(TEXT), image_token_id=1, relation="attention"))


def test_states_that_do_not_fit_the_patches():
    config, _, _ = TOWERS["clip"]
    tower = AutoModel.from_config(config)
    with pytest.raises(ValueError, match="4 x 4"):
        to_patch_tokens(torch.zeros(1, 9, 32), tower, torch.zeros(1, 3, 56, 56))


# --- assembling from two checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(tmp_path):
    """A CLIP pair (of which only the vision half is wanted) and a decoder with its tokenizer, saved as users find them."""
    decoder = variants.DECODERS["qwen2.5"]
    tokenizer = variants.tiny_tokenizer(decoder)
    text = AutoConfig.for_model(**decoder.tiny, vocab_size=len(tokenizer) + 6)  # a padded table, as Qwen's
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(text).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    clip = AutoConfig.for_model("clip", vision_config=TOWERS["clip"][0].to_dict(), text_config=dict(VIT, vocab_size=50))
    CLIPModel(clip).save_pretrained(tmp_path / "vision")
    build_tiny("clip-qwen2.5")[1].image_processor.save_pretrained(tmp_path / "vision")
    return str(tmp_path / "vision"), str(tmp_path / "text")


def test_from_vision_text_pretrained(checkpoints):
    vision, text = checkpoints
    model = GranulonForConditionalGeneration.from_vision_text_pretrained(vision, text, num_semantic_tokens=6)
    processor = GranulonProcessor.from_vision_text_pretrained(vision, text, num_semantic_tokens=6)
    clip, language = CLIPModel.from_pretrained(vision), AutoModelForCausalLM.from_pretrained(text)
    for name, value in clip.vision_model.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name.removeprefix("vision_model.")], value), name
    for name, value in language.model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name], value), name
    assert model.get_input_embeddings().weight.shape == language.get_input_embeddings().weight.shape  # never resized
    assert model.lm_head.weight is model.get_input_embeddings().weight  # tied as the checkpoint is
    assert model.config.image_token_id == processor.image_token_id == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (model.config.image_seq_length, processor.patch_size, processor.num_semantic_tokens) == (16, 14, 6)
    assert not [name for name, value in model.named_parameters() if value.device.type == "meta"]
    assert not model.training
    assert model.model.multi_modal_projector.linear_1.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_each_weight_is_held_once(checkpoints, monkeypatch):
    """The parts that were read are the parts of the model, the same objects."""
    loaded = []
    for auto in (AutoModel, AutoModelForCausalLM):
        original = auto.from_pretrained

        def load(*args, original=original, **kwargs):
            result = original(*args, **kwargs)
            loaded.append(result[0] if isinstance(result, tuple) else result)
            return result

        monkeypatch.setattr(auto, "from_pretrained", load)
    model = GranulonForConditionalGeneration.from_vision_text_pretrained(*checkpoints)
    pointers = {value.data_ptr() for part in loaded for value in part.parameters()}
    fresh = ("model.multi_modal_projector", "model.controller")
    assert all(value.data_ptr() in pointers for name, value in model.named_parameters() if not name.startswith(fresh))
    assert len(loaded) == 2


def test_assembled_models_survive_saving(checkpoints, tmp_path):
    model = GranulonForConditionalGeneration.from_vision_text_pretrained(*checkpoints, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    loaded = GranulonForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_tower_whose_weights_are_missing_is_refused(checkpoints, tmp_path):
    TOWERS["clip"][0].save_pretrained(tmp_path)
    save_file({"something.else": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks"):
        GranulonForConditionalGeneration.from_vision_text_pretrained(str(tmp_path), checkpoints[1])


def test_an_unsupported_tower_is_refused_before_the_language_model_is_read(checkpoints, tmp_path, monkeypatch):
    UNSUPPORTED["pixtral"].save_pretrained(tmp_path / "pixtral")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("read the language model"))
    with pytest.raises(ValueError, match="patch features"):
        GranulonForConditionalGeneration.from_vision_text_pretrained(str(tmp_path / "pixtral"), checkpoints[1])


def test_a_tokenizer_without_a_spare_token():
    tokenizer = variants.tiny_tokenizer(variants.Decoder("x", {}, ("<s>", "</s>")))
    with pytest.raises(ValueError, match="image_token="):
        find_image_token(tokenizer)
