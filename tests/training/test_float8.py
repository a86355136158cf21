"""Products in float8: against the same rounding in NumPy, in a model, in a run, and where they are refused."""

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from granulon_hf.data.collator import GranulonCollator
from granulon_hf.data.datasets.shapes import Shapes
from granulon_hf.errors import GranulonError
from granulon_hf.training import GranulonTrainer, RecipeArguments, parse, set_stage
from granulon_hf.training.float8 import Float8Linear, use_float8

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def rounded(rows):
    """Rows as float8 keeps them: three bits behind the first of each number, down to 2^-9, the largest number being 448."""
    rows = rows.astype(np.float32)
    scale = np.abs(rows).max(-1, keepdims=True) / np.float32(448)
    scale[scale == 0] = 1
    values = rows / scale
    unit = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(values), 2**-20))), -6) - 3)
    return np.round(values / unit) * unit * scale.astype(np.float64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_and_its_gradient(device, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, dtype=dtype).requires_grad_(False).to(device)
    linear.weight[3], linear.weight[5] = 0, linear.weight[5] * 1e3
    inputs = torch.randn(2, 7, 64, device=device).mul(10.0 ** torch.arange(7.0, device=device).unsqueeze(1)).to(dtype)
    inputs[0, 1] = 0
    inputs.requires_grad_()
    outputs = Float8Linear(linear)(inputs)
    gradient = torch.randn_like(outputs)
    outputs.backward(gradient)
    weight, bias, rows, back = (t.detach().double().cpu().numpy() for t in (linear.weight, linear.bias, inputs, gradient))
    expected = rounded(rows) @ rounded(weight).T + bias
    np.testing.assert_allclose(outputs.detach().double().cpu(), expected, rtol=0.01, atol=0.01 * np.abs(expected).max(-1).min())
    expected = rounded(back) @ rounded(weight.T).T
    np.testing.assert_allclose(inputs.grad.double().cpu(), expected, rtol=0.01, atol=0.01 * np.abs(expected).max())
    assert outputs.dtype == inputs.grad.dtype == dtype


def test_frozen_layers_alone_and_by_the_same_names(build):
    model, _ = build()
    set_stage(model, "projector+lora")
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    decoder = model.model.language_model
    frozen = [m for m in decoder.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    assert use_float8(decoder) == len(frozen) > 0
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and model.state_dict().keys() >= after.keys()
    assert all(after[name] is parameter and parameter.requires_grad is trained for name, (parameter, trained) in before.items())
    assert sum(isinstance(module, Float8Linear) for module in model.modules()) == len(frozen)
    odd = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 32)).requires_grad_(False)
    assert use_float8(odd) == 1 and isinstance(odd[0], nn.Linear)


def run(build, folder, **options):
    model, processor = build()
    set_stage(model, "projector")
    collator, samples = GranulonCollator(processor, packing=True), Shapes(16)
    common = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, "report_to": "none", "use_cpu": True}
    trainer = GranulonTrainer(
        model,
        RecipeArguments(output_dir=str(folder), per_device_train_batch_size=4, bf16=True, save_full=True, **common, **options),
        data_collator=collator,
        train_dataset=samples,
        lengths=collator.lengths(samples),
        max_tokens_per_batch=600,
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_run(build, tmp_path):
    plain, expected = run(build, tmp_path / "plain")
    float8, losses = run(build, tmp_path / "float8", frozen_dtype="fp8")
    assert losses != expected and losses == pytest.approx(expected, abs=0.02)
    for name in ("linear_1", "linear_2"):
        start = getattr(build()[0].model.multi_modal_projector, name).weight
        one, other = (getattr(m.model.multi_modal_projector, name).weight - start for m in (plain, float8))
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.8  # of Adam's steps, which follow signs
    # What is saved has all weights under their own names.
    saved = type(plain).from_pretrained(tmp_path / "float8")
    torch.testing.assert_close(saved.model.language_model.state_dict(), plain.model.language_model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["another class", "sides"])
def test_where_nothing_can_be_replaced_it_is_refused(build, tmp_path, kind):
    class Quantized(nn.Linear):  # as bitsandbytes has them
        pass

    def build_other():
        model, processor = build()
        for layer in model.model.language_model.modules():
            if isinstance(layer, nn.Linear):
                if kind == "sides":
                    layer.weight = nn.Parameter(layer.weight[:-1])
                else:
                    layer.__class__ = Quantized
        return model, processor

    with pytest.raises(GranulonError, match="leave it out"):
        run(build_other, tmp_path, frozen_dtype="fp8")


def test_compiled_without_a_break():
    torch._dynamo.reset()
    counters.clear()
    layer = Float8Linear(nn.Linear(32, 16).requires_grad_(False))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5, 8):
        inputs = torch.randn(rows, 32)
        first, second = (inputs.clone().requires_grad_() for _ in range(2))
        layer(first).sum().backward()
        compiled(second).sum().backward()
        assert torch.equal(first.grad, second.grad)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("line", "device", "capability", "what"),
    [
        (["--frozen_dtype", "int8"], "cuda", (9, 0), "must be fp8"),
        (["--frozen_dtype", "fp8"], "cuda", (8, 9), "Hopper"),
        (["--frozen_dtype", "fp8"], "cpu", (9, 0), "Hopper"),
        (["--frozen_dtype", "fp8", "--stage", "full", "--bf16", "true"], "cuda", (9, 0), "--stage full"),
        (["--frozen_dtype", "fp8", "--bf16", "false"], "cuda", (9, 0), "--bf16"),
        (["--frozen_dtype", "fp8", "--bf16", "true"], "cuda", (9, 0), None),
    ],
)
def test_refused_before_anything_is_read(monkeypatch, line, device, capability, what):
    line = [*line, "--use_cpu", "true"]
    monkeypatch.setattr(RecipeArguments, "device", torch.device(device))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    if what is None:
        assert parse(line)[2].frozen_dtype == "fp8"
    else:
        with pytest.raises(GranulonError, match=what):
            parse(line)


def test_sharding_is_refused(monkeypatch):
    monkeypatch.setattr(RecipeArguments, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(GranulonError, match="cannot be sharded"):
        parse(["--frozen_dtype", "fp8", "--bf16", "true", "--use_cpu", "true"])
