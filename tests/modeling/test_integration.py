"""Granulon inside the libraries that people use it with: pipeline, generate's modes, compile, peft, accelerate."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoProcessor, DynamicCache, pipeline

from granulon_hf import AutoModelForVision2Seq
from tests.conftest import make_conversation, make_inputs, make_picture


@pytest.fixture
def conversations():
    return [
        make_conversation("What is it?", [make_picture(1)]),
        make_conversation("How many red objects are there, and where?", [make_picture(2), make_picture(3)]),
        make_conversation("Say hello."),
    ]


@torch.no_grad()
def test_mixed_batch_of_several_one_and_no_images(build, conversations):
    model, processor = build()
    inputs = make_inputs(processor, conversations)
    together = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, -6:]
    for row, conversation in enumerate(conversations):
        alone = model.generate(**make_inputs(processor, conversation), max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(together[row], alone[0, -6:]), row


@torch.no_grad()
def test_text_only(build):
    model, processor = build()
    inputs = make_inputs(processor, make_conversation("Say hello."))
    outputs = model(**inputs)
    assert outputs.granularity is None
    assert outputs.image_outputs is None
    expected = model.lm_head(model.model.language_model(inputs["input_ids"]).last_hidden_state)
    torch.testing.assert_close(outputs.logits, expected)
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


@torch.no_grad()
def test_sampling_is_reproducible_and_returns_several(build, conversations):
    model, processor = build()
    inputs = make_inputs(processor, conversations[:2])
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(model.generate(**inputs, max_new_tokens=5, do_sample=True, top_p=0.9, num_return_sequences=3))
    assert runs[0].shape[0] == 6
    assert torch.equal(*runs)


@torch.no_grad()
def test_other_decoding_modes(build, conversations):
    model, processor = build()
    inputs = make_inputs(processor, conversations[0])
    common = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    greedy = model.generate(**inputs, **common)
    assert torch.equal(model.generate(**inputs, prefill_chunk_size=16, **common), greedy)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    assert torch.equal(model.generate(inputs_embeds=embeds, **rest, **common), greedy[:, inputs["input_ids"].shape[1] :])


@torch.no_grad()
def test_generate_takes_a_forced_level(build, conversations):
    model, processor = build()
    inputs = make_inputs(processor, conversations[:2])
    common = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    for level in ("coarse", ["fine", "coarse"], None):
        first = model.generate(**inputs, granularity=level, **common).logits[0]
        torch.testing.assert_close(first, model(**inputs, granularity=level).logits[:, -1], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="huge"):
        model.generate(**inputs, granularity="huge", **common)


@pytest.mark.parametrize(("new_image", "beams"), [(True, 1), (False, 1), (False, 2)])
@torch.no_grad()
def test_a_second_turn_continues_from_the_cache(build, new_image, beams):
    """What the first turn's level left empty stays hidden; only the new turn's image is given."""
    model, processor = build()
    common = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, granularity="coarse", return_dict_in_generate=True)
    first = make_conversation("What is it?", [make_picture(1)])
    second = make_conversation("And how many are there?", [make_picture(2)] if new_image else [])
    one = make_inputs(processor, first)
    turn = model.generate(**one, cache=DynamicCache(config=model.config), **common)
    two = make_inputs(processor, second)
    ids = torch.cat([turn.sequences, two["input_ids"]], dim=1)
    pixels = [one["pixel_values"]] + ([two["pixel_values"]] if new_image else [])
    whole = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    later = dict(output_logits=True, num_beams=beams)
    expected = model.generate(**whole, pixel_values=torch.cat(pixels), **common, **later)
    if beams > 1:
        turn.cache.batch_repeat_interleave(beams)
        turn.cache.hidden_slots = turn.cache.hidden_slots[:1]
    given = {"pixel_values": two["pixel_values"]} if new_image else {}
    actual = model.generate(**whole, **given, cache=turn.cache, **common, **later)
    assert torch.equal(actual.sequences, expected.sequences)
    for a, e in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=0)


@pytest.mark.parametrize("relation", ["cosine", "attention"])
@torch.no_grad()
def test_the_whole_forward_compiles_without_a_break(build, conversations, relation):
    model, processor = build(relation=relation)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = dict(make_inputs(processor, conversations[:2]))
    for level in ([0, 2], [1, 1], [2, 0]):
        granularity = torch.tensor(level)
        expected = model(**inputs, granularity=granularity)
        with torch._dynamo.config.patch(error_on_recompile=level != [0, 2]):
            actual = compiled(**inputs, granularity=granularity)
        torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_static_cache_with_compiled_decoding(build, conversations):
    model, processor = build()
    inputs = make_inputs(processor, conversations[:2])
    common = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    expected = model.generate(**inputs, **common)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(**inputs, cache_implementation="static", **common), expected)


def test_pipeline(build, tmp_path):
    model, processor = build()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ask = pipeline("image-text-to-text", model=str(tmp_path))
    conversation = make_conversation("What is it?", [make_picture(1)])
    (answer,) = ask(text=conversation, max_new_tokens=4, do_sample=False, return_full_text=False)
    tokens = model.generate(**make_inputs(processor, conversation), max_new_tokens=4, do_sample=False)[0, -4:]
    assert answer["generated_text"] == processor.decode(tokens, skip_special_tokens=True)


@torch.no_grad()
def test_batched_generation_from_a_folder(build, conversations, tmp_path):
    for part in build():
        part.save_pretrained(tmp_path)
    model, processor = AutoModelForVision2Seq.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)

    def ask(conversation):
        inputs = make_inputs(processor, conversation, side=processor.tokenizer.padding_side)  # the side that was saved
        return model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, -5:]

    together = ask(conversations)
    for row, conversation in enumerate(conversations):
        assert torch.equal(together[row], ask(conversation)[0]), row


def test_lora_on_the_language_model(build, conversations):
    model, processor = build()
    inputs = make_inputs(processor, conversations[:2])
    with torch.no_grad():
        before = model(**inputs).logits
    target = r".*language_model.*\.(q_proj|v_proj)"
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=target, modules_to_save=["multi_modal_projector"]))
    with torch.no_grad():
        torch.testing.assert_close(wrapped(**inputs).logits, before)
    trainable = {name for name, value in wrapped.named_parameters() if value.requires_grad}
    assert trainable
    assert all("lora" in name or "multi_modal_projector" in name for name in trainable)
    wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = [value.grad for name, value in wrapped.named_parameters() if "lora_B" in name]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    assert wrapped.generate(**inputs, max_new_tokens=2).shape[0] == 2


def test_device_map_auto(build, conversations, tmp_path):
    model, processor = build()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    loaded = AutoModelForVision2Seq.from_pretrained(tmp_path, device_map="auto")
    inputs = make_inputs(processor, conversations).to(loaded.device)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits.cpu(), model(**inputs.to("cpu")).logits)


def test_gradient_checkpointing_gives_the_same_gradients(build, conversations):
    model, processor = build()
    inputs = make_inputs(processor, conversations[:2])
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)  # a DINOv3 tower that trains jitters its positions
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append(model.model.multi_modal_projector.linear_1.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_in_bfloat16(build, conversations):
    model, processor = build()
    inputs = make_inputs(processor, conversations).to("cuda")
    model = model.to("cuda", torch.bfloat16)
    assert model(**inputs).logits.isfinite().all()
    assert model.generate(**inputs, max_new_tokens=4, cache_implementation="static").shape[0] == 3


@pytest.mark.parametrize("name", ["granulon-qwen2.5", "clip-llama3.2"])
@pytest.mark.parametrize("draft", [1, 2, 7, 60])
def test_prompt_lookup_is_greedy(build, name, draft):
    """A draft that is looked up in a prompt full of image slots holds none of them."""
    model, processor = build(name)
    for question in ("What is it?", "a cat is a cat is a cat is a"):
        inputs = make_inputs(processor, make_conversation(question, [make_picture(0)]))
        greedy = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        for ngram in (1, 2, 3):
            options = {"prompt_lookup_num_tokens": draft, "max_matching_ngram_size": ngram}
            assert torch.equal(model.generate(**inputs, max_new_tokens=16, do_sample=False, **options), greedy)


def test_an_assistant_model_is_greedy(build):
    model, processor = build()
    inputs = make_inputs(processor, make_conversation("What is it?", [make_picture(0)]))
    greedy = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    for assistant in (model, build(trained=False)[0]):
        assert torch.equal(model.generate(**inputs, max_new_tokens=16, do_sample=False, assistant_model=assistant), greedy)
