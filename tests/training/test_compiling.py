"""Compiled regions: the same losses and gradients, without a break, and without a graph for another batch."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from granulon_hf.data.collator import GranulonCollator
from granulon_hf.data.datasets.shapes import Shapes
from granulon_hf.errors import GranulonError
from granulon_hf.training import GranulonTrainer, RecipeArguments, parse, set_stage
from granulon_hf.training.compiling import compile_regions
from granulon_hf.training.stages import trainable

SAMPLES = Shapes(64)


def make_batches(processor):
    """Twenty packs of 1 to 7 samples; the third has no image at all."""
    collator = GranulonCollator(processor, packing=True)
    batches = [collator([SAMPLES[i] for i in range(3 * n % 40, 3 * n % 40 + 1 + n % 7)]) for n in (2, *range(20))]
    texts = [SAMPLES[i] for i in range(3)]
    for sample in texts:
        sample.images, sample.messages[0]["content"] = [], [{"type": "text", "text": "What is red?"}]
    batches.insert(3, collator(texts))
    return batches


def step(model, batch):
    model.zero_grad()
    loss = model(**batch, skip_logits=True).loss
    if loss.requires_grad:
        loss.backward()
    return loss.item(), [None if p.grad is None else p.grad.clone() for _, p in trainable(model)]


@pytest.mark.parametrize("variant", ["granulon-qwen2.5", pytest.param("granulon-compact-llama3.2", marks=pytest.mark.slow)])
def test_no_break_and_no_graph_for_another_batch(build, variant):
    plain, processor = build(variant)
    set_stage(plain, "projector")
    plain.set_attn_implementation({"text_config": "granulon_packed"})
    compiled = copy.deepcopy(plain)
    torch._dynamo.reset()
    counters.clear()
    compile_regions(compiled, backend="aot_eager")
    assert {name for name, _ in compiled.named_parameters()} == {name for name, _ in plain.named_parameters()}
    graphs = None
    for batch in make_batches(processor):
        expected, actual = step(plain, batch), step(compiled, batch)
        assert actual[0] == pytest.approx(expected[0], abs=1e-5)
        for mine, other in zip(actual[1], expected[1], strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
        graphs = graphs or counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    assert graphs <= 5  # a layer of each kind, with and without what the first one lacks, and AdaTA


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_a_plain_one(build, tmp_path):
    found = []
    for name in ("none", "regional"):
        torch._dynamo.reset()
        model, processor = build()
        set_stage(model, "projector")
        collator = GranulonCollator(processor, packing=True)
        options = {"max_steps": 3, "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
        args = RecipeArguments(output_dir=str(tmp_path / name), compile=name, per_device_train_batch_size=3, **options)
        trainer = GranulonTrainer(
            model,
            args,
            data_collator=collator,
            train_dataset=SAMPLES,
            lengths=collator.lengths(SAMPLES),
            max_tokens_per_batch=400,
            processing_class=processor,
        )
        trainer.train()
        trainer.save_model()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[1] == pytest.approx(found[0], abs=1e-5)


def test_what_is_compiled_has_a_name():
    with pytest.raises(GranulonError, match="--compile"):
        parse(["--use_cpu", "true", "--compile", "all"])
