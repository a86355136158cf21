"""Train a Granulon model with the supplement's recipe: frozen backbones, projector only.

    accelerate launch examples/train.py                                             # the demo model on drawn scenes, in minutes
    accelerate launch --config_file examples/accelerate_multi_gpu.yaml examples/train.py examples/granulon_qwen2.5.yaml
    accelerate launch --config_file examples/accelerate_zero2.yaml examples/train.py examples/granulon_llama3.2.yaml \\
        --data ./flux-reason-200k --output_dir runs/llama
    accelerate launch examples/train.py examples/granulon_qwen2.5.yaml --variant clip-qwen2.5 --data chat/chat.json
    accelerate launch examples/train.py <as before> --resume_from_checkpoint last   # goes on after a crash or SIGTERM

All options: python examples/train.py --help
"""

import os
import sys
from pathlib import Path

from transformers import set_seed

from granulon_hf.data.collator import GranulonCollator
from granulon_hf.demo.assemble import build_demo
from granulon_hf.training import GranulonTrainer, RecipeError, TrainingFailed, parse
from granulon_hf.training.checkpoints import find_resume
from granulon_hf.training.run import (
    SampleDataset,
    build_model,
    check_device,
    check_samples,
    fill_cache,
    finish,
    load_samples,
    print_table,
    start,
)

DEMO = str(Path(__file__).with_name("demo.yaml"))


def main() -> None:
    model_args, data_args, args = parse(sys.argv[1:] or [DEMO])
    args.resume_from_checkpoint = find_resume(args.resume_from_checkpoint, args.output_dir)
    set_seed(args.seed)

    samples = load_samples(data_args)
    model, processor = build_model(model_args, demo=build_demo)
    collator = GranulonCollator(
        processor,
        max_length=data_args.max_length,
        packing=data_args.batching == "packed",
        pad_to_multiple_of=data_args.pad_to_multiple_of,
    )
    if data_args.feature_cache:
        collator.image_features = fill_cache(data_args.feature_cache, model, processor, samples)
    check_samples(collator, samples)
    check_device(args, model, model_args.stage)

    trainer = GranulonTrainer(
        model,
        args,
        data_collator=collator,
        train_dataset=SampleDataset(samples),
        lengths=collator.lengths(samples) if data_args.batching == "grouped" else None,
        processing_class=processor,
    )
    if trainer.is_world_process_zero():
        described = start(model_args, data_args, args, samples)
        print_table(model, model_args.stage)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        finish(trainer, described, collator)


if __name__ == "__main__":
    try:
        main()
    except (RecipeError, TrainingFailed) as error:
        sys.exit(f"Error: {error}" if int(os.environ.get("RANK", 0)) == 0 else 1)
