"""Adapters of peft on any linear layer, controller and projector included."""

import pytest
import torch

from granulon_hf.training.stages import set_stage
from tests.conftest import make_conversation, make_inputs, make_picture

peft = pytest.importorskip("peft")

QUESTIONS = ["How many small red dots are in the corner?", "What is it?"]
TARGETS = {
    "all-linear": {"target_modules": "all-linear"},
    "two": {"target_modules": ["q_proj", "fc1"]},
    "ours": {"target_modules": ["in_proj", "fc1", "fc2", "linear_1", "linear_2"], "lora_dropout": 0.1},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector", "controller"]},
    # The one that examples/quantization.md recommends.
    "guide": {"target_modules": "all-linear", "exclude_modules": r".*(controller|language_model\.layers\.0)\..*"},
}


@pytest.fixture
def setup(build):
    model, processor = build(slot_position="all")
    return model, make_inputs(processor, [make_conversation(text, [make_picture(i)]) for i, text in enumerate(QUESTIONS)])


def train_step(model, inputs):
    model.train()
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_are_trained_and_merged(setup, targets, dtype):
    model, inputs = setup
    config = peft.LoraConfig(r=2, init_lora_weights="gaussian", **TARGETS[targets])
    adapted = peft.get_peft_model(model.to(dtype), config)
    with torch.no_grad():
        before = adapted(**inputs)
    train_step(adapted, inputs)
    with torch.no_grad():
        after = adapted(**inputs)
        assert not after.logits.equal(before.logits)
        assert after.granularity.equal(after.granularity_probs.argmax(-1))
        for level in (None, "coarse", ["fine", None]):
            new = adapted.generate(**inputs, granularity=level, max_new_tokens=2, min_new_tokens=2)
            assert new.shape == (2, inputs["input_ids"].shape[1] + 2)
        forced = adapted(**inputs, granularity="fine").logits
        merged = adapted.merge_and_unload()
        assert type(merged) is type(model)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(merged(**inputs, granularity="fine").logits, forced, atol=tolerance, rtol=0)


def test_the_guides_adapters_leave_the_choice_of_the_level_alone(setup):
    model, inputs = setup
    expected = model.get_granularity_probs(**{name: inputs[name] for name in ("input_ids", "question_mask")})
    adapted = train_step(peft.get_peft_model(model, peft.LoraConfig(r=2, **TARGETS["guide"])), inputs)
    assert adapted(**inputs).granularity_probs.equal(expected)


def test_adapters_are_saved_and_loaded(setup, build, tmp_path):
    model, inputs = setup
    adapted = train_step(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear")), inputs)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(slot_position="all")[0], tmp_path)
    assert again(**inputs, granularity="fine").logits.equal(adapted(**inputs, granularity="fine").logits)


def test_a_projector_in_float32_reads_and_feeds_parts_in_bfloat16(setup):
    model, inputs = setup
    set_stage(model.to(torch.bfloat16), "projector")
    types = {name.split(".")[1]: weight.dtype for name, weight in model.named_parameters()}
    assert types["multi_modal_projector"] == torch.float32 and types["vision_tower"] == torch.bfloat16
    train_step(model, inputs)
    assert model.model.multi_modal_projector.linear_1.weight.grad.dtype == torch.float32
    assert model(**inputs).logits.dtype == torch.bfloat16
