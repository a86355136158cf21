"""Time to the first token of the demo model: all pixel tokens and semantic ones beside them, against the compact form.

    python examples/benchmarks/first_token.py                       # AdaTA, pooling and the smaller image, at 16 to 64 tokens
    python examples/benchmarks/first_token.py --reducers adata --budgets 32 --rounds 9

All forms share their backbones and run in turn in this process: processor, vision tower, controller, reducer, prefill and one
new token of one question about one image, in bfloat16 as the demo model is. Printed are medians over rounds, in seconds of the
processor on one thread, and how much faster each is than the first.
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

from granulon_hf.data.collator import conversation, encode_prompts  # noqa: E402
from granulon_hf.data.datasets.shapes import Shapes  # noqa: E402
from granulon_hf.demo_model import build_demo  # noqa: E402
from granulon_hf.modeling.reducers_granulon import REDUCERS  # noqa: E402


def main() -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reducers", nargs="+", default=["adata", "pool", "downsample"], choices=list(REDUCERS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sample = Shapes(1, seed=5)[0]
    asked = [conversation(sample.prompt, sample.images)]
    level = {"name": "most", "alpha": 1, "beta": max(args.budgets), "gamma": 1.0}
    arms = {"pixel+semantic": (*build_demo(), None)}
    for reducer in args.reducers:
        built = build_demo(visual_tokens="semantic", reducer=reducer, granularity_levels=[level])
        arms |= {f"{reducer}@{budget}": (*built, budget) for budget in args.budgets}

    def first_token(model, processor, budget) -> int:
        inputs = encode_prompts(processor, asked, visual_tokens=budget)
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        return int((inputs["input_ids"] == model.config.image_token_id).sum())

    tokens = {name: first_token(*arm) for name, arm in arms.items()}  # which also warms up
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name, arm in arms.items():
            began = time.process_time()
            first_token(*arm)
            seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    rows = [
        {"arm": name, "visual_tokens": tokens[name], "seconds": median, "faster": medians["pixel+semantic"] / median}
        for name, median in medians.items()
    ]
    print("| arm | visual tokens | seconds | faster |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['arm']} | {row['visual_tokens']} | {row['seconds']:.3f} | {row['faster']:.2f} |")
    print(json.dumps(rows))
    return {"rows": rows}


if __name__ == "__main__":
    with torch.inference_mode():
        main()
