# Copyright 2026 The Granulon team. Licensed under the Apache License, Version 2.0.
"""The text-conditioned granularity controller.

Notation: B batch, L text length, E language width, n number of granularity levels.
"""

import inspect

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask

# Log-odds that an untrained controller gives its default level over each other one (ours).
UNTRAINED_PREFERENCE = 2.0


def cast_input(features: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Cast features to the type that a module computes in: they may come from parts in another one."""
    # No layer is asked for its weight: it may be quantized (of another type, or of fewer bits) or wrapped in an adapter.
    dtypes = (weight.dtype for weight in module.parameters() if weight.is_floating_point() and weight.element_size() > 1)
    return features.to(next(dtypes, features.dtype))


class GranularityController(nn.Module):
    """p = softmax(W2 · GELU(W1 · h + b1) + b2) with h = Wp · sigmoid(mean over question tokens of E1) (paper)."""

    def __init__(self, config):
        super().__init__()
        width = config.controller_hidden_size
        self.num_levels = len(config.granularity_levels)
        self.default_level = config.level_names.index(config.default_granularity)
        self.in_proj = nn.Linear(config.text_config.hidden_size, width, bias=False)
        self.fc1 = nn.Linear(width, width)
        self.act = ACT2FN["gelu"]
        self.num_prices = len(config.controller_prices or [None])
        # Ordinary linear layers without anything of their own: adapters and quantizers put others in their place.
        self.fc2 = nn.Linear(width, self.num_prices * self.num_levels)

    def untrained_logits(self, device: torch.device) -> torch.Tensor:
        """Return the logits of a controller with W2 = 0, whose b2 favors the default level (ours). Shape [n]."""
        levels = torch.arange(self.num_levels, device=device)
        return UNTRAINED_PREFERENCE * (levels == self.default_level).float()

    def forward(self, question_states: torch.Tensor, question_mask: torch.Tensor, price: int = 0) -> torch.Tensor:
        """Return logits of the levels [B x n] in float32, from E1 [B x L x E] and the mask [B x L] of the question's tokens.

        `price` is an index of the config's `controller_prices`.

        A sample without a question token gets those of the untrained controller.
        """
        mask = question_mask.unsqueeze(-1)
        mean = question_states.float().masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)
        hidden = self.in_proj(cast_input(torch.sigmoid(mean), self))
        # Back to float32, and to the question's device, from which `device_map` may have led away.
        logits = self.fc2(self.act(self.fc1(hidden))).to(mean).unflatten(-1, (self.num_prices, self.num_levels))[:, price]
        return torch.where(question_mask.any(1, keepdim=True), logits, self.untrained_logits(mean.device))


@torch.no_grad()
def first_block_states(decoder: nn.Module, inputs_embeds: torch.Tensor, question_mask: torch.Tensor) -> torch.Tensor:
    """Return E1 [B x L x E], the output of the decoder's own first block, run on the question's tokens alone.

    Every other position is hidden from them and takes no position id, so that neither markup, padding, images nor the
    answer can change the result; there it is meaningless. No gradient: the block belongs to the frozen language model. The
    decoder has `layers` and `rotary_emb` (Llama, Qwen2, Qwen3, SmolLM2, Mistral, …).
    """
    position_ids = (question_mask.long().cumsum(-1) - 1).clamp(min=0)
    attention_mask = create_causal_mask(
        config=decoder.config,
        inputs_embeds=inputs_embeds,
        attention_mask=question_mask.long(),
        cache=None,
        position_ids=position_ids,
    )
    # Some decoders have one rotary embedding per kind of layer.
    takes_kind = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
    kind = {"layer_type": decoder.config.layer_types[0]} if takes_kind else {}
    # A layer that is compiled on its own is compiled for the decoder's rows, not for questions.
    first = decoder.layers[0]
    states = (first if first._compiled_call_impl is None else first._call_impl)(
        inputs_embeds,
        attention_mask=attention_mask,
        position_embeddings=decoder.rotary_emb(inputs_embeds, position_ids, **kind),
        position_ids=position_ids,
        use_cache=False,
    )
    return states[0] if isinstance(states, tuple) else states


def unpack_questions(
    inputs_embeds: torch.Tensor, question_mask: torch.Tensor, sample: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the question tokens of packed samples an ordinary padded batch, one row per sample (ours).

    `sample` [B x L] numbers the samples from 0, not decreasing. Embeddings [S x Lq x E] and mask [S x Lq] have one row for each
    of S samples, and Lq is the longest question (at least 1).
    """
    counts = sample[question_mask].bincount(minlength=int(sample[-1, -1]) + 1)
    columns = torch.arange(max(1, int(counts.max())), device=counts.device)
    mask = columns < counts.unsqueeze(1)
    embeds = inputs_embeds.new_zeros(*mask.shape, inputs_embeds.shape[-1])
    return embeds.masked_scatter(mask.unsqueeze(-1), inputs_embeds[question_mask]), mask


__all__ = ["GranularityController"]
