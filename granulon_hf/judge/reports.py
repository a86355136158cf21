"""What a run found, as `compute` returns it: means with intervals, sample by sample, of one judge and of a panel.

A *rating* is what one judge says once of a text; with `samples` a judge rates it several times, and its score is their mean.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from .client import Run
from .images import image_id
from .stats import bootstrap_mean, clusters_of

SCORES = ("accuracy", "hallucination")


def mean_of(scores: Sequence) -> float | None:
    """Return the mean of the scores that are not None."""
    values = [score for score in scores if score is not None]
    return statistics.fmean(values) if values else None


def interval_of(scores: Sequence, images: Sequence[int], n_resamples: int) -> list[float] | None:
    """Return the 95 % bootstrap interval, over images, of the mean of the scores that are not None."""
    places = [i for i, score in enumerate(scores) if score is not None]
    if not places:
        return None
    own = [scores[i] for i in places], [images[i] for i in places]
    _, low, high = bootstrap_mean(*own, n_resamples=n_resamples, top=100.0)
    return None if math.isnan(low) else [low, high]


def average(ratings: list[dict], every: bool = False) -> dict:
    """Return the mean of those ratings that are scores; with `every` there is none unless all are."""
    missing = [rating for rating in ratings if rating["accuracy"] is None]
    scored = [rating for rating in ratings if rating["accuracy"] is not None]
    if len(ratings) == 1 or not scored or (every and missing):
        return (missing or ratings)[0]
    return {**{name: statistics.fmean(rating[name] for rating in scored) for name in SCORES}, "reason": None}


def spread(ratings: list[dict], name: str) -> float | None:
    """Return the standard deviation of ratings, None where fewer than two are scores."""
    scores = [rating[name] for rating in ratings if rating[name] is not None]
    return statistics.stdev(scores) if len(scores) > 1 else None


def summarize(scored: list[dict], images: list[int], n_resamples: int) -> dict:
    """Return means, intervals, the scores themselves and the reasons where there are none."""
    summary: dict[str, Any] = {}
    for name in SCORES:
        scores = [sample[name] for sample in scored]
        summary[name], summary[f"{name}_ci"] = mean_of(scores), interval_of(scores, images, n_resamples)
        summary[f"{name}_scores"] = scores
    summary["reasons"] = [sample["reason"] for sample in scored]
    return summary


def scored_units(texts: list[str], run: Run) -> dict[tuple[int, int | None], list[dict]]:
    """Return the ratings of one judge by sample and segment, once for each time that it was asked; empty texts have zeros."""
    found: dict[tuple[int, int | None], list[dict]] = {}
    for unit, result in zip(run.units, run.results, strict=True):
        found.setdefault((unit.sample, unit.segment), []).append(result)
    zero = {"accuracy": 0, "hallucination": 0, "reason": None}
    missing = {**run.options.nothing, "reason": None}  # a segment without words
    for i in range(len(texts)):
        found.setdefault((i, None), [zero] * run.options.samples)
        for segment in range(run.options.segments or 0):
            found.setdefault((i, segment), [missing])
    return found


def counts_of(samples: list[dict], empty: list[bool], images: list[int]) -> dict[str, int]:
    """Count the samples; `n_images` is how many images the scores are of, over which intervals are."""
    sent = [sample["accuracy"] for sample, nothing in zip(samples, empty, strict=True) if not nothing]
    n_unscored = sent.count(None)
    n_images = len({image for sample, image in zip(samples, images, strict=True) if sample["accuracy"] is not None})
    counts = {"n": len(samples), "n_scored": len(sent) - n_unscored, "n_unscored": n_unscored, "n_empty": sum(empty)}
    return {**counts, "n_images": n_images}


def spending(run: Run) -> dict[str, Any]:
    """Return what the answers of one judge took, and how they were asked for."""
    options = run.options
    paid = {result["key"]: result["rows"] for result in run.results if result["rows"]}
    rows = [row for answers in paid.values() for row in answers]
    tokens = {name: sum(row.get(name, 0) for row in rows) for name in ("prompt_tokens", "completion_tokens")}
    return {
        "n_requests": run.n_requests,
        "n_repaired": sum("repair" in options.remedies(answers[:-1]) for answers in paid.values()),
        "n_lengthened": sum("larger" in options.remedies(answers[:-1]) for answers in paid.values()),
        "tokens": {**tokens, "total_tokens": sum(tokens.values())},
        "cost_usd": options.cost(rows),
        "lost_usd": run.lost if run.price else None,
        "spent_usd": run.spent if run.price else None,
        "judge_models": sorted({str(row["model"]) for row in rows if row.get("model")}),
        "response_formats": sorted({str(row.get("response_format")) for row in rows}),
    }


def added(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up what several judges took; lists are joined, and what one of them does not know is not known."""
    total: dict[str, Any] = {}
    for name, first in parts[0].items():
        values = [part[name] for part in parts]
        if isinstance(first, dict):
            total[name] = added(values)
        elif isinstance(first, list):
            total[name] = sorted(set().union(*values))
        else:
            total[name] = None if None in values else sum(values)
    return total


def report(texts: list[str], pictures: list[dict], runs: list[Run]) -> dict:
    """Make the result of `compute` of the runs of all judges; what is scored are texts about pictures."""
    options = runs[0].options
    ids = [image_id(picture) for picture in pictures]
    images = clusters_of([] if name is None else [name] for name in ids)
    by_judge = [scored_units(texts, run) for run in runs]
    means = [{place: average(ratings) for place, ratings in found.items()} for found in by_judge]
    panel = {place: average([one[place] for one in means], every=True) for place in means[0]}
    samples = [panel[i, None] for i in range(len(texts))]
    empty = [not text.strip() for text in texts]
    spent = [spending(run) for run in runs]
    output = {
        **summarize(samples, images, options.n_resamples),
        "empty": empty,
        "image_ids": ids,
        **counts_of(samples, empty, images),
        **{
            f"{name}_nonempty": mean_of([s[name] for s, nothing in zip(samples, empty, strict=True) if not nothing])
            for name in SCORES
        },
        **added(spent),
        "prices_date": next((date for run in runs if (date := run.options.prices_date)), None),
        "task": options.task,
        "model": options.model if len(runs) == 1 else [run.options.model for run in runs],
        "samples": options.samples,
        "hardened": options.hardened,
        "parameters": {**runs[0].extras, "detail": options.detail},
    }
    if options.segments:
        places = [[panel[i, j] for i in range(len(samples))] for j in range(options.segments)]
        by_segment = [summarize(place, images, options.n_resamples) for place in places]
        output["segments"] = {name: [summary[name] for summary in by_segment] for name in by_segment[0]}
    if len(runs) > 1 or options.samples > 1:
        output["judges"] = {}
        for run, found, mean, took in zip(runs, by_judge, means, spent, strict=True):
            own, ratings = [mean[i, None] for i in range(len(texts))], [found[i, None] for i in range(len(texts))]
            output["judges"][run.options.model] = {
                **summarize(own, images, options.n_resamples),
                **counts_of(own, empty, images),
                **{f"{name}_samples": [[rating[name] for rating in one] for one in ratings] for name in SCORES},
                **{f"{name}_spread": [spread(one, name) for one in ratings] for name in SCORES},
                **took,
                "parameters": {**run.extras, "detail": options.detail},
            }
        # Between judges or, where there is but one, between its samples.
        several = [[one[i, None] for one in means] if len(runs) > 1 else by_judge[0][i, None] for i in range(len(texts))]
        output |= {f"{name}_spread": [spread(ratings, name) for ratings in several] for name in SCORES}
    return output
