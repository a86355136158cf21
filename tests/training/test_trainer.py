"""The lean step against the plain one, frozen weights, batches, checkpoints, logs."""

import copy
import json
import logging
import math
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoProcessor

from granulon_hf.data.collator import GranulonCollator
from granulon_hf.data.datasets.shapes import Shapes
from granulon_hf.errors import GranulonError
from granulon_hf.modeling import modeling_granulon
from granulon_hf.training import GranulonTrainer, RecipeArguments, TrainingFailed, set_stage
from granulon_hf.training.checkpoints import ADAPTER, UNFINISHED, last_checkpoint
from granulon_hf.training.stages import trainable

SAMPLES = Shapes(48)


@pytest.fixture
def make(build, tmp_path):
    """A trainer on drawn samples."""

    def make(name="run", stage="projector", *, packing=False, grouped=True, model=None, side="right", **kwargs):
        torch.manual_seed(0)
        built, processor = build(kwargs.pop("variant", "granulon-qwen2.5"))
        model = model or built
        set_stage(model, stage)
        collator = GranulonCollator(processor, packing=packing, padding_side=side)
        options = {
            **{"max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-2},
            **{"save_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True, **kwargs},
        }
        budget = options.pop("max_tokens_per_batch", None)
        args = RecipeArguments(output_dir=str(tmp_path / name), **options)
        lengths = collator.lengths(SAMPLES) if grouped or budget else None
        return GranulonTrainer(
            model,
            args,
            data_collator=collator,
            train_dataset=SAMPLES,
            lengths=lengths,
            max_tokens_per_batch=budget,
            processing_class=processor,
        )

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def plain_loss(model, batch):
    """Next-token cross-entropy over the full logits, as the textbook has it."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("packing", [False, True])
def test_the_lean_step_is_the_plain_one(make, packing):
    trainer = make(packing=packing)
    model, rows = trainer.model, [SAMPLES[i] for i in range(6)]
    padded = GranulonCollator(trainer.processing_class)(rows)
    model.eval()
    expected = plain_loss(model, padded)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = trainer.compute_loss(model.train(), trainer.data_collator(rows))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=1e-4)


def test_no_vocabulary_sized_tensor_for_positions_without_label(make):
    trainer = make()
    rows = []
    trainer.model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    batch = trainer.data_collator([SAMPLES[i] for i in range(4)])
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs.logits is None and math.isfinite(loss)
    assert rows == [(batch["labels"][:, 1:] != -100).sum()]


def test_many_labels_are_taken_in_chunks_with_the_same_loss_and_gradients(make, monkeypatch):
    trainer = make()
    model, rows = trainer.model.eval(), []
    batch = trainer.data_collator([SAMPLES[i] for i in range(4)])

    def step():
        model.zero_grad()
        loss = model(**batch, skip_logits=True).loss
        loss.backward()
        return loss, [parameter.grad.clone() for _, parameter in trainable(model)]

    expected = step()
    monkeypatch.setattr(modeling_granulon, "LOSS_CHUNK", 3)
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    torch.testing.assert_close(step(), expected)
    labels = int((batch["labels"][:, 1:] != -100).sum())
    assert sum(rows) == 2 * labels and max(rows) == 3  # once forward, once again backward


def test_dual_stream_losses_are_kept_by_the_lean_step(make):
    trainer = make()
    trainer.model.config.pixel_loss_weight, trainer.model.config.semantic_loss_weight = 0.5, 0.25
    batch = trainer.data_collator([SAMPLES[i] for i in range(4)])
    trainer.model.eval()
    plain = trainer.model(**batch).loss
    lean = trainer.model(**batch, skip_logits=True).loss
    trainer.model.config.pixel_loss_weight = trainer.model.config.semantic_loss_weight = 0.0
    alone = trainer.model(**batch).loss
    assert lean.item() == pytest.approx(plain.item(), abs=1e-5)
    assert lean.item() > 1.5 * alone.item()


@pytest.mark.parametrize("stage", ["projector", "projector+lora"])
def test_nothing_frozen_moves_and_what_is_trained_does(make, stage):
    trainer = make(stage=stage, save_strategy="no")
    before = copy.deepcopy(trainer.model.state_dict())
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and moved <= trained
    assert {name for name in trained if "multi_modal_projector" in name} <= moved


def test_steps_without_an_image_or_a_label(make):
    """Text-only batches reach no projector; in DDP and in `backward` there must be something to differentiate."""
    trainer = make(save_strategy="no", max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=1, grouped=False)
    text = SAMPLES[0]
    text.images, text.messages[0]["content"] = [], [{"type": "text", "text": "What is red?"}]
    silent = SAMPLES[1]
    silent.messages = silent.messages[:1]
    trainer.train_dataset = [silent, text, silent]
    before = [p.clone() for _, p in trainable(trainer.model)]
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, trainable(trainer.model), strict=True))


def test_the_loss_goes_down(make):
    trainer = make(stage="full", max_steps=30, save_strategy="no", gradient_accumulation_steps=1)
    trainer.train()
    found = losses(trainer)
    assert sum(found[-5:]) < 0.9 * sum(found[:5])


def test_batches_do_not_change_what_is_learned(make):
    """Padded left, padded right and packed: the same losses, step by step."""
    runs = [make("a"), make("b", side="left"), make("c", packing=True)]
    for trainer in runs:
        trainer.train()
    for other in runs[1:]:
        assert losses(other) == pytest.approx(losses(runs[0]), abs=2e-4)


def test_gradient_accumulation_is_one_big_batch(make):
    small, big = make("small", grouped=False), make("big", grouped=False)
    small.args.max_steps = big.args.max_steps = 3
    big.args.per_device_train_batch_size, big.args.gradient_accumulation_steps = 8, 1
    big._train_batch_size = 8
    big.accelerator.gradient_accumulation_steps = 1
    big.accelerator.gradient_state.plugin_kwargs["num_steps"] = 1
    small.train(), big.train()
    assert losses(small) == pytest.approx(losses(big), abs=1e-4)


def assert_same_weights(one, other):
    for (name, a), b in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("variant", "stage"), [("granulon-qwen2.5", "projector+lora"), ("granulon-compact-qwen2.5", "projector")]
)
def test_packs_of_any_budget_train_the_weights_of_padded_batches(make, variant, stage):
    """Ten steps, the seventh of which begins the second epoch."""
    options = {"variant": variant, "stage": stage, "save_strategy": "no", "max_steps": 10, "learning_rate": 1e-3}
    padded = make("padded", grouped=False, **options)
    padded.train()
    for budget, least, most in ((1, 80, 80), (250, 11, 79), (10**6, 10, 10)):
        packed = make(f"packed {budget}", packing=True, max_tokens_per_batch=budget, **options)
        passes = []
        packed.model.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        packed.train()
        assert losses(packed) == pytest.approx(losses(padded), abs=1e-5), budget
        assert_same_weights(packed, padded)
        assert least <= len(passes) <= most, budget
        assert packed.state.epoch == padded.state.epoch and packed.state.total_flos > 0


@pytest.mark.parametrize("budgets", ["controller", "random"])
def test_a_packed_run_resumes_in_the_second_epoch_to_the_same_losses(make, tmp_path, budgets):
    options = {"packing": True, "max_tokens_per_batch": 250, "max_steps": 11, "save_steps": 8, "budgets": budgets}
    whole = make("whole", **options)
    whole.train()
    resumed = make("resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    assert_same_weights(whole, resumed)


def test_grouped_batches_have_little_padding(make):
    grouped, random = make("g", per_device_train_batch_size=4), make("r", grouped=False)
    shares = []
    for trainer in (grouped, random):
        batches = list(trainer.get_train_dataloader())
        shares.append(1 - sum(b["attention_mask"].sum() for b in batches) / sum(b["input_ids"].numel() for b in batches))
    assert shares[0] < shares[1]


def test_checkpoints_are_small_and_resume_to_the_same_losses(make, tmp_path):
    whole = make("whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert not checkpoint.exists()  # save_total_limit is 2
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert (checkpoint / ADAPTER).stat().st_size < 400_000 and not list(checkpoint.glob("model*.safetensors"))
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_resume_in_the_second_epoch_goes_on_in_its_order(make, tmp_path):
    """48 samples make 6 steps an epoch: a checkpoint at 8 lies in the second."""
    whole = make("whole", max_steps=11, save_steps=8)
    whole.train()
    resumed = make("resumed", max_steps=11, save_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)


def test_half_written_checkpoints_are_skipped_with_a_warning(make, tmp_path, caplog):
    trainer = make()
    trainer.train()
    folder = tmp_path / "run"
    newest = folder / "checkpoint-6"
    (newest / ADAPTER).write_bytes((newest / ADAPTER).read_bytes()[:1000])
    logging.getLogger("transformers").propagate = True
    logger = logging.getLogger("granulon_hf.training.checkpoints")
    logger.addHandler(caplog.handler)
    try:
        assert last_checkpoint(folder) == folder / "checkpoint-4"
    finally:
        logger.removeHandler(caplog.handler)
    assert "checkpoint-6 is incomplete or damaged and is skipped" in caplog.text


def test_a_checkpoint_that_fails_leaves_nothing_half_written(make, tmp_path, monkeypatch):
    trainer = make()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "_save_rng_state", full)
    with pytest.raises(TrainingFailed, match="--resume_from_checkpoint last"):
        trainer.train()
    assert not (tmp_path / "run" / UNFINISHED).exists() and last_checkpoint(tmp_path / "run") is None


def test_a_loss_that_is_no_number_stops_the_run(make):
    trainer = make()
    with torch.no_grad():
        trainer.model.model.multi_modal_projector.linear_2.bias.fill_(float("nan"))
    with pytest.raises(TrainingFailed, match="nan"):
        trainer.train()


def test_a_checkpoint_never_holds_what_is_no_number(make, tmp_path):
    trainer = make(logging_steps=100, logging_first_step=False)
    train_step = trainer.training_step

    def poison(*args, **kwargs):
        if trainer.state.global_step == 3:
            with torch.no_grad():
                trainer.model.model.multi_modal_projector.linear_2.bias.fill_(float("inf"))
        return train_step(*args, **kwargs)

    trainer.training_step = poison
    with pytest.raises(TrainingFailed, match="step 4"):
        trainer.train()
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-2"


def test_logs_say_speed_padding_and_levels(make):
    trainer = make()
    trainer.train()
    entry = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert entry["tokens_per_second"] > 0 and 0 <= entry["padding"] < 0.5
    assert sum(entry[f"level_{name}"] for name in trainer.model.config.level_names) == pytest.approx(1, abs=0.01)


STAGES_AND_BATCHES = [("projector", {}), ("projector+lora", {}), ("full", {}), ("projector+lora", {"save_full": True})]


@pytest.mark.parametrize(("stage", "options"), STAGES_AND_BATCHES)
def test_without_named_backbones_a_run_leaves_a_model_that_can_be_read(make, tmp_path, stage, options):
    trainer = make(stage=stage, max_steps=2, **options)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "run"
    loaded, info = type(trainer.model).from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any(".lora_" in name or "base_layer" in name for name in load_file(folder / "model.safetensors"))
    batch = trainer.data_collator([SAMPLES[0]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).loss, trainer.model.eval()(**batch).loss)
    assert AutoProcessor.from_pretrained(folder).image_token_id == loaded.config.image_token_id
    assert (folder / ADAPTER).exists()  # for --adapter
    assert (folder / "checkpoint-2" / "model.safetensors").exists() == bool(options)


def test_with_named_backbones_it_leaves_what_was_trained(make, tmp_path):
    trainer = make(max_steps=2)
    trainer.model.config.backbones = {"vision": {"name": "org/vision"}, "text": {"name": "org/text"}}
    folder = tmp_path / "run"
    (folder / "model.safetensors").touch()  # of an end with save_full
    trainer.train()
    trainer.save_model()
    assert (folder / ADAPTER).exists() and not (folder / "model.safetensors").exists()


@pytest.mark.parametrize("stage", ["projector", "projector+lora"])
@pytest.mark.parametrize("first", [False, True])
def test_save_full_may_change_where_a_run_goes_on(make, tmp_path, stage, first):
    whole = make("whole", stage, save_full=first)
    whole.train()
    resumed = make("resumed", stage, save_full=not first)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_liger_is_applied_to_the_language_model_or_refused(make, monkeypatch):
    applied = []
    liger = ModuleType("liger_kernel.transformers.monkey_patch")
    liger.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2": None}
    liger._apply_liger_kernel_to_instance = lambda model, **options: applied.append((model, options))
    package = ModuleType("liger_kernel.transformers")
    package.monkey_patch = liger
    for name, module in (("liger_kernel", ModuleType("liger_kernel")), (package.__name__, package), (liger.__name__, liger)):
        monkeypatch.setitem(sys.modules, name, module)
    trainer = make(use_liger_kernel=True, liger_kernel_config={"rope": False})
    (one,) = applied
    assert one[0] is trainer.model.model.language_model
    assert one[1] == {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    liger.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    with pytest.raises(GranulonError, match="qwen2"):
        make(use_liger_kernel=True)


def test_save_full_is_a_checkpoint_that_from_pretrained_loads(make, tmp_path):
    trainer = make(save_full=True, max_steps=2)
    trainer.train()
    trainer.save_model()
    loaded = type(trainer.model).from_pretrained(tmp_path / "run")
    batch = trainer.data_collator([SAMPLES[0]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).loss, trainer.model.eval()(**batch).loss)
    assert json.loads((tmp_path / "run" / "processor_config.json").read_text())


COMPACT = "granulon-compact-qwen2.5"


def chosen_levels(trainer):
    """What each pass of a run is told, in order."""
    told, forward = [], trainer.model.forward

    def watched(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        told.append(outputs["granularity"].tolist())
        return outputs

    trainer.model.forward = watched
    return told


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("variant", ["granulon-qwen2.5", COMPACT])
def test_all_budgets_are_the_mean_over_the_levels(make, variant, packing):
    trainer = make(variant=variant, budgets="all", packing=packing)
    rows = [SAMPLES[i] for i in range(4)]
    batch = trainer.data_collator(rows)
    model, runs = trainer.model, []
    losses = [model.eval()(**batch, granularity=level, skip_logits=True).loss.item() for level in range(3)]
    model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    loss = trainer.compute_loss(model.train(), batch)
    loss.backward()
    assert loss.item() == pytest.approx(sum(losses) / 3, abs=1e-5) and len(set(losses)) == 3
    assert len(runs) == 1
    assert all(parameter.grad is not None for _, parameter in trainable(model))
    assert trainer.seen["encoded"] == 4 and trainer.seen["images"] == 12
    assert [trainer.seen[f"level_{name}"] for name in model.config.level_names] == [4, 4, 4]


@pytest.mark.parametrize("packing", [False, True])
def test_random_budgets_are_uniform_and_of_each_sample(make, packing):
    trainer = make(variant=COMPACT, budgets="random", packing=packing, save_strategy="no", max_steps=24)
    told = chosen_levels(trainer)
    trainer.train()
    assert all(len(levels) == 4 for levels in told) and len(told) == 48
    assert any(len(set(levels)) > 1 for levels in told) and len({tuple(levels) for levels in told}) > 20
    counts = [sum(levels.count(level) for levels in told) for level in range(3)]
    assert min(counts) > 40  # of 192; 64 are expected of each
    (last, *_) = [entry for entry in reversed(trainer.state.log_history) if "loss" in entry]
    assert sum(last[f"level_{name}"] for name in trainer.model.config.level_names) == pytest.approx(1, abs=0.01)


def test_a_resumed_run_draws_the_same_levels(make, tmp_path):
    whole = make("whole", variant=COMPACT, budgets="random")
    told = chosen_levels(whole)
    whole.train()
    resumed = make("resumed", variant=COMPACT, budgets="random")
    again = chosen_levels(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert again == told[8:] and losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    other = make("other", variant=COMPACT, budgets="random", seed=7)
    different = chosen_levels(other)
    other.train()
    assert different != told


@pytest.mark.parametrize("variant", ["granulon-qwen2.5", COMPACT])
@pytest.mark.parametrize("packing", [False, True])
def test_a_number_of_tokens(make, variant, packing):
    trainer = make(variant=variant, budgets=5, packing=packing, save_strategy="no", max_steps=1)
    batch = trainer.data_collator([SAMPLES[i] for i in range(2)])
    expected = trainer.model.eval()(**batch, visual_tokens=5).loss
    assert trainer.compute_loss(trainer.model.train(), batch).item() == pytest.approx(expected.item(), abs=1e-5)
    trainer.train()
    (entry, *_) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert not [name for name in entry if name.startswith("level_")]


@pytest.mark.parametrize("budgets", ["some", "0", "21", "-1", "4.5", ""])
def test_budgets_that_cannot_be(make, budgets):
    with pytest.raises(GranulonError):
        make(budgets=budgets)


@pytest.mark.parametrize("budgets", ["random", "all", "5"])
def test_budgets_need_levels(make, budgets):
    with pytest.raises(GranulonError):
        make(variant="clip-qwen2.5", budgets=budgets)


def test_flops_count_the_tokens_that_are_there(make):
    """The compact form projects K slots of an image, and features that are kept cost no tower."""
    flops = {}
    for variant in ("granulon-qwen2.5", COMPACT):
        trainer = make(variant=variant)
        seen = {"visible": 0, "images": 2, "encoded": 0}
        parts = trainer.model.model
        slots = {"granulon-qwen2.5": trainer.model.config.image_seq_length + 20, COMPACT: 64}[variant]
        projector = sum(parameter.numel() for parameter in parts.multi_modal_projector.parameters())
        assert trainer.step_flops(seen) == 6 * projector * slots * 2
        flops[variant] = trainer.step_flops({**seen, "encoded": 2}) - trainer.step_flops(seen)
    assert len(set(flops.values())) == 1 and flops[COMPACT] > 0
