"""Preference pairs from the judge: of two sampled answers to a question, the less hallucinated is preferred (ours)."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from granulon_hf.data import Sample
from granulon_hf.data.collator import conversation, encode_prompts
from granulon_hf.errors import GranulonError
from granulon_hf.io import Journal, write_text
from granulon_hf.judge.judge import Judge, estimate
from granulon_hf.modeling.images_granulon import open_rgb


@torch.no_grad()
def sample_answers(model: Any, processor: Any, sample: Sample, **generation: Any) -> list[str]:
    """Sample two answers of a model in eval mode to the last question of a sample; `generation` is for its `generate`."""
    messages = conversation(sample.prompt, [open_rgb(image) for image in sample.images])
    inputs = encode_prompts(processor, [messages]).to(model.device)
    output = model.generate(**inputs, do_sample=True, num_return_sequences=2, **generation)
    return processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def sampled(path: Path, model: Any, processor: Any, samples: Sequence[Sample], **generation: Any) -> list[list[str]]:
    """Sample answers to all samples [N x 2] into a JSONL file, one by one: what a stopped run has is used again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(path)
    found = {row["id"]: row["answers"] for row in journal}
    for sample in samples:
        if sample.id not in found:
            found[sample.id] = sample_answers(model, processor, sample, **generation)
            journal.append([{"id": sample.id, "answers": found[sample.id]}])
    return [found[sample.id] for sample in samples]


def judged(samples: Sequence[Sample], answers: Sequence[Sequence[str]], *, dry_run: bool = False, **options: Any) -> Any:
    """Score the hallucination of two answers to each sample [N x 2], 0-100 or `None`; or, for a dry run, say what that costs.

    Args:
        samples (`list[Sample]`): with one image each, all of one task.
        answers (`list[list[str]]`): [N x 2].
        dry_run (`bool`): send nothing; give the judge's `estimate`.
        **options: of the judge's `compute` (`model`, `base_url`, `store`, `max_cost` …).

    Raises:
        GranulonError: samples that cannot be judged together.
        JudgeError: the run cannot go on; what was paid for is in the store.
    """
    tasks = sorted({sample.task for sample in samples})
    if len(tasks) != 1 or any(len(sample.images) != 1 for sample in samples):
        raise GranulonError(
            f"Answers are judged about one image each, in one task; these are of {', '.join(tasks)}, with "
            f"{sorted({len(sample.images) for sample in samples})} images."
        )
    twice = [sample for sample in samples for _ in range(2)]
    inputs: dict[str, Any] = {
        "predictions": [answer for two in answers for answer in two],
        "images": [sample.images[0] for sample in twice],
        "references": [sample.reference for sample in twice],
        "questions": [sample.question for sample in twice],
    }
    if dry_run:
        return estimate(**inputs, task=tasks[0], **options)
    scores = Judge().compute(**inputs, task=tasks[0], **options)["hallucination_scores"]
    return [scores[i : i + 2] for i in range(0, len(scores), 2)]


def prefer(
    samples: Sequence[Sample], answers: Sequence[Sequence[str]], hallucination: Sequence[Sequence[int | None]]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Make pairs in the form of TRL's `DPOTrainer`, the answer with the lower hallucination score chosen.

    Args:
        samples (`list[Sample]`): N samples.
        answers (`list[list[str]]`): two for each, [N x 2].
        hallucination (`list[list[int | None]]`): the judge's scores, 0-100, `None` where there is none, [N x 2].

    Returns:
        `tuple`: rows with `id`, `prompt`, `chosen`, `rejected` and both scores (the images are the samples'); and how many
        samples became `pairs` and how many were dropped: `ties`, `unscored`, and `empty` for those where an answer has no
        word, which the judge is not asked about (it would count as free of hallucination).
    """
    pairs: list[dict[str, Any]] = []
    counts = {"pairs": 0, "ties": 0, "unscored": 0, "empty": 0}
    for sample, two, scores in zip(samples, answers, hallucination, strict=True):
        (low, chosen), (high, rejected) = sorted(zip(scores, two, strict=True), key=lambda pair: pair[0] or 0)
        if not all(answer.strip() for answer in two):
            counts["empty"] += 1
        elif low is None or high is None:
            counts["unscored"] += 1
        elif low == high:
            counts["ties"] += 1
        else:
            counts["pairs"] += 1
            turns = {"prompt": sample.prompt, "chosen": turn(chosen), "rejected": turn(rejected)}
            pairs.append({"id": sample.id, **turns, "chosen_hallucination": low, "rejected_hallucination": high})
    return pairs, counts


def turn(words: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": words}]}]


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file that is there as a whole or not at all."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file, none where there is no file; lines that are torn are left out."""
    return list(Journal(path))
