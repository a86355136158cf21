"""What is trained in which stage, and how the rest is kept still."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from granulon_hf.errors import GranulonError
from granulon_hf.modeling.adapter_granulon import ADAPTER_WEIGHTS, LORA_SCALE
from granulon_hf.modeling.modeling_granulon import GranulonForConditionalGeneration
from granulon_hf.modeling.vision_granulon import image_size
from granulon_hf.overrides import set_prices

STAGES = {
    "projector": "the projector (supplement), and a reducer with weights",
    "controller": "the granularity controller, on labelled questions (paper; examples/train_controller.py)",
    "projector+lora": "the projector, and low-rank adapters in the language model but for its first block (ours)",
    "full": "everything but the controller, and what no answer depends on (ours)",
}
PRICES = "controller_prices"  # in the metadata of an adapter
PARTS = ("vision_tower", "reducer", "multi_modal_projector", "controller", "language_model", "lm_head")


def set_stage(model: GranulonForConditionalGeneration, stage: str, *, lora_rank: int = 16, lora_alpha: int = 32) -> None:
    """Freeze all that a stage does not train.

    Trained weights are kept in float32, whatever the backbones are in: steps of 1e-4 would be lost in bfloat16. With
    `projector+lora` the language model gets adapters in its linear layers, but for the first block, which the controller
    reads: its choice must not drift while it is not being trained.

    Raises:
        ValueError: an unknown stage, stage "controller" for a model without levels, or nothing to adapt.
        ImportError: peft is not installed and the stage needs it.
    """
    if stage not in STAGES:
        raise ValueError(f"Unknown stage {stage!r}; the stages are {', '.join(STAGES)}.")
    if stage == "controller" and not model.config.granularity_levels:
        raise ValueError("This model has no granularity levels, and therefore no controller to train.")
    model.requires_grad_(stage == "full")
    if stage == "full":
        model.config.backbones = None  # no longer theirs
        freeze_unreached(model)
    if model.config.granularity_levels:
        model.model.controller.requires_grad_(stage == "controller")
    if stage in ("projector", "projector+lora"):
        for part in ("multi_modal_projector", "reducer"):
            if isinstance(module := getattr(model.model, part, None), nn.Module):
                module.requires_grad_(True)
    if stage == "projector+lora":
        add_lora(model.model.language_model, lora_rank, lora_alpha)
    if stage != "full":
        for _, parameter in trainable(model):
            parameter.data = parameter.data.float()
    keep_frozen_parts_in_eval(model)


def freeze_unreached(model: GranulonForConditionalGeneration) -> None:
    """Freeze the tower's weights that features do not depend on, such as a mask token or the layers behind those that are read.

    They get no gradient, and DDP and the state of a sharded optimizer want one of all that is trained.
    """
    tower = model.model.vision_tower.eval()  # no image is dropped here, and no statistics of it are kept
    weights = list(tower.parameters())
    channels = getattr(tower.config, "num_channels", 3)
    pixels = torch.zeros(1, channels, *image_size(tower.config), device=weights[0].device)
    patches, _ = model.model._patch_features(pixels)
    for weight, gradient in zip(weights, torch.autograd.grad(patches.features.sum(), weights, allow_unused=True), strict=True):
        weight.requires_grad_(gradient is not None)


def add_lora(decoder: nn.Module, rank: int, alpha: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError('The stage "projector+lora" needs peft: pip install "granulon-hf[train]"') from None
    linear = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if not name.startswith("layers.0.")]
    if not targets:
        raise ValueError("The language model has one block only, which the controller reads: there is nothing to adapt.")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), decoder)


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold parameters, none of them trainable, and all that is inside of them."""
    found: dict[nn.Module, None] = {}
    for module in model.modules():
        if {parameter.requires_grad for parameter in module.parameters()} == {False}:
            found.update(dict.fromkeys(module.modules()))
    return list(found)


def keep_frozen_parts_in_eval(model: nn.Module, frozen: list[nn.Module] | None = None) -> None:
    """Put frozen modules into eval mode: no dropout, no drop-path, no jitter of positions, no running statistics. To be called
    after each `model.train()`; `frozen` are [`frozen_modules`], found once. Where gradient checkpointing is on its layers stay
    switched to training, since transformers checkpoints in training mode only; what is inside them does not.
    """
    for module in frozen_modules(model) if frozen is None else frozen:
        module.training = isinstance(module, GradientCheckpointingLayer) and getattr(module, "gradient_checkpointing", False)


def trainable(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Return the names and parameters that are trained."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def parameter_table(model: GranulonForConditionalGeneration) -> Table:
    """Count the trainable and frozen parameters of each part."""
    table = Table("part", "trainable", "frozen", "dtype", box=None, padding=(0, 2, 0, 0))
    parts: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():  # which names tied weights once
        parts.setdefault(name.removeprefix("model.").partition(".")[0], []).append(parameter)

    def counts(held: list[nn.Parameter]) -> list[str]:
        return [f"{sum(p.numel() for p in held if p.requires_grad is trained):,}" for trained in (True, False)]

    for part, held in parts.items():
        if held:
            table.add_row(part, *counts(held), ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in held})))
    table.add_row("all", *counts(list(model.parameters())), "", style="bold")
    return table


def adapter_state(model: GranulonForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Return the trained weights, and always projector and controller, on the CPU, named as below `model.`."""
    return {
        name.removeprefix("model."): parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name.startswith(("model.multi_modal_projector.", "model.controller.", "model.reducer."))
    }


def save_adapter(folder: Path, model: GranulonForConditionalGeneration, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write [`adapter_state`], or the state given, and both configs: what `from_pretrained` assembles with the backbones."""
    factors = next(iter(low_rank_modules(model).values()), None)
    scale = {} if factors is None else {LORA_SCALE: str(factors.scaling["default"])}
    if model.config.controller_prices:
        scale[PRICES] = json.dumps(model.config.controller_prices)
    file = folder / ADAPTER_WEIGHTS
    save_file(adapter_state(model) if state is None else state, file, metadata={"format": "pt", **scale})
    file.chmod(0o644)  # safetensors leaves its files to their owner alone
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def load_adapter(model: GranulonForConditionalGeneration, file: Path) -> None:
    """Put the weights of a file of [`save_adapter`] into a model, whose controller gets outputs for the prices of the file's.

    Raises:
        GranulonError: they do not fit.
    """
    state = load_file(file)
    if model.config.granularity_levels and any(name.startswith("controller.") for name in state):
        with safe_open(file, "pt") as opened:
            set_prices(model, json.loads((opened.metadata() or {}).get(PRICES, "null")))
    load_adapter_state(model, adapter_state(model) | state)


def low_rank_modules(model: nn.Module) -> dict[str, Any]:
    """Return the modules that have low-rank factors, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def merged_state(model: nn.Module, state: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Return all weights, or the `state` that was gathered from shards, with low-rank factors merged into what they adapt."""
    state = dict(model.state_dict() if state is None else state)
    for name, module in low_rank_modules(model).items():
        first, second = (state[f"{name}.lora_{factor}.default.weight"].float() for factor in "AB")
        base = state[f"{name}.base_layer.weight"]
        state[f"{name}.base_layer.weight"] = (base.float() + module.scaling["default"] * second @ first).to(base.dtype)
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def load_adapter_state(model: GranulonForConditionalGeneration, state: dict[str, torch.Tensor]) -> None:
    """Put such weights back, or raise GranulonError for another shape, an unknown weight, or a trained one that is missing."""
    own: dict[str, Any] = {name.removeprefix("model."): parameter for name, parameter in model.named_parameters()}
    unknown = sorted(state.keys() - own.keys())
    missing = sorted(name for name, parameter in own.items() if parameter.requires_grad and name not in state)
    if unknown or missing:
        what = f"has {unknown[0]}, which the model lacks" if unknown else f"lacks {missing[0]}, which is trained"
        raise GranulonError(f"The adapter does not fit: it {what}; was it trained in another stage?")
    with torch.no_grad():
        for name, value in state.items():
            if own[name].shape != value.shape:
                raise GranulonError(
                    f"The adapter does not fit: {name} is {tuple(value.shape)}, not {tuple(own[name].shape)}; it belongs to "
                    "other backbones, levels or prices."
                )
            if isinstance(own[name], DTensor):  # sharded by FSDP2
                value = distribute_tensor(value, own[name].device_mesh, own[name].placements)
            own[name].copy_(value)
