"""Which samples are answered together: those about one image, those of similar lengths, and no more than memory holds."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from granulon_hf.data.collator import GranulonCollator
from granulon_hf.data.sample import Sample
from granulon_hf.training.memory import USED, free_memory

# Samples at once where nobody says it, without and with a bound on their tokens.
FEW, MANY = 8, 64
# Matrices of AdaTA, with a number in float64 for each pair of an image's patches, that exist at the same time.
MATRICES = 8


def make_batches(model: Any, processor: Any, samples: Sequence[Sample], generation: Any) -> Iterator[list[Sample]]:
    """Make batches as a [`Generation`] says it, or, on a GPU, as its free memory does."""
    if not samples:  # all answers are stored: whoever reads them needs no model
        return iter(())
    budget, free = generation.max_tokens_per_batch, free_memory(model.device)
    if budget is None and free is None:
        return batches_by_image(samples, generation.batch_size or FEW)
    lengths = count_tokens(processor, samples, generation.max_new_tokens, generation.visual_tokens)
    if budget is None:
        budget = fit_tokens(model, lengths, free or 0)
    return batches_by_image(samples, generation.batch_size or MANY, lengths, budget)


def fit_tokens(model: Any, lengths: Sequence[int], free: int) -> int:
    """Estimate how many tokens of prompts and answers fit the free bytes (ours; not measured on a GPU)."""
    config, size = model.config.get_text_config(), model.dtype.itemsize
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * width
    of_token = size * (kept + 8 * config.hidden_size + 3 * config.intermediate_size)  # one layer works at a time
    of_sample = (size + 8) * config.vocab_size + MATRICES * 8 * (model.config.image_seq_length or 0) ** 2
    mean = sum(lengths) / len(lengths)
    return max(max(lengths), int(USED * free / (of_token + of_sample / mean)))


def count_tokens(processor: Any, samples: Sequence[Sample], max_new_tokens: int, visual_tokens: int | None) -> list[int]:
    """Count the tokens of each prompt, image slots included, and of the longest answer."""
    if visual_tokens is not None and processor.visual_tokens == "semantic":
        processor = copy.copy(processor)
        processor.num_semantic_tokens = visual_tokens
    prompts = [{"messages": sample.prompt, "images": sample.images} for sample in samples]
    return [length + max_new_tokens for length in GranulonCollator(processor).lengths(prompts)]


def batches_by_image(
    samples: Sequence[Sample], size: int, lengths: Sequence[int] | None = None, budget: int | None = None
) -> Iterator[list[Sample]]:
    """Batches of samples about one image, which is then encoded once, where it has enough of them; then of all others.

    Long prompts are beside long ones: less padding. The answers depend on neither.

    Args:
        size (`int`): samples of a batch, at most.
        lengths (`Sequence[int]`, *optional*): tokens of each sample; by default characters of its question.
        budget (`int`, *optional*): tokens of a batch with its padding, at most; a longer sample is alone.
    """
    if lengths is None:
        lengths = [len(sample.question) for sample in samples]

    def cut(numbers: list[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        for number in numbers:  # the shortest first
            if len(batch) == size or (batch and budget is not None and (len(batch) + 1) * lengths[number] > budget):
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    groups: dict[str | bytes, list[int]] = {}
    for number in sorted(range(len(samples)), key=lengths.__getitem__):
        groups.setdefault(image_name(samples[number]), []).append(number)
    rest = groups.pop("", [])
    for group in groups.values():
        for batch in cut(group):
            full = 2 * len(batch) >= size or (budget is not None and 2 * len(batch) * lengths[batch[-1]] >= budget)
            # Half a batch that shares its image costs less than its part of a full one that does not.
            if len(batch) > 1 and full:
                yield [samples[number] for number in batch]
            else:
                rest += batch
    for batch in cut(sorted(rest, key=lengths.__getitem__)):
        yield [samples[number] for number in batch]


def image_name(sample: Sample) -> str | bytes:
    """Where a sample's only image is, or a hash of it; nothing where it has none or several."""
    if len(sample.images) != 1:
        return ""
    data = sample.images[0].get("bytes")
    return sample.images[0]["path"] if data is None else hashlib.sha256(data).digest()
