"""From arguments to a run: model, data, the checks before the first step, and what is left behind at the end."""

import copy
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import accelerate
import jinja2
import psutil
import torch
import transformers
from accelerate.utils import gather, gather_object
from huggingface_hub import ModelCard
from rich.console import Console
from transformers import set_seed
from transformers.utils import logging

import granulon_hf
from granulon_hf import variants
from granulon_hf.data import Sample, load
from granulon_hf.data.collator import GranulonCollator
from granulon_hf.data.datasets.llava import is_chat
from granulon_hf.data.datasets.shapes import Shapes
from granulon_hf.errors import GranulonError
from granulon_hf.io import existing
from granulon_hf.loading import read_config, read_model
from granulon_hf.modeling.attention_granulon import NAME as PACKED_ATTENTION
from granulon_hf.modeling.attention_granulon import find_packed_attention
from granulon_hf.overrides import reconfigure, replace_fields
from granulon_hf.training.arguments import DataArguments, ModelArguments, RecipeArguments
from granulon_hf.training.checkpoints import ADAPTER, RUN, check_settings, find_resume, settings_of
from granulon_hf.training.feature_cache import FeatureCache
from granulon_hf.training.memory import choose_token_budget, free_memory
from granulon_hf.training.stages import STAGES, load_adapter, parameter_table, set_stage, trainable
from granulon_hf.training.trainer import GranulonTrainer, TrainingStopped, compute_dtype, find_liger, read_budgets

logger = logging.get_logger(__name__)
PROBED = 64  # samples that are looked at before the first step


def build_model(args: ModelArguments, *, fresh: bool = False) -> tuple[Any, Any]:
    """Build the model of a run, frozen as its stage says, and its processor.

    Args:
        fresh (`bool`): of the variant "demo", leave out the trained controller too; its projector is always trained anew.

    Raises:
        GranulonError: an unknown variant or stage, a folder without a Granulon model, an adapter that does not fit.
    """
    stages = [stage for stage in STAGES if stage != "controller"]
    if args.stage not in stages:
        what = f"--stage must be one of {', '.join(stages)} (the controller has examples/train_controller.py)"
        raise GranulonError(f"{what}; got {args.stage!r}.")
    overrides = args.overrides()
    if args.variant == "demo":
        from granulon_hf.demo_model import SHIPPED, build_demo  # timm and what else only this model needs

        with in_one_sentence(args):
            model, processor = build_demo(None if fresh else SHIPPED, **overrides)
        for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            layer.reset_parameters()
    elif args.variant in variants.NAMES:
        check_reducer(args, variants.parse(args.variant)[0].config)
        try:
            with in_one_sentence(args):
                model, processor = variants.build(args.variant, tiny=args.tiny, open_weights=args.open_weights, **overrides)
        except OSError as error:
            raise GranulonError(
                f"The backbones of {args.variant} cannot be read ({' '.join(str(error).split())[:200]}); DINOv3 and Llama 3.2 "
                "need a Hub account that has accepted their licences (--open_weights reads DINOv3 without)."
            ) from error
    else:
        model, processor = read_changed(args, overrides)
    if args.attn_implementation:
        model.set_attn_implementation({"text_config": args.attn_implementation})
    model.config.pixel_loss_weight, model.config.semantic_loss_weight = args.pixel_loss_weight, args.semantic_loss_weight
    set_stage(model, args.stage, lora_rank=args.lora_rank, lora_alpha=args.lora_alpha)
    if args.adapter:
        file = Path(args.adapter) / ADAPTER if os.path.isdir(args.adapter) else Path(args.adapter)
        if not file.is_file():
            raise GranulonError(f"There is no adapter {str(file)!r}.")
        load_adapter(model, file)
    return model, processor


def read_changed(args: ModelArguments, overrides: dict[str, Any]) -> tuple[Any, Any]:
    """Read the model of a folder or Hub id, and put other fields into its config."""
    options = {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}
    try:
        config = read_config(args.variant)
    except GranulonError as error:
        raise GranulonError(f"--variant is neither demo nor one of {', '.join(variants.NAMES)}: {error}") from error
    check_reducer(args, config.to_dict())
    model, processor, _ = read_model(args.variant, **options)
    if not overrides:
        return model, processor
    with in_one_sentence(args):
        model, fresh = reconfigure(model, processor, overrides)
    if "reducer" in fresh and args.reducer is None:
        raise GranulonError(
            f"The weights of the reducer {config.reducer} in {args.variant!r} do not fit these levels; say --reducer "
            f"{config.reducer} to train it anew from random ones."
        )
    if "controller" in fresh:
        logger.warning(f"The controller of {args.variant} does not fit these levels: it is untrained, and takes the default.")
    return model, processor


def check_reducer(args: ModelArguments, fields: Mapping[str, Any]) -> None:
    """Refuse a reducer for a model that has no semantic tokens, given the fields of its config."""
    if args.reducer is not None and replace_fields(fields, args.overrides()).get("granularity_levels") == []:
        raise GranulonError(f"--reducer makes semantic tokens, and {args.variant} has none: add --visual_tokens semantic.")


@contextmanager
def in_one_sentence(args: ModelArguments) -> Iterator[None]:
    """Turn what a config or a vision tower refuses into a GranulonError that names the options."""
    try:
        yield
    except GranulonError:
        raise
    except ValueError as error:
        raise GranulonError(f"{args.variant} cannot be built like this: {' '.join(str(error).split())}") from error


def load_samples(args: DataArguments) -> Any:
    """Load the training samples, a sequence of [`Sample`]; GranulonError where they cannot be read or have no random access."""
    if args.data == "shapes":
        if given := [name for name in ("source", "split", "preset") if getattr(args, name) is not None]:
            raise GranulonError(f"The drawn shapes have no {given[0]}; leave out --{given[0]}, or name another --data.")
        return Shapes(args.limit or 2000, seed=args.subset_seed)
    name, source = ("llava", args.source or args.data) if is_chat(args.data) else (args.data, args.source)
    try:
        samples = load(name, args.split, source, args.limit, args.subset_seed, preset=args.preset, on_error=args.on_error)
    except (GranulonError, OSError) as error:
        raise GranulonError(f"--data {args.data!r} cannot be used: {' '.join(str(error).split())}") from error
    samples[0]  # a stream has no random access, which is said here
    return samples


def check_samples(collator: GranulonCollator, samples: Sequence[Sample], stage: str = "projector") -> None:
    """Refuse data whose first samples have no token with a label or, where the projector is trained, no image."""
    for i in range(min(PROBED, len(samples))):
        encoded = collator.encode(samples[i])
        if encoded is not None and (stage != "projector" or "pixel_values" in encoded):
            collator.problems.clear()
            collator.stand_in = encoded  # the same in every worker and process
            return
    what = "has an image: there is nothing to project"
    if collator.problems:
        what = "can be trained on; the last, {id}: {reason}".format_map(collator.problems[-1])
    raise GranulonError(f"None of the first {min(PROBED, len(samples))} samples {what}.")


def train(model_args: ModelArguments, data_args: DataArguments, args: RecipeArguments) -> tuple[Any, Any]:
    """Do a whole run, from checks to model card, as examples/train.py has it, and return the trained model and its processor.

    Raises:
        GranulonError: it cannot work; before the first step.
        TrainingFailed: it cannot go on.
    """
    asked = args.resume_from_checkpoint
    args.resume_from_checkpoint = find_resume(asked, args.output_dir or ".")
    if args.process_index == 0:
        say(f"Recipe: {args.recipe}")
        if asked and args.resume_from_checkpoint is None:
            say(f"Nothing to resume: {args.output_dir!r} holds no checkpoint. The run starts at step 0.", style="bold yellow")
    set_seed(args.seed)

    samples = load_samples(data_args)
    model, processor = build_model(model_args)
    budgets = read_budgets(args.budgets, model.config)
    check_device(args, model, model_args.stage)
    data_args = replace(data_args, batching=find_batching(data_args, args, model))
    packed, multiple = data_args.batching == "packed", data_args.pad_to_multiple_of
    # In the compact form a fixed number of tokens needs no empty slots.
    slots = copy.copy(processor)
    if isinstance(budgets, int) and model.config.compact:
        slots.num_semantic_tokens = budgets
    # The trainer warns, once for all workers.
    collator = GranulonCollator(slots, data_args.max_length, packing=packed, pad_to_multiple_of=multiple, warn=False)
    if data_args.feature_cache:
        cache = FeatureCache(data_args.feature_cache, model, processor, budget=budgets if isinstance(budgets, int) else None)
        cache.fill(image for i in range(len(samples)) for image in samples[i].images)
        collator.image_features = cache
        if clusters_pay(cache, args, budgets, len(samples)):
            cache.fill_clusters()
            collator.image_clusters = cache.clusters_of
    check_samples(collator, samples, model_args.stage)

    lengths = None if data_args.batching == "padded" else collator.lengths(samples)
    if packed:
        data_args = replace(data_args, max_tokens_per_batch=find_token_budget(data_args, args, model, lengths or []))
    trainer = GranulonTrainer(
        model,
        args,
        data_collator=collator,
        train_dataset=samples,
        lengths=lengths,
        max_tokens_per_batch=data_args.max_tokens_per_batch,
        processing_class=processor,
    )
    if (problems := getattr(samples, "problems", [])) and trainer.is_world_process_zero():
        say(
            f"{len(problems)} rows cannot be used, the first: {problems[0]}. Another sample stands in for each; all are listed "
            "in left_out.jsonl at the end.",
            style="yellow",
        )
    described: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        workers = trainer.args.dataloader_num_workers
        say(f"Workers that read samples for each process: {workers} (--dataloader_num_workers).")
        described = start(model_args, data_args, args, samples)
        console = Console()
        console.print(f"Stage {model_args.stage}: {STAGES[model_args.stage]}", style="bold")
        console.print(parameter_table(model))
        if model.config.backbones is None and not args.save_full:
            print(
                f"The config names no place to read the backbones from: {args.output_dir} will hold all weights "
                f"({all_weights(model) / 2**20:,.0f} MiB), so that it can be read on its own."
            )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.stop_on_signal.stopped:
        raise TrainingStopped(trainer.stop_on_signal.stopped)
    trainer.save_model()
    trainer.save_state()
    left_out = gather_object([*trainer.data_collator.told, *trainer.left_out])
    if trainer.is_world_process_zero():
        finish(trainer, described, [*dict.fromkeys(left_out)])
    return model, processor


def clusters_pay(cache: FeatureCache, args: RecipeArguments, budgets: str | int, samples: int) -> bool:
    """Say whether AdaTA's clusters are kept: on a CPU only where the steps need more of them than there are to find."""
    choices = len(cache.choices)
    seen = args.num_train_epochs * samples
    if args.max_steps > 0:
        seen = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    missing = choices * (len(cache.rows) - cache.count_clusters())
    # A GPU spends most of AdaTA's time on starting its kernels, once for a large batch.
    return choices > 0 and (args.device.type != "cpu" or seen * (choices if budgets == "all" else 1) > missing)


def continued(args: RecipeArguments) -> dict[str, Any]:
    """Return the settings of the run that goes on, if one does."""
    path = Path(args.resume_from_checkpoint or "").parent / RUN
    return json.loads(path.read_text())["settings"] if args.resume_from_checkpoint and path.exists() else {}


def find_batching(data_args: DataArguments, args: RecipeArguments, model: Any) -> str:
    """Return how batches are made: as asked for, or by the run that goes on, or packed where no pair of tokens is wasted."""
    if batching := data_args.batching or continued(args).get("batching"):
        return batching
    if data_args.max_tokens_per_batch is not None:
        return "packed"
    attention = find_packed_attention(model.config.text_config, args.device, compute_dtype(args, model))
    # Torch's attention of variable length was faster on a CPU, and is not measured on a GPU.
    faster = attention == "flash_attention_2" or (attention == PACKED_ATTENTION and args.device.type == "cpu")
    return "packed" if faster and not data_args.pad_to_multiple_of else "grouped"


def find_token_budget(data_args: DataArguments, args: RecipeArguments, model: Any, lengths: Sequence[int]) -> int:
    """Return the tokens of a packed batch, and print them: those asked for, or of the run that goes on, or those that fit."""
    budget = data_args.max_tokens_per_batch or continued(args).get("max_tokens_per_batch")
    if budget is None:
        weights = 0 if next(model.parameters()).device.type == "cuda" else all_weights(model)
        free = free_memory(args.device)
        found = choose_token_budget(
            model.config.text_config,
            lengths,
            args.per_device_train_batch_size,
            None if free is None else free - weights,
            checkpointing=bool(args.gradient_checkpointing),
            size=compute_dtype(args, model).itemsize,
        )
        # The least of all processes, whose packs are planned together.
        budget = int(gather(torch.tensor([found], device=args.device)).min())
    if args.process_index == 0:
        say(f"Packed batches hold up to {budget:,} tokens (--max_tokens_per_batch).")
    return budget


def say(text: str, style: str | None = None) -> None:
    """Print a line of text on stderr as it is."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(text, style=style, markup=False)


def check_device(args: RecipeArguments, model: Any, stage: str) -> None:
    """Refuse what the launcher or the device cannot do."""
    if args.gradient_checkpointing and stage == "projector" and not args.use_cpu:
        say("Gradient checkpointing costs about a third more time; the recipe does not need it.", style="yellow")
    if args.use_liger_kernel:
        find_liger(model.model.language_model.config.model_type)
    free = shutil.disk_usage(existing(Path(args.output_dir or "."))).free
    count = 0 if args.save_strategy == "no" else (args.save_total_limit or 1) + 1
    kept = sum(p.numel() for _, p in trainable(model)) * 4 * 4 * count
    kept += all_weights(model) * ((count if args.save_full else 0) + (args.save_full or model.config.backbones is None))
    if free < kept:
        raise GranulonError(
            f"--output_dir has {free / 2**30:.1f} GiB free, and weights and {count} checkpoints may take "
            f"{kept / 2**30:.1f} GiB; make room, or lower --save_total_limit."
        )


def all_weights(model: Any) -> int:
    """Return the bytes of a model's weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def start(model_args: ModelArguments, data_args: DataArguments, args: RecipeArguments, samples: Any) -> dict[str, Any]:
    """Check that a run that goes on is the same run, and write down what it is in `run.json`, which is returned.

    Called by the main process. GranulonError where the settings changed.
    """
    settings = settings_of(model_args, data_args, args, world_size=args.world_size, samples=len(samples))
    path = Path(args.output_dir or ".") / RUN
    data = getattr(samples, "manifest", {"data": data_args.data, "samples": len(samples), "seed": data_args.subset_seed})
    if args.resume_from_checkpoint:
        check_settings(Path(args.resume_from_checkpoint).parent / RUN, settings, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {
        "settings": settings,
        "recipe": args.recipe,
        "command": command_line(),
        "versions": versions(),
        "model": asdict(model_args),
        "data": data,
    }
    path.write_text(json.dumps(described, indent=1, default=str) + "\n")
    return described


def command_line() -> str:
    """Return what was typed: the launcher's own line where there is one."""
    for process in psutil.Process().parents():
        line = process.cmdline()
        at = next((i for i, part in enumerate(line) if Path(part).name in ("accelerate", "accelerate.commands.launch")), None)
        if at is not None:
            rest = line[at + 1 :]
            return shlex.join(["accelerate", "launch", *(rest[1:] if rest[:1] == ["launch"] else rest)])
    program = ["granulon"] if Path(sys.argv[0]).name in ("granulon", "__main__.py") else ["python", sys.argv[0]]
    return shlex.join([*program, *sys.argv[1:]])


def versions() -> dict[str, str]:
    found = {module.__name__: module.__version__ for module in (torch, transformers, accelerate, granulon_hf)}
    return {"python": sys.version.split()[0], **found}


def finish(trainer: Any, described: dict[str, Any], left_out: Sequence[str]) -> None:
    """Write the loss curve (PNG), the model card and, where samples were left out, their list, by the main process."""
    folder = Path(trainer.args.output_dir)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    if history:
        plot_losses(history, folder / "loss.png")
    if left_out:
        (folder / "left_out.jsonl").write_text("".join(f"{problem}\n" for problem in left_out))
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    card = jinja2.Template(template, undefined=jinja2.StrictUndefined).render(
        described,
        adapter=ADAPTER,
        whole=trainer.whole,
        losses=[*history[:1], *history[1:][-1:]],
        curve=(folder / "loss.png").exists(),
        left_out=(folder / "left_out.jsonl").exists(),
    )
    ModelCard(card).save(folder / "README.md")


def plot_losses(history: list[dict[str, Any]], path: Path) -> None:
    """Draw loss and learning rate over steps, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    steps = [entry["step"] for entry in history]
    # One point makes no line.
    left.plot(steps, [entry["loss"] for entry in history], color="tab:blue", marker="." if len(history) == 1 else None)
    right.plot(steps, [entry.get("learning_rate", 0.0) for entry in history], color="tab:gray", linewidth=0.8)
    left.set(xlabel="step", ylabel="training loss")
    right.set_ylabel("learning rate", color="tab:gray")
    figure.savefig(path, dpi=120)
