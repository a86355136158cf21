"""How many tokens a packed batch may hold, estimated from the memory that is free."""

from collections.abc import Sequence
from typing import Any

import torch

from granulon_hf.modeling.modeling_granulon import LOSS_CHUNK

# What is left for kernels' own buffers, fragments and images.
USED = 0.8


def bytes_per_token(config: Any, checkpointing: bool = False, size: int = 2) -> int:
    """Estimate what a decoder keeps of a token for the backward pass.

    The factors fit the peaks that were measured with Qwen2.5-1.5B (examples/benchmarks/results.md).

    Args:
        config: of the language model.
        checkpointing (`bool`): whether only the inputs of layers are kept.
        size (`int`): bytes of a number: 2 in bfloat16, 4 in float32.
    """
    layer = int(16 * config.hidden_size + 4.5 * config.intermediate_size)
    kept = config.num_hidden_layers * config.hidden_size + layer if checkpointing else config.num_hidden_layers * layer
    return size * kept


def choose_token_budget(
    config: Any, lengths: Sequence[int], batch_size: int, free: int | None, *, checkpointing: bool = False, size: int = 2
) -> int:
    """Return the tokens of a packed batch: what fits the free bytes, and where they are unknown the tokens of a batch.

    Args:
        config: of the language model.
        lengths (`Sequence[int]`): tokens of each sample.
        batch_size (`int`): samples of an ordinary batch.
    """
    if free is None:
        return max(1, round(batch_size * sum(lengths) / max(1, len(lengths))))
    # Logits of a chunk of labels, in half and in full precision, and their gradient.
    logits = LOSS_CHUNK * config.vocab_size * (size + 8)
    return max(*lengths, int((USED * free - logits) // bytes_per_token(config, checkpointing, size)))


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a GPU; None for other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
