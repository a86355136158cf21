"""Packed samples against the same samples in a padded batch."""

import copy

import pytest
import torch

from granulon_hf.modeling import attention_granulon
from tests.conftest import make_conversation, make_inputs, make_picture

CONVERSATIONS = (
    make_conversation("What is it?", [make_picture(1)], "A red house."),
    make_conversation("Is there an animal?", [], "No, there is none in it."),
    make_conversation("How many small objects are there, and why?", [make_picture(2), make_picture(3)], "Three."),
    make_conversation("Describe the image in detail.", [make_picture(4)], "Two people on a beach, left of a green car."),
)
CHOICES = [None, "middle", ["coarse", None, "fine", "middle"]]


def make_batch(processor, conversations=CONVERSATIONS, **kwargs):
    """A right-padded batch whose labels are the answers (the last words of each row)."""
    inputs = make_inputs(processor, conversations, side="right", generate=False, **kwargs)
    labels = inputs["input_ids"].clone()
    for row, conversation in enumerate(conversations):
        answer = conversation[-1]["content"][0]["text"]
        length = int(inputs["attention_mask"][row].sum())
        labels[row, : length - len(processor.tokenizer(answer)["input_ids"])] = -100
    return {**inputs, "labels": labels.masked_fill(inputs["attention_mask"] == 0, -100)}


def pack(batch, rows=1):
    """The same samples one after the other in `rows` rows of equal length, with what is over masked."""
    real, size = batch["attention_mask"].bool(), len(batch["input_ids"]) // rows
    packed = {
        name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask", "labels", "question_mask")
    }
    seq_idx = torch.arange(len(real)).unsqueeze(1).expand(real.shape)
    fields = {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "question_mask") if name in batch}
    for name, value in {**fields, "seq_idx": seq_idx}.items():
        lines = [value[i : i + size][real[i : i + size]] for i in range(0, len(real), size)]
        packed[name] = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=-100 if name == "labels" else 0)
    if rows == 1:
        del packed["attention_mask"]
    else:  # what is over belongs to the last sample
        packed["seq_idx"] = packed["seq_idx"].cummax(1).values
    return packed


def flat(batch, logits):
    return logits[batch["attention_mask"].bool()]


def visible(batch, outputs):
    return outputs.attention_mask[batch["attention_mask"].bool()].bool() if outputs.attention_mask is not None else ...


def gradients(model):
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_equal(model, batch, packed, **options):
    """Loss, logits of what is visible, levels, and every gradient."""
    expected = model(**batch, **options)
    expected.loss.backward()
    want = gradients(model)
    model.zero_grad()
    actual = model(**packed, **options)
    actual.loss.backward()
    got = gradients(model)
    torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=0)
    logits = actual.logits[packed["attention_mask"].bool()] if "attention_mask" in packed else actual.logits.flatten(0, 1)
    seen = visible(batch, expected)
    torch.testing.assert_close(logits[seen], flat(batch, expected.logits)[seen], atol=1e-5, rtol=0)
    if expected.granularity is not None:
        assert torch.equal(actual.granularity, expected.granularity)
        torch.testing.assert_close(actual.granularity_probs, expected.granularity_probs, atol=1e-5, rtol=0)
    assert want.keys() == got.keys() and any("multi_modal_projector" in name for name in want)
    for name, gradient in want.items():
        assert gradient.abs().max() > 0 or "position" in name or "mask_token" in name or "bias" in name, name
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    return expected, actual


@pytest.mark.parametrize("attention", ["sdpa", "eager", "granulon_packed"])
@pytest.mark.parametrize("granularity", CHOICES, ids=["chosen", "one", "each"])
@pytest.mark.parametrize("decoder", ["qwen2.5", "llama3.2"])
def test_loss_and_gradients_are_those_of_the_padded_batch(build, decoder, granularity, attention):
    model, processor = build(f"granulon-{decoder}")
    model.set_attn_implementation(attention)
    batch = make_batch(processor)
    expected, _ = assert_equal(model, batch, pack(batch), granularity=granularity)
    if granularity != "middle":
        assert len(set(expected.granularity.tolist())) > 1


@pytest.mark.parametrize("name", ["clip-qwen2.5", "dinov2-llama3.2"])
def test_without_levels(build, name):
    model, processor = build(name)
    batch = make_batch(processor)
    assert_equal(model, batch, pack(batch))


def test_several_rows_with_padding(build):
    model, processor = build()
    batch = make_batch(processor)
    assert_equal(model, batch, pack(batch, rows=2), granularity=CHOICES[-1])


def test_weights_in_float32_under_autocast(build):
    model, processor = build()
    batch = make_batch(processor)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).loss
        model.set_attn_implementation({"text_config": attention_granulon.NAME})
        actual = model(**pack(batch)).loss
    actual.backward()
    torch.testing.assert_close(actual, expected, atol=0.02, rtol=0)


def test_without_images(build):
    model, processor = build()
    batch = make_batch(processor, [make_conversation("Red?", [], "No."), make_conversation("Where is the cat?", [], "Left.")])
    expected, actual = model(**batch), model(**pack(batch))
    torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(actual.logits[0], flat(batch, expected.logits), atol=1e-5, rtol=0)


def test_without_question_mask_what_has_no_label_is_the_question(build):
    model, processor = build()
    batch = make_batch(processor)
    del batch["question_mask"]
    assert_equal(model, batch, pack(batch))


@pytest.mark.parametrize("weights", [{"pixel_loss_weight": 0.5}, {"semantic_loss_weight": 0.3}])
def test_losses_of_the_streams(build, weights):
    model, processor = build(**weights)
    batch = make_batch(processor)
    plain, _ = build()
    assert not torch.isclose(plain(**batch).loss, model(**batch).loss)
    assert_equal(model, batch, pack(batch))


@pytest.mark.parametrize("stream", ["pixel", "semantic"])
def test_one_stream(build, stream):
    model, processor = build()
    batch = make_batch(processor)
    assert_equal(model, batch, pack(batch), visual_stream=stream)


@pytest.mark.parametrize("attention", ["sdpa", "granulon_packed"])
def test_gradient_checkpointing(build, attention):
    model, processor = build()
    model.set_attn_implementation({"text_config": attention})
    batch = make_batch(processor)
    packed = pack(batch)
    model.train()
    model(**packed).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**packed).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "granulon_packed"])
@torch.no_grad()
def test_samples_do_not_see_each_other(build, attention):
    model, processor = build()
    model.set_attn_implementation(attention)
    packed = pack(make_batch(processor))
    before = model(**packed)
    for sample in range(len(CONVERSATIONS)):
        here = packed["seq_idx"] == sample
        text = here & (packed["input_ids"] != model.config.image_token_id)
        changed = {**packed, "input_ids": torch.where(text, packed["input_ids"] % 200 + 50, packed["input_ids"])}
        assert not (changed["input_ids"] == model.config.image_token_id)[text].any()
        after = model(**changed)
        torch.testing.assert_close(after.logits[~here], before.logits[~here], atol=1e-5, rtol=0)
        assert (after.logits[here] - before.logits[here]).abs().max() > 1e-2


@torch.no_grad()
def test_no_sample_predicts_the_first_token_of_the_next(build):
    model, processor = build()
    packed = pack(make_batch(processor))
    loss = model(**packed).loss
    first = torch.diff(packed["seq_idx"], prepend=torch.tensor([[-1]])) != 0
    labelled = torch.where(first, packed["input_ids"], packed["labels"])
    torch.testing.assert_close(model(**{**packed, "labels": labelled}).loss, loss)


@torch.no_grad()
def test_logits_to_keep_hidden_states_and_inputs_embeds(build):
    model, processor = build()
    packed = pack(make_batch(processor))
    labels = packed.pop("labels")
    full = model(**packed, output_hidden_states=True)
    assert full.cache is None
    assert all(states.shape[:2] == labels.shape for states in full.hidden_states)
    hidden = full.attention_mask == 0
    assert hidden.any() and (full.hidden_states[-1][hidden] == 0).all()
    torch.testing.assert_close(model(**packed, logits_to_keep=5).logits, full.logits[:, -5:])
    embeds = model.get_input_embeddings()(packed.pop("input_ids"))
    torch.testing.assert_close(model(**packed, inputs_embeds=embeds).logits, full.logits)


@torch.no_grad()
def test_what_is_refused(build):
    model, processor = build()
    packed = pack(make_batch(processor))
    del packed["labels"]
    with pytest.raises(ValueError, match="2 levels .* 4"):
        model(**packed, granularity=["fine", "coarse"])
    with pytest.raises(ValueError, match="shape"):
        model(**{**packed, "seq_idx": packed["seq_idx"][:, 1:]})
    with pytest.raises(ValueError, match="shape"):
        model(**packed, attention_mask=torch.ones(1, 1, 9, 9))
    with pytest.raises(ValueError, match="training"):
        model.generate(**packed, max_new_tokens=2)


@torch.no_grad()
def test_what_is_not_packed_is_attended_to_as_by_sdpa(build):
    model, processor = build()
    batch, prompt = make_batch(processor), make_inputs(processor, CONVERSATIONS)
    expected, answers = model(**batch).logits, model.generate(**prompt, max_new_tokens=4, do_sample=False)
    model.set_attn_implementation({"text_config": "granulon_packed"})
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=0)
    assert torch.equal(model.generate(**prompt, max_new_tokens=4, do_sample=False), answers)


def test_attention_for_packed_rows_replaces_sdpa_alone(build):
    config = build()[0].config.text_config
    cpu, found = torch.device("cpu"), attention_granulon.find_packed_attention
    assert found(config, cpu, torch.float32) == "granulon_packed"
    assert found(config, torch.device("meta"), torch.float32) == "sdpa"
    for changed in ({"attention_dropout": 0.1}, {"layer_types": ["sliding_attention", "full_attention"]}):
        other = copy.deepcopy(config)
        other.update(changed)
        assert found(other, cpu, torch.float32) == "sdpa"
    config._attn_implementation = "eager"
    assert found(config, cpu, torch.float32) == "eager"


def test_packed_attention_is_one_operator_with_gradients():
    query, key, value = (torch.randn(1, 2, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    arguments = (query, key, value, torch.tensor([0, 4, 5, 9]), 0.3)
    torch.library.opcheck(attention_granulon.on_cpu, arguments)
    assert torch.autograd.gradcheck(lambda *states: attention_granulon.on_cpu(*states, *arguments[3:])[0], arguments[:3])


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@torch.no_grad()
def test_on_a_gpu(build, attention):
    model, processor = build()
    model.config.text_config.update({"num_attention_heads": 2, "num_key_value_heads": 1})
    model.config.vision_config.update({"num_attention_heads": 2})
    model = type(model)(model.config).eval()  # flex attention wants heads of 16 channels there
    batch = make_batch(processor)
    expected = model(**batch)
    model.set_attn_implementation(attention)
    packed = {name: value.cuda() for name, value in pack(batch).items()}
    torch.testing.assert_close(model.cuda()(**packed).loss.cpu(), expected.loss, atol=1e-4, rtol=0)
