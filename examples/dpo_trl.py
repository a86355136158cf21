"""Direct preference optimisation with TRL: two sampled answers, judged; the less hallucinated is preferred. Projector alone.

    OPENAI_API_KEY=… python examples/dpo_trl.py --limit 200 --dry_run          # samples the answers, says what judging costs
    OPENAI_API_KEY=… python examples/dpo_trl.py --limit 200 --max_cost 2       # the demo model on drawn scenes
    python examples/dpo_trl.py --base_url http://localhost:8000/v1 --model qwen2.5-vl --variant path/to/model --data ./flux

Needs `pip install 'granulon-hf[train,judge]'`. --output_dir keeps what cost time or money: answers.jsonl (sampled),
judged.jsonl (every reply of the judge) and pairs.jsonl. A run that was stopped is started again with the same command and asks
for nothing twice; where pairs.jsonl is there it is used as it is. Rows for DPOTrainer are

    {"images": sample.images, "prompt": sample.prompt, "chosen": [assistant turn], "rejected": [assistant turn]}

The collator is ours: in TRL's own the controller would read the answers, and could choose another level for the rejected one.
All options: python examples/dpo_trl.py --help
"""

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed
from trl import DPOConfig, DPOTrainer, TrlParser

from granulon_hf.data import Sample
from granulon_hf.data.collator import GranulonPreferenceCollator, conversation, encode_prompts
from granulon_hf.errors import GranulonError
from granulon_hf.io import Journal, write_text
from granulon_hf.judge.judge import Judge, JudgeError, Options, estimate
from granulon_hf.modeling.images_granulon import open_rgb
from granulon_hf.training.arguments import ModelArguments, TrlDataArguments
from granulon_hf.training.run import build_model, load_samples
from granulon_hf.training.stages import keep_frozen_parts_in_eval


@dataclass
class PairArguments:
    """How answers are sampled and judged."""

    max_new_tokens: int = field(default=64, metadata={"help": "Of a sampled answer."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    model: str = field(default="gpt-4o", metadata={"help": "The judge."})
    base_url: str | None = field(default=None, metadata={"help": "An OpenAI-compatible server; else OPENAI_BASE_URL."})
    max_cost: float | None = field(default=None, metadata={"help": "USD that this run may spend; then it stops."})
    price: list[float] | None = field(
        default=None, metadata={"help": "USD per million prompt and completion tokens of an unusual judge."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Say what judging would cost, and send nothing."})


@dataclass
class Config(DPOConfig):
    """TRL's, with defaults that suit the projector of the demo."""

    output_dir: str | None = "granulon-dpo"
    max_length: int | None = 2048
    learning_rate: float = 1e-5
    logging_steps: float = 5
    save_strategy: str = "no"
    report_to: str = "none"
    bf16: bool | None = False
    gradient_checkpointing: bool = False  # nothing is gained where only the projector is trained


class Trainer(DPOTrainer):
    def compute_loss(self, *args, **kwargs):
        # training_step has just called model.train(), in which a frozen DINOv3 would scale its positions at random.
        keep_frozen_parts_in_eval(self.accelerator.unwrap_model(self.model))
        return super().compute_loss(*args, **kwargs)


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


def make_pairs(args: PairArguments, folder: Path, model, processor, samples) -> list[dict] | None:
    """The pairs of this folder, made where they are not there yet; `None` after a dry run."""
    if (folder / "pairs.jsonl").exists():
        return list(Journal(folder / "pairs.jsonl"))
    prices = {args.model: (args.price[0], args.price[1])} if args.price else None
    options: dict = {"model": args.model, "base_url": args.base_url, "max_cost": args.max_cost, "prices": prices}
    try:
        Options(**options)  # before answers are sampled
    except ValueError as error:
        raise GranulonError(str(error)) from None
    generation = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    answers = sampled(folder / "answers.jsonl", model.eval(), processor, samples, **generation)
    scores = judged(samples, answers, dry_run=args.dry_run, store=folder / "judged.jsonl", **options)
    if args.dry_run:
        print(scores)
        return None
    pairs, counts = prefer(samples, answers, scores)
    print(counts)
    if not pairs:
        raise GranulonError(f"None of {len(samples)} samples gave a pair: {counts}.")
    write_text(folder / "pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    return pairs


def main(arguments: list[str] | None = None) -> DPOTrainer | None:
    parser = TrlParser([ModelArguments, TrlDataArguments, PairArguments, Config])
    parsed: tuple = parser.parse_args_and_config(arguments)
    model_args, data_args, pair_args, config = parsed
    set_seed(config.seed)
    model, processor = build_model(model_args)
    found = load_samples(data_args)
    samples = [found[i] for i in range(len(found))]
    pairs = make_pairs(pair_args, Path(config.output_dir), model, processor, samples)
    if pairs is None:
        return None
    images = {sample.id: sample.images for sample in samples}
    if not all(pair["id"] in images for pair in pairs):
        raise GranulonError(f"The pairs in {config.output_dir!r} are of other samples; say another --output_dir.")
    frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    trainer = Trainer(
        model,
        copy.deepcopy(model, frozen),  # the reference: a second projector on the same backbones
        args=config,
        train_dataset=Dataset.from_list([{"images": images[pair["id"]], **pair} for pair in pairs]),
        processing_class=processor,
        data_collator=GranulonPreferenceCollator(processor, max_length=config.max_length),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    try:
        main()
    except (GranulonError, JudgeError) as error:
        sys.exit(f"Error: {error}")
