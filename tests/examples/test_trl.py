"""The TRL examples on the toy model: what is trained moves and nothing else, pairs come from the judge and are kept."""

import importlib.util
import json
import math
import sys
import zlib
from pathlib import Path

import pytest

pytest.importorskip("trl")

from datasets import Dataset, Image, List
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from granulon_hf.data.collator import GranulonCollator
from granulon_hf.data.datasets.shapes import Shapes
from granulon_hf.errors import GranulonError
from granulon_hf.io import Journal
from tests.conftest import build_tiny
from tests.judge.server import Reply, Server, prediction_of

ROOT = Path(__file__).parents[2]
TINY = ["--variant", "granulon-qwen2.5", "--tiny", "true", "--use_cpu", "true", "--logging_steps", "1"]
SHORT = ["--per_device_train_batch_size", "4", "--max_steps", "4", "--learning_rate", "1e-2"]


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its classes are pickled
    spec.loader.exec_module(module)
    return module


def losses(trainer):
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def moved(trainer):
    before, _ = build_tiny()
    after = dict(trainer.model.named_parameters())
    return {name for name, value in before.named_parameters() if not value.equal(after[name])}


def train_with_stock_trl(tmp_path, dataset, collator=None, **options):
    """One step of TRL's own SFTTrainer: the trainer, its first batch, and the tokens that the controller read."""
    model, processor = build_tiny()
    read = []
    model.model.controller.register_forward_pre_hook(lambda _, inputs: read.append(inputs[1]))
    peft_config = options.pop("peft_config", None)
    fixed = dict(max_steps=1, per_device_train_batch_size=3, report_to="none", use_cpu=True, bf16=False, save_strategy="no")
    trainer = SFTTrainer(
        model,
        SFTConfig(output_dir=str(tmp_path), learning_rate=1e-2, logging_steps=1, **fixed, **options),
        train_dataset=dataset,
        processing_class=processor,
        data_collator=collator and collator(processor),
        peft_config=peft_config,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert math.isfinite(losses(trainer)[0])
    changed = {name for name, value in trainer.model.named_parameters() if not value.equal(before[name])}
    return processor, batch, read[0], changed


def check_batch(processor, batch, read, samples):
    """Labels on the answer and its end alone, and nothing but the question for the controller."""
    decode = processor.tokenizer.decode
    found = {decode(ids[mask.bool()]): decode(ids[labels != -100]) for ids, mask, labels in zip(
        batch["input_ids"], batch["question_mask"], batch["labels"], strict=True)}  # fmt: skip
    assert found == {sample.question: f"{sample.reference}<|im_end|>" for sample in samples}
    assert not (batch["labels"] == processor.image_token_id).any()
    assert sorted(read.sum(1).tolist()) == sorted(batch["question_mask"].sum(1).tolist())


@pytest.mark.parametrize("target_modules", [None, "all-linear", ["q_proj", "fc1", "linear_1"]], ids=str)
def test_stock_trl(tmp_path, target_modules):
    """As README says it."""
    samples = [Shapes(3)[i] for i in range(3)]
    dataset = Dataset.from_list([sample.to_dict() for sample in samples]).cast_column("images", List(Image()))
    lora = target_modules and LoraConfig(r=2, target_modules=target_modules, init_lora_weights="gaussian")
    *seen, changed = train_with_stock_trl(tmp_path, dataset, assistant_only_loss=True, peft_config=lora)
    check_batch(*seen, samples)
    assert any("multi_modal_projector" in name for name in changed)
    assert not any("controller" in name for name in changed)
    if lora:
        assert all("lora_" in name for name in changed)


@pytest.mark.parametrize("target_modules", [None, "all-linear"])
@pytest.mark.parametrize("form", ["as it is", "decoded", "prompt and completion"])
def test_stock_trl_with_our_collator(tmp_path, form, target_modules):
    samples = [Shapes(3)[i] for i in range(3)]
    rows = [sample.to_dict() for sample in samples]
    if form == "prompt and completion":
        rows = [{"images": sample.images, "prompt": sample.prompt, "completion": sample.messages[-1:]} for sample in samples]
    dataset = Dataset.from_list(rows)
    if form == "decoded":
        dataset = dataset.cast_column("images", List(Image()))
    lora = target_modules and LoraConfig(r=2, target_modules=target_modules, init_lora_weights="gaussian")
    *seen, changed = train_with_stock_trl(tmp_path, dataset, GranulonCollator, peft_config=lora)
    check_batch(*seen, samples)
    assert any("multi_modal_projector" in name for name in changed)


def test_prompts_and_completions_are_refused_where_the_controller_would_read_the_answer(tmp_path):
    """TRL's own collator puts the answers behind the prompts, but leaves the prompts' question mask as it was."""
    sample = Shapes(1)[0]
    _, processor = build_tiny()
    text = processor.apply_chat_template(sample.prompt, tokenize=False)
    if "question_mask" not in processor(text=[text.replace(processor.image_token, "")]):
        pytest.skip("a rendered prompt has no question mask")
    row = {"images": sample.images, "prompt": sample.prompt, "completion": sample.messages[-1:]}
    with pytest.raises(ValueError, match="GranulonCollator"):
        train_with_stock_trl(tmp_path, Dataset.from_list([row] * 3).cast_column("images", List(Image())))


def judge(server, body):
    """Any two answers differ in their scores, unless they are the same."""
    score = zlib.crc32(prediction_of(body).encode()) % 101
    return Reply(json.dumps({"accuracy_score": 50, "hallucination_score": score}))


@pytest.mark.parametrize("batching", ["grouped", "packed"])
def test_sft(tmp_path, batching):
    trainer = example("sft_trl").main([*TINY, *SHORT, "--limit", "8", "--batching", batching, "--output_dir", str(tmp_path)])
    found = losses(trainer)
    assert len(found) == 4 and found[-1] < found[0]
    names = moved(trainer)
    assert names and all("multi_modal_projector" in name for name in names)
    assert not trainer.model.model.vision_tower.training
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_dpo(tmp_path):
    dpo = example("dpo_trl")
    with Server(judge) as server:
        arguments = [*TINY, *SHORT, "--limit", "4", "--max_new_tokens", "6", "--output_dir", str(tmp_path)]
        arguments += ["--base_url", server.url, "--model", "local", "--max_cost", "1", "--price", "1", "1"]
        assert dpo.main([*arguments, "--dry_run", "true"]) is None
        assert not server.requests and not (tmp_path / "pairs.jsonl").exists()
        trainer = dpo.main(arguments)
        asked = len(server.requests)
        pairs = list(Journal(tmp_path / "pairs.jsonl"))
        assert 0 < len(pairs) <= 4 and 0 < asked <= 8
        for pair in pairs:
            scores = [zlib.crc32(pair[name][0]["content"][0]["text"].encode()) % 101 for name in ("chosen", "rejected")]
            assert scores == [pair["chosen_hallucination"], pair["rejected_hallucination"]] and scores[0] < scores[1]
        (tmp_path / "pairs.jsonl").unlink()
        again = dpo.main([*arguments, "--max_steps", "1"])
        assert len(server.requests) == asked  # answers and scores were kept
    assert list(Journal(tmp_path / "pairs.jsonl")) == pairs
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)  # the reference is the model
    assert losses(trainer)[-1] < losses(trainer)[0] and math.isfinite(losses(again)[0])
    names = moved(trainer)
    assert names and all("multi_modal_projector" in name for name in names)


def test_bad_input_is_refused_before_anything_is_sampled(tmp_path):
    dpo = example("dpo_trl")
    arguments = [*TINY, "--limit", "2", "--output_dir", str(tmp_path)]
    with pytest.raises(GranulonError, match="price"):
        dpo.main([*arguments, "--model", "local", "--max_cost", "1"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "pairs.jsonl").write_text('{"id": "elsewhere"}\n')
    with pytest.raises(GranulonError, match="--output_dir"):
        dpo.main(arguments)


def test_what_is_no_pair_is_dropped_and_counted():
    samples = [Shapes(5)[i] for i in range(5)]
    answers = [["a", "b"], ["c", "d"], ["e", "e"], ["f", "g"], ["h", " "]]
    pairs, counts = example("dpo_trl").prefer(samples, answers, [[40, 0], [0, 90], [5, 5], [None, 7], [30, 0]])
    assert [(pair["chosen"][0]["content"][0]["text"], pair["rejected_hallucination"]) for pair in pairs] == [
        ("b", 40),
        ("c", 90),
    ]
    assert counts == {"pairs": 2, "ties": 1, "unscored": 1, "empty": 1}
    assert pairs[0]["id"] == samples[0].id and pairs[0]["prompt"] == samples[0].prompt
