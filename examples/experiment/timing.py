"""What an answer and a training step of an arm cost, as ratios to the pixel arm's: the two take turns in one process.

What else a machine does changes seconds, and ratios little. Features and clusters are cached; the pixel arm against itself
shows the noise.
"""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from granulon_hf.io import write_text
from granulon_hf.training.stages import frozen_modules, keep_frozen_parts_in_eval

from .training import ANSWER_TOKENS, Run, Study, read_json

ROUNDS = 9
QUESTIONS = 32


def timed(study: Study) -> dict[str, Any]:
    """Of each arm so far: for "answer" and "step" the ratio to pixel, its least and most, and seconds of the pixel arm."""
    path = study.out / "timing.json"
    return read_json(path) if path.exists() else {}


def time_arms(study: Study, names: Sequence[str]) -> None:
    """Write the ratios of those arms that have none yet."""
    for name in names:
        if name not in (found := timed(study)):
            study.stop_if_orphaned()
            write_text(study.out / "timing.json", json.dumps(found | {name: compare(study, name)}, indent=1) + "\n")


def compare(study: Study, name: str) -> dict[str, Any]:
    turns = [works(Run(study, one, 0)) for one in ("pixel", name)]
    seconds: dict[str, list[list[float]]] = defaultdict(list)
    for _ in range(ROUNDS + 1):
        for what in turns[0]:
            seconds[what].append([clock(turn[what]) for turn in turns])
    result = {}
    for what, pairs in seconds.items():
        ratios = [own / pixel for pixel, own in pairs[1:]]  # the first round warms up
        result[what] = {
            "ratio": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
            "pixel_seconds": round(statistics.median(pixel for pixel, _ in pairs[1:]), 4),
        }
    return result


def clock(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def works(run: Run) -> dict[str, Callable[[], Any]]:
    """A batch of answers, no two in a row of one scene, and forward and backward of a training batch; new weights cost what
    trained ones do, since every answer has as many tokens."""
    run.assemble()
    settings, scenes = run.study.settings, [*run.study.scenes["test"][:QUESTIONS]]
    tasks = [(scene := scenes[i % len(scenes)], i % len(scene.questions)) for i in range(QUESTIONS)]
    inputs = run.prompts(tasks)
    inputs["pixel_values"] = run.features_of([scene for scene, _ in tasks])
    frozen = frozen_modules(run.model)
    samples = run.study.conversations("train", 0, 1)
    batch = run.collator([samples[i] for i in range(min(settings.batch_size, len(samples)))])

    def answer() -> None:
        run.model.eval()
        with torch.inference_mode():
            run.generate(inputs, tasks, min_new_tokens=ANSWER_TOKENS)

    def step() -> None:  # as GranulonTrainer takes it
        run.model.train()
        keep_frozen_parts_in_eval(run.model, frozen)
        run.model(**batch, skip_logits=True).loss.backward()
        run.model.zero_grad()

    return {"answer": answer, "step": step}
