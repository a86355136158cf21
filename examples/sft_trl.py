"""Supervised fine-tuning with TRL's SFTTrainer: the projector alone, answers labelled by our collator, packed.

    python examples/sft_trl.py                                  # a fresh projector for the demo model, on drawn scenes
    python examples/sft_trl.py --variant granulon-qwen2.5 --tiny --use_cpu --max_steps 10        # seconds, random weights
    accelerate launch examples/sft_trl.py --variant granulon-qwen2.5 --data ./flux-reason-200k --output_dir runs/sft \\
        --per_device_train_batch_size 8 --learning_rate 1e-4 --max_steps 3000

Needs `pip install 'granulon-hf[train]'`. Samples become what TRL takes in one line:

    Dataset.from_list([sample.to_dict() for sample in samples])

The collator is ours: it works with any chat template and packs, which TRL's own does not do with images (TRL's `packing` stays
off; examples/quantization.md says what its collator needs). TRL computes the loss itself: `pixel_loss_weight` and
`semantic_loss_weight` have no effect.
All options: python examples/sft_trl.py --help
"""

import sys
from dataclasses import dataclass

from datasets import Dataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer, TrlParser

from granulon_hf.data.collator import GranulonCollator
from granulon_hf.errors import GranulonError
from granulon_hf.training.arguments import ModelArguments, TrlDataArguments
from granulon_hf.training.run import build_model, load_samples
from granulon_hf.training.stages import keep_frozen_parts_in_eval


@dataclass
class Config(SFTConfig):
    """TRL's, with defaults that suit the projector of the demo."""

    output_dir: str | None = "granulon-sft"
    max_length: int | None = 2048
    learning_rate: float = 1e-3
    max_steps: int = 60
    logging_steps: float = 5
    save_strategy: str = "no"
    report_to: str = "none"
    bf16: bool | None = False
    gradient_checkpointing: bool = False  # nothing is gained where only the projector is trained


class Trainer(SFTTrainer):
    def compute_loss(self, *args, **kwargs):
        # training_step has just called model.train(), in which a frozen DINOv3 would scale its positions at random.
        keep_frozen_parts_in_eval(self.accelerator.unwrap_model(self.model))
        return super().compute_loss(*args, **kwargs)


def main(arguments: list[str] | None = None) -> SFTTrainer:
    parser = TrlParser([ModelArguments, TrlDataArguments, Config])
    parsed: tuple = parser.parse_args_and_config(arguments)
    model_args, data_args, config = parsed
    set_seed(config.seed)
    model, processor = build_model(model_args, fresh=True)
    samples = load_samples(data_args)
    trainer = Trainer(
        model,
        config,
        train_dataset=Dataset.from_list([samples[i].to_dict() for i in range(len(samples))]),
        processing_class=processor,
        data_collator=GranulonCollator(processor, max_length=config.max_length, packing=data_args.batching == "packed"),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    try:
        main()
    except GranulonError as error:
        sys.exit(f"Error: {error}")
