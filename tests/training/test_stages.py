"""Stages: what is trained, what stays still, and what a run keeps."""

import pytest
import torch

from granulon_hf.training.stages import (
    STAGES,
    adapter_state,
    keep_frozen_parts_in_eval,
    load_adapter_state,
    parameter_table,
    set_stage,
    trainable,
)
from tests.conftest import make_conversation, make_inputs


def parts(model):
    return {name.split(".")[1] for name, _ in trainable(model) if name.startswith("model.")}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("projector", {"multi_modal_projector"}),
        ("controller", {"controller"}),
        ("projector+lora", {"multi_modal_projector", "language_model"}),
        ("full", {"vision_tower", "multi_modal_projector", "language_model"}),
    ],
)
def test_stages(build, stage, expected):
    model, _ = build()
    set_stage(model, stage)
    assert parts(model) == expected
    if stage == "projector+lora":
        names = [name for name, _ in trainable(model) if "language_model" in name]
        assert all("lora_" in name for name in names)
        assert not any("layers.0." in name for name in names)  # the block that the controller reads
    assert set(STAGES) == {"projector", "controller", "projector+lora", "full"}


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("granulon-qwen2.5", {}),  # DINOv3 has a mask token
        ("granulon-compact-qwen2.5", {"reducer": "queries"}),
        ("granulon-compact-qwen2.5", {"reducer": "downsample"}),
        ("clip-llama3.2", {}),  # features of the last layer but one
        ("siglip-qwen2.5", {}),
    ],
)
def test_all_that_is_trained_gets_a_gradient(build, variant, options, picture):
    model, processor = build(variant, **options)
    assert not model.training
    set_stage(model, "full")
    inputs = make_inputs(processor, make_conversation("What is it?", [picture], "A cat."), generate=False)
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [name for name, parameter in trainable(model) if parameter.grad is None] == []
    assert "vision_tower" in parts(model)
    # What is left out cannot matter.
    model.eval()
    before = model(**inputs).logits
    with torch.no_grad():
        for parameter in model.model.vision_tower.parameters():
            if not parameter.requires_grad:
                parameter.normal_()
    torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=0)


def test_trained_weights_are_kept_in_float32(build):
    model, _ = build()
    set_stage(model.to(torch.bfloat16), "projector")
    assert {p.dtype for _, p in trainable(model)} == {torch.float32}
    assert next(model.model.language_model.parameters()).dtype == torch.bfloat16


def test_bad_stages(build):
    model, _ = build()
    with pytest.raises(ValueError, match="projector, controller"):
        set_stage(model, "everything")
    plain, _ = build("clip-qwen2.5")
    with pytest.raises(ValueError, match="controller"):
        set_stage(plain, "controller")


def test_frozen_modules_stay_in_eval_mode_and_trained_ones_do_not(build):
    model, _ = build()
    set_stage(model, "projector")
    model.train()
    keep_frozen_parts_in_eval(model)
    inner = model.model
    assert not any(m.training for part in (inner.vision_tower, inner.language_model, inner.controller) for m in part.modules())
    assert all(module.training for module in inner.multi_modal_projector.modules())


def test_checkpointed_layers_work_though_they_are_frozen(build):
    """transformers checkpoints in training mode only; the layer is switched on, what is inside it is not."""
    model, _ = build()
    model.gradient_checkpointing_enable()
    set_stage(model, "projector")
    model.train()
    keep_frozen_parts_in_eval(model)
    layer = model.model.language_model.layers[0]
    assert layer.training and not any(module.training for module in layer.children())


def test_adapter_round_trip(build):
    model, _ = build()
    set_stage(model, "projector")
    state = {name: value.clone() for name, value in adapter_state(model).items()}
    assert {name.split(".")[0] for name in state} == {"multi_modal_projector", "controller"}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_adapter_state(model, state)
    after = adapter_state(model)
    assert state.keys() == after.keys() and all(torch.equal(state[name], after[name]) for name in state)


def test_adapters_that_do_not_fit(build):
    model, _ = build()
    set_stage(model, "projector")
    state = adapter_state(model)
    with pytest.raises(ValueError, match="multi_modal_projector"):
        load_adapter_state(model, {name: value for name, value in state.items() if "controller" in name})
    with pytest.raises(ValueError, match="lacks"):
        load_adapter_state(model, {**state, "language_model.layers.9.x": torch.zeros(1)})
    with pytest.raises(ValueError, match="backbones"):
        load_adapter_state(model, {**state, "multi_modal_projector.linear_1.bias": torch.zeros(3)})


def test_table_counts_every_parameter_once(build):
    model, _ = build()
    set_stage(model, "projector")
    table = parameter_table(model)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    numbers = {row[0]: (int(row[1].replace(",", "")), int(row[2].replace(",", ""))) for row in rows}
    assert sum(numbers["all"]) == sum(parameter.numel() for parameter in model.parameters())
    assert numbers["all"][0] == numbers["multi_modal_projector"][0] == sum(p.numel() for _, p in trainable(model))
