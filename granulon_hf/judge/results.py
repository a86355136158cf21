"""What the judge returns: means with intervals, scores, reasons and costs."""

from typing import Any

import numpy as np

from .client import Run
from .prices import PRICES_DATE, cost_of


def mean_and_interval(scores: list, n_resamples: int) -> tuple[float | None, list[float] | None]:
    """Return the mean of the scores that are not None, and its 95 % percentile bootstrap interval (seed 0)."""
    values = np.array([score for score in scores if score is not None], dtype=float)
    if not len(values):
        return None, None
    draw = np.random.default_rng(0)
    means = [values[draw.integers(len(values), size=len(values))].mean() for _ in range(n_resamples)]
    return float(values.mean()), [float(edge) for edge in np.percentile(means, [2.5, 97.5])]


def summarize(scored: list[dict], n_resamples: int) -> dict:
    """Return means, intervals and the scores themselves, of dicts with "accuracy" and "hallucination"."""
    summary: dict[str, Any] = {}
    for name in ("accuracy", "hallucination"):
        scores = [sample[name] for sample in scored]
        summary[name], summary[f"{name}_ci"] = mean_and_interval(scores, n_resamples)
        summary[f"{name}_scores"] = scores
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
        "reasons": [sample["reason"] for sample in samples],
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
        output["segments"]["reasons"] = [[sample["reason"] for sample in place] for place in places]
    return output
