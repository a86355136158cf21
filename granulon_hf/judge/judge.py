"""Judge of answers about images: accuracy and hallucination, 0-100 each, scored by GPT-4o or any OpenAI-compatible model.

This folder is the Space `granulon/judge` and stands alone. `evaluate` copies the files that this one imports, and names the
packages that are missing among its imports: all of them are imported here, used or not, each on a line of its own.
"""
# ruff: noqa: F401

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import evaluate
import filelock
import numpy
import openai
import PIL
import pydantic

from .batch import BatchRun
from .client import JudgeError, Run
from .images import encode_image, image_tokens, open_image, to_rgb
from .options import PRICES_DATE, Options, Unit, columns_of, cost_of, digest_of, estimate, foresee, price_of, units_of
from .prompts import REPAIR, fence, response_formats, segments_of
from .rate import Limiter
from .replies import NoBoolean, parse, read_object, to_row
from .store import Store

_INPUTS = """
Args:
    predictions (list of str): answers to be scored; an empty one is not sent and scores 0 and 0.
    images (list): PIL images, paths, or `datasets.Image` values.
    references (list of str, optional): right answers ("vqa") or captions ("caption"); task "reasoning" never sends them.
    questions (list of str, optional): for "vqa"; task "reasoning" never sends them.
    task (str): "reasoning" (the supplement's prompt), "vqa" or "caption" (prompts of ours).
    model (str): the judge; its price must be in `prices` ({model: (USD per million prompt tokens, completion tokens)}) if
    unusual. store (str): JSONL file of all answers; a run with the same inputs asks only what is missing in it. None keeps
    nothing. hardened (bool): fence lines and a system message against instructions in predictions; False sends the printed
    prompt alone. segments (int, optional): also score this many chronological segments of each prediction.
    backend (str): "chat", or "batch" for the Batch API, which costs half and takes up to a day (`poll_seconds` between looks).
    detail (str): "high" or "low", of the image.
    base_url, api_key, organization, azure_endpoint, api_version: default to OpenAI's environment variables.
    rpm, tpm (float, optional): requests and tokens per minute; learnt from the server's headers by default. concurrency (int).
    timeout (s), max_retries, max_wait (s that the server may make a request wait), max_tokens, temperature, seed.
    response_format (str): "auto" tries "json_schema", "json_object", "none", in this order, until the server takes one.
    max_cost (float, optional): USD that this run may spend; then it stops cleanly. retry_unscored (bool): ask those again.
    on_result (callable, optional): called with a dict after every unit: sample, segment, done, total, accuracy, hallucination,
        reason, cached, spent_usd.
Returns:
    dict: accuracy, hallucination (means of all scores, 0 for empty predictions; *_nonempty without those), *_ci (95 %
    bootstrap), *_scores (None where unscored), reasons, empty, n = n_scored + n_unscored + n_empty, tokens, cost_usd (all
    answers used), spent_usd (this run), judge_models (as the server reports them), hardened, segments (lists segment by
    segment), ...
"""


class Judge(evaluate.Metric):
    """Score answers about images; see `inputs_description`."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Accuracy and hallucination (0-100 each) of answers about images, scored by a multimodal judge.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": text, "images": datasets.Image(decode=False), "references": text, "questions": text}
            ),
        )

    def add_batch(self, *, predictions=None, references=None, images=None, questions=None, **kwargs):
        """Add predictions with their images; references and questions may be left out."""
        super().add_batch(**columns_of(predictions, images, references, questions), **kwargs)

    def add(self, *, prediction=None, reference=None, images=None, questions=None, **kwargs):
        """Add one prediction with its image (`images=`, `questions=`: one each)."""
        self.add_batch(predictions=[prediction], images=[images], references=[reference], questions=[questions], **kwargs)

    def compute(self, *, predictions=None, references=None, images=None, questions=None, **kwargs):
        """Score what is given here or was added before.

        Raises:
            JudgeError: the run cannot go on (key, quota, model, network); what was paid for is in the store.
        """
        Options(**kwargs)  # a wrong argument fails here
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references, images=images, questions=questions)
        elif images is not None or references is not None or questions is not None:
            raise ValueError("Give predictions= too.")
        return super().compute(**kwargs)

    def _compute(self, **inputs):
        columns = {name: list(inputs.pop(name)) for name in self.features}
        options = Options(**inputs)
        return report(columns, ask(units_of(columns, options), options))

    estimate = staticmethod(estimate)


def ask(units: list[Unit], options: Options) -> Run:
    """Ask for all units, by the store or the judge; return the run with its results."""
    with contextlib.closing(Store(options.store)) as store:
        run = (BatchRun if options.backend == "batch" else Run)(options, units, store)
        run_blocking(run.run)
    return run


def run_blocking(function: Callable[[], Coroutine]) -> None:
    """Run a coroutine function to its end, inside a running event loop (a notebook) too: there in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(function())
        return
    loop = asyncio.new_event_loop()
    with contextlib.closing(loop), ThreadPoolExecutor(1) as pool:
        task = loop.create_task(function())
        try:
            pool.submit(loop.run_until_complete, task).result()
        except KeyboardInterrupt:  # the run stops as it does outside of a loop: what is under way is awaited and stored
            loop.call_soon_threadsafe(task.cancel)
            raise


def mean_and_interval(scores: list, n_resamples: int) -> tuple[float | None, list[float] | None]:
    """Return the mean of the scores that are not None, and its 95 % percentile bootstrap interval (seed 0)."""
    values = numpy.array([score for score in scores if score is not None], dtype=float)
    if not len(values):
        return None, None
    draw = numpy.random.default_rng(0)
    means = [values[draw.integers(len(values), size=len(values))].mean() for _ in range(n_resamples)]
    return float(values.mean()), [float(edge) for edge in numpy.percentile(means, [2.5, 97.5])]


def summarize(scored: list[dict], n_resamples: int) -> dict:
    """Return means, intervals, the scores themselves and the reasons where there are none."""
    summary: dict[str, Any] = {}
    for name in ("accuracy", "hallucination"):
        scores = [sample[name] for sample in scored]
        summary[name], summary[f"{name}_ci"] = mean_and_interval(scores, n_resamples)
        summary[f"{name}_scores"] = scores
    summary["reasons"] = [sample["reason"] for sample in scored]
    return summary


def report(columns: dict[str, list], run: Run) -> dict:
    """Make the result of `compute`."""
    options = run.options
    found = {(unit.sample, unit.segment): result for unit, result in zip(run.units, run.results, strict=True)}
    empty = [not text.strip() for text in columns["predictions"]]
    zero = {"accuracy": 0, "hallucination": 0, "reason": None}
    samples = [found.get((i, None), zero) for i in range(len(empty))]
    sent = [found[i, None] for i in range(len(empty)) if not empty[i]]
    paid = {result["key"]: result["rows"] for result in run.results if result["rows"]}
    rows = [row for answers in paid.values() for row in answers]
    tokens = {name: sum(row.get(name, 0) for row in rows) for name in ("prompt_tokens", "completion_tokens")}
    output = {
        **summarize(samples, options.n_resamples),
        "empty": empty,
        "n": len(samples),
        "n_scored": sum(sample["accuracy"] is not None for sample in sent),
        "n_unscored": sum(sample["accuracy"] is None for sample in sent),
        "n_empty": sum(empty),
        **{f"{name}_nonempty": mean_and_interval([s[name] for s in sent], 1)[0] for name in ("accuracy", "hallucination")},
        "n_requests": run.n_requests,
        "n_repaired": sum(len(answers) == 2 for answers in paid.values()),
        "tokens": {**tokens, "total_tokens": sum(tokens.values())},
        "cost_usd": cost_of(rows, options.model, options.prices),
        "spent_usd": run.spent if run.price else None,
        "prices_date": PRICES_DATE,
        "judge_models": sorted({str(row["model"]) for row in rows if row.get("model")}),
        "task": options.task,
        "model": options.model,
        "hardened": options.hardened,
        "response_formats": sorted({str(row.get("response_format")) for row in rows}),
        "parameters": {**run.extras, "detail": options.detail},
    }
    if options.segments:
        missing = {**options.nothing, "reason": None}  # a segment without words
        places = [[found.get((i, j), missing) for i in range(len(samples))] for j in range(options.segments)]
        by_segment = [summarize(place, options.n_resamples) for place in places]
        output["segments"] = {name: [summary[name] for summary in by_segment] for name in by_segment[0]}
    return output
