"""The paper's table of encoders and language models, at toy size."""

import pytest
import torch

from granulon_hf import variants
from tests.conftest import make_conversation, make_inputs, make_picture


def test_the_table_is_the_papers_and_its_compact_forms():
    encoders = ("clip", "siglip", "dinov2", "dinov3", "granulon", "granulon-compact")
    assert set(variants.NAMES) == {f"{encoder}-{llm}" for encoder in encoders for llm in ("qwen2.5", "llama3.2")}
    assert len(variants.NAMES) == 12


@pytest.mark.parametrize("name", variants.NAMES)
@torch.no_grad()
def test_every_variant_answers(name):
    model, processor = variants.build(name, tiny=True)
    conversations = [
        make_conversation("What is it?", [make_picture(0)]),
        make_conversation("How many, and why?", [make_picture(1)]),
    ]
    inputs = make_inputs(processor, conversations)
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape[0] == 2
    form = "semantic" if "compact" in name else "pixel+semantic" if name.startswith("granulon") else "pixel"
    assert model.config.visual_tokens == form and bool(model.config.granularity_levels) == (form != "pixel")
    encoder, decoder = variants.parse(name)
    assert model.config.vision_config.model_type == encoder.tiny["model_type"]
    assert model.config.text_config.model_type == decoder.tiny["model_type"]
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000


def test_the_seed_decides_the_weights():
    one, same, other = (variants.build("granulon-qwen2.5", tiny=True, seed=seed)[0] for seed in (1, 1, 2))
    for (name, a), b in zip(one.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_options_reach_the_config():
    model, processor = variants.build("granulon-qwen2.5", tiny=True, num_semantic_tokens=3, relation="attention")
    assert (model.config.num_semantic_tokens, processor.num_semantic_tokens, model.config.relation) == (3, 3, "attention")


@pytest.mark.parametrize("name", ["granulon", "blip-qwen2.5", "clip-gpt2", ""])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="granulon-llama3.2"):
        variants.build(name, tiny=True)


def test_the_toy_tokenizer_encodes_any_text():
    for decoder in variants.DECODERS.values():
        tokenizer = variants.tiny_tokenizer(decoder)
        for text in ("What is in the picture?", "naïve 漢字 🙂\n\ttabs"):
            assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
