# Copyright 2026 The Granulon team. Licensed under the Apache License, Version 2.0.
"""Attention within the packed samples of one row: no pair of tokens of different samples is computed (ours).

Notation: T tokens of all samples in one row, S samples, H heads, d width of a head.

transformers keeps packed samples apart with a mask of T × T, for which sdpa computes all pairs. On a GPU torch's own variable
length attention takes its place, on a CPU its flash kernel, sample by sample. The latter is one operator for the compiler, so
that no graph depends on the number of samples.
"""

import importlib.util
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "granulon_packed"
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@torch.library.custom_op("granulon::packed_attention", mutates_args=())
def on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return causal attention within samples [1 x H x T x d], and the logarithms of its sums [1 x H x T].

    Sample i is the tokens from `starts[i]` to `starts[i + 1]`, shape [S + 1].
    """
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    sums = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    for start, end in pairwise(starts.tolist()):
        part = slice(start, end)
        output[:, :, part], sums[:, :, part] = flash(
            query[:, :, part], key[:, :, part], value[:, :, part], 0.0, True, scale=scale
        )
    return output, sums


@on_cpu.register_fake
def _(query, key, value, starts, scale):
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    return output, query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


@torch.library.custom_op("granulon::packed_attention_backward", mutates_args=())
def on_cpu_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    sums: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradients = tuple(torch.empty_like(one, memory_format=torch.contiguous_format) for one in (query, key, value))
    for start, end in pairwise(starts.tolist()):
        parts = (one[:, :, start:end] for one in (gradient, query, key, value, output, sums))
        for whole, part in zip(gradients, flash_backward(*parts, 0.0, True, scale=scale), strict=True):
            whole[:, :, start:end] = part
    return gradients


@on_cpu_backward.register_fake
def _(gradient, query, key, value, output, sums, starts, scale):
    return tuple(torch.empty_like(one, memory_format=torch.contiguous_format) for one in (query, key, value))


def keep(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def differentiate(ctx, gradient, _):
    query, key, value, starts, output, sums = ctx.saved_tensors
    return *on_cpu_backward(gradient, query, key, value, output, sums, starts, ctx.scale), None, None


on_cpu.register_autograd(differentiate, setup_context=keep)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend within packed samples, or as sdpa does where nothing is packed: an attention function of transformers.

    Heads come first in what goes in [1 x H x T x d], tokens in what comes out [1 x T x H x d].
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # Rotations in float32 leave these so under autocast, which sdpa would cast.
    query, key = query.to(value.dtype), key.to(value.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        lengths = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
        output = varlen_attn(query, key, value, *lengths, scale=scale, window_size=(-1, 0), enable_gqa=True)
        return output.unsqueeze(0), None
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    return on_cpu(query, key, value, cu_seq_lens_q, scale)[0].transpose(1, 2), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def find_packed_attention(config: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Return the attention for packed rows of a decoder of this config: its own, but where that is sdpa and can be replaced.

    `dtype` is what attention is computed in. Windows and dropout are left to sdpa.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if kinds is None else set(kinds) != {"full_attention"}
    if config._attn_implementation != "sdpa" or window or getattr(config, "attention_dropout", 0.0):
        return config._attn_implementation
    if device.type == "cpu":
        return NAME
    half = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    if half and torch.cuda.get_device_capability(device)[0] >= 8 and importlib.util.find_spec("torch.nn.attention.varlen"):
        return NAME
    return "sdpa"


__all__ = ["find_packed_attention", "packed_attention"]
