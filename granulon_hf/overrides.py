"""Fields put over the config of a model: what follows from them, and the weights that are kept."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from granulon_hf.modeling.configuration_granulon import GranulonConfig
from granulon_hf.modeling.controller_granulon import GranularityController
from granulon_hf.modeling.modeling_granulon import GranulonForConditionalGeneration
from granulon_hf.modeling.processing_granulon import GranulonProcessor

PARTS = ("multi_modal_projector", "controller", "reducer")
# What a config derives from a field, or what counts with its value alone.
OF_LEVELS = ("num_semantic_tokens", "default_granularity", "controller_prices")
OF_FORM = ("granularity_levels", *OF_LEVELS, "slot_position", "pixel_loss_weight", "semantic_loss_weight")


def replace_fields(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Put overrides over the fields of a config; what depended on the values that they replace is derived anew."""
    levels = fields.get("granularity_levels")
    before = {
        "visual_tokens": fields.get("visual_tokens") or ("pixel" if levels == [] else "pixel+semantic"),
        "granularity_levels": levels,
    }
    changed = {name for name, value in before.items() if overrides.get(name, value) != value}
    dropped = {*(OF_FORM if "visual_tokens" in changed else ()), *(OF_LEVELS if "granularity_levels" in changed else ())}
    if overrides.get("granularity_levels") and before["visual_tokens"] == "pixel":
        dropped.add("visual_tokens")
    return {name: value for name, value in fields.items() if name not in dropped} | dict(overrides)


def load_fitting(model: GranulonForConditionalGeneration, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Load projector, controller and reducer from weights named as below `model.`, each if it fits as a whole.

    Places of slots that are new here tell nothing before they are trained, and need not be there.

    Returns:
        `list[str]`: the parts that stay as they were initialized.
    """
    own, fresh = model.model.state_dict(), []
    for part in PARTS:
        names = [name for name in own if name.startswith(f"{part}.")]
        found = {name: state[name] for name in names if name in state and state[name].shape == own[name].shape}
        if found.keys() | {"multi_modal_projector.position"} >= set(names):
            model.model.load_state_dict(found, strict=False)
        else:
            fresh.append(part)
    return fresh


def reconfigure(
    model: GranulonForConditionalGeneration, processor: GranulonProcessor, overrides: Mapping[str, Any]
) -> tuple[GranulonForConditionalGeneration, list[str]]:
    """Build a model with other fields in its config on the same backbones, and let its processor write as many slots.

    Returns:
        `tuple`: the model, and the parts of it whose weights did not fit and are random.

    Raises:
        ValueError: the fields do not go together, or the vision tower lacks what they need.
    """
    # The backbones' own configs, which their modules hold.
    backbones = {name: getattr(model.config, name) for name in ("vision_config", "text_config")}
    config = GranulonConfig(**replace_fields(model.config.to_dict(), overrides) | backbones)
    changed = GranulonForConditionalGeneration.from_backbones(config, model.model.vision_tower, model)
    # They may be held in more precision than the backbones.
    dtype = model.model.multi_modal_projector.linear_1.weight.dtype
    for part in PARTS:
        if isinstance(module := getattr(changed.model, part, None), nn.Module):
            module.to(dtype)
    vars(processor).update(config.slot_options)
    return changed, load_fitting(changed, model.model.state_dict())


def set_prices(model: GranulonForConditionalGeneration, prices: list[float] | None) -> bool:
    """Give a model's controller outputs for these prices; say whether they are new, and untrained."""
    before = model.model.controller
    if model.config.controller_prices == prices:
        return False
    model.config.controller_prices = prices
    controller = GranularityController(model.config).apply(model._init_weights)
    kept = {name: value for name, value in before.state_dict().items() if not name.startswith("fc2.")}
    controller.load_state_dict(kept, strict=False)
    weight = before.in_proj.weight
    model.model.controller = controller.to(weight.device, weight.dtype).requires_grad_(False)
    return True
