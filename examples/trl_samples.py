"""The same samples in TRL: supervised fine-tuning, then preferences, on a toy model and the photographs beside this file.

    python examples/trl_samples.py

Needs `pip install 'granulon-hf[train]'`; under a minute on a CPU. TRL takes rows of a `datasets.Dataset`:

    SFTTrainer   Dataset.from_list([sample.to_dict() for sample in samples])
    DPOTrainer   Dataset.from_list([{"images": sample.images, "prompt": sample.prompt, "chosen": …, "rejected": …} for …])

Both are given our collators. TRL's own would put labels on questions and image slots, let the controller read the answers, and
refuse packing. TRL also computes the loss itself: `pixel_loss_weight` and `semantic_loss_weight` have no effect in it.
"""

import copy
import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from granulon_hf import variants  # noqa: E402
from granulon_hf.data import Sample  # noqa: E402
from granulon_hf.data.collator import GranulonCollator, GranulonPreferenceCollator  # noqa: E402

ANSWERS = {"chelsea": "A cat.", "coffee": "A cup of coffee.", "rocket": "A rocket."}


def photographs() -> list[Sample]:
    return [
        Sample(
            id=name,
            images=[{"bytes": None, "path": str(ROOT / f"examples/images/{name}.jpg")}],
            messages=[
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]},
                text("assistant", answer),
            ],
            reference=answer,
            task="caption",
        )
        for name, answer in ANSWERS.items()
    ]


def text(role: str, words: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": words}]}


def main(folder: str, steps: int = 10) -> list[list[float]]:
    """The losses of both trainers, step by step."""
    model, processor = variants.build("granulon-qwen2.5", tiny=True)
    model.model.vision_tower.requires_grad_(False)
    samples = photographs()
    options = dict(
        output_dir=folder,
        max_steps=steps,
        learning_rate=1e-2,
        per_device_train_batch_size=len(samples),
        use_cpu=True,
        bf16=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
    )

    sft = SFTTrainer(
        model,
        SFTConfig(**options),
        train_dataset=Dataset.from_list([sample.to_dict() for sample in samples]),
        processing_class=processor,
        data_collator=GranulonCollator(processor, packing=True),  # TRL's own packing stays off
    )
    sft.train()

    dpo = DPOTrainer(
        model,
        copy.deepcopy(model),
        args=DPOConfig(**options),
        train_dataset=Dataset.from_list(
            [
                {
                    "images": sample.images,
                    "prompt": sample.prompt,
                    "chosen": sample.messages[-1:],
                    "rejected": [text("assistant", "A green car.")],
                }
                for sample in samples
            ]
        ),
        processing_class=processor,
        data_collator=GranulonPreferenceCollator(processor),
    )
    dpo.train()
    return [[float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry] for trainer in (sft, dpo)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sft, dpo = main(folder)
    print(f"SFT loss {sft[0]:.3f} -> {sft[-1]:.3f}, DPO loss {dpo[0]:.3f} -> {dpo[-1]:.3f}")
