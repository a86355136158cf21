"""Granularity: which levels a model chooses, what the choice is worth, and how many clusters it takes (paper's ablation).

Every sample is answered once at every level. All policies are read off these answers, on the same samples:

- *controller*: the level that the controller prefers; its answer is that of the forced level, which is the same sequence.
- one *level* for all samples.
- *random*: the expectation over a level drawn uniformly, that is the mean over levels; nothing is drawn.
- *oracle*: the best level of each sample, an upper bound that no controller can pass.

The sweep changes β and K of the same weights: one setting for all levels, by default α = 1, since a level that pools has fewer
tokens than clusters to make of them (14 x 14 patches pooled by 4 are 16).
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np
import torch

from granulon_hf.data.sample import Sample
from granulon_hf.errors import GranulonError
from granulon_hf.evaluation.answer import Generation, PredictionRun
from granulon_hf.evaluation.metrics import SCORERS
from granulon_hf.io import write_text
from granulon_hf.modeling.images_granulon import open_rgb
from granulon_hf.stats import bootstrap_mean, paired_difference

Scorer = Callable[[dict[str, Any]], float]
POLICIES = ("controller", "random", "oracle")
BETAS = (5, 10, 20, 30, 40, 50)  # paper: 5 … 50 clusters
ALL = "all"


def auto_score(row: dict[str, Any]) -> float:
    """Option accuracy where there are options, exact match for other short answers, recall for long ones."""
    if row["choices"]:
        return SCORERS["option_accuracy"](row)
    return SCORERS["exact" if row["task"] == "vqa" else "recall"](row)


def find_scorer(name: str) -> Scorer:
    """Raises ValueError for an unknown name."""
    known = {"auto": auto_score, **SCORERS}
    if name not in known:
        raise GranulonError(f"Unknown score {name!r}; the choices are {', '.join(known)}.")
    return known[name]


class LightRun(PredictionRun):
    """Without copies of the images: the same ones are answered in many settings, and only the text is looked at."""

    def keep(self, image: dict[str, Any]) -> str:
        return image.get("path") or ""


@contextmanager
def setting(model: Any, processor: Any, alpha: int, beta: int, slots: int) -> Iterator[None]:
    """The same weights with one α, β and K at all levels; as before afterwards.

    The number of levels stays, since the controller's last layer has it.

    Args:
        alpha (`int`): pooling kernel side.
        beta (`int`): clusters.
        slots (`int`): K, semantic slots per image, of which the processor must write as many.
    """
    config = model.config
    before = config.granularity_levels, config.num_semantic_tokens, processor.num_semantic_tokens
    config.granularity_levels = [{**level, "alpha": alpha, "beta": beta} for level in config.granularity_levels]
    config.num_semantic_tokens = processor.num_semantic_tokens = slots
    try:
        yield
    finally:
        config.granularity_levels, config.num_semantic_tokens, processor.num_semantic_tokens = before


@torch.inference_mode()
def image_tokens(model: Any, processor: Any, samples: Sequence[Sample], level: str) -> tuple[int, int]:
    """Pixel tokens and filled semantic slots of an image at a level; (0, 0) where the samples have no image.

    Counted on the first image: the vision tower sees all at one size.
    """
    image = next((image for sample in samples for image in sample.images), None)
    if image is None:
        return 0, 0
    pixels = processor.image_processor(open_rgb(image), return_tensors="pt")["pixel_values"].to(model.device)
    aggregation = model.aggregate(pixels, level)
    return aggregation.assignment[0].numel(), int(aggregation.keep.sum())


def groups_of(row: dict[str, Any], fields: Sequence[str]) -> list[str]:
    """What a sample belongs to: all, and `field=value` of its task and of the fields of its `meta`."""
    values = {name: row["task"] if name == "task" else row["meta"].get(name) for name in fields}
    return [ALL, *(f"{name}={value}" for name, value in values.items() if value is not None)]


def group_names(rows: Sequence[dict[str, Any]], fields: Sequence[str]) -> list[str]:
    """All groups of the rows, field by field; a field with one value says nothing that "all" does not."""
    names = [ALL]
    for name in fields:
        found = sorted({group for row in rows for group in groups_of(row, [name])[1:]})
        names += found if len(found) > 1 else []
    return names


class GranularityAnalysis:
    """Answers of one model at every level and in every setting of a sweep, in a folder; what is there is not made again.

    Args:
        model ([`GranulonForConditionalGeneration`]): in eval mode, with levels.
        processor ([`GranulonProcessor`]): its processor.
        samples (`list[Sample]`): to answer.
        folder (`Path`): for the answers, one run per setting.
        description (`dict`): model and data, for the runs.
        generation ([`Generation`]): how answers are made; its level is not used.
        scorer (`callable`): score of a row of a run, higher is better.
        fields (`list[str]`): "task" or names in `meta` that samples are grouped by.
        on_progress (`callable`): called with the number of answers that were found or made since the last call.

    Raises:
        GranulonError: the model has no levels, or there are no samples.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        samples: Sequence[Sample],
        folder: Path,
        description: dict[str, Any],
        generation: Generation | None = None,
        scorer: Scorer = auto_score,
        fields: Sequence[str] = ("task",),
        on_progress: Callable[[int], None] = lambda count: None,
    ):
        if not model.config.granularity_levels:
            raise GranulonError("This model has no granularity levels: there is nothing to choose and nothing to sweep.")
        if not samples:
            raise GranulonError("There are no samples.")
        self.model, self.processor, self.samples, self.folder = model, processor, samples, Path(folder)
        self.description, self.scorer, self.fields, self.on_progress = description, scorer, fields, on_progress
        self.generation = generation or Generation()

    def answers(self, name: str, generation: Generation, **extra: Any) -> list[dict[str, Any]]:
        """Scored rows of one setting, in the order of the samples."""
        description = {**self.description, "generation": generation.settings(), **extra}
        run = LightRun(self.folder / name, description)
        rows = run.run(self.model, self.processor, self.samples, generation, on_progress=self.on_progress)
        return [{**row, "score": float(self.scorer(row))} for row in rows]

    def levels(self) -> dict[str, Any]:
        """Every level on every sample.

        Returns:
            `dict`: `names` of the levels, `tokens` (pixel, semantic) per level, `rows` of the first level, which hold the
            probabilities, `choice` (index of the level, -1 where nothing is to be chosen, as without an image) [samples],
            `scores` and `seconds` [levels x samples].
        """
        names = self.model.config.level_names
        found = {name: self.answers(f"level-{name}", changed(self.generation, granularity=name)) for name in names}
        rows = found[names[0]]
        choice = [-1 if not row.get("granularity_probs") else best(row["granularity_probs"], names) for row in rows]
        return {
            "names": names,
            "tokens": {name: image_tokens(self.model, self.processor, self.samples, name) for name in names},
            "rows": rows,
            "choice": np.array(choice),
            "scores": np.array([[row["score"] for row in found[name]] for name in names]),
            "seconds": np.array([[row["seconds"] for row in found[name]] for name in names]),
            "predictions": {name: [row["prediction"] for row in found[name]] for name in names},
        }

    def sweep(self, betas: Sequence[int], slots: Sequence[int] | None = None, alpha: int = 1) -> list[dict[str, Any]]:
        """Other numbers of clusters, on the same weights.

        Args:
            betas (`list[int]`): numbers of clusters.
            slots (`list[int]`, *optional*): numbers K of slots, of which every pair with K <= β is answered (more slots than
                clusters stay empty, and change nothing). By default K = β: all clusters are kept.
            alpha (`int`): pooling kernel side.

        Returns:
            `list[dict]`: per setting alpha, beta, k, pixel_tokens, semantic_tokens, rows; the first is without semantic tokens.
        """
        names = self.model.config.level_names
        generation = changed(self.generation, granularity=names[0])
        pixels, _ = image_tokens(self.model, self.processor, self.samples, names[0])
        rows = self.answers("pixels", changed(generation, visual_stream="pixel"))
        cells = [{"alpha": alpha, "beta": 0, "k": 0, "pixel_tokens": pixels, "semantic_tokens": 0, "rows": rows}]
        for beta, k in sweep_cells(betas, slots):
            with setting(self.model, self.processor, alpha, beta, k):
                rows = self.answers(f"alpha{alpha}-beta{beta}-k{k}", generation, alpha=alpha, beta=beta, k=k)
                pixels, semantic = image_tokens(self.model, self.processor, self.samples, names[0])
            cell = {"alpha": alpha, "beta": beta, "k": k, "pixel_tokens": pixels, "semantic_tokens": semantic, "rows": rows}
            cells.append(cell)
        return cells


def best(probs: dict[str, float], names: Sequence[str]) -> int:
    return max(range(len(names)), key=lambda index: probs[names[index]])


def sweep_cells(betas: Sequence[int], slots: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Pairs (β, K).

    Raises:
        GranulonError: a number below 1, or no K fits any β.
    """
    if any(number < 1 for number in (*betas, *(slots or ()))):
        raise GranulonError("Numbers of clusters and of slots must be at least 1.")
    cells = [(beta, k) for beta in sorted(set(betas)) for k in (sorted(set(slots)) if slots else [beta]) if k <= beta]
    if betas and not cells:
        raise GranulonError("Every K is above every β: more slots than clusters stay empty; give a smaller K.")
    return cells


# --- tables -----------------------------------------------------------------------------------------------------------


def policy_scores(found: dict[str, Any]) -> dict[str, np.ndarray]:
    """Per policy the score of every sample for which there was something to choose. Each of shape [samples]."""
    chosen = found["choice"] >= 0
    scores, choice = found["scores"][:, chosen], found["choice"][chosen]
    named = dict(zip(found["names"], scores, strict=True))
    return {
        "controller": scores[choice, np.arange(scores.shape[1])],
        **named,
        "random": scores.mean(0),
        "oracle": scores.max(0),
    }


def policy_table(found: dict[str, Any], fields: Sequence[str]) -> list[dict[str, Any]]:
    """Score of every policy in every group, with its interval and its paired difference to the controller."""
    rows = [row for row, choice in zip(found["rows"], found["choice"], strict=True) if choice >= 0]
    scores = policy_scores(found)
    semantic = np.array([found["tokens"][name][1] for name in found["names"]])
    spent = {name: np.full(len(rows), semantic[i]) for i, name in enumerate(found["names"])}
    spent["controller"] = semantic[found["choice"][found["choice"] >= 0]]
    spent["random"] = np.full(len(rows), semantic.mean())
    table = []
    for group in group_names(rows, fields):
        inside = np.array([group in groups_of(row, fields) for row in rows])
        for policy, values in scores.items():
            mean, low, high = bootstrap_mean(values[inside])
            entry = {"group": group, "policy": policy, "n": int(inside.sum()), "score": mean, "low": low, "high": high}
            tokens = spent.get(policy)
            entry["semantic_tokens"] = None if tokens is None else float(tokens[inside].mean())
            if policy != "controller":
                difference = paired_difference(values[inside], scores["controller"][inside])
                entry |= dict(zip(("difference", "difference_low", "difference_high", "p"), difference, strict=True))
            table.append(entry)
    return table


def choice_table(found: dict[str, Any], fields: Sequence[str]) -> list[dict[str, Any]]:
    """How often each level is chosen in every group: count, share and the mean probability."""
    pairs = [(row, choice) for row, choice in zip(found["rows"], found["choice"], strict=True) if choice >= 0]
    table = []
    for group in group_names([row for row, _ in pairs], fields):
        inside = [(row, choice) for row, choice in pairs if group in groups_of(row, fields)]
        for index, name in enumerate(found["names"]):
            count = sum(int(choice) == index for _, choice in inside)
            mean = float(np.mean([row["granularity_probs"][name] for row, _ in inside]))
            entry = {"group": group, "level": name, "n": len(inside), "count": count, "share": count / len(inside)}
            table.append({**entry, "mean_probability": mean})
    return table


def sweep_table(cells: Sequence[dict[str, Any]], fields: Sequence[str]) -> list[dict[str, Any]]:
    """Score, tokens and seconds of every setting in every group, and the paired difference to no semantic tokens."""
    table = []
    for group in group_names(cells[0]["rows"], fields):
        inside = [i for i, row in enumerate(cells[0]["rows"]) if group in groups_of(row, fields)]
        without = [cells[0]["rows"][i]["score"] for i in inside]
        for cell in cells:
            values = [cell["rows"][i]["score"] for i in inside]
            mean, low, high = bootstrap_mean(values)
            entry = {name: value for name, value in cell.items() if name != "rows"}
            entry |= {"group": group, "n": len(inside), "score": mean, "low": low, "high": high}
            entry["seconds"] = float(np.median([cell["rows"][i]["seconds"] for i in inside]))
            if cell is not cells[0]:
                difference = paired_difference(values, without)
                entry |= dict(zip(("difference", "difference_low", "difference_high", "p"), difference, strict=True))
            table.append(entry)
    return table


def long_rows(found: dict[str, Any], cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per sample and setting, for the Parquet file."""
    rows = []
    for i, name in enumerate(found["names"]):
        for j, row in enumerate(found["rows"]):
            chosen = int(found["choice"][j])
            pixels, semantic = found["tokens"][name]
            rows.append(
                {
                    **{
                        "setting": f"level {name}",
                        "id": row["id"],
                        "task": row["task"],
                        "alpha": None,
                        "beta": None,
                        "k": None,
                    },
                    "chosen": None if chosen < 0 else found["names"][chosen],
                    "probability": (row.get("granularity_probs") or {}).get(name),
                    **{"prediction": found["predictions"][name][j], "reference": row["reference"]},
                    **{"score": float(found["scores"][i, j]), "seconds": float(found["seconds"][i, j])},
                    **{"pixel_tokens": pixels, "semantic_tokens": semantic},
                }
            )
    for cell in cells:
        numbers = {name: cell[name] for name in ("alpha", "beta", "k")}
        tokens = {name: cell[name] for name in ("pixel_tokens", "semantic_tokens")}
        for row in cell["rows"]:
            kept = {name: row[name] for name in ("id", "task", "prediction", "reference", "score", "seconds")}
            rows.append({"setting": "sweep", **numbers, "chosen": None, "probability": None, **kept, **tokens})
    return rows


def markdown(choices: list[dict], policies: list[dict], sweep: list[dict], title: str) -> str:
    """The three tables."""

    def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
        cells = [[cell.replace("|", "\\|") for cell in line] for line in (header, ["---"] * len(header), *lines)]
        return [f"| {' | '.join(line)} |" for line in cells]

    def score(row: dict[str, Any]) -> str:
        return f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"

    def difference(row: dict[str, Any]) -> str:
        if "difference" not in row:
            return ""
        interval = f"[{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"
        return f"{row['difference']:+.3f} {interval}, p = {row['p']:.3f}"

    def tokens(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    levels = list(dict.fromkeys(row["level"] for row in choices))
    groups: dict[str, dict[str, dict]] = {}
    for row in choices:
        groups.setdefault(row["group"], {})[row["level"]] = row
    lines = [
        [group, str(rows[levels[0]]["n"]), *(f"{rows[name]['count']} ({rows[name]['share']:.0%})" for name in levels)]
        for group, rows in groups.items()
    ]
    text = [f"# {title}", "", "## Chosen levels", "", *table(["group", "samples", *levels], lines), ""]
    lines = [[r["group"], r["policy"], score(r), difference(r), tokens(r["semantic_tokens"])] for r in policies]
    header = ["group", "level", "score [95 %]", "difference to the controller", "semantic tokens"]
    text += ["## Levels against the controller", "", *table(header, lines), ""]
    text += ["*random*: a level drawn uniformly, in expectation. *oracle*: the best level of each sample, an upper bound.", ""]
    if sweep:
        lines = [
            [r["group"], str(r["beta"]), str(r["k"]), str(r["semantic_tokens"]), score(r), difference(r), f"{r['seconds']:.3f}"]
            for r in sweep
        ]
        header = ["group", "β", "K", "semantic tokens", "score [95 %]", "difference to none", "seconds per sample"]
        text += [f"## Clusters (α = {sweep[0]['alpha']}, the same weights)", "", *table(header, lines), ""]
        text += ["Seconds are the median over samples, of a batch shared among its samples, image decoding included.", ""]
    return "\n".join(text)


# --- plots ------------------------------------------------------------------------------------------------------------


def plot_choices(choices: list[dict]):
    """Shares of the levels per group, stacked; a `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure

    groups, levels = (list(dict.fromkeys(row[key] for row in choices)) for key in ("group", "level"))
    share = {(row["group"], row["level"]): row["share"] for row in choices}
    counts = {row["group"]: row["n"] for row in choices}
    figure = Figure(figsize=(6.4, 1.3 + 0.42 * len(groups)), layout="constrained")
    axes, left = figure.subplots(), np.zeros(len(groups))
    for i, level in enumerate(levels):
        values = np.array([share[group, level] for group in groups])
        bars = axes.barh(range(len(groups)), values, left=left, height=0.7, color=shade(i, len(levels)), label=level)
        dark = i > (len(levels) - 1) / 2
        labels = [f"{value:.0%}" if value >= 0.08 else "" for value in values]
        axes.bar_label(bars, labels, label_type="center", fontsize=8, color="white" if dark else "black")
        left += values
    axes.set(yticks=range(len(groups)), xlim=(0, 1), xlabel="share of samples")
    axes.set_yticklabels([f"{group} ({counts[group]})" for group in groups])
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=min(len(levels), 6), fontsize=8, frameon=False)
    return figure


def shade(index: int, count: int) -> tuple[float, float, float, float]:
    """Colours from light (coarse) to dark (fine): levels have an order."""
    from matplotlib import colormaps

    return colormaps["YlGnBu"](0.3 + 0.6 * index / max(1, count - 1))


def plot_policies(policies: list[dict]):
    """Score of every policy with its interval, one panel per group; a `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure

    groups, names = (list(dict.fromkeys(row[key] for row in policies)) for key in ("group", "policy"))
    levels = [name for name in names if name not in POLICIES]
    colours = {"controller": "tab:orange", "random": "0.75", "oracle": "0.5"}
    colours |= {name: shade(i, len(levels)) for i, name in enumerate(levels)}
    columns = min(3, len(groups))
    lines = math.ceil(len(groups) / columns)
    size = (max(5.0, 3.4 * columns), 1.0 + (0.4 + 0.3 * len(names)) * lines)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for group, axes in zip(groups, panels, strict=False):
        rows = [row for row in policies if row["group"] == group]
        means = np.array([row["score"] for row in rows])
        error = np.array([[row["score"] - row["low"], row["high"] - row["score"]] for row in rows]).T.clip(min=0)
        axes.barh(names, means, xerr=error, color=[colours[name] for name in names], error_kw={"capsize": 2, "lw": 0.9})
        axes.set(xlim=(0, 1.02))
        axes.tick_params(labelbottom=True)  # also above a place that stays empty
        axes.set_title(f"{group} ({rows[0]['n']})", fontsize=10)
    figure.supxlabel("score, 95 % bootstrap interval", fontsize=10)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    panels[0].invert_yaxis()  # shared by all
    return figure


def plot_sweep(sweep: list[dict]):
    """Score against clusters, visual tokens and seconds: a line per group or, where K was varied, per K over all samples; a
    `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    varied = any(row["k"] not in (0, row["beta"]) for row in sweep)
    groups = [ALL] if varied else list(dict.fromkeys(row["group"] for row in sweep))
    for i, group in enumerate(groups):
        rows = [row for row in sweep if row["group"] == group]
        series: dict[str, list[dict]] = {}
        for row in rows[1:]:
            series.setdefault(f"K = {row['k']}" if varied else group, []).append(row)
        for j, (label, line) in enumerate(series.items()):
            points, number = [rows[0], *line], i + j  # one of both varies
            style = {"color": f"C{number % 10}", "linestyle": "-" if j == 0 else "--", "marker": "os^Dv"[number % 5], "ms": 4}
            means, beta = [row["score"] for row in points], [row["beta"] for row in points]
            panels[0].plot(beta, means, label=label, **style)
            if group == ALL and not varied:  # bands on top of each other cannot be read
                band = ([row["low"] for row in points], [row["high"] for row in points])
                panels[0].fill_between(beta, *band, color=style["color"], alpha=0.15, linewidth=0)
            style |= {"linestyle": ""} if varied else {}  # β changes along a line whose tokens stay the same
            panels[1].plot([row["pixel_tokens"] + row["semantic_tokens"] for row in points], means, **style)
            if group == ALL:
                panels[2].plot([row["seconds"] for row in points], means, **{**style, "linestyle": ""})
                for row in points if j == 0 else line:
                    at = (row["seconds"], row["score"])
                    panels[2].annotate(str(row["beta"]), at, (3, 4), textcoords="offset points", fontsize=8)
    panels[0].set(xlabel="clusters β (0: no semantic tokens)", ylabel="score", ylim=(0, 1.02))
    panels[1].set(xlabel="visual tokens per image")
    panels[2].set(xlabel="median seconds per sample (labels: β)")
    for axes in panels:
        axes.grid(alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return figure


def report(
    folder: Path, found: dict[str, Any], cells: Sequence[dict[str, Any]], fields: Sequence[str], title: str, settings: dict
) -> dict[str, Any]:
    """Write `granularity.md`, `granularity.json`, `granularity.parquet`, `choices.png`, `levels.png` and `sweep.png`.

    Returns:
        `dict`: settings and the tables `choices`, `levels` and `sweep`, as in the JSON file.

    Raises:
        GranulonError: no sample has an image, so that no level was chosen.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not (found["choice"] >= 0).any():
        raise GranulonError("No sample could be answered with an image: there is no level to look at.")
    folder = Path(folder)
    choices, policies = choice_table(found, fields), policy_table(found, fields)
    sweep = sweep_table(cells, fields) if cells else []
    write_text(folder / "granularity.md", markdown(choices, policies, sweep, title))
    result = {"settings": settings, "choices": choices, "levels": policies, "sweep": sweep}
    write_text(folder / "granularity.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    pq.write_table(pa.Table.from_pylist(long_rows(found, cells)), folder / "granularity.parquet")
    plot_choices(choices).savefig(folder / "choices.png", dpi=150)
    plot_policies(policies).savefig(folder / "levels.png", dpi=150)
    if sweep:
        plot_sweep(sweep).savefig(folder / "sweep.png", dpi=150)
    return result
