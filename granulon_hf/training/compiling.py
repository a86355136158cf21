"""Compiling the parts of a model that repeat: one graph for all layers, one for AdaTA, none anew for another batch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Return the layers of a transformer: the longest list of modules of one kind in it."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList) and len({type(one) for one in part}) == 1]
    return max((list(layers) for layers in lists), key=len, default=[])


def compile_regions(model: Any, **options: Any) -> None:
    """Compile decoder layers, tower layers and a reducer without weights (AdaTA) in place, for packed batches of any make-up.

    In place, as accelerate does it for FSDP2: names of weights and hooks stay. Embeddings require gradients, so that the
    graphs of batches with and without images are the same, and a single image goes through the tower twice, since the compiler
    takes a size of 1 for a constant.

    Args:
        options: of `torch.compile`.
    """
    parts = model.model
    for layer in [*layers_of(parts.language_model), *layers_of(parts.vision_tower)]:
        layer.compile(fullgraph=True, dynamic=True, **options)
    parts.language_model.register_forward_pre_hook(require_gradients, with_kwargs=True)
    parts._run_tower = in_pairs(parts._run_tower)
    if parts.config.granularity_levels and not isinstance(parts.reducer, nn.Module):
        parts.reducer = of_any_number(parts.reducer, **options)


def require_gradients(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    embeds = kwargs.get("inputs_embeds")
    if embeds is not None and torch.is_grad_enabled() and embeds.is_leaf:
        embeds.requires_grad_()


def in_pairs(run_tower: Callable) -> Callable:
    """Let a single image go through the tower twice."""

    def run(run, pixel_values, *args, **kwargs):
        images = len(pixel_values)
        features, grid, outputs = run_tower(run, pixel_values.expand(max(2, images), -1, -1, -1), *args, **kwargs)
        return features[:images], grid, outputs

    return run


def of_any_number(reducer: Callable, **options: Any) -> Callable:
    """Compile a reducer for any number of images; everything else of them stays as it is."""
    compiled = torch.compile(reducer, fullgraph=True, **options)

    def reduce(patches, budget, num_slots):
        images = len(budget)
        twice = torch.arange(max(2, images), device=budget.device).clamp(max=images - 1)
        many = replace(patches, **{name: value[twice] for name, value in vars(patches).items() if torch.is_tensor(value)})
        budget = budget[twice]
        for value in (budget, *vars(many).values()):
            if torch.is_tensor(value):
                torch._dynamo.mark_dynamic(value, 0)
        found = compiled(many, budget, num_slots)
        return type(found)(**{name: value[:images] for name, value in found.items()})

    return reduce
