"""Arguments of a training run: the supplement's recipe as defaults."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import is_liger_kernel_available

from granulon_hf.errors import GranulonError, one_line
from granulon_hf.modeling.reducers_granulon import REDUCERS
from granulon_hf.variants import NAMES

BATCHING = ("padded", "grouped", "packed")
# Options of the command line that leave a recipe's others without a meaning: a subset is one of the file's own data, and
# transformers would let the file's max_steps win over the line's epochs.
REPLACES = {"data": ("source", "split", "preset", "limit"), "num_train_epochs": ("max_steps",)}


def option(default: Any, words: str) -> Any:
    return field(default=default, metadata={"help": words})


@dataclass
class ModelArguments:
    """Which model is trained, and what of it."""

    variant: str = option("demo", f"demo, a folder or Hub id of a Granulon model, or one of {', '.join(NAMES)}.")
    tiny: bool = option(False, "The variant's architectures at toy size with random weights.")
    open_weights: bool = option(False, "Read DINOv3 from timm's repository, which has no gate.")
    stage: str = option("projector", "projector, projector+lora or full.")
    lora_rank: int = option(16, "Rank of the adapters in the stage projector+lora.")
    lora_alpha: int = option(32, "Their scale is lora_alpha / lora_rank.")
    adapter: str | None = option(None, "Folder or file of an adapter.safetensors to begin with, such as a trained controller.")
    pixel_loss_weight: float = option(0.0, "Weight of the loss with the semantic slots hidden.")
    semantic_loss_weight: float = option(0.0, "Weight of the loss with the pixel slots hidden.")
    visual_tokens: str | None = option(
        None, "pixel+semantic (paper), semantic (the compact form) or pixel: what the language model sees of an image."
    )
    reducer: str | None = option(None, f"How semantic tokens are made of patch features: {', '.join(REDUCERS)}.")
    levels: str | None = option(None, "Visual tokens of each level, such as 16,32,64; the default level is the middle one.")
    slot_position: str | None = option(None, "none (paper), semantic or all: which visual tokens are position-encoded (ours).")
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2 …")

    def overrides(self) -> dict[str, Any]:
        """Return the fields of a config that are asked for; raise GranulonError for values that a field cannot have."""
        named: tuple[tuple[str, Sequence[str]], ...] = (
            ("visual_tokens", ("pixel+semantic", "semantic", "pixel")),
            ("reducer", tuple(REDUCERS)),
            ("slot_position", ("none", "semantic", "all")),
        )
        fields: dict[str, Any] = {}
        for name, choices in named:
            if (value := getattr(self, name)) is not None:
                if value not in choices:
                    raise GranulonError(f"--{name} must be {', '.join(choices[:-1])} or {choices[-1]}; got {value!r}.")
                fields[name] = value
        if self.levels is not None:
            fields |= read_levels(self.levels)
        if self.visual_tokens == "pixel" and (idle := [name for name in ("levels", "reducer") if getattr(self, name)]):
            raise GranulonError(f"--visual_tokens pixel shows pixel tokens alone: leave out --{idle[0]}.")
        for name in ("pixel_loss_weight", "semantic_loss_weight"):
            if value := getattr(self, name):
                if self.visual_tokens == "semantic":
                    raise GranulonError(f"--{name} needs both kinds of tokens: leave it out with --visual_tokens semantic.")
                fields[name] = value
        return fields


def read_levels(text: Any) -> dict[str, Any]:
    """Read the visual tokens of each level, such as "16,32,64", as fields of a config."""
    parts = [part.strip() for part in str(text).strip("[]").split(",")]
    counts = sorted({int(part) for part in parts if part.isdecimal()})
    if len(counts) < len(parts) or counts[0] < 1:
        raise GranulonError(f"--levels must be different positive numbers of visual tokens, such as 16,32,64; got {text!r}.")
    levels = [{"name": str(count), "alpha": 1, "beta": count, "gamma": 1.0} for count in counts]
    return {"granularity_levels": levels, "num_semantic_tokens": counts[-1]}


@dataclass
class DataArguments:
    """What it is trained on, and how batches are made."""

    data: str = option("shapes", "shapes (drawn, built in), a set's name, a prepared folder, or a chat.json.")
    source: str | None = option(None, "Where the data set is, if not at its place on the Hub.")
    split: str | None = option(None, "Split of the data set.")
    preset: str | None = option(None, "One of the data set's subsets, as in the paper.")
    limit: int | None = option(None, "At most so many samples, uniformly drawn.")
    subset_seed: int = option(0, "Seed of the drawing.")
    on_error: str = option("skip", "skip or raise, at rows that cannot be used.")
    max_length: int | None = option(2048, "Tokens per sample, image slots included.")
    batching: str | None = option(
        None,
        "padded: random batches; grouped: by length; packed: no padding at all, in batches of so many tokens. By default "
        "packed where attention stays within samples, and grouped elsewhere.",
    )
    max_tokens_per_batch: int | None = option(
        None,
        "Tokens of a packed batch; a step has the same samples whatever it is. By default what the free memory of a GPU holds, "
        "or else as many as an ordinary batch has.",
    )
    pad_to_multiple_of: int | None = option(None, "Row lengths are multiples of this; for compile.")
    feature_cache: str | None = option(
        None, "Folder for the tower's features: every image is encoded once, for all epochs and runs."
    )


@dataclass
class TrlDataArguments(DataArguments):
    """The same beside the arguments of a TRL trainer, which have two of these names too."""

    max_length: int | None = field(default=None, init=False)
    pad_to_multiple_of: int | None = field(default=None, init=False)


def tensorboard_if_installed() -> list[str]:
    return ["tensorboard" if importlib.util.find_spec("tensorboard") else "none"]


@dataclass
class RecipeArguments(TrainingArguments):
    """transformers' TrainingArguments with the defaults of the supplement, section 1.

    The batch of the released script is 8 per device x 4 on 2 GPUs (64); the paper's notes say 128 and a learning rate of 2e-5:
    the sources conflict. The supplement's 1e-4 is the default.
    """

    output_dir: str | None = "granulon-run"
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.05
    weight_decay: float = 0.0
    num_train_epochs: float = 2.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 4
    logging_steps: float = 10
    logging_nan_inf_filter: bool = False
    logging_first_step: bool = True
    save_steps: float = 500
    save_total_limit: int | None = 2
    # A list, so that the command line takes several.
    report_to: list[str] = field(default_factory=tensorboard_if_installed)
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False
    budgets: str = option(
        "controller",
        "Visual tokens that a step trains: those of the level that the controller chooses; random: of a level drawn for each "
        "sample; all: the mean loss over all levels, at a decoder's step for each; or a number of tokens.",
    )
    compile: str = option("none", "none; regional: decoder layers, tower layers and AdaTA, each kind once for all batches.")
    frozen_dtype: str | None = option(
        None,
        "fp8: the products of the frozen language model in float8, with rounding of a few percent each (Hopper GPUs and newer; "
        "ours). By default they are those of its weights' dtype.",
    )
    save_full: bool = option(
        False,
        "Write all weights beside the trained ones, into each checkpoint too. The final folder of a model whose "
        "backbones have no name (the demo, toy sizes, the stage full) holds them in any case.",
    )
    dataloader_num_workers: int = option(
        -1,
        "Processes that read samples, for each that trains. By default (-1) up to 4 on a GPU, and none with cached features.",
    )
    auto_precision: bool = option(True, "bf16 with tf32 matmul where the device has it, unless bf16 or fp16 is given.")

    # Said, not set: which recipe file it is, and what the command line changed.
    recipe: str = field(default="the supplement's defaults, no recipe file was named", init=False)

    def __post_init__(self):
        if self.auto_precision and not self.bf16 and not self.fp16 and not self.use_cpu and torch.cuda.is_available():
            self.bf16 = torch.cuda.is_bf16_supported()
            if self.tf32 is None and torch.cuda.get_device_capability()[0] >= 8:
                self.tf32 = True
        super().__post_init__()


class OptionParser(HfArgumentParser):
    """transformers' parser, with one sentence in a GranulonError for everything that is wrong."""

    def error(self, message):
        raise GranulonError(f"The options cannot be used: {message}.")

    def read(self, arguments: list[str]) -> tuple[Any, ...]:
        """Return the dataclasses that a command line fills."""
        try:
            *found, unknown = self.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        except GranulonError:
            raise
        except (TypeError, ValueError) as error:
            raise GranulonError(f"The options cannot be used: {one_line(error)}") from None
        if unknown:
            raise GranulonError(
                f"The options cannot be used: {unknown[0]!r} is none (--help lists them all, and a recipe file comes first)."
            )
        return tuple(found)

    def named(self, arguments: list[str]) -> set[str]:
        """Return the names of the options that stand on a command line."""
        known = self._option_string_actions
        return {known[name].dest for text in arguments if (name := text.partition("=")[0]) in known}


def make_parser() -> OptionParser:
    return OptionParser((ModelArguments, DataArguments, RecipeArguments), allow_abbrev=False)  # type: ignore[arg-type]


def parse(arguments: list[str], default: str | None = None) -> tuple[ModelArguments, DataArguments, RecipeArguments]:
    """Read the arguments of a command line, `[RECIPE.yaml] [--name value …]`.

    What is said on the line wins over the file, `--data` over the file's data with their subset, and `--num_train_epochs` over
    its `max_steps`. The `recipe` of the [`RecipeArguments`] says in words which file it was and what the line changed.

    Args:
        default (`str`, *optional*): the recipe of the variant "demo" where the line names no file.

    Raises:
        GranulonError: a file that cannot be read, or that holds a name no argument has; options that cannot be used.
    """
    parser = make_parser()
    path: str | None = None
    if arguments and not arguments[0].startswith("-"):
        path, *arguments = arguments
    elif parser.parse_known_args(arguments)[0].variant == "demo":
        path = default
    values = {} if path is None else read_recipe(path, {action.dest for action in parser._actions})
    given = parser.named(arguments)
    replaced = {other for name in given for other in REPLACES.get(name, ()) if other in values} - given
    parser.set_defaults(**{name: value for name, value in values.items() if name not in replaced})
    model, data, recipe = parser.read(arguments)
    if path is not None:
        now = {**vars(model), **vars(data), **vars(recipe)}
        changed = [f"{name} {now[name]} (in the file {value})" for name, value in values.items() if name in given]
        changed += [f"no {name} (in the file {values[name]})" for name in values if name in replaced]
        recipe.recipe = path + (f"; the command line changes: {', '.join(changed)}" if changed else "")
    refuse(model, data, recipe)
    return model, data, recipe


def read_recipe(path: str, known: set[str]) -> dict[str, Any]:
    """Return the names and values of a recipe file, all of them known."""
    if not path.endswith((".yaml", ".yml")) or not os.path.isfile(path):
        raise GranulonError(f"{path!r} is no YAML file of a recipe; options begin with --.")
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.safe_load(file) or {}
        except yaml.YAMLError as error:
            raise GranulonError(f"{path} is no valid YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise GranulonError(f"{path} must be a YAML mapping of options to values; got a {type(values).__name__}.")
    if unknown := sorted(set(values) - known):
        raise GranulonError(f"{path} holds the unknown name {unknown[0]!r}; the names are those of `train.py --help`.")
    return values


def refuse(model: ModelArguments, data: DataArguments, recipe: RecipeArguments) -> None:
    """Refuse options that exclude each other, or that would be ignored or change what is trained."""
    if data.batching is not None and data.batching not in BATCHING:
        raise GranulonError(f"Unknown batching {data.batching!r}; the choices are {', '.join(BATCHING)}.")
    if (budget := data.max_tokens_per_batch) is not None and (budget < 1 or data.batching in ("padded", "grouped")):
        raise GranulonError(
            f"--max_tokens_per_batch must be a positive number of tokens, with --batching packed; got {budget}"
            + (f" with --batching {data.batching}." if data.batching else ".")
        )
    if data.batching == "packed" and data.pad_to_multiple_of:
        raise GranulonError("Packed batches have no padding: leave out --pad_to_multiple_of, or --batching packed.")
    if recipe.dataloader_num_workers < -1:
        raise GranulonError(f"--dataloader_num_workers must be 0 or more; got {recipe.dataloader_num_workers}.")
    if recipe.compile not in ("none", "regional"):
        raise GranulonError(f"--compile must be none or regional; got {recipe.compile!r}.")
    if recipe.frozen_dtype is not None:
        check_float8(model, recipe)
    if recipe.label_smoothing_factor:
        raise GranulonError("Label smoothing would replace the recipe's loss; leave out --label_smoothing_factor.")
    if recipe.eval_strategy != "no":
        raise GranulonError("Nothing is evaluated while it trains; leave out --eval_strategy, and use granulon eval run.")
    if recipe.use_liger_kernel:
        check_liger(recipe)
    stage = getattr(recipe.deepspeed_plugin, "zero_stage", None)
    if stage == 3 or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        raise GranulonError(
            "ZeRO-3 is not supported: it shards the frozen weights, tied ones among them, while the model is being built. Use "
            "accelerate_zero2.yaml (the trained part is small) or accelerate_fsdp2.yaml."
        )


def check_float8(model: ModelArguments, recipe: RecipeArguments) -> None:
    """Refuse products in float8 where there is nothing to gain, or they do not work."""
    asked = f"--frozen_dtype {recipe.frozen_dtype}"
    if recipe.frozen_dtype != "fp8":
        raise GranulonError(f"--frozen_dtype must be fp8, or left out; got {recipe.frozen_dtype!r}.")
    if recipe.device.type != "cuda" or torch.cuda.get_device_capability(recipe.device) < (9, 0):
        raise GranulonError(f"{asked} needs a Hopper GPU (H100) or a newer one; leave it out.")
    if model.stage == "full":
        raise GranulonError(f"{asked} is for a frozen language model, and --stage full trains it; leave out one of them.")
    if not recipe.bf16:
        raise GranulonError(f"{asked} goes with bfloat16 alone: leave out --fp16 and --bf16 false.")
    if recipe.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise GranulonError(f"{asked} cannot be sharded: use accelerate_zero2.yaml, or leave it out.")


def check_liger(recipe: RecipeArguments) -> None:
    """Refuse liger's kernels where they cannot run, or would be used for the loss."""
    if not is_liger_kernel_available():
        raise GranulonError("--use_liger_kernel needs a package that is not installed: pip install liger-kernel")
    if recipe.device.type in ("cpu", "mps"):
        raise GranulonError(f"--use_liger_kernel needs a GPU, and this run is on the {recipe.device.type}; leave it out.")
    losses = ("cross_entropy", "fused_linear_cross_entropy")
    if chosen := [name for name in losses if (recipe.liger_kernel_config or {}).get(name)]:
        raise GranulonError(
            f"--liger_kernel_config asks for {chosen[0]}, and the loss is computed at labelled positions only; leave it out."
        )
