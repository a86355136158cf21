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
import scipy

from .batch import BatchRun
from .client import Run
from .images import encode_image, image_id, open_image, refuse_address, to_rgb
from .known_models import SOURCE
from .models import PRICES_DATE, find_model, image_tokens, known_names
from .options import Options, Unit, columns_of, digest_of, estimate, foresee, panel_of, units_of
from .panel import Panel, is_answered
from .prompts import REPAIR, fence, response_formats, segments_of
from .rate import Limiter
from .replies import NoBoolean, parse, read_object, to_row
from .reports import report
from .server import JudgeError
from .stats import clusters_of
from .store import Store

_INPUTS = """
Args:
    predictions (list of str): answers to be scored; an empty one is not sent and scores 0 and 0.
    images (list): PIL images, paths, or `datasets.Image` values.
    references (list of str, optional): right answers ("vqa") or captions ("caption"); task "reasoning" never sends them.
    questions (list of str, optional): for "vqa"; task "reasoning" never sends them.
    task (str): "reasoning" (the supplement's prompt), "vqa" or "caption" (prompts of ours).
    model (str, or list of str): the judge, or a panel whose scores are averaged; of unusual ones `prices` ({model: (USD per
    million prompt tokens, completion tokens)}) or `judge_models` ({model: fields of `JudgeModel`}) say what they cost and are.
    samples (int): how often each judge rates each text; a `temperature` above 0 makes it more than a repetition.
    store (str): JSONL file of all answers; a run with the same inputs asks only what is missing in it. None keeps nothing.
    hardened (bool): fence lines and a system message against instructions in predictions; False sends the printed prompt alone.
    segments (int, optional): also score this many chronological segments of each prediction.
    backend (str): "chat", or "batch" for the Batch API, which costs half and takes up to a day (`poll_seconds` between looks).
    detail (str): "high" or "low", of the image.
    base_url, api_key, organization, azure_endpoint, api_version: default to OpenAI's environment variables.
    rpm, tpm (float, optional): requests and tokens per minute; learnt from the server's headers by default. concurrency (int).
    timeout (s, and one more for every 10 tokens that `max_tokens` allows beyond 100), max_retries, max_wait (s that the server
    may make a request wait), temperature (0; not sent to a judge that reasons), reasoning_effort ("low" for one that does),
    max_tokens (100, or 4,000 where it reasons; an answer that reaches it is asked for once more with four times as many, at
    least 4,096), seed.
    response_format (str): "auto" tries "json_schema", "json_object", "none", in this order, until the server takes one.
    max_cost (float, optional): USD that this run may spend; then it stops cleanly. retry_unscored (bool): ask those again.
    on_result (callable, optional): called with a dict after every unit: sample, segment, done, total, accuracy, hallucination,
        reason, cached, spent_usd.
Returns:
    dict: accuracy, hallucination (means of all scores, 0 for empty predictions; *_nonempty without those), *_ci (95 %
    bootstrap over images; None for a single image, or where all are scored alike), *_scores (None where unscored), reasons,
    empty, image_ids (digests), n_images, n = n_scored + n_unscored + n_empty, tokens, cost_usd (all answers used), spent_usd
    (this run), judge_models (as the server reports them), hardened, segments (lists segment by segment), with a panel or
    samples also *_spread (standard deviations) and judges (the same for each judge), ...
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
        panel_of(**kwargs)  # a wrong argument fails here
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references, images=images, questions=questions)
        elif images is not None or references is not None or questions is not None:
            raise ValueError("Give predictions= too.")
        return super().compute(**kwargs)

    def _compute(self, **inputs):
        columns = {name: list(inputs.pop(name)) for name in self.features}
        panel = [(options, units_of(columns, options)) for options in panel_of(**inputs)]
        return report(columns["predictions"], columns["images"], ask_panel(panel))

    estimate = staticmethod(estimate)


def ask(units: list[Unit], options: Options) -> Run:
    """Ask one judge for all units; see `ask_panel`."""
    return ask_panel([(options, units)])[0]


def ask_panel(panel: list[tuple[Options, list[Unit]]]) -> list[Run]:
    """Ask all judges for their units, by the one store or the judge, answer by answer; return the runs with their results.

    Raises:
        ValueError: a judge is unknown or retired, and has something left to answer; nothing was sent.
        JudgeError: the run cannot go on; what was paid for is in the store.
    """
    runs: list[Run] = []
    with contextlib.closing(Store(panel[0][0].store)) as store:
        for options, units in panel:
            if (refusal := options.refusal()) and not all(is_answered(unit, options, store) for unit in units):
                raise ValueError(refusal)
            runs.append((BatchRun if options.backend == "batch" else Run)(options, units, store, runs))
        run_blocking(Panel(runs).run)
    return runs


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
