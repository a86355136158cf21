"""Granularity: which levels a model chooses, what the choice is worth, and how many clusters it takes (paper's ablation).

Every sample is answered once at every level. All policies are read off these answers, on the same samples:

- *controller*: the level that the controller prefers; its answer is that of the forced level, which is the same sequence.
- one *level* for all samples.
- *random*: the expectation over a level drawn uniformly, that is the mean over levels; nothing is drawn.
- *oracle*: the best level of each sample, an upper bound that no controller can pass.

The sweep changes β and K of the same weights: one setting for all levels, by default α = 1, since a level that pools has fewer
tokens than clusters to make of them (14 x 14 patches pooled by 4 are 16). In the compact form, and with another reducer than
AdaTA, it asks for numbers of tokens (`visual_tokens`) up to the model's K instead; the compact form, which has no answers
without semantic tokens, is compared with its own at K.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from granulon_hf.data.sample import Sample
from granulon_hf.errors import GranulonError
from granulon_hf.evaluation.answer import Generation, PredictionRun, cluster_keys
from granulon_hf.evaluation.metrics import SCORERS
from granulon_hf.evaluation.tables import difference_text, empty_figure, markdown_table, score_text, write_rows
from granulon_hf.io import batches, write_text
from granulon_hf.modeling.images_granulon import open_rgb
from granulon_hf.stats import clusters_of, difference, estimate

Scorer = Callable[[dict[str, Any]], float]
POLICIES = ("controller", "random", "oracle")
ALL = "all"
# Those of the Parquet file.
COLUMNS = (
    "setting id task alpha beta k chosen probability prediction reference score seconds pixel_tokens semantic_tokens".split()
)


def auto_score(row: dict[str, Any]) -> float:
    """Option accuracy where there are options, exact match for other short answers, recall for long ones."""
    if row["choices"]:
        return SCORERS["option_accuracy"](row)
    return SCORERS["exact" if row["task"] == "vqa" else "recall"](row)


def find_scorer(name: str) -> Scorer:
    known = {"auto": auto_score, **SCORERS}
    if name not in known:
        raise GranulonError(f"Unknown score {name!r}; the choices are {', '.join(known)}.")
    return known[name]


@contextmanager
def setting(model: Any, processor: Any, alpha: int, beta: int, slots: int) -> Iterator[None]:
    """Give all levels one α (pooling kernel side), β (clusters) and K (slots), on the same weights; as before afterwards.

    The number of levels stays, since the controller's last layer has it. The processor must write as many slots.
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
def image_tokens(
    model: Any, processor: Any, samples: Sequence[Sample], level: str | None, visual_tokens: int | None = None
) -> tuple[int, int]:
    """Pixel tokens and filled semantic slots of an image at a level, or of so many tokens; (0, 0) where there is no image.

    Counted on the first image: the vision tower sees all at one size.
    """
    image = next((image for sample in samples for image in sample.images), None)
    if image is None:
        return 0, 0
    pixels = processor.image_processor(open_rgb(image), return_tensors="pt")["pixel_values"].to(model.device)
    aggregation = model.aggregate(pixels, level, visual_tokens)
    return 0 if model.config.compact else aggregation.assignment[0].numel(), int(aggregation.keep.sum())


@dataclass
class GranularityAnalysis:
    """Answers of one model at every level and in every setting of a sweep, in a folder; what is there is not made again."""

    model: Any  # in eval mode, with levels
    processor: Any
    samples: Sequence[Sample]
    folder: Path  # for the answers, one run per setting
    description: dict[str, Any]  # model and data, for the runs
    generation: Generation = field(default_factory=Generation)  # how answers are made; its level is not used
    scorer: Scorer = auto_score  # of a row of a run; higher is better
    on_progress: Callable[[int], None] = lambda count: None  # takes the answers found or made since the last call

    def __post_init__(self):
        if not self.model.config.granularity_levels:
            raise GranulonError("This model has no granularity levels: there is nothing to choose and nothing to sweep.")
        self.clusters = clusters_of(map(cluster_keys, self.samples))

    def answers(self, name: str, generation: Generation, **extra: Any) -> list[dict[str, Any]]:
        """Scored rows of one setting, in the order of the samples."""
        description = {**self.description, "generation": generation.settings(), **extra}
        # The same images are answered in many settings, and only the text is looked at.
        run = PredictionRun(self.folder / name, description, copy_images=False)
        rows = run.run(self.model, self.processor, self.samples, generation, on_progress=self.on_progress)
        scored = zip(rows, self.clusters, strict=True)
        return [{**row, "score": float(self.scorer(row)), "cluster": cluster} for row, cluster in scored]

    def levels(self) -> list[dict[str, Any]]:
        """Every level on every sample: rows with `level`, its tokens, its `probability`, and the level that was `chosen`.

        Nothing is chosen without an image.
        """
        names, rows = self.model.config.level_names, []
        probs: dict[str, dict[str, float]] = {}  # of the first level's answer: those of the others are the same
        for name in names:
            pixels, semantic = image_tokens(self.model, self.processor, self.samples, name)
            for row in self.answers(f"level-{name}", changed(self.generation, granularity=name)):
                likely = probs.setdefault(row["id"], row.get("granularity_probs") or {})
                row |= {"setting": f"level {name}", "level": name, "pixel_tokens": pixels, "semantic_tokens": semantic}
                row |= {"chosen": max(names, key=likely.__getitem__) if likely else None, "probability": likely.get(name)}
                rows.append(row)
        return rows

    def sweep(self, betas: Sequence[int], slots: Sequence[int] | None = None, alpha: int = 1) -> list[dict[str, Any]]:
        """Other numbers of clusters, on the same weights.

        Args:
            betas (`list[int]`): numbers of clusters.
            slots (`list[int]`, *optional*): numbers K of slots, of which every pair with K <= β is answered (more slots than
                clusters stay empty, and change nothing). By default K = β: all clusters are kept.

        Returns:
            `list[dict]`: per setting alpha, beta, k, pixel_tokens, semantic_tokens, rows; the first is what others are compared
            with, see [`plan_sweep`].
        """
        config = self.model.config
        level = config.level_names[0]
        generation = changed(self.generation, granularity=level)
        cells = []
        for cell in plan_sweep(config, betas, slots, alpha):
            beta, k = cell["beta"], cell["k"]
            if not beta:
                pixels, semantic = image_tokens(self.model, self.processor, self.samples, level)[0], 0
                rows = self.answers("pixels", changed(generation, visual_stream="pixel"))
            elif by_number(config):
                pixels, semantic = image_tokens(self.model, self.processor, self.samples, None, beta)
                rows = self.answers(f"tokens{beta}", changed(self.generation, visual_tokens=beta))
            else:
                with setting(self.model, self.processor, alpha, beta, k):
                    rows = self.answers(f"alpha{alpha}-beta{beta}-k{k}", generation, **cell)
                    pixels, semantic = image_tokens(self.model, self.processor, self.samples, level)
            cells.append({**cell, "pixel_tokens": pixels, "semantic_tokens": semantic, "rows": rows})
        return cells


def by_number(config: Any) -> bool:
    """Whether a sweep asks for numbers of tokens, instead of other clusters in other slots."""
    return config.compact or config.reducer != "adata"


def plan_sweep(config: Any, betas: Sequence[int], slots: Sequence[int] | None = None, alpha: int = 1) -> list[dict[str, int]]:
    """Return alpha, beta and k of each setting of a sweep; first those that others are compared with: no semantic tokens, or in
    the compact form all K.

    Raises:
        GranulonError: α or K are given, and the model's sweep is one over numbers of tokens.
    """
    if not betas:
        return []
    if not by_number(config):
        pairs = [(0, 0), *sweep_cells(betas, slots)]
    elif slots or alpha != 1:
        raise GranulonError(
            "`k` and `alpha` are of clusters beside pixel tokens; this model's sweep is over numbers of tokens: leave them out."
        )
    else:
        first = config.num_semantic_tokens if config.compact else 0
        numbers = [beta for beta in sorted(set(betas)) if beta <= config.num_semantic_tokens and beta != first]
        pairs = [(number, number) for number in (first, *numbers)]
    return [{"alpha": alpha, "beta": beta, "k": k} for beta, k in pairs]


def sweep_cells(betas: Sequence[int], slots: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Pairs (β, K) of numbers from 1. Raises GranulonError where no K fits any β."""
    cells = [(beta, k) for beta in sorted(set(betas)) for k in (sorted(set(slots)) if slots else [beta]) if k <= beta]
    if betas and not cells:
        raise GranulonError("Every K is above every β: more slots than clusters stay empty; give a smaller K.")
    return cells


# --- tables -----------------------------------------------------------------------------------------------------------


def groups_of(rows: Sequence[dict[str, Any]], fields: Sequence[str]) -> dict[str, list[int]]:
    """Places of the rows by group: all of them, and `field=value` of their task or of a field of `meta`.

    A field with one value says nothing that "all" does not, and makes no group.
    """
    groups = {ALL: list(range(len(rows)))}
    for name in fields:
        found: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            value = row["task"] if name == "task" else row["meta"].get(name)
            if value is not None:
                found.setdefault(f"{name}={value}", []).append(i)
        groups |= dict(sorted(found.items())) if len(found) > 1 else {}
    return groups


def by_policy(rows: Sequence[dict[str, Any]], value: str) -> pd.DataFrame:
    """A value of every sample for which there was something to choose (rows, in their order) under every policy (columns)."""
    frame = pd.DataFrame([row for row in rows if row["chosen"] is not None])
    levels = frame.pivot(index="id", columns="level", values=value).loc[frame["id"].unique(), frame["level"].unique()]
    chosen = frame[frame["level"] == frame["chosen"]].set_index("id")[value].loc[levels.index]
    return pd.DataFrame({"controller": chosen, **levels, "random": levels.mean(axis=1), "oracle": levels.max(axis=1)})


def choosers(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each sample for which there was something to choose."""
    return [row for row in rows if row["chosen"] is not None and row["level"] == rows[0]["level"]]


def clusters_at(rows: Sequence[dict[str, Any]], inside: Sequence[int]) -> list[int]:
    """Return the clusters of rows at these places; rows that name none are one each."""
    return [rows[i].get("cluster", i) for i in inside]


def policy_table(rows: Sequence[dict[str, Any]], fields: Sequence[str]) -> list[dict[str, Any]]:
    """Score of every policy in every group, with its interval and its paired difference to the controller."""
    scores, tokens = by_policy(rows, "score"), by_policy(rows, "semantic_tokens")
    table = []
    shown = choosers(rows)
    for group, inside in groups_of(shown, fields).items():
        part, spent, clusters = scores.iloc[inside], tokens.iloc[inside].mean(), clusters_at(shown, inside)
        for policy, values in part.items():
            entry = {"group": group, "policy": policy, "n": len(inside), **estimate(values, clusters)}
            entry["semantic_tokens"] = None if policy == "oracle" else float(spent[policy])
            table.append(entry if policy == "controller" else entry | difference(values, part["controller"], clusters))
    return table


def choice_table(rows: Sequence[dict[str, Any]], fields: Sequence[str]) -> list[dict[str, Any]]:
    """How often each level is chosen in every group: count, share and the mean probability."""
    frame = pd.DataFrame([row for row in rows if row["chosen"] is not None])
    table = []
    for group, inside in groups_of(choosers(rows), fields).items():
        for level, part in frame.groupby("level", sort=False):
            part = part.iloc[inside]
            entry = {"group": group, "level": level, "n": len(inside), "count": int((part["chosen"] == level).sum())}
            entry |= {"share": entry["count"] / len(inside), "mean_probability": float(part["probability"].mean())}
            table.append(entry)
    return table


def sweep_table(cells: Sequence[dict[str, Any]], fields: Sequence[str]) -> list[dict[str, Any]]:
    """Score, tokens and seconds of every setting in every group, and the paired difference to no semantic tokens."""
    table = []
    for group, inside in groups_of(cells[0]["rows"], fields).items():
        without, clusters = [cells[0]["rows"][i]["score"] for i in inside], clusters_at(cells[0]["rows"], inside)
        for cell in cells:
            values, seconds = ([cell["rows"][i][name] for i in inside] for name in ("score", "seconds"))
            entry = {name: value for name, value in cell.items() if name != "rows"}
            entry |= {"group": group, "n": len(inside), **estimate(values, clusters), "seconds": float(np.median(seconds))}
            table.append(entry if cell is cells[0] else entry | difference(values, without, clusters))
    return table


def markdown(choices: list[dict], policies: list[dict], sweep: list[dict], title: str) -> str:
    """The three tables."""
    levels = list(dict.fromkeys(row["level"] for row in choices))
    counts, worth, score = [], [], "score [95 %]"
    for rows in batches(choices, len(levels)):
        chosen = [f"{row['count']} ({row['share']:.0%})" for row in rows]
        counts.append([rows[0]["group"], str(rows[0]["n"]), *chosen])
    for row in policies:
        tokens = "" if row["semantic_tokens"] is None else f"{row['semantic_tokens']:.1f}"
        worth.append([row["group"], row["policy"], score_text(row), difference_text(row), tokens])
    parts = [
        f"# {title}",
        "## Chosen levels",
        markdown_table(["group", "samples", *levels], counts),
        "## Levels against the controller",
        markdown_table(["group", "level", score, "difference to the controller", "semantic tokens"], worth),
        "*random*: a level drawn uniformly, in expectation. *oracle*: the best level of each sample, an upper bound.",
    ]
    if sweep:
        swept = []
        for row in sweep:
            cell = [str(row[name]) for name in ("group", "beta", "k", "semantic_tokens")]
            swept.append([*cell, score_text(row), difference_text(row), f"{row['seconds']:.3f}"])
        reference = sweep[0]["beta"] or "none"
        head = ["group", "β", "K", "semantic tokens", score, f"difference to {reference}", "seconds per sample"]
        parts += [
            f"## Clusters (α = {sweep[0]['alpha']}, the same weights)",
            markdown_table(head, swept),
            "Seconds are the median over samples, of a batch shared among its samples, image decoding included.",
        ]
    return "\n\n".join(parts) + "\n"


# --- plots ------------------------------------------------------------------------------------------------------------


def shades(count: int) -> list[tuple[float, float, float, float]]:
    """Colors from light (coarse) to dark (fine): levels have an order."""
    from matplotlib import colormaps

    return [colormaps["YlGnBu"](0.3 + 0.6 * index / max(1, count - 1)) for index in range(count)]


def plot_choices(choices: list[dict]):
    """Shares of the levels per group, stacked; a `matplotlib.figure.Figure`."""
    frame = pd.DataFrame(choices)
    groups, levels = frame["group"].unique(), frame["level"].unique()
    shares = frame.pivot(index="group", columns="level", values="share").loc[groups, levels]
    counts = frame.groupby("group", sort=False)["n"].first()
    figure = empty_figure(6.4, 1.3 + 0.42 * len(groups))
    axes = figure.subplots()
    shares.plot.barh(stacked=True, width=0.7, color=shades(len(levels)), ax=axes, legend=False, xlim=(0, 1), ylabel="")
    for i, (bars, level) in enumerate(zip(axes.containers, levels, strict=True)):
        labels = [f"{value:.0%}" if value >= 0.08 else "" for value in shares[level]]
        color = "white" if i > (len(levels) - 1) / 2 else "black"
        axes.bar_label(bars, labels, label_type="center", fontsize=8, color=color)
    axes.set(xlabel="share of samples")
    axes.set_yticklabels([f"{group} ({count})" for group, count in counts.items()])
    axes.autoscale(axis="y")
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=min(len(levels), 6), fontsize=8, frameon=False)
    return figure


def plot_policies(policies: list[dict]):
    """Score of every policy with its interval, one panel per group; a `matplotlib.figure.Figure`."""
    frame = pd.DataFrame(policies)
    names = list(frame["policy"].unique())
    levels = [name for name in names if name not in POLICIES]
    colors: dict[str, Any] = {"controller": "tab:orange", "random": "0.75", "oracle": "0.5"}
    colors |= zip(levels, shades(len(levels)), strict=True)
    count = frame["group"].nunique()
    columns = min(3, count)
    lines = math.ceil(count / columns)
    figure = empty_figure(max(5.0, 3.4 * columns), 1.0 + (0.4 + 0.3 * len(names)) * lines)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for (group, rows), axes in zip(frame.groupby("group", sort=False), panels, strict=False):
        low, high = rows["low"].astype(float), rows["high"].astype(float)  # without an interval they are None
        error = np.stack([rows["score"] - low, high - rows["score"]]).clip(min=0)
        axes.barh(names, rows["score"], xerr=error, color=[colors[name] for name in names], error_kw={"capsize": 2, "lw": 0.9})
        axes.set(xlim=(0, 1.02))
        axes.tick_params(labelbottom=True)  # also above a place that stays empty
        axes.set_title(f"{group} ({rows['n'].iloc[0]})", fontsize=10)
    figure.supxlabel("score, 95 % bootstrap interval", fontsize=10)
    for axes in panels[count:]:
        axes.set_visible(False)
    panels[0].invert_yaxis()  # shared by all
    return figure


def plot_sweep(sweep: list[dict]):
    """Score against clusters, visual tokens and seconds: a line per group or, where K was varied, per K over all samples; a
    `matplotlib.figure.Figure`."""
    frame = pd.DataFrame(sweep).astype({"low": float, "high": float})  # without an interval they are None
    frame = frame.sort_values("beta", kind="stable")  # the first need not have the fewest
    frame["tokens"] = frame["pixel_tokens"] + frame["semantic_tokens"]
    varied = any(row["k"] not in (0, row["beta"]) for row in sweep)
    lines = dict(iter(frame.groupby("group", sort=False)))
    if varied:
        every = lines[ALL]
        lines = {f"K = {k}": every[every["k"].isin([0, k])] for k in every["k"].unique() if k}
    figure = empty_figure(11, 3.8)
    clusters, tokens, seconds = figure.subplots(1, 3, sharey=True)
    for i, (label, points) in enumerate(lines.items()):
        style = {"color": f"C{i % 10}", "marker": "os^Dv"[i % 5], "ms": 4}
        clusters.plot("beta", "score", data=points, label=label, linestyle="--" if varied and i else "-", **style)
        if label == ALL:  # more bands on top of each other cannot be read
            clusters.fill_between("beta", "low", "high", data=points, color=style["color"], alpha=0.15, linewidth=0)
        # β changes along a line whose tokens stay the same.
        tokens.plot("tokens", "score", data=points, linestyle="" if varied else "-", **style)
        if varied or label == ALL:
            seconds.plot("seconds", "score", data=points, linestyle="", **style)
            for row in points.iloc[min(i, 1) :].itertuples():  # the point that all have is labeled once
                seconds.annotate(str(row.beta), (row.seconds, row.score), (3, 4), textcoords="offset points", fontsize=8)
    clusters.set(xlabel="clusters β (0: no semantic tokens)", ylabel="score", ylim=(0, 1.02))
    tokens.set(xlabel="visual tokens per image")
    seconds.set(xlabel="median seconds per sample (labels: β)")
    for axes in figure.axes:
        axes.grid(alpha=0.25)
    figure.legend(*clusters.get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return figure


def report(
    folder: Path,
    rows: Sequence[dict[str, Any]],  # of `GranularityAnalysis.levels`
    cells: Sequence[dict[str, Any]],  # of `GranularityAnalysis.sweep`
    fields: Sequence[str],  # "task" or names in `meta` that samples are grouped by
    title: str,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Write `granularity.md`, `.json`, `.parquet`, `choices.png`, `levels.png` and `sweep.png`; return what the JSON holds."""
    if not choosers(rows):
        raise GranulonError("No sample could be answered with an image: there is no level to look at.")
    choices, policies = choice_table(rows, fields), policy_table(rows, fields)
    sweep = sweep_table(cells, fields) if cells else []
    write_text(folder / "granularity.md", markdown(choices, policies, sweep, title))
    result = {"settings": settings, "choices": choices, "levels": policies, "sweep": sweep}
    write_text(folder / "granularity.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    swept = ({**row, **cell, "setting": "sweep"} for cell in cells for row in cell["rows"])
    write_rows(folder / "granularity.parquet", ({name: row.get(name) for name in COLUMNS} for row in (*rows, *swept)))
    plots = {"choices": plot_choices(choices), "levels": plot_policies(policies)}
    plots |= {"sweep": plot_sweep(sweep)} if sweep else {}
    for name, figure in plots.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
    return result
