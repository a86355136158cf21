"""transformers' Trainer, lean: labels only where they count, frozen parts left alone, small atomic checkpoints."""

import contextlib
import copy
import functools
import math
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import DistributedType
from accelerate.data_loader import SeedableRandomSampler
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import rotate_checkpoints, seed_worker
from transformers.utils import logging

from granulon_hf.data.packing import Packs, StepSampler
from granulon_hf.errors import GranulonError
from granulon_hf.modeling.attention_granulon import find_packed_attention
from granulon_hf.modeling.modeling_granulon import count_samples, number_samples
from granulon_hf.training.checkpoints import ADAPTER, UNFINISHED, remove_unfinished
from granulon_hf.training.compiling import compile_regions
from granulon_hf.training.float8 import use_float8
from granulon_hf.training.left_out import Reporting
from granulon_hf.training.stages import (
    adapter_state,
    frozen_modules,
    keep_frozen_parts_in_eval,
    load_adapter_state,
    low_rank_modules,
    merged_state,
    save_adapter,
    trainable,
)

logger = logging.get_logger(__name__)

# bf16 matrix multiplications a second, dense, as the makers state them; other devices have no MFU.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}
WORKERS = 4
REMEDY = "Start again in a new --output_dir with a smaller --learning_rate or --max_grad_norm, or in float32."


class TrainingFailed(GranulonError):
    """The run cannot go on; the message says why and what to do."""


class TrainingStopped(TrainingFailed):
    """The run was asked to stop, and wrote a checkpoint."""


class GranulonTrainer(Trainer):
    """Trains what [`~granulon_hf.training.set_stage`] has left trainable.

    - Logits and loss are computed at labelled positions only: the same loss, without the vocabulary-sized rest.
    - Frozen modules stay in eval mode.
    - A checkpoint holds the trained weights (`adapter.safetensors`), optimizer, schedule and random states; with `save_full`
      all weights too. It appears under its name when it is complete.
    - `save_model` also writes all weights where the config names no backbones to read the others from.
    - `use_liger_kernel` puts liger's kernels into the language model.
    - `frozen_dtype="fp8"` computes the products of the frozen language model in float8.
    - `compile="regional"` compiles decoder layers, tower layers and AdaTA, each once for batches of any make-up.
    - `budgets` says how many visual tokens a step trains; what it draws, seed and step alone decide.
    - On SIGTERM a checkpoint is written at the end of the step, on all processes, and training stops.
    - `left_out` lists the samples that its batches had to leave out, whichever worker made them; the first is logged.
    - Logs also say tokens per second, the share of padding, the chosen levels and, for known devices, MFU.

    Args:
        lengths (`list[int]`, *optional*): tokens of each training sample; batches are then grouped by length.
        max_tokens_per_batch (`int`, *optional*): tokens of a packed batch. Every step then has the samples of padded batches in
            random order, in as few packs as keep within it, of the same number in every process. `data_collator` packs.
        The others are those of `Trainer`; `args` is [`~granulon_hf.training.arguments.RecipeArguments`].
    """

    model: Any  # a GranulonForConditionalGeneration
    args: Any  # RecipeArguments
    data_collator: Any

    def __init__(self, *args, lengths: list[int] | None = None, max_tokens_per_batch: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.dataloader_num_workers < 0:
            self.args.dataloader_num_workers = choose_workers(self.args, self.data_collator)
        self.data_collator = Reporting(self.data_collator, self.train_dataset)
        self.left_out: dict[str, None] = {}
        self.max_tokens_per_batch = max_tokens_per_batch
        if max_tokens_per_batch is not None:
            # A step's batches are folded into packs, whose number is their own.
            self.accumulated = self.args.gradient_accumulation_steps
            self.args = copy.copy(self.args)
            self.args.gradient_accumulation_steps = 1
            self._train_batch_size = self.args.per_device_train_batch_size * self.accumulated
            decoder = self.model.model.language_model.config
            found = find_packed_attention(decoder, self.args.device, compute_dtype(self.args, self.model))
            self.model.set_attn_implementation({"text_config": found})
        if self.args.use_liger_kernel:
            # Trainer would ask for the kernels of "granulon", which liger does not know. The loss stays ours: it is computed at
            # labelled positions only, and a decoder without a head has none.
            decoder = self.model.model.language_model
            options = {**(self.args.liger_kernel_config or {}), "cross_entropy": False, "fused_linear_cross_entropy": False}
            find_liger(decoder.config.model_type)(model=decoder, **options)
        if self.args.frozen_dtype == "fp8":
            # DeepSpeed would move it later only.
            use_float8(self.model.to(self.args.device).model.language_model)
        if self.args.compile == "regional":
            compile_regions(self.model)
        self.lengths, self.staging, self.frozen = lengths, False, frozen_modules(self.model)
        self.budgets = read_budgets(self.args.budgets, self.model.config)
        self.drawn = (-1, 0)  # the step, and how many of its batches have had levels drawn
        self.whole = False
        self.seen: Counter[Any] = Counter()
        self.since: float | None = None
        self.stop_on_signal = StopOnSignal(self.accelerator)
        self.add_callback(self.stop_on_signal)
        # DeepSpeed loads strictly, and frozen weights are not in its checkpoints.
        self.model.register_load_state_dict_pre_hook(fill_missing)

    # --- batches and the step ----------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset=None):
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return GroupedSampler(size, self.lengths, self.args.data_seed if self.args.data_seed is not None else self.args.seed)

    def get_train_dataloader(self):
        if self.max_tokens_per_batch is None:
            return super().get_train_dataloader()
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        sampler = StepSampler(
            # As accelerate has it for padded batches.
            SeedableRandomSampler(self.train_dataset, data_seed=seed),
            self.lengths,
            self.max_tokens_per_batch,
            batch_size=self.args.per_device_train_batch_size,
            accumulation=self.accumulated,
            processes=self.args.world_size,
            drop_last=self.args.dataloader_drop_last,
        )
        packs = Packs(self.train_dataset, self.data_collator)
        loader = DataLoader(
            packs,
            batch_sampler=sampler,
            collate_fn=packs.collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=functools.partial(
                seed_worker, num_workers=self.args.dataloader_num_workers, rank=self.args.process_index
            ),
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for problem in [one for batch in batches for pack in packs_of(batch) for one in pack.pop("problems", ())]:
            if not self.left_out:
                logger.warning(f"A sample cannot be used and is left out, {problem}. Others will be listed at the end only.")
            self.left_out[problem] = None
        return batches, count

    def _get_num_items_in_batch(self, batch_samples, device):
        return super()._get_num_items_in_batch([pack for batch in batch_samples for pack in packs_of(batch)], device)

    def floating_point_ops(self, inputs):
        return sum(super(GranulonTrainer, self).floating_point_ops(pack) for pack in packs_of(inputs))

    def training_step(self, model, inputs, num_items_in_batch=None):
        if "packs" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        losses, accelerator = [], self.accelerator
        for left, pack in reversed([*enumerate(reversed(inputs["packs"]))]):
            # Gradients are exchanged once, with the last pack.
            accelerator.gradient_state._set_sync_gradients(not left)
            apart = left and accelerator.distributed_type != DistributedType.DEEPSPEED
            with accelerator.no_sync(model) if apart else contextlib.nullcontext():
                losses.append(super().training_step(model, pack, num_items_in_batch))
        return sum(losses)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        keep_frozen_parts_in_eval(self.model, self.frozen)  # training_step has just called model.train()
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.clamp(min=1)  # all samples of a step may have been unusable
        options = {"skip_logits": True, "num_items_in_batch": num_items_in_batch}
        every = self.budgets == "all" and model.training and "pixel_values" in inputs
        if every:
            inputs = {**inputs, "pixel_values": self.reusable(inputs["pixel_values"])}
        losses = []
        for choice in range(len(self.model.config.granularity_levels)) if every else [None]:
            chosen = {"granularity": choice} if every else self.choose(inputs, model.training)
            outputs = model(**inputs, **chosen, **options)
            losses.append(outputs["loss"])
            self.count(inputs, outputs)
        loss = sum(losses) / len(losses)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # As Trainer has it, but not in place, which the output of a compiled model does not allow.
            loss = loss * (self.accelerator.num_processes if self.args.n_gpu <= 1 else self.args.n_gpu)
        if "pixel_values" not in inputs:  # the projector is not reached: there must be something to differentiate all the same
            loss = loss + 0.0 * sum(parameter.sum() for _, parameter in trainable(self.model))
        return (loss, outputs) if return_outputs else loss

    def choose(self, inputs, training: bool) -> dict[str, Any]:
        """Return what a step says to the model of the visual tokens of its samples."""
        if isinstance(self.budgets, int):
            return {"visual_tokens": self.budgets}
        if self.budgets != "random" or not training:
            return {}
        step, batch = self.drawn
        batch = batch + 1 if step == self.state.global_step else 0
        self.drawn = self.state.global_step, batch
        seq_idx = inputs.get("seq_idx")
        count = count_samples(inputs["input_ids"], None if seq_idx is None else number_samples(seq_idx))
        random = np.random.default_rng((self.args.seed, self.state.global_step, batch, self.args.process_index))
        drawn = random.integers(len(self.model.config.granularity_levels), size=count)
        return {"granularity": torch.from_numpy(drawn).to(inputs["input_ids"].device)}

    def reusable(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run a frozen tower once for all levels; one that is sharded runs within the model's own forward pass alone."""
        parts = self.model.model
        if self.is_fsdp_enabled or any(parameter.requires_grad for parameter in parts.vision_tower.parameters()):
            return pixel_values
        with torch.no_grad(), self.accelerator.autocast():
            features = parts.reusable_features(pixel_values)
        self.seen["encoded"] += len(features) if features.ndim < pixel_values.ndim else 0
        return features

    def count(self, inputs, outputs) -> None:
        """Add to what the next log says; sums stay on the device until then."""
        mask = inputs.get("attention_mask")
        cells = inputs["input_ids"].numel()
        tokens = cells if mask is None else mask.sum()
        images = inputs.get("pixel_values", ())
        seen = outputs.get("attention_mask")
        self.seen.update(
            cells=cells,
            tokens=tokens,
            # Empty slots cost the decoder nothing where they are packed away.
            visible=tokens if seen is None else seen.sum(),
            images=len(images),
            # Features take the place of images that the tower has seen before.
            encoded=len(images) if getattr(images, "ndim", 0) == 4 else 0,
        )
        if (level := outputs.get("granularity")) is not None:
            for index, name in enumerate(self.model.config.level_names):
                self.seen[f"level_{name}"] += (level == index).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        now = time.monotonic()
        if "loss" in logs and self.seen:
            seen = {name: float(value) for name, value in self.seen.items()}
            if self.since is not None:
                logs["tokens_per_second"] = round(seen["tokens"] * self.args.world_size / max(now - self.since, 1e-6), 1)
                if (peak := peak_flops()) is not None:
                    logs["mfu"] = round(self.step_flops(seen) / max(now - self.since, 1e-6) / peak, 4)
            logs["padding"] = round(1 - seen["tokens"] / seen["cells"], 4)
            levels = {name: value for name, value in seen.items() if name.startswith("level_")}
            if total := sum(levels.values()):  # a fixed number of tokens is no level
                logs |= {name: round(value / total, 3) for name, value in levels.items()}
            self.seen, self.since = Counter(), now
        super().log(logs, start_time)
        if not math.isfinite(loss := logs.get("loss", 0.0)):
            raise TrainingFailed(f"The loss became {loss} by step {self.state.global_step}. {REMEDY}")

    def step_flops(self, seen: dict[str, float]) -> float:
        """Estimate the FLOPs of the matrix products of what was seen, without attention, as is usual.

        A weight and token take 2 forward, 2 for gradients of activations, 2 more for those of trained weights; the tower runs
        forward only.
        """
        parts, config = self.model.model, self.model.config

        def weights(module):
            return sum(p.numel() for name, p in module.named_parameters() if "embed_tokens" not in name)

        of_token = (6 if any(p.requires_grad for p in parts.language_model.parameters()) else 4) * weights(parts.language_model)
        slots = config.num_semantic_slots + (0 if config.compact else config.image_seq_length)
        of_image = 6 * weights(parts.multi_modal_projector) * slots
        of_tower = 2 * weights(parts.vision_tower) * config.image_seq_length
        return of_token * seen["visible"] + of_image * seen["images"] + of_tower * seen["encoded"]

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial=None):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self.staging else folder

    def _save_checkpoint(self, model, trial=None):
        folder = Path(self._get_output_dir(trial))
        if broken := [name for name, parameter in trainable(self.model) if not torch.isfinite(parameter).all()]:
            raise TrainingFailed(
                f"{broken[0]} is no number any more after step {self.state.global_step}; earlier checkpoints are kept. {REMEDY}"
            )
        if self.args.should_save:
            remove_unfinished(folder)
        self.accelerator.wait_for_everyone()
        self.staging = True
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(folder).free
            full = getattr(error, "errno", None) == 28 or "No space left" in str(error) or free < 2**20
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            if full:
                raise TrainingFailed(
                    f"The disk of {str(folder)!r} is full ({free / 2**20:.0f} MiB free). Make room, then go on with "
                    "--resume_from_checkpoint last: earlier checkpoints are whole."
                ) from error
            raise
        finally:
            self.staging = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            shutil.rmtree(folder / name, ignore_errors=True)
            sync(folder / UNFINISHED / name)
            os.replace(folder / UNFINISHED / name, folder / name)
            (folder / UNFINISHED).rmdir()
            rotate_checkpoints(output_dir=str(folder), save_total_limit=self.args.save_total_limit, use_mtime=False)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir=None, _internal_call=False):
        # What a run leaves must be readable on its own; a checkpoint only has to go on.
        self.whole = self.args.save_full or (not _internal_call and self.model.config.backbones is None)
        if self.whole or self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self._save(output_dir)

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        state = adapter_state(model)
        if state_dict is not None:  # gathered from shards
            state = {name: state_dict.get(f"model.{name}", state_dict.get(name)) for name in state}
        save_adapter(folder, model, state)
        if self.whole:
            named = model.config.backbones
            if low_rank_modules(model):  # merged into a backbone, which is then not the one that is named
                model.config.backbones = None
            model.save_pretrained(folder, state_dict=merged_state(model, state_dict))
            model.config.backbones = named
            for path in folder.glob("model*.safetensors"):
                path.chmod(0o644)  # as save_adapter has it
        else:  # all weights of an earlier end of this run would be read in place of these
            for path in folder.glob("model*.safetensors*"):
                path.unlink()
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.is_deepspeed_enabled and not self.args.save_full:
            engine = self.model_wrapped
            engine.save_checkpoint = functools.partial(type(engine).save_checkpoint, engine, exclude_frozen_parameters=True)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        file = Path(resume_from_checkpoint) / ADAPTER
        if file.exists():
            load_adapter_state(self.accelerator.unwrap_model(model or self.model), load_file(file))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def compute_dtype(args: Any, model: Any) -> torch.dtype:
    """Return the type that a run computes in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype


def choose_workers(args: Any, collator: Any) -> int:
    """Return how many workers read samples where nobody says it: few, beside a GPU that must not wait for pictures.

    One worker reads about 200 photographs of 640 x 480 a second, and an H200 took fewer than 100 (examples/benchmarks). Cached
    features need no worker; a CPU has nobody to spare.
    """
    least = int(args.dataloader_persistent_workers or args.dataloader_prefetch_factor is not None)
    if args.device.type in ("cpu", "mps") or getattr(collator, "image_features", None) is not None:
        return least
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(least, min(WORKERS, len(psutil.Process().cpu_affinity()) // processes - 1))


def packs_of(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the batches that a step passes through the model for one of its loader."""
    return batch.get("packs", [batch])


class GroupedSampler(Sampler[int]):
    """transformers' `LengthGroupedSampler`, in an order that seed and epoch alone decide: a resumed run goes on in it."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        self.batch_size, self.lengths, self.seed, self.epoch = batch_size, lengths, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(LengthGroupedSampler(self.batch_size, lengths=self.lengths, generator=random))


def read_budgets(budgets: str | int, config: Any) -> str | int:
    """Return what `--budgets` says, a number as an integer; raise GranulonError for what a model of this config cannot do."""
    text, slots = str(budgets), config.num_semantic_slots
    if text == "controller":
        return text
    if text not in ("random", "all") and not text.isdecimal():
        raise GranulonError(f"--budgets must be controller, random, all or a number of visual tokens; got {text!r}.")
    if not slots:
        raise GranulonError(
            f"--budgets {text} needs levels, and this model has none: add --visual_tokens semantic, or --levels."
        )
    if text.isdecimal() and not 1 <= int(text) <= slots:
        raise GranulonError(f"--budgets must lie between 1 and {slots}, the slots that this model has for tokens; got {text}.")
    return int(text) if text.isdecimal() else text


def sync(folder: Path) -> None:
    """Have the system write a folder's files before it is renamed: a name must not appear before its content."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def fill_missing(module, state_dict, prefix, *args) -> None:
    """Weights that a checkpoint does not hold stay as they are."""
    trained = {name for name, _ in trainable(module)}
    for name, value in module.state_dict().items():
        if name not in trained:
            state_dict.setdefault(prefix + name, value)


def find_liger(model_type: str) -> Any:
    """Return liger's function for the instances of a decoder; GranulonError if liger does not know it."""
    from liger_kernel.transformers import monkey_patch

    if model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:  # liger itself would do nothing, and not say so
        raise GranulonError(f"--use_liger_kernel does nothing for a language model of the kind {model_type}; leave it out.")
    return monkey_patch._apply_liger_kernel_to_instance


def peak_flops() -> float | None:
    """Return this GPU's dense bf16 FLOPs a second, or None if it is unknown."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


class StopOnSignal(TrainerCallback):
    """On SIGTERM: one checkpoint at the end of the step, then stop, on all processes together."""

    def __init__(self, accelerator):
        self.accelerator, self.asked, self.before, self.stopped = accelerator, False, None, ""

    def on_train_begin(self, args, state, control, **kwargs):
        with contextlib.suppress(ValueError):  # not the main thread
            self.before = signal.signal(signal.SIGTERM, self.ask)

    def ask(self, signum, frame):
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            self.accelerator.set_trigger()
        if self.accelerator.check_trigger():
            self.stopped = f"Stopped by SIGTERM after step {state.global_step}; --resume_from_checkpoint last goes on."
            logger.warning(self.stopped)
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
