"""How much of a judge's rate limit is used, and how many samples are lost, against a server that misbehaves as real ones do.

    python examples/benchmarks/judge_throughput.py --samples 1000 --rpm 1200

The server runs in this process: latency log-normal around 1.2 s, 2 % of the answers 6 s late, 2 % status 500, 1 % broken
connections, 2 % answers that are no JSON; a token bucket of `--rpm` requests a minute (`--burst` at once) with OpenAI's
headers, and 429 with Retry-After beyond it. The loop of the released script (one request after the other) is measured on
`--loop` samples. Prints one JSON line: `budget_used` is accepted requests by what the limit allowed in the time from the first
to the last request; `lost` are samples without an answer; `unparsable` had a bad answer, and a bad one to the repair request.
"""

import argparse
import json
import logging
import random
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from granulon_hf.judge.judge import Judge  # noqa: E402
from tests.judge.server import Reply, Server  # noqa: E402


class Limits:
    """Behaviour of the server, told by a token bucket."""

    def __init__(self, rpm: float, burst: float, seed: int):
        self.rate, self.burst, self.level, self.time = rpm / 60, burst, burst, time.monotonic()
        self.rpm, self.random, self.accepted, self.refused = rpm, random.Random(seed), [], 0

    def __call__(self, server, body):
        with server.lock:
            now = time.monotonic()
            self.level, self.time = min(self.burst, self.level + (now - self.time) * self.rate), now
            headers = {"x-ratelimit-limit-requests": f"{self.rpm:.0f}"}
            if self.level < 1:
                self.refused += 1
                headers |= {"x-ratelimit-remaining-requests": "0", "Retry-After": f"{(1 - self.level) / self.rate:.3f}"}
                return Reply(status=429, error=("rate_limit_exceeded", "slow down"), headers=headers)
            self.level -= 1
            self.accepted.append(now)
            headers["x-ratelimit-remaining-requests"] = f"{int(self.level)}"
            draw, delay = self.random.random(), self.random.lognormvariate(0.18, 0.3)
        if draw < 0.02:
            return Reply(status=500, headers=headers, delay=0.3)
        if draw < 0.03:
            return Reply(reset=True, delay=0.3)
        if draw < 0.05:
            return Reply("Accuracy: 70, hallucination: 20", headers=headers, delay=delay)
        return Reply(headers=headers, delay=6 if draw < 0.07 else delay)


def judged(arguments, n: int, **options) -> dict:
    limits = Limits(arguments.rpm, arguments.burst or arguments.rpm / 60, arguments.seed)
    images = [Image.new("RGB", (64, 64), (i % 256, i // 256, 0)) for i in range(n)]
    with Server(limits) as server, tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        result = Judge(cache_dir=folder).compute(
            predictions=[f"Answer {i}." for i in range(n)],
            images=images,
            base_url=server.url,
            api_key="-",
            store=f"{folder}/scores.jsonl",
            **options,
        )
        took = time.monotonic() - start
    window = limits.accepted[-1] - limits.accepted[0]
    return {
        "seconds": round(took, 1),
        "lost": sum(bool(reason) and "unparsable" not in reason for reason in result["reasons"]),
        "unparsable": sum("unparsable" in (reason or "") for reason in result["reasons"]),
        "budget_used": round(len(limits.accepted) / (limits.burst + limits.rate * window), 3),
        "refused_429": limits.refused,
        "requests": result["n_requests"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--rpm", type=float, default=1200)
    parser.add_argument("--burst", type=float, help="requests at once (default: a second's worth)")
    parser.add_argument("--loop", type=int, default=20, help="samples of the one-by-one loop")
    parser.add_argument("--tell", action="store_true", help="tell the judge the limit (rpm=) instead of letting it learn")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable()
    ours = judged(arguments, arguments.samples, **({"rpm": arguments.rpm} if arguments.tell else {}))
    loop = judged(arguments, arguments.loop, concurrency=1)["seconds"] / arguments.loop * arguments.samples
    times = {"loop_seconds": round(loop), "faster": round(loop / ours["seconds"], 1)}
    print(json.dumps({**vars(arguments), **ours, **times}))
