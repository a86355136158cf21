"""The model against oracles: transformers' own LLaVA, and the same sequence with the empty slots physically removed."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
)

from granulon_hf import AutoModelForVision2Seq, GranulonConfig, GranulonForConditionalGeneration, GranulonModel
from granulon_hf.training.stages import adapter_state, set_stage
from tests.conftest import make_conversation, make_inputs, make_picture

LEVELS = ("coarse", "middle", "fine")


# --- plain LLaVA -----------------------------------------------------------------------------------------------------


def llava_pair(layer=-1, strategy="default"):
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=1
    )
    options = dict(vision_config=vision, text_config=text, vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    llava = LlavaForConditionalGeneration(LlavaConfig(image_token_index=9, **copy.deepcopy(options))).eval()
    granulon = GranulonForConditionalGeneration(GranulonConfig(image_token_id=9, granularity_levels=[], **options)).eval()
    granulon.load_state_dict(llava.state_dict())
    slots = 16 + (strategy == "full")
    prompts = [[5, *[9] * slots, 7, 8, 11], [6, 7, *[9] * slots, 3, 4, 15, 16, 17]]
    width = max(map(len, prompts))
    ids = torch.tensor([[1] * (width - len(prompt)) + prompt for prompt in prompts])
    return llava, granulon, dict(input_ids=ids, attention_mask=(ids != 1).long(), pixel_values=torch.randn(2, 3, 56, 56))


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-1, -2, [-1, -3]])
@torch.no_grad()
def test_without_levels_it_is_llava(layer, strategy):
    llava, granulon, inputs = llava_pair(layer, strategy)
    expected, actual = llava(**inputs), granulon(**inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual.logits[real], expected.logits[real], atol=1e-5, rtol=0)
    assert actual.granularity is None
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(granulon.generate(**inputs, **options), llava.generate(**inputs, **options))


def test_without_levels_the_loss_is_llavas():
    llava, granulon, inputs = llava_pair()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 9, -100)
    expected, actual = llava(**inputs, labels=labels).loss, granulon(**inputs, labels=labels).loss
    expected.backward()
    actual.backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        granulon.model.multi_modal_projector.linear_1.weight.grad, llava.model.multi_modal_projector.linear_1.weight.grad
    )


def test_levels_forced_on_a_model_without_levels():
    _, granulon, inputs = llava_pair()
    with pytest.raises(ValueError, match="granularity"):
        granulon(**inputs, granularity="fine")
    with pytest.raises(ValueError, match="granularity"):
        granulon.generate(**inputs, granularity="fine", max_new_tokens=1)


# --- empty slots -----------------------------------------------------------------------------------------------------


def language_model_of(model):
    """The same decoder and head as a model of its own: it knows nothing of images."""
    oracle = AutoModelForCausalLM.from_config(model.config.text_config, attn_implementation=model.config._attn_implementation)
    oracle.load_state_dict(
        {f"model.{name}": value for name, value in model.model.language_model.state_dict().items()}
        | {"lm_head.weight": model.lm_head.weight}
    )
    return oracle.eval()


def removed(model, inputs, granularity):
    """Per sample: embeddings of the sequence without padding and without the slots that the level leaves empty."""
    outputs = model(**inputs, granularity=granularity)
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    slots = ids == model.config.image_token_id
    embeds[slots] = torch.cat(outputs.image_outputs.pooler_output)
    keep = inputs["attention_mask"].bool().clone()
    keep[slots] = outputs.image_outputs.slot_mask.flatten().bool()
    return outputs, keep, [embeds[i][keep[i]][None] for i in range(len(ids))]


@pytest.fixture
def batch():
    conversations = [
        make_conversation("What is it?", [make_picture(1)]),
        make_conversation(
            "How many small red objects are in the top left corner, and why?", [make_picture(2), make_picture(3)]
        ),
        make_conversation("Describe the image in detail.", [make_picture(4)]),
    ]
    return lambda processor, side: make_inputs(processor, conversations, side=side)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("granularity", [*LEVELS, None, ["fine", "coarse", "middle"], ["coarse", None, "coarse"]])
@torch.no_grad()
def test_empty_slots_are_as_if_removed(build, batch, granularity, side, attention):
    model, processor = build()
    model.set_attn_implementation(attention)
    outputs, keep, embeds = removed(model, batch(processor, side), granularity)
    oracle = language_model_of(model)
    for i, one in enumerate(embeds):
        torch.testing.assert_close(outputs.logits[i][keep[i]], oracle(inputs_embeds=one).logits[0], atol=1e-5, rtol=0)
    if granularity == "coarse":
        assert (keep.sum(1) < batch(processor, side)["attention_mask"].sum(1)).all()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_generation_is_as_if_empty_slots_were_removed(build, batch, options, attention):
    model, processor = build()
    model.set_attn_implementation(attention)
    inputs = batch(processor, "left")
    granularity = ["coarse", "fine", "middle"]
    _, _, embeds = removed(model, inputs, granularity)
    oracle = language_model_of(model)
    common = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, disable_compile=True)
    actual = model.generate(**inputs, granularity=granularity, **common, **options)[:, inputs["input_ids"].shape[1] :]
    for i, one in enumerate(embeds):
        mask = torch.ones(one.shape[:2], dtype=torch.long)
        expected = oracle.generate(inputs_embeds=one, attention_mask=mask, **common, num_beams=options.get("num_beams", 1))
        assert torch.equal(actual[i], expected[0]), f"sample {i}"


@torch.no_grad()
def test_generated_logits_are_as_if_empty_slots_were_removed(build, batch):
    model, processor = build()
    inputs = batch(processor, "left")
    _, _, embeds = removed(model, inputs, "coarse")
    oracle = language_model_of(model)
    common = dict(
        max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=256)):
        actual = model.generate(**inputs, granularity="coarse", cache=cache, disable_compile=True, **common)
        for i, one in enumerate(embeds):
            mask = torch.ones(one.shape[:2], dtype=torch.long)
            expected = oracle.generate(inputs_embeds=one, attention_mask=mask, **common)
            for step, (a, e) in enumerate(zip(actual.logits, expected.logits, strict=True)):
                torch.testing.assert_close(a[i], e[0], atol=1e-5, rtol=0, msg=f"sample {i}, step {step}")


@torch.no_grad()
def test_a_decoding_loop_by_hand_extends_the_returned_mask(build, batch):
    model, processor = build()
    inputs = batch(processor, "left")
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, -5:]
    outputs = model(**inputs, use_cache=True)
    mask, tokens = outputs.attention_mask, []
    for _ in range(5):
        tokens.append(outputs.logits[:, -1].argmax(-1, keepdim=True))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        outputs = model(input_ids=tokens[-1], attention_mask=mask, cache=outputs.cache)
    assert torch.equal(torch.cat(tokens, dim=1), expected)


@torch.no_grad()
def test_beams_keep_the_images_of_their_sample(build, batch):
    model, processor = build()
    inputs = batch(processor, "left")
    together = model.generate(**inputs, max_new_tokens=6, num_beams=2, do_sample=False, eos_token_id=None)[:, -6:]
    question = "How many small red objects are in the top left corner, and why?"
    one = make_inputs(processor, make_conversation(question, [make_picture(2), make_picture(3)]))
    alone = model.generate(**one, max_new_tokens=6, num_beams=2, do_sample=False, eos_token_id=None)[:, -6:]
    assert torch.equal(together[1], alone[0])


@torch.no_grad()
def test_inputs_embeds_and_given_position_ids(build, batch):
    model, processor = build()
    inputs = batch(processor, "right")
    expected = model(**inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    positions = torch.arange(embeds.shape[1])[None].expand(len(embeds), -1)
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    real = inputs["attention_mask"].bool()
    for actual in (model(inputs_embeds=embeds, **rest), model(**inputs, position_ids=positions)):
        torch.testing.assert_close(actual.logits[real], expected.logits[real], atol=1e-5, rtol=0)


# --- levels ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_levels_can_be_forced_by_name_per_sample_and_by_index(build, batch):
    model, processor = build()
    inputs = batch(processor, "left")
    free = model(**inputs)
    assert torch.equal(free.granularity, free.granularity_probs.argmax(-1))
    torch.testing.assert_close(free.granularity_probs.sum(-1), torch.ones(3))
    named = model(**inputs, granularity=["fine", "coarse", "fine"])
    assert named.granularity.tolist() == [2, 0, 2]
    torch.testing.assert_close(named.granularity_probs, free.granularity_probs)
    torch.testing.assert_close(model(**inputs, granularity=torch.tensor([2, 0, 2])).logits, named.logits)
    assert model(**inputs, granularity=1).granularity.tolist() == [1, 1, 1]
    mixed = model(**inputs, granularity=[None, "coarse", None]).granularity
    assert mixed.tolist() == [free.granularity[0], 0, free.granularity[2]]


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        ("medium", "'medium'.* coarse, middle, fine"),
        (["fine"], "1 level.* 3"),
        (torch.tensor([0, 3, 1]), "-1 and 2"),
        (torch.tensor([0, -2, 1]), "-1 and 2"),
        (torch.tensor([0, 1]), r"\(2,\).* 3"),
    ],
)
def test_wrong_levels_are_refused(build, batch, granularity, message):
    model, processor = build()
    inputs = batch(processor, "left")
    with pytest.raises((ValueError, RuntimeError), match=message):
        model(**inputs, granularity=granularity)
    text_only = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises((ValueError, RuntimeError), match=message):
        model(**text_only, granularity=granularity)


@torch.no_grad()
def test_gamma_weighs_the_projected_semantic_tokens(build, batch):
    levels = [{"name": "a", "alpha": 1, "beta": 4, "gamma": 1.0}, {"name": "b", "alpha": 1, "beta": 4, "gamma": 0.25}]
    model, processor = build(granularity_levels=levels, num_semantic_tokens=4)
    pixels = batch(processor, "left")["pixel_values"]
    one, quarter = (torch.stack(model.get_image_features(pixels, granularity=name).pooler_output) for name in "ab")
    torch.testing.assert_close(quarter[:, :-4], one[:, :-4])
    torch.testing.assert_close(quarter[:, -4:], one[:, -4:] / 4)


@pytest.mark.parametrize("kind", ["semantic", "all"])
@torch.no_grad()
def test_slots_are_told_where_they_are(build, batch, kind):
    """Against `numpy.interp` of the rows' and the columns' embeddings; untrained ones tell nothing: the paper's form."""
    paper, processor = build(slot_position="none")
    model, _ = build(slot_position=kind, slot_position_bins=4)
    pixels = batch(processor, "left")["pixel_values"]
    told = model.model.multi_modal_projector.position
    assert told.shape == (2, 4, model.config.text_config.hidden_size)
    rest = {name: value for name, value in model.state_dict().items() if not name.endswith("projector.position")}
    paper.load_state_dict(rest)
    before = [torch.stack(m.get_image_features(pixels, granularity="fine").pooler_output) for m in (paper, model)]
    assert torch.equal(*before)
    told.normal_(generator=torch.Generator().manual_seed(0))
    after = model.get_image_features(pixels, granularity="fine")
    more = torch.stack(after.pooler_output) - before[0]
    patches, bins = more.shape[1] - model.config.num_semantic_tokens, np.linspace(-1, 1, 4)
    grid = [(row, column) for row in np.linspace(-1, 1, 6) for column in np.linspace(-1, 1, 6)]
    assert patches == len(grid)
    for image in range(len(pixels)):
        positions = (grid if kind == "all" else []) + after.aggregation.positions[image].tolist()
        slots = more[image] if kind == "all" else more[image, patches:]
        assert kind == "all" or (more[image, :patches] == 0).all()
        for position, slot in zip(positions, slots, strict=True):
            expected = sum(
                np.array([np.interp(at, bins, table[:, c]) for c in range(table.shape[1])])
                for at, table in zip(position, told.numpy(), strict=True)
            )
            np.testing.assert_allclose(slot.numpy(), expected, atol=1e-5)


def test_places_are_trained_with_the_projector_and_kept(build, batch, tmp_path):
    model, processor = build(slot_position="semantic")
    set_stage(model, "projector")
    inputs = batch(processor, "left")
    model(**inputs, labels=labels_of(inputs, model, processor)).loss.backward()
    told = model.model.multi_modal_projector.position
    assert told.grad.abs().sum(2).ne(0).any(1).all()
    assert torch.equal(adapter_state(model)["multi_modal_projector.position"], told)
    told.data.normal_()
    model.save_pretrained(tmp_path)
    again = GranulonForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.model.multi_modal_projector.position, told)


def test_places_in_bfloat16_and_under_autocast(build, batch):
    model, processor = build(slot_position="all")
    model.model.multi_modal_projector.position.data.normal_()
    inputs = batch(processor, "left")
    with torch.no_grad():
        exact = model(**inputs, granularity="fine").logits
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(**inputs, granularity="fine").logits
        low = model.to(torch.bfloat16)(**inputs, granularity="fine").logits
    for logits in (mixed, low):
        assert (logits.float() - exact)[inputs["attention_mask"].bool()].abs().mean() < 0.05 * exact.abs().mean()


def test_backbones_get_places_that_tell_nothing(build):
    model, _ = build(slot_position="all")
    parts = model.model
    head = AutoModelForCausalLM.from_config(model.config.text_config)
    made = GranulonForConditionalGeneration.from_backbones(model.config, parts.vision_tower, head)
    assert (made.model.multi_modal_projector.position == 0).all()


@torch.no_grad()
def test_aggregate_shows_what_forward_used(build, batch):
    model, processor = build()
    inputs = batch(processor, "left")
    used = model(**inputs, granularity="middle").aggregation
    shown = model.aggregate(inputs["pixel_values"], "middle")
    for name in ("assignment", "kept_clusters", "scores", "level"):
        assert torch.equal(used[name], shown[name]), name
    assert shown.assignment.shape == (4, 6, 6)
    assert shown.keep.sum(1).tolist() == [9] * 4  # 3 x 3 pooled cells are fewer than 10 clusters


# --- loss ------------------------------------------------------------------------------------------------------------


def labels_of(inputs, model, processor):
    labels = inputs["input_ids"].clone()
    labels[labels == model.config.image_token_id] = -100
    labels[inputs["attention_mask"] == 0] = -100
    labels[:, : labels.shape[1] // 2] = -100
    return labels


def test_dual_stream_loss_is_the_weighted_sum_of_its_parts(build, batch):
    model, processor = build(pixel_loss_weight=0.5, semantic_loss_weight=0.25)
    inputs = batch(processor, "left")
    labels = labels_of(inputs, model, processor)
    total = model(**inputs, labels=labels).loss
    parts = [model(**inputs, labels=labels, visual_stream=stream).loss for stream in ("pixel", "semantic")]
    model.config.pixel_loss_weight = model.config.semantic_loss_weight = 0.0
    task = model(**inputs, labels=labels).loss
    torch.testing.assert_close(total, task + 0.5 * parts[0] + 0.25 * parts[1])
    assert len({round(value.item(), 6) for value in (task, *parts)}) == 3
    total.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_the_pixel_stream_is_the_model_without_semantic_slots(build, batch):
    model, processor = build()
    inputs = batch(processor, "left")
    with torch.no_grad():
        by_level = [model(**inputs, visual_stream="pixel", granularity=level).logits[:, -1] for level in LEVELS]
    torch.testing.assert_close(by_level[0], by_level[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(by_level[0], by_level[2], atol=1e-5, rtol=0)


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fresh_process_computes_the_same_logits(build, batch, tmp_path):
    """Tied and untied, in both precisions."""
    for tied in (True, False):
        model, processor = build("granulon-llama3.2")
        if not tied:
            model.config.text_config.tie_word_embeddings = model.config.tie_word_embeddings = False
            torch.manual_seed(1)
            model = GranulonForConditionalGeneration(model.config).eval()
        for dtype in (torch.float32, torch.bfloat16):
            folder = tmp_path / f"{tied}-{dtype}"
            # Not `.to(dtype)`: that also rounds the rotary frequencies, which loading keeps in float32.
            model.save_pretrained(folder)
            loaded = AutoModelForVision2Seq.from_pretrained(folder, dtype=dtype)
            loaded.save_pretrained(folder)
            processor.save_pretrained(folder)
            inputs = dict(batch(processor, "left"))
            with torch.no_grad():
                logits = loaded(**inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}).logits
            torch.save({"inputs": inputs, "logits": logits, "tied": tied, "dtype": dtype}, folder / "expected.pt")
    script = (
        "import pathlib, sys, torch; from granulon_hf import AutoModelForVision2Seq\n"
        "for folder in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    model, expected = AutoModelForVision2Seq.from_pretrained(folder), torch.load(folder / 'expected.pt')\n"
        "    assert (model.lm_head.weight is model.get_input_embeddings().weight) == expected['tied'], folder\n"
        "    assert model.dtype == expected['dtype'], folder\n"
        "    with torch.no_grad(): logits = model(**expected['inputs']).logits\n"
        "    assert torch.equal(logits, expected['logits']), folder\n"
        "    print(folder)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.split()) == 4, done.stderr


def test_the_old_auto_name_is_the_image_text_to_text_class(build, tmp_path):
    assert AutoModelForVision2Seq is AutoModelForImageTextToText
    model, _ = build()
    model.save_pretrained(tmp_path)
    assert type(AutoModelForVision2Seq.from_pretrained(tmp_path)) is GranulonForConditionalGeneration


def test_an_untrained_model_uses_its_default_level(build, batch):
    for default in LEVELS:
        model, processor = build(trained=False, default_granularity=default)
        assert model(**batch(processor, "left")).granularity.tolist() == [LEVELS.index(default)] * 3


# --- bad input -------------------------------------------------------------------------------------------------------


def test_images_and_placeholders_must_match(build, batch):
    model, processor = build()
    inputs = batch(processor, "left")
    with pytest.raises((ValueError, RuntimeError), match="slots"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:-1]})
    with pytest.raises((ValueError, RuntimeError), match="slots"):
        model.generate(**inputs | {"pixel_values": inputs["pixel_values"][:-1]}, max_new_tokens=2)


def test_a_4d_mask_with_images_is_refused(build, batch):
    model, processor = build()
    inputs = batch(processor, "left")
    length = inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match="attention_mask"):
        model(**inputs | {"attention_mask": torch.zeros(3, 1, length, length)}, granularity="fine")


def test_a_language_model_that_alters_its_logits_is_refused(build):
    model, _ = build()
    for text in ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, {"model_type": "granite", "logits_scaling": 8.0}):
        language = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**text, vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
        )
        config = GranulonConfig(vision_config=model.config.vision_config, text_config=language.config, image_token_id=3)
        with pytest.raises(ValueError, match="logit"):
            GranulonForConditionalGeneration.from_backbones(config, model.model.vision_tower, language)


def test_a_decoder_without_reachable_first_block_is_refused():
    config = GranulonConfig(
        vision_config={"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        text_config={"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2},
    )
    with pytest.raises(ValueError, match="granularity_levels="):
        GranulonModel(config)
