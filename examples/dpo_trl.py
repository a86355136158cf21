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
import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import set_seed
from trl import DPOConfig, DPOTrainer, TrlParser

from granulon_hf.data.collator import GranulonPreferenceCollator
from granulon_hf.errors import GranulonError
from granulon_hf.judge.judge import JudgeError, Options
from granulon_hf.training import DataArguments, ModelArguments
from granulon_hf.training.preferences import judged, prefer, read_lines, sampled, write_lines
from granulon_hf.training.run import build_model, load_samples
from granulon_hf.training.stages import keep_frozen_parts_in_eval


@dataclass
class SampleArguments(DataArguments):
    """What it is trained on."""

    # TRL's arguments have these names too.
    max_length: int | None = field(default=None, init=False)
    pad_to_multiple_of: int | None = field(default=None, init=False)


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


def make_pairs(args: PairArguments, folder: Path, model, processor, samples) -> list[dict] | None:
    """The pairs of this folder, made where they are not there yet; `None` after a dry run."""
    if (folder / "pairs.jsonl").exists():
        return read_lines(folder / "pairs.jsonl")
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
    write_lines(folder / "pairs.jsonl", pairs)
    return pairs


def main(arguments: list[str] | None = None) -> DPOTrainer | None:
    parser = TrlParser([ModelArguments, SampleArguments, PairArguments, Config])
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
