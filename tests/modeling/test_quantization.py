"""Quantizers shrink the backbones and leave controller, projector and head; where they do not, the model works as well."""

import dataclasses
import importlib
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    QuantoConfig,
    TorchAoConfig,
)

from granulon_hf import GranulonForConditionalGeneration, export_check, hub, variants
from granulon_hf.data.datasets.shapes import Shapes
from granulon_hf.errors import GranulonError
from granulon_hf.loading import load_model, read_model
from granulon_hf.quantization import LIBRARIES, quantization_config
from granulon_hf.training.stages import save_adapter, set_stage
from tests.conftest import make_conversation, make_inputs, make_picture

KEPT = ("model.controller.", "model.multi_modal_projector.", "lm_head")


def int8_weight_only():
    return importlib.import_module("torchao.quantization").Int8WeightOnlyConfig()


# Library, config, and whether the result can be saved.
BACKENDS = {
    "bnb-4bit": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True), True),
    # A skip list of the user's own replaces the default one.
    "bnb-4bit-skip": (
        "bitsandbytes",
        lambda: BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"], bnb_4bit_quant_type="nf4"),
        True,
    ),
    "bnb-8bit": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True), True),
    "quanto-int8": ("optimum.quanto", lambda: QuantoConfig("int8"), False),
    "torchao-int8": ("torchao", lambda: TorchAoConfig(int8_weight_only()), True),
}


def load(folder, backend, **kwargs):
    library, config, _ = BACKENDS[backend]
    pytest.importorskip(library)
    return GranulonForConditionalGeneration.from_pretrained(
        folder, quantization_config=config(), device_map=None if "quanto" in backend else "cpu", **kwargs
    )


@pytest.fixture
def wide(build, monkeypatch):
    """Build a toy model whose layers are 64 wide: bitsandbytes packs 4-bit weights in blocks of 64."""
    for table in (variants.ENCODERS, variants.DECODERS):
        for name, part in table.items():
            monkeypatch.setitem(table, name, dataclasses.replace(part, tiny=part.tiny | {"hidden_size": 64}))
    return build


@pytest.fixture
def setup(wide):
    model, processor = wide(slot_position="all")
    questions = ["How many small red dots are in the corner?", "What is it?"]
    conversations = [make_conversation(question, [make_picture(i)]) for i, question in enumerate(questions)]
    return model, make_inputs(processor, conversations)


@torch.no_grad()
def check(model, inputs, expected):
    """The controller chooses, every level can be forced, and forced logits are near those of the whole weights."""
    outputs = model(**inputs)
    assert outputs.granularity.equal(outputs.granularity_probs.argmax(-1))
    torch.testing.assert_close(outputs.granularity_probs.sum(-1), torch.ones(2))
    for level, logits in expected.items():
        # On the whole: a patch may fall into another cluster, so that single tokens differ more.
        assert (model(**inputs, granularity=level).logits - logits).abs().mean() < 0.2 * logits.std()
        new = model.generate(**inputs, granularity=level, max_new_tokens=2, min_new_tokens=2)
        assert new.shape[1] == inputs["input_ids"].shape[1] + 2
    unasked = inputs | {"question_mask": torch.zeros_like(inputs["question_mask"])}
    assert model(**unasked).granularity.tolist() == [model.config.level_names.index("middle")] * 2
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2


@torch.no_grad()
def levels_of(model, inputs):
    return {level: model(**inputs, granularity=level).logits.float() for level in model.config.level_names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_checkpoint_is_loaded_quantized(setup, backend, dtype, tmp_path):
    model, inputs = setup
    model.to(dtype).save_pretrained(tmp_path / "whole")
    quantized = load(tmp_path / "whole", backend)
    before, after = dict(model.named_parameters()), dict(quantized.named_parameters())
    for name, weight in after.items():
        if name.startswith(KEPT):
            assert type(weight) is nn.Parameter and weight.equal(before[name]), name
    inside = quantized.model
    for layer in (inside.language_model.layers[0].self_attn.q_proj, inside.vision_tower.model.layer[0].attention.q_proj):
        assert type(layer.weight) is not nn.Parameter
    check(quantized, inputs, levels_of(model, inputs))
    if BACKENDS[backend][2]:
        quantized.save_pretrained(tmp_path / "small")
        again = GranulonForConditionalGeneration.from_pretrained(tmp_path / "small", device_map="cpu")
        torch.testing.assert_close(again(**inputs).logits, quantized(**inputs).logits)


@pytest.mark.parametrize("backend", ["bnb-8bit", "torchao-int8"])
@torch.no_grad()
def test_an_adapter_is_assembled_quantized(setup, backend, tmp_path):
    model, inputs = setup
    set_stage(model, "projector")
    model.model.vision_tower.save_pretrained(tmp_path / "vision")
    language = AutoModelForCausalLM.from_config(model.config.text_config)
    language.model = model.model.language_model
    language.lm_head = model.lm_head
    language.save_pretrained(tmp_path / "text")
    model.config.backbones = {part: {"name": str(tmp_path / part)} for part in ("vision", "text")}
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", model)
    check(load(tmp_path / "adapter", backend), inputs, levels_of(model, inputs))


class Replaced(nn.Module):
    """A layer as other libraries put it in the place of a linear one: integers, a scale, and no `weight`."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax() / 127
        self.codes = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale)
        self.bias = linear.bias

    def forward(self, features):
        assert features.dtype == self.scale.dtype
        return nn.functional.linear(features, self.codes.to(self.scale.dtype) * self.scale, self.bias)


def replace_all(model):
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, Replaced(module))


def quantize_by_torchao(model):
    pytest.importorskip("torchao")
    importlib.import_module("torchao.quantization").quantize_(model, int8_weight_only())


def quantize_by_quanto(model):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantize", [replace_all, quantize_by_torchao, quantize_by_quanto])
@torch.no_grad()
def test_every_linear_layer_may_be_quantized(setup, quantize, dtype):
    model, inputs = setup
    model.to(dtype)
    expected = levels_of(model, inputs)
    quantize(model)
    check(model, inputs, expected)


@pytest.mark.parametrize("backend", ["bnb-4bit", "bnb-8bit", "torchao-int8"])
def test_adapters_are_trained_on_quantized_weights(setup, backend, tmp_path):
    """QLoRA: prepared by peft, one step, and it still answers."""
    peft = pytest.importorskip("peft")
    model, inputs = setup
    model.save_pretrained(tmp_path)
    quantized = peft.prepare_model_for_kbit_training(load(tmp_path, backend), use_gradient_checkpointing=False)
    adapted = peft.get_peft_model(quantized, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian"))
    adapted.train()
    before = {name: weight.clone() for name, weight in adapted.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=1.0)
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    moved = {name for name, weight in adapted.named_parameters() if weight.requires_grad and not weight.equal(before[name])}
    assert all(any(part in name for name in moved) for part in ("language_model", "vision_tower", "multi_modal_projector"))
    assert not any("controller" in name for name in moved)
    assert adapted.eval().generate(**inputs, max_new_tokens=2).shape[0] == 2


# --- exports -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(wide, tmp_path):
    """A folder with a model that is not quantized, its logits and its processor."""
    model, processor = wide()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole", model, processor


@pytest.mark.parametrize("kind", LIBRARIES)
@torch.no_grad()
def test_a_quantized_export_is_loaded_by_from_pretrained_alone(whole, kind, tmp_path):
    pytest.importorskip(LIBRARIES[kind])
    source, model, processor = whole
    before = GranulonForConditionalGeneration.from_pretrained(
        source, quantization_config=quantization_config(kind, model.config)
    ).eval()
    folder = hub.export(source, tmp_path / "small", quantize=kind, validate=False)
    again = AutoModelForImageTextToText.from_pretrained(folder)
    found, expected = export_check.logits(again, processor), export_check.logits(before, processor)
    for level, logits in export_check.logits(model, processor).items():
        np.testing.assert_array_equal(found[level], expected[level])
        assert 0 < np.abs(found[level] - logits).mean() < 0.2 * logits.std()
    inputs = make_inputs(processor, [make_conversation("How many dots?", [make_picture(0)])])
    assert torch.equal(again(**inputs).granularity_probs, model(**inputs).granularity_probs)  # the levels are chosen as before
    answers = [one.generate(**inputs, max_new_tokens=8, do_sample=False) for one in (again, before)]
    assert torch.equal(*answers)
    parameters = dict(model.named_parameters())
    for name, weight in again.named_parameters():
        quantized = ".language_model.layers.1." in name and name.endswith("proj.weight")
        assert quantized == (type(weight) is not nn.Parameter), name
        assert quantized or weight.equal(parameters[name]), name
    assert (folder / "model.safetensors").stat().st_size < (source / "model.safetensors").stat().st_size


@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_quantized_folder_is_a_model_for_every_command(whole, kind, tmp_path):
    pytest.importorskip(LIBRARIES[kind])
    source, _, processor = whole
    folder = hub.export(source, tmp_path / "small", quantize=kind, validate=False)
    model, _, _ = load_model(str(folder), "cpu")
    expected = export_check.logits(model, processor)  # from here on bitsandbytes' weights may lie in memory in another order
    again = hub.export(folder, tmp_path / "again", validate=False)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    found = export_check.logits(read_model(str(again))[0], processor)
    assert all(np.array_equal(found[level], expected[level]) for level in expected)
    assert load_model(str(folder), "cpu", "bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(GranulonError, match="--dtype"):
        load_model(str(folder), "cpu", "float32")
    with pytest.raises(GranulonError, match="quantized already"):
        hub.export(folder, tmp_path / "twice", quantize=kind, validate=False)


def test_the_card_of_a_quantized_export(whole, tmp_path, monkeypatch):
    source, _, _ = whole
    backbones = {"vision": {"name": "org/vision"}, "text": {"name": "org/text"}}
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"backbones": backbones}))
    card = ModelCard.load(hub.export(source, tmp_path / "a", quantize="8bit", validate=False) / "README.md")
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert card.data.base_model == ["org/vision", "org/text"]
    assert "`torchao`" in card.text
    # What has a repository of its own is what was quantized; a folder's card keeps that.
    monkeypatch.setattr(hub.cards, "is_hub_id", lambda text: True)
    card = ModelCard.load(hub.export(source, tmp_path / "b", quantize="8bit", validate=False) / "README.md")
    assert card.data.base_model == str(source)
    monkeypatch.undo()
    again = ModelCard.load(hub.export(tmp_path / "b", tmp_path / "c", validate=False) / "README.md")
    assert again.data.base_model == str(source) and again.data.to_dict()["base_model_relation"] == "quantized"


@pytest.mark.slow
@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_quantized_export_is_loaded_without_the_package(whole, kind, tmp_path):
    pytest.importorskip(LIBRARIES[kind])
    assert hub.export(whole[0], tmp_path / "small", quantize=kind).is_dir()


def test_what_cannot_be_quantized(build, whole, tmp_path, monkeypatch):
    model, _ = build()
    model.config.text_config.hidden_size = 32
    assert isinstance(quantization_config("8bit", model.config), TorchAoConfig)
    with pytest.raises(GranulonError, match="8bit"):
        quantization_config("4bit", model.config)
    for options, word in (
        ({"quantize": "3bit"}, "3bit"),
        ({"quantize": "4bit", "form": "adapter"}, "adapter"),
        ({"quantize": "4bit", "results": {"models": []}}, "--results"),
    ):
        with pytest.raises(GranulonError, match=word):
            hub.export(whole[0], tmp_path / "out", **options)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GranulonError, match="pip install bitsandbytes"):
        quantization_config("4bit", whole[1].config)
    assert not (tmp_path / "out").exists()


def test_the_guide(wide, tmp_path, monkeypatch):
    """The Python of `examples/quantization.md`, from top to bottom."""
    for library in ("bitsandbytes", "peft", "trl"):
        pytest.importorskip(library)
    model, processor = wide()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    guide = (Path(__file__).parents[2] / "examples/quantization.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", guide, re.DOTALL))
    for old, new in (("FOLDER", str(tmp_path / "model")), ("max_steps=1", "max_steps=1, use_cpu=True, report_to='none'")):
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    names = {"samples": [Shapes(8)[i] for i in range(8)]}
    exec(code, names)
    assert names["trainer"].state.global_step == 1
    assert isinstance(names["adapted"].get_base_model(), GranulonForConditionalGeneration)
