"""Labels for the granularity controller by measured value: how well a model answers each question at each level (ours).

The idea is that of AVG-LLaVA's router (aclanthology 2025.findings-acl.865); the price of a token is ours. Nothing is asked of
another model: the loss of the answer that the data holds is computed at every level.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from granulon_hf.data.collator import GranulonCollator
from granulon_hf.data.sample import Sample
from granulon_hf.errors import GranulonError
from granulon_hf.io import Journal, batches


@torch.inference_mode()
def answer_losses(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of every sample's last answer at every level, and what the level costs.

    The vision tower runs once for all levels, unless the reducer looks at more than its features; the answer's logits are
    computed at its own tokens only.

    Args:
        model ([`GranulonForConditionalGeneration`]): in eval mode, with levels.
        batch (`dict`): of [`GranulonCollator`], padded, with labels on the last answer.

    Returns:
        `tuple`: summed losses in nats and visual tokens that the language model sees, each of shape [B x n].
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    rows, columns = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    targets = batch["labels"][rows, columns + 1]
    images = "pixel_values" in inputs
    if images:
        inputs["pixel_values"] = model.model.reusable_features(inputs["pixel_values"])
    losses, tokens = [], []
    for level in range(len(model.config.granularity_levels)):
        outputs = model.model(**inputs, granularity=level)
        logits = model.lm_head(outputs.last_hidden_state[rows, columns]).float()
        loss = F.cross_entropy(logits, targets, reduction="none")
        losses.append(loss.new_zeros(len(batch["labels"])).index_add(0, rows, loss))
        seen = inputs["input_ids"] == model.config.image_token_id
        tokens.append((seen & outputs.attention_mask.bool()).sum(1) if images else seen.sum(1))
    return torch.stack(losses, dim=1), torch.stack(tokens, dim=1)


def label_by_loss(
    model: Any,
    processor: Any,
    samples: Iterable[Sample],
    journal: str | Path,
    batch_size: int = 8,
    on_progress: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """Score the last answer of every sample at every level of a model; what the journal holds is not scored again.

    Args:
        model ([`GranulonForConditionalGeneration`]): in eval mode, with levels.
        processor ([`GranulonProcessor`]): its processor.
        samples (`Iterable[Sample]`): with different ids; a batch of them is in memory at a time.
        journal (`str` or `Path`): JSONL file of the scores, one row per sample.
        batch_size (`int`, defaults to 8): samples at once; scores do not depend on it.
        on_progress (`callable`): called with the number of samples that were found or scored since the last call.

    Returns:
        `list[dict]`: rows with `id`, `text` (the question), `losses` (nats of the whole answer, by level) and `tokens` (visual
        tokens, by level), in the order of the samples; those that cannot be used are left out.

    Raises:
        GranulonError: the model has no levels, or the journal holds scores of other levels.
    """
    names = model.config.level_names
    check_choice(names)
    kept = Journal(journal)
    found = {row["id"]: row for row in kept}
    if any(list(row["losses"]) != names for row in found.values()):
        raise GranulonError(f"{str(journal)!r} holds scores of other levels than {', '.join(names)}; name another --out.")
    order: list[str] = []

    def missing() -> Iterator[Sample]:
        for sample in samples:
            order.append(sample.id)
            if sample.id in found:
                on_progress(1)
            else:
                yield sample

    collator = GranulonCollator(processor, last_answer_only=True)
    for group in batches(missing(), batch_size):
        usable = [sample for sample in group if collator.encode(sample) is not None]
        if usable:
            batch = {name: value.to(model.device) for name, value in collator(usable).items()}
            rows = list(score_rows(usable, *answer_losses(model, batch), names))
            kept.append(rows)
            found |= {row["id"]: row for row in rows}
        on_progress(len(group))
    return [found[name] for name in order if name in found]


def check_choice(levels: Sequence[str]) -> None:
    """Raise GranulonError where there is nothing that a controller could choose."""
    if len(levels) < 2:
        raise GranulonError(
            "The controller chooses among levels, and this model has fewer than two; there is nothing to label."
        )


def score_rows(
    samples: Sequence[Sample], losses: torch.Tensor, tokens: torch.Tensor, names: Sequence[str]
) -> Iterable[dict[str, Any]]:
    """The rows of [`label_by_loss`] for scores of shape [B x n]."""
    for sample, loss, count in zip(samples, losses.tolist(), tokens.tolist(), strict=True):
        yield {
            "id": sample.id,
            "text": sample.question,
            "losses": dict(zip(names, loss, strict=True)),
            "tokens": dict(zip(names, count, strict=True)),
        }
