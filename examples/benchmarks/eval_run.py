"""Seconds that answers take: in batches, as `granulon eval run` makes them, against one by one, as the released eval.py does.

    python examples/benchmarks/eval_run.py                      # the demo model on drawn scenes, on a CPU
    python examples/benchmarks/eval_run.py --model tiny:granulon-qwen2.5 --samples 32
    python examples/benchmarks/eval_run.py --questions 8        # many questions about one image

Both loops run in this process in turns, on the same model in float32 and the same samples, with the same limit of new tokens,
and must give the same answers, or the script fails. Printed are the medians over rounds, in seconds of the processor on a CPU
and of the clock on a GPU, and their ratio. With `--questions` it is the time to the first token of all answers, of
`prefill_shared_image` against an ordinary batch; tower, controller, projector, clustering and the processor are in it on both
sides.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from granulon_hf.data.datasets.shapes import Shapes  # noqa: E402
from granulon_hf.evaluation.answer import (  # noqa: E402
    Generation,
    answer_batch,
    prefill_shared_image,
)
from granulon_hf.io import batches  # noqa: E402
from granulon_hf.loading import load_model  # noqa: E402
from granulon_hf.modeling.images_granulon import open_rgb  # noqa: E402


def main() -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--questions", type=int, default=0)
    args = parser.parse_args()
    model, processor, _ = load_model(args.model, args.device, "float32")
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    torch.set_num_threads(1)
    if args.questions:
        return many_questions(args, model, processor, clock)
    shapes = Shapes(args.samples, seed=5)
    samples = [shapes[i] for i in range(args.samples)]
    generation = Generation(args.max_new_tokens, batch_size=args.batch_size)
    seconds: dict[str, list[float]] = {"one by one": [], "batched": []}
    answers: dict[str, list[str]] = {}
    for round_number in range(args.rounds):
        arms = [("one by one", 1), ("batched", args.batch_size)]
        for name, size in arms if round_number % 2 else arms[::-1]:
            started = clock()
            rows = [row for batch in batches(samples, size) for row in answer_batch(model, processor, batch, generation)]
            seconds[name].append(clock() - started)
            answers[name] = [row["prediction"] for row in rows]
    if answers["one by one"] != answers["batched"]:
        sys.exit("The answers differ.")
    medians = {name: round(statistics.median(values), 2) for name, values in seconds.items()}
    result = {"model": args.model, "samples": args.samples, "batch_size": args.batch_size, "rounds": args.rounds, **medians}
    result["ratio"] = round(medians["one by one"] / max(medians["batched"], 1e-9), 2)
    print(json.dumps(result))
    return result


WORDS = ("top left", "top right", "bottom left", "bottom right")


def many_questions(args, model, processor, clock) -> dict:
    sample = Shapes(1, seed=5)[0]
    questions = [f"What is in the {WORDS[i % 4]} corner of picture {i}?" for i in range(args.questions)]
    turns = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
    samples = [replace(sample, id=str(i), messages=[{"role": "user", "content": turn}]) for i, turn in enumerate(turns)]

    def plain(tokens: int) -> list[str]:
        return [row["prediction"] for row in answer_batch(model, processor, samples, Generation(tokens))]

    def shared(tokens: int) -> list[str]:
        inputs = prefill_shared_image(model, processor, open_rgb(sample.images[0]), questions)
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in processor.batch_decode(output, skip_special_tokens=True)]

    if plain(args.max_new_tokens) != shared(args.max_new_tokens):
        sys.exit("The answers differ.")
    seconds: dict[str, list[float]] = {"plain": [], "shared": []}
    for round_number in range(args.rounds):
        arms = [("plain", plain), ("shared", shared)]
        for name, arm in arms if round_number % 2 else arms[::-1]:
            started = clock()
            arm(1)
            seconds[name].append(clock() - started)
    medians = {name: round(statistics.median(values), 2) for name, values in seconds.items()}
    result = {"model": args.model, "questions": args.questions, "rounds": args.rounds, **medians}
    result["ratio"] = round(medians["plain"] / max(medians["shared"], 1e-9), 2)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
