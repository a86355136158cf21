"""Accuracy against visual tokens: what each number of tokens costs, and what it gives (ours).

How such a comparison must be reported: accuracy with paired intervals over images, against the mean number of visual tokens
that the language model sees, the FLOPs up to the first new token, and the measured time to it. A budget that is chosen for each
question counts as better only against the *interpolated* curve of the fixed budgets at its own mean number of tokens.
"""

import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from granulon_hf.evaluation.answer import answer_batch
from granulon_hf.evaluation.benchmark import PERCENT, TOP, Suite, open_set, scored
from granulon_hf.evaluation.tables import difference_text, empty_figure, markdown_table, score_text
from granulon_hf.io import write_text
from granulon_hf.stats import difference, estimate

PROBED, ROUNDS = 4, 3  # samples whose cost is measured, and how often
# What PyTorch does not count by itself.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query, key, value
    )
}
# What counts as accuracy where several metrics are there, the strictest first.
ACCURACY = ("option_accuracy", "exact", "recall")


def measure_costs(
    suite: Suite,
    rows: Mapping[str, str],
    stamps: Mapping[str, Any],
    load_model: Callable[[str, str, str], tuple[Any, Any, str]],
    kept: Path,
) -> dict[str, dict[str, float]]:
    """Measure FLOPs and seconds up to the first new token, one sample at a time; what the file `kept` holds is not repeated.

    `stamps` say of each arm which weights and settings it has. Arms of one row, which share their weights, are timed in turn.
    FLOPs are those of matrix products, convolutions and attention, as PyTorch counts them, of tower, reducer and prefill
    together; the seconds are medians, and hold everything from the opened image on.
    """
    measured = {arm: json.loads(json.dumps([stamps[arm], suite.data[0], suite.device, suite.dtype])) for arm in suite.models}
    known = json.loads(kept.read_text()) if kept.exists() else {}
    costs = {arm: one for arm, one in known.items() if arm in measured and one["measured"] == measured[arm]}
    samples = list(itertools.islice(open_set(suite, suite.data[0]), PROBED))

    def answer(source: str, counter: Any = contextlib.nullcontext()) -> float:  # noqa: B008 (it keeps no state)
        model, processor, _ = load_model(source, suite.device, suite.dtype)
        first = replace(suite.generation_of(source), max_new_tokens=1)
        began = time.perf_counter()
        with counter:
            for sample in samples:
                answer_batch(model, processor, [sample], first)
        return (time.perf_counter() - began) / len(samples)

    for _, group in itertools.groupby((arm for arm in suite.models if arm not in costs), rows.__getitem__):
        counters = {arm: FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) for arm in group}
        for arm, counter in counters.items():  # which also warms up
            answer(arm, counter)
        times = [{arm: answer(arm) for arm in counters} for _ in range(ROUNDS)]
        for arm, counter in counters.items():
            seconds = statistics.median(one[arm] for one in times)
            flops = counter.get_total_flops() / len(samples)
            costs[arm] = {"prefill_flops": flops, "first_token_seconds": seconds, "measured": measured[arm]}
        write_text(kept, json.dumps(costs, indent=1) + "\n")
    return {arm: costs[arm] for arm in suite.models}


def write_curve(
    result: dict[str, Any], rows: Mapping[str, str], chosen: Collection[str], costs: dict[str, dict[str, float]], out: Path
) -> None:
    """Write `tokens.json`, `tokens.md` and `tokens.png`: accuracy of every arm against its visual tokens.

    Args:
        result (`dict`): of [`~granulon_hf.evaluation.benchmark.run_suite`]; the first arm is what the others are compared with.
        rows (`dict`): by arm the name of its row; arms of one row share their weights.
        chosen (`list[str]`): arms whose budget is chosen for each question.
        costs (`dict`): of [`measure_costs`].
    """
    found = {data: curve(result, data, rows, chosen) for data in result["data"]}
    write_text(out / "tokens.json", json.dumps({"curves": found, "costs": costs}, indent=1) + "\n")
    write_text(out / "tokens.md", "\n".join(markdown(data, one, costs) for data, one in found.items()))
    plot(found, rows, out / "tokens.png")


def curve(result: dict[str, Any], data: str, rows: Mapping[str, str], chosen: Collection[str]) -> dict[str, Any]:
    """Return the accuracy of every arm on a data set: overall, by level of question, and against the first arm.

    An arm that chooses its budget is also compared with the fixed budgets of its row at the same mean number of tokens
    (`interpolated`): each question's score is that of the two neighbors, weighted by how near they are. What some arm has no
    score for, as where a judge's reply could not be read, counts for none.
    """
    scores = {arm: found[data] for arm, found in result["scores"].items()}
    metric = next(name for name in (*ACCURACY, *next(iter(scores.values()))) if all(name in one for one in scores.values()))
    columns = pd.concat({arm: scored(result, arm, data, metric) for arm in scores}, axis=1, join="inner")
    values, weights = (columns.xs(name, axis=1, level=1) for name in ("value", "weight"))
    tokens = pd.DataFrame({arm: found[data] for arm, found in result["visual_tokens"].items()}, dtype=float)
    first = values.columns[0]
    clusters = columns[first]["cluster"]
    kinds = pd.Series(result["levels"][data], dtype=object).fillna("").loc[columns.index]
    arms: dict[str, Any] = {}
    for arm in values:
        arms[arm] = {"visual_tokens": tokens[arm].mean(), **estimate(values[arm], clusters, weights[arm], TOP.get(metric, 1.0))}
        if arm != first:
            arms[arm] |= difference(values[arm], values[first], clusters, weights[arm], weights[first])
        sums = pd.DataFrame({"value": values[arm] * weights[arm], "weight": weights[arm]}).groupby(kinds).sum()
        arms[arm]["levels"] = {name: one["value"] / one["weight"] for name, one in sums.iterrows() if name and one["weight"]}
    for arm in chosen:
        fixed = [one for one in values if rows[one] == rows[arm] and one not in chosen]
        known = sorted(fixed, key=lambda one: arms[one]["visual_tokens"])
        between = interpolate(arms[arm]["visual_tokens"], [arms[one]["visual_tokens"] for one in known])
        weight = weights[known] @ between
        value = ((values * weights)[known] @ between / weight).fillna(0)
        arms[arm]["interpolated"] = difference(values[arm], value, clusters, weights[arm], weight)
    return {"metric": metric, "samples": len(values), "images": clusters.nunique(), "reference": first, "arms": arms}


def interpolate(place: float, known: list[float]) -> np.ndarray:
    """Return the weights of known places, in order, that give `place` by linear interpolation; beyond the ends, the end."""
    return np.array([np.interp(place, known, row) for row in np.eye(len(known))])


def markdown(data: str, found: dict[str, Any], costs: dict[str, dict[str, float]]) -> str:
    """Return a curve as a table in Markdown."""
    style: dict[str, Any] = {"digits": 1, "scale": 100.0} if found["metric"] in PERCENT else {"digits": 3}
    arms = found["arms"]
    levels = list(dict.fromkeys(level for one in arms.values() for level in one["levels"]))
    head = ["arm", "visual tokens", found["metric"], f"difference to {found['reference']}", *levels]
    lines = []
    for name, one in arms.items():
        cells = [name, f"{one['visual_tokens']:.1f}", score_text(one, **style), difference_text(one, **style)]
        cells += [f"{style.get('scale', 1.0) * one['levels'].get(level, float('nan')):.{style['digits']}f}" for level in levels]
        cost = costs.get(name, {})
        cells += [f"{cost['prefill_flops'] / 1e9:.3g}", f"{1000 * cost['first_token_seconds']:.0f}"] if cost else ["", ""]
        lines.append(cells)
    text = f"## {data} ({found['samples']} samples, {found['images']} images)\n\n"
    text += markdown_table([*head, "GFLOPs to the first token", "ms to the first token"], lines) + "\n"
    chosen = {name: one["interpolated"] for name, one in arms.items() if "interpolated" in one}
    if chosen:
        lines = [[name, f"{arms[name]['visual_tokens']:.1f}", difference_text(one, **style)] for name, one in chosen.items()]
        text += "\nBudgets chosen for each question, against fixed ones at the same mean number of visual tokens:\n\n"
        text += markdown_table(["arm", "visual tokens", "difference to the interpolated fixed curve"], lines) + "\n"
    return text + f"\n{NOTE}\n"


def plot(found: dict[str, dict[str, Any]], rows: Mapping[str, str], path: Path) -> None:
    """Draw a panel for each data set: a line for each row, crosses for budgets that are chosen for each question."""
    figure = empty_figure(6.5 * len(found), 4.2)
    for axes, (data, one) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        points = pd.DataFrame({arm: {**values, "row": rows[arm]} for arm, values in one["arms"].items()}).T
        chosen = points["interpolated"].notna() if "interpolated" in points else pd.Series(False, points.index)
        for number, (row, line) in enumerate(points[~chosen].groupby("row", sort=False)):
            line = line.sort_values("visual_tokens")
            errors = [line["score"] - line["low"], line["high"] - line["score"]]
            color = f"C{number % 10}"
            axes.errorbar(line["visual_tokens"], line["score"], errors, marker="o", color=color, label=row, capsize=2, lw=1)
            also = points[chosen & (points["row"] == row)]
            axes.plot(also["visual_tokens"], also["score"], "x", color=color, markersize=8)
        axes.set(title=data, xlabel="visual tokens (mean)", ylabel=one["metric"])
        axes.set_xscale("log", base=2)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


NOTE = (
    "Means with 95 % bootstrap intervals over images; differences are paired, with the p-value of a permutation test of them. "
    "FLOPs and milliseconds are those of vision tower, reducer and prefill, one sample at a time."
)
