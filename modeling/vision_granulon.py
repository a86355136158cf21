# Copyright 2026 The Granulon team. Licensed under the Apache License, Version 2.0.
"""What Granulon asks of a vision tower, whatever its architecture: patch tokens on a grid, and their last self-attention.

Notation: I images, N = H·W patch tokens of one image, T = N plus prefix tokens (CLS, registers), D vision width.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel


class VisionGrid(NamedTuple):
    """Patch grid of a vision tower at its own image size: rows, columns, pixels per patch, prefix tokens."""

    height: int
    width: int
    patch_size: int
    prefix_tokens: int


def _square(side: int | Sequence[int]) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def vision_width(tower: PreTrainedModel) -> int:
    """Return D, the width of the features of a vision tower."""
    config = tower.config
    width = getattr(config, "hidden_size", None) or (getattr(config, "hidden_sizes", None) or [None])[-1]
    width = width or getattr(getattr(tower, "timm_model", None), "num_features", None)
    if not isinstance(width, int):
        raise ValueError(f"{describe(tower)} has no patch features that Granulon can use: its config states no hidden size.")
    return width


def patch_size(tower: PreTrainedModel) -> tuple[int, int]:
    """Return the height and width in pixels that one patch token stands for."""
    timm_model = getattr(tower, "timm_model", None)
    if timm_model is None:
        side = getattr(tower.config, "patch_size", None)
    elif hasattr(getattr(timm_model, "patch_embed", None), "patch_size"):
        side = timm_model.patch_embed.patch_size
    else:
        side = (getattr(timm_model, "feature_info", None) or [{}])[-1].get("reduction")
    if side is None:
        raise ValueError(f"{describe(tower)} has no patch features that Granulon can use: it states no patch size.")
    return _square(side)


def to_patch_tokens(
    states: torch.Tensor, tower: PreTrainedModel, pixel_values: torch.Tensor
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Bring the states of any tower into one form: a sequence whose last H·W tokens are the patches in row-major order.

    They are [I x T x D] of a transformer, or a feature map [I x D x H x W] or [I x H x W x D]; tokens [I x T x D] and the grid
    (H, W) come back. What comes before the patches (CLS, registers) is found by counting, from the size of patch and pixels.

    Raises:
        ValueError: the states are not one feature per patch.
    """
    if states.ndim == 4:
        if states.shape[1] != vision_width(tower):
            states = states.permute(0, 3, 1, 2)
        grid = (states.shape[2], states.shape[3])
        return states.flatten(2).transpose(1, 2), grid
    side = patch_size(tower)
    grid = (pixel_values.shape[-2] // side[0], pixel_values.shape[-1] // side[1])
    if states.ndim != 3 or states.shape[0] != pixel_values.shape[0] or states.shape[1] < grid[0] * grid[1]:
        raise ValueError(
            f"{describe(tower)} has no patch features that Granulon can use: for pixels of shape "
            f"{tuple(pixel_values.shape)} and a patch size of {side} it gives states of shape {tuple(states.shape)}, which "
            f"is not one feature for each of {grid[0]} x {grid[1]} patches."
        )
    return states, grid


def describe(tower: PreTrainedModel) -> str:
    architecture = getattr(tower.config, "architecture", None)
    return f"The vision tower {type(tower).__name__}" + (f" ({architecture})" if architecture else "")


def last_self_attention(tower: PreTrainedModel) -> nn.Module | None:
    """Return the last self-attention module of a vision tower whose weights can be recomputed, or `None`."""
    kinds = (("is_causal", "config"), ("fused_attn", "attn_drop"))  # of transformers, of timm
    found = [one for one in tower.modules() if any(hasattr(one, first) and hasattr(one, second) for first, second in kinds)]
    return found[-1] if found else None


class LastAttention:
    """Weights and keys of one self-attention module, recomputed from its own inputs.

    SDPA returns no weights, and the whole tower in eager mode would be slow: this one module runs a second time, as a shallow
    copy with the same parameters in eager mode. Hooks and copy are made once, outside of what `torch.compile` traces.
    """

    def __init__(self, module: nn.Module):
        self.inputs: tuple[tuple, dict] = ((), {})
        self.seen: torch.Tensor | None = None
        eager = copy.copy(module)
        eager._forward_pre_hooks = type(module._forward_pre_hooks)()
        eager.training = False
        if hasattr(module, "config"):
            eager.config = copy.copy(module.config)
            eager.config._attn_implementation = "eager"
        else:  # timm hands the weights to its dropout, and only in eager mode
            eager.fused_attn = False
            eager.attn_drop.register_forward_pre_hook(self._keep_weights)
        self.eager = eager
        module.register_forward_pre_hook(self._keep_inputs, with_kwargs=True)

    def _keep_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.inputs = (args, kwargs)

    def _keep_weights(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        self.seen = inputs[0]

    @torch.no_grad()
    def keys(self) -> torch.Tensor | None:
        """Keys of the module's last call, shape [I x T x heads·d]; `None` of a module that makes them in another way.

        To be asked for before `weights`.
        """
        layers = self.eager._modules
        layer = next((layers[name] for name in ("k_proj", "key", "qkv") if layers.get(name) is not None), None)
        if layer is None:
            return None
        args, kwargs = self.inputs
        keys = layer(args[0] if args else kwargs["hidden_states"])
        return keys.chunk(3, dim=-1)[1] if layer is layers.get("qkv") else keys

    @torch.no_grad()
    def weights(self) -> torch.Tensor:
        """Return those of the module's last call, shape [I x heads x T x T]; its inputs are let go."""
        (args, kwargs), self.inputs = self.inputs, ((), {})
        output = self.eager(*args, **kwargs)
        weights, self.seen = (output[1] if hasattr(self.eager, "config") else self.seen), None
        return weights


def run_resized(tower: PreTrainedModel, pixel_values: torch.Tensor, **kwargs):
    """Run a vision tower on images of another size than its own; learned positions are interpolated."""
    if "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
        kwargs["interpolate_pos_encoding"] = True
    return tower(pixel_values, **kwargs)


def takes_any_size(vision_config, patch_size: int) -> bool:
    """Whether a vision tower also takes images of two by two patches, found without weights or arithmetic."""
    try:
        with torch.device("meta"), torch.no_grad():
            tower = AutoModel.from_config(vision_config)
            pixel_values = torch.empty(1, getattr(vision_config, "num_channels", 3), 2 * patch_size, 2 * patch_size)
            states = run_resized(tower, pixel_values, return_dict=True).last_hidden_state
        return to_patch_tokens(states, tower, pixel_values)[1] == (2, 2)
    except Exception:
        return False


def probe_vision_tower(vision_config) -> VisionGrid:
    """Run a vision tower's architecture without weights or arithmetic, to learn its patch grid at its own image size.

    Raises:
        ValueError: the tower has no patch features that Granulon can use.
    """
    name = getattr(vision_config, "architecture", None) or type(vision_config).__name__
    height, width = image_size(vision_config)
    try:
        with torch.device("meta"), torch.no_grad():
            tower = AutoModel.from_config(vision_config)
            pixel_values = torch.empty(2, getattr(vision_config, "num_channels", 3), height, width)
            states = tower(pixel_values, return_dict=True).last_hidden_state
            tokens, grid = to_patch_tokens(states, tower, pixel_values)
        return VisionGrid(*grid, height // grid[0], tokens.shape[1] - grid[0] * grid[1])
    except Exception as error:
        if isinstance(error, ImportError) or "patch features" in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{name} has no patch features that Granulon can use: a vision tower takes pixels [I x 3 x H x W] and gives one "
            f"feature per patch, but running it failed ({type(error).__name__}: {reason}); take a tower of one fixed "
            "resolution, or the same tower from timm."
        ) from error


def image_size(vision_config) -> tuple[int, int]:
    """Return the height and width in pixels at which a vision tower was trained, from its config; 224 if it does not say."""
    size = getattr(vision_config, "image_size", None)
    if size is None:
        pretrained = getattr(vision_config, "pretrained_cfg", None) or {}
        model_args = getattr(vision_config, "model_args", None) or {}
        size = model_args.get("img_size") or (pretrained.get("input_size") or (3, 224, 224))[1:]
    return _square(size)
