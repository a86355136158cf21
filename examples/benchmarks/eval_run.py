"""Seconds that answers take: in batches, as `granulon eval run` makes them, against one by one, as the released eval.py does.

    python examples/benchmarks/eval_run.py                      # the demo model on drawn scenes, on a CPU
    python examples/benchmarks/eval_run.py --model tiny:granulon-qwen2.5 --samples 32

Both loops run in this process in turns, on the same model in float32 and the same samples, with the same limit of new tokens,
and must give the same answers, or the script fails. Printed are the medians over rounds, in seconds of the processor on a CPU
and of the clock on a GPU, and their ratio.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from granulon_hf.cli.eval import loader  # noqa: E402
from granulon_hf.data.shapes import Shapes  # noqa: E402
from granulon_hf.evaluation.prediction import Generation, answer_batch, batched  # noqa: E402


def main() -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    model, processor, _ = loader(args.model, args.device, "float32")
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    torch.set_num_threads(1)
    shapes = Shapes(args.samples, seed=5)
    samples = [shapes[i] for i in range(args.samples)]
    generation = Generation(args.max_new_tokens, batch_size=args.batch_size)
    seconds: dict[str, list[float]] = {"one by one": [], "batched": []}
    answers: dict[str, list[str]] = {}
    for round_number in range(args.rounds):
        arms = [("one by one", 1), ("batched", args.batch_size)]
        for name, size in arms if round_number % 2 else arms[::-1]:
            started = clock()
            rows = [row for batch in batched(samples, size) for row in answer_batch(model, processor, batch, generation)]
            seconds[name].append(clock() - started)
            answers[name] = [row["prediction"] for row in rows]
    if answers["one by one"] != answers["batched"]:
        sys.exit("The answers differ.")
    medians = {name: round(statistics.median(values), 2) for name, values in seconds.items()}
    result = {"model": args.model, "samples": args.samples, "batch_size": args.batch_size, "rounds": args.rounds, **medians}
    result["ratio"] = round(medians["one by one"] / max(medians["batched"], 1e-9), 2)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
