"""Train the granularity controller on labelled questions, and measure it on held-out ones. Minutes on a CPU.

    python examples/train_controller.py                                    # the demo model, on the corpus that ships
    python examples/train_controller.py --variant granulon-qwen2.5 --output_dir runs/controller
    granulon controller label questions.txt --out labels.jsonl             # labels of GPT-4o, or of your own server
    python examples/train_controller.py --labels labels.jsonl --variant path/to/model --save_full
    accelerate launch examples/train.py examples/granulon_qwen2.5.yaml --adapter runs/controller   # then the projector

Leaves adapter.safetensors (the controller alone), config.json, results.json and controller.png in --output_dir, which must not
hold weights yet.
All options: python examples/train_controller.py --help
"""

import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from transformers import set_seed

from granulon_hf.errors import GranulonError
from granulon_hf.training.controller import parse, print_results, run_controller, save


def main() -> None:
    args = parse(sys.argv[1:])
    started = time.monotonic()
    set_seed(args.seed)
    results = run_controller(args)
    model, processor = results.pop("model"), results.pop("processor")
    print_results(results, Console(highlight=False))
    settings = {**asdict(args), "labels": Path(args.labels).name}
    results |= {"settings": settings, "command": shlex.join(["python", *sys.argv]), "seconds": time.monotonic() - started}
    save(Path(args.output_dir), model, processor, results, full=args.save_full)
    print(f"{results['seconds']:.0f} s; written to {args.output_dir}")


if __name__ == "__main__":
    try:
        main()
    except GranulonError as error:
        sys.exit(f"Error: {error}")
