"""Several models on several data sets: predictions, scores with intervals, paired tests, and the table of the paper."""

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from transformers import AutoConfig

from granulon_hf.data import ADAPTERS, Sample
from granulon_hf.errors import GranulonError, first_sentence
from granulon_hf.evaluation import answer
from granulon_hf.evaluation.answer import Generation, PredictionRun, cluster_keys, encoded
from granulon_hf.evaluation.hallucination import WEIGHTED
from granulon_hf.evaluation.metrics import CAPTION_METRICS, SCORERS, bert_scores, corpus_captions
from granulon_hf.evaluation.sets import describe_set, left_out, no_sample, open_samples
from granulon_hf.evaluation.tables import difference_text, markdown_table, score_text, write_page
from granulon_hf.io import write_text
from granulon_hf.loading import pick_device
from granulon_hf.stats import clusters_of, difference, estimate
from granulon_hf.training.run import command_line

# Figures of the paper by model, then by (data set, metric), for reference.
PAPER: dict[str, dict[tuple[str, str], float]] = {
    model: {(data, metric): figure for data, metrics in sets.items() for metric, figure in metrics.items()}
    for model, sets in yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8")).items()
}
METRICS = (*(SCORERS | WEIGHTED), "bertscore", *CAPTION_METRICS, "judge", "hallucination")
PERCENT = {*SCORERS, *WEIGHTED, "bertscore"}  # shown times 100
TOP = {"judge": 100.0, "hallucination": 100.0}  # the highest score of metrics, where it is not 1


@dataclass
class Suite:
    """What to evaluate; split, preset, limit and seed are those of all sets."""

    models: list[str]  # folders, Hub ids, "tiny:<variant>"
    data: list[str]  # names or folders for `granulon_hf.data.load`, or "shapes"; `name=source` says where a set is
    out: str  # folder of everything
    split: str | None = None
    preset: str | None = None
    limit: int | None = None
    seed: int = 0
    # By default those of the set, or what suits the task: recall always, option accuracy where there are choices, exact match
    # for other questions.
    metrics: list[str] | None = None
    generation: Generation = field(default_factory=Generation)
    generations: dict[str, Generation] = field(default_factory=dict)  # of single models, instead of that of all
    device: str = "auto"
    dtype: str = "auto"
    bertscore_model: str = "roberta-large"  # its encoder
    bertscore_layers: int | None = None
    judge: dict[str, Any] | None = None  # arguments of the judge's `compute`, such as `model` and `base_url`

    def __post_init__(self):
        for name, values in (("model", self.models), ("data set", self.data), ("metric", self.metrics)):
            if values is None:
                continue
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                raise GranulonError(f"What to take as {name} is a list of names, not {values!r}.")
            names = [value.partition("=")[0].strip() for value in values]
            if not names:
                raise GranulonError(f"There is no {name} to evaluate.")
            if len(set(names)) < len(names):
                raise GranulonError(f"A {name} is named twice.")
        for name, number, least in (("limit", self.limit, 1), ("seed", self.seed, 0)):
            if number is not None and (not isinstance(number, int) or number < least):
                raise GranulonError(f"The {name} is a whole number from {least}, not {number!r}.")
        if unknown := sorted(set(self.metrics or []) - set(METRICS)):
            raise GranulonError(f"Unknown metric {unknown[0]!r}; the metrics are {', '.join(METRICS)}.")
        if {"judge", "hallucination"} & set(self.metrics or []) and self.judge is None:
            raise GranulonError("The metric 'judge' needs a judge: say which, such as --judge gpt-4o.")

    def generation_of(self, source: str) -> Generation:
        return self.generations.get(source, self.generation)


def open_set(suite: Suite, name: str) -> Any:
    """Samples of a set, not gone through yet. Raises GranulonError where it cannot be read."""
    name, _, source = name.partition("=")
    # Split and preset are those of the sets beside the drawn one.
    options = {} if name == "shapes" else {"split": suite.split, "preset": suite.preset}
    return open_samples(name, drawn=300, seed=suite.seed, limit=suite.limit, source=source or None, **options)


def slug(text: str) -> str:
    """A name that a folder can have."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text).strip("-.") or "unnamed"


def titles_of(sources: Sequence[str]) -> dict[str, str]:
    """What each model is called: its folder's name, or its source. Raises GranulonError where two would share a folder."""
    titles = {source: source.rstrip("/").split("/")[-1] if os.path.isdir(source) else source for source in sources}
    taken = Counter(map(slug, titles.values()))
    if twice := [title for title in titles.values() if taken[slug(title)] > 1]:
        raise GranulonError(f"Two models have the name {twice[-1]!r}; rename a folder.")
    return titles


def check_metrics(suite: Suite) -> None:
    """Raise GranulonError where a metric is asked for and its packages, or the encoder of BERTScore, are not there."""
    asked = set(suite.metrics or [])
    missing = [package for package in CAPTION_METRICS.values() if find_spec(package) is None]
    if missing and asked & set(CAPTION_METRICS):
        names = ", ".join(CAPTION_METRICS)
        raise GranulonError(f'{missing[0]} is not installed; {names} need: pip install "granulon-hf[captions]"')
    if "bertscore" not in asked:
        return
    try:
        AutoConfig.from_pretrained(suite.bertscore_model)
    except (OSError, ValueError) as error:
        encoder = f"The encoder {suite.bertscore_model!r} of BERTScore"
        raise GranulonError(f"{encoder} cannot be loaded ({first_sentence(error)}); a folder will do too.") from error
    if os.path.isdir(suite.bertscore_model) and suite.bertscore_layers is None:
        raise GranulonError("For an encoder in a folder say --bertscore-layers: which of its layers BERTScore compares.")


def run_suite(
    suite: Suite,
    load_model: Callable[[str, str, str], tuple[Any, Any, str]],  # called once a model, and only where answers are missing
    on_progress: Callable[[str, int, int], None] = lambda what, total, done: None,  # takes what is newly done
    on_set: Callable[[str], None] = lambda line: None,  # takes a line on each set, before a model is loaded
    # Takes all models whose answers are missing; raises ValueError for what can be seen to be wrong before the first is loaded.
    check_models: Callable[[list[str], str, str], None] = lambda sources, device, dtype: None,
) -> dict[str, Any]:
    """Predict, score, and write the tables; everything that is there already is kept.

    Returns:
        `dict`: `models`, `data` (columns: names of sets, or of their parts), `sets` (`{name: {"samples": number, "left_out":
        rows, files, filtered, "parts": {column: number}}}`), `clusters` (`{column: [number of each sample]}`, the same for
        samples that share an image), `levels` (likewise, the level of question that a set names), `scores` (`{model: {column:
        {metric: [value of each sample]}}}`), `weights` (likewise, of metrics whose samples do not count alike),
        `visual_tokens` (`{model: {column: [number of each sample]}}`), `failed` (`{model: {column: number}}`, samples
        without an answer, which are scored as empty ones) and `judge` (its name): what the tables are made from, and what
        `scores.json` holds. Empty on all processes but the first, which alone scores.

    Raises:
        GranulonError: data or a model cannot be used; before a model is loaded where that can be known.
    """
    out, titles = Path(suite.out), titles_of(suite.models)
    check_metrics(suite)
    sets: dict[str, list[Sample]] = {}
    about: dict[str, dict[str, Any]] = {}
    for name in suite.data:
        opened, data = open_set(suite, name), name.partition("=")[0]
        sets[data] = list(opened)
        if not sets[data]:
            raise no_sample(data, opened)
        parts = {part: len(indices) for part, indices in parts_of(data, sets[data]).items()}
        about[data] = {"samples": len(sets[data]), "left_out": left_out(opened), "parts": parts}
        on_set(f"{data}: {describe_set(len(sets[data]), about[data]['left_out'])}")
        tasks = sorted({sample.task for sample in sets[data]})
        if len(tasks) > 1 and suite.judge and {"judge", "hallucination"} & set(suite.metrics or METRICS):
            raise GranulonError(f"The judge scores one task at a time; {data} has {' and '.join(tasks)}.")
    columns = [part for one in about.values() for part in one["parts"]]
    if twice := [part for part, times in Counter(columns).items() if times > 1]:
        raise GranulonError(f"Two data sets would have the column {twice[0]!r}; rename one.")
    folders = {(source, data): out / slug(titles[source]) / slug(data) for source in suite.models for data in sets}
    if len(set(folders.values())) < len(folders):
        raise GranulonError(f"Two data sets would share a folder: {', '.join(sets)}; rename one.")
    stored = {key: stored_rows(folder, sets[key[1]]) for key, folder in folders.items()}
    missing = [source for source in suite.models if any(stored[source, data] is None for data in sets)]
    check_models(missing, suite.device, suite.dtype)
    already = torch.distributed.is_available() and torch.distributed.is_initialized()
    state = answer.process_state(pick_device(suite.device))
    state.wait_for_everyone()  # all have seen what is there before one changes it
    answers: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for source, title in titles.items():
        model = processor = None
        for data, samples in sets.items():
            folder = folders[source, data]
            description = {
                "model_source": source_state(source),
                "data": {"name": data, "content": digest_of(samples), "samples": len(samples)},
                "generation": suite.generation_of(source).settings(),
                "dtype": suite.dtype,
            }
            rows = stored[source, data]
            if rows is not None:
                # A run that only scores does not load its model; answers to something else are refused.
                PredictionRun(folder, {"model": PredictionRun(folder).description.get("model"), **description})
            else:
                if model is None:
                    model, processor, _ = load_model(source, suite.device, suite.dtype)
                    level, levels = suite.generation_of(source).granularity, model.config.level_names
                    if level is not None and levels and level not in levels:
                        raise GranulonError(f"Unknown granularity {level!r}; the levels of {title} are {', '.join(levels)}.")
                run = PredictionRun(folder, {**description, "model": answer.describe_model(source, model)})
                told = functools.partial(on_progress, f"{title} on {data}", len(samples))
                rows = run.run(model, processor, samples, suite.generation_of(source), state=state, on_progress=told)
            if all("error" in row for row in rows):
                raise GranulonError(
                    f"{title} could answer none of the samples of {data} ({rows[0]['error'].rstrip('.')}); when that "
                    f"is mended, remove {str(folder)!r}."
                )
            answers[source, data] = rows
    model = processor = None
    state.wait_for_everyone()
    main = state.is_main_process
    if state.num_processes > 1 and not already:  # a judge takes long: nobody waits for the first process
        state.destroy_process_group()
        state._reset_state()
    if not main:
        return {}
    result: dict[str, Any] = {"models": list(titles.values()), "data": columns, "sets": about, "clusters": {}, "levels": {}}
    result["judge"] = suite.judge and suite.judge["model"]
    kept = ("scores", "weights", "failed", "visual_tokens")
    result |= {name: {title: {} for title in titles.values()} for name in kept}
    for data, samples in sets.items():
        clusters = clusters_of(map(cluster_keys, samples))
        for part, places in parts_of(data, samples).items():
            result["clusters"][part] = [clusters[i] for i in places]
            result["levels"][part] = [samples[i].meta.get("level") for i in places]
    for source, title in titles.items():
        scores, weights, failed, shown = (result[name][title] for name in kept)
        for data, samples in sets.items():
            folder, rows = folders[source, data], answers[source, data]
            made = suite.generation_of(source)
            answer.write_parquet(folder / "predictions.parquet", rows, model=title, data=data, generation=made)
            found, weighted = score_rows(suite, data, samples, rows, folder)
            for part, indices in parts_of(data, samples).items():
                scores[part] = {name: [values[i] for i in indices] for name, values in found.items()}
                weights[part] = {name: [values[i] for i in indices] for name, values in weighted.items()}
                for name in weighted:  # a score of captions says nothing about a part with questions
                    if all(value is None for value in scores[part][name]):
                        del scores[part][name], weights[part][name]
                failed[part] = sum("error" in rows[i] for i in indices)
                shown[part] = [rows[i].get("visual_tokens") for i in indices]
    result["command"] = command_line()
    write_text(out / "scores.json", json.dumps(result) + "\n")
    table = make_table(result)
    write_text(out / "table.md", markdown(table))
    write_page(out / "table.html", "table.html.jinja", table=table)
    return result


def parts_of(data: str, samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Columns of a set, each with the places of its samples: one, or where it is split one for each part that is there.

    Benchmarks with metrics of their own have a column of all their samples too.
    """
    field = ADAPTERS[data].split_by if data in ADAPTERS else ""
    values = [sample.meta.get(field) for sample in samples]
    parts: dict[str, list[int]] = {}
    for i, value in enumerate(values):
        parts.setdefault(f"{data}-{value or 'other'}" if any(values) else data, []).append(i)
    if len(parts) > 1 and ADAPTERS[data].metrics:
        return {data: list(range(len(samples))), **parts}
    return parts


def digest_of(samples: Iterable[Sample]) -> str:
    """Of everything that answers and scores depend on."""
    digest = hashlib.sha256()
    for sample in samples:
        parts: list[Any] = [sample.id, sample.prompt, sample.reference, sample.choices, sample.task]
        parts += [hashlib.sha256(encoded(image)).hexdigest() for image in sample.images]
        digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def source_state(source: str) -> list[Any]:
    """A model's name and, of a folder, the size and time of its weight files: trained anew it is another model."""
    files = sorted(Path(source).glob("*.safetensors")) if os.path.isdir(source) else []
    return [source, *([file.name, file.stat().st_size, int(file.stat().st_mtime)] for file in files)]


def stored_rows(folder: Path, samples: Sequence[Sample]) -> list[dict[str, Any]] | None:
    """The rows of a run that is complete, in the order of the samples."""
    if not (folder / "run.json").exists():
        return None
    run = PredictionRun(folder)
    known, parts = run.rows(), [part.name for part in run.parts()]
    if parts != ["predictions.jsonl"] or not all(sample.id in known for sample in samples):  # parts are to be put together
        return None
    return [known[sample.id] for sample in samples]


def metrics_for(suite: Suite, rows: list[dict[str, Any]], data: str = "") -> list[str]:
    if suite.metrics is not None:
        return suite.metrics
    judged = ["judge", "hallucination"] if suite.judge else []
    if data in ADAPTERS and ADAPTERS[data].metrics:
        return [*ADAPTERS[data].metrics, *judged]
    chosen = ["recall"]
    if all(row["choices"] for row in rows):
        chosen.append("option_accuracy")
    elif all(row["task"] == "vqa" for row in rows):
        chosen.append("exact")
    return chosen + judged


def score_rows(
    suite: Suite, data: str, samples: Sequence[Sample], rows: list[dict[str, Any]], folder: Path
) -> tuple[dict[str, list[float | None]], dict[str, list[float]]]:
    """Values of each sample by metric, None where there is none (the judge's failures), and weights of the weighted metrics."""
    names = metrics_for(suite, rows, data)
    # A run keeps of `meta` what is short.
    rows = [{**row, "meta": sample.meta} for row, sample in zip(rows, samples, strict=True)]
    predictions, references = [row["prediction"] for row in rows], [row["reference"] for row in rows]
    found: dict[str, Any] = {name: [SCORERS[name](row) for row in rows] for name in names if name in SCORERS}
    if "bertscore" in names:
        found["bertscore"] = bert_scores(predictions, references, suite.bertscore_model, suite.bertscore_layers)
    if set(CAPTION_METRICS) & set(names):
        found |= corpus_captions(predictions, references)
    if {"judge", "hallucination"} & set(names):
        found |= judge_rows(suite, rows, folder)
    weights: dict[str, list[float]] = {}
    for name in set(names) & set(WEIGHTED):
        values, own = zip(*WEIGHTED[name](rows), strict=True)
        found[name], weights[name] = list(values), list(own)
    return {name: found[name] for name in names}, weights


def judge_rows(suite: Suite, rows: list[dict[str, Any]], folder: Path) -> dict[str, list[float | None]]:
    """The judge's scores of a run; its answers are kept beside the predictions."""
    from granulon_hf.judge import judge as judge_module

    result = judge_module.Judge().compute(
        **{f"{name}s": [row[name] for row in rows] for name in ("prediction", "reference", "question")},
        images=[str(folder / row["images"][0]) if row["images"] else None for row in rows],
        task=rows[0]["task"],
        **{"store": str(folder / "judge.jsonl"), **(suite.judge or {})},
    )
    scores = {"judge": result["accuracy_scores"], "hallucination": result["hallucination_scores"]}
    columns = {name: [row[name] for row in rows] for name in ("id", "prediction")} | {"image_id": result["image_ids"]}
    columns |= {"accuracy": scores["judge"], "hallucination": scores["hallucination"], "reason": result["reasons"]}
    lines = (dict(zip(columns, one, strict=True)) for one in zip(*columns.values(), strict=True))
    write_text(folder / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return scores


# --- tables -----------------------------------------------------------------------------------------------------------


def make_table(result: dict[str, Any]) -> dict[str, Any]:
    """Texts of the table: rows are models, columns data × metric; the first model is what the others are compared with."""
    models, scores = result["models"], result["scores"]
    columns = [
        (data, metric)
        for data in result["data"]
        for metric in dict.fromkeys(metric for model in models for metric in scores[model][data])
    ]
    rows = []
    for model in models:
        base = models[0] if model != models[0] else None
        cells = [cell_text(result, model, base, data, metric) for data, metric in columns]
        rows.append({"name": model, "cells": cells, "paper": False})
    for name, figures in PAPER.items():
        cells = [f"{figures[column]:.2f}" if column in figures else "" for column in columns]
        if any(cells):
            rows.append({"name": f"{name} (paper)", "cells": cells, "paper": True})
    counts = {part: count for about in result["sets"].values() for part, count in about["parts"].items()}
    remarks = [
        f"{data}: {describe_set(about['samples'], about['left_out'])}."
        for data, about in result["sets"].items()
        if any(about["left_out"].values())
    ]
    return {"columns": columns, "rows": rows, "note": NOTE.format(first=models[0]), "counts": counts, "remarks": remarks}


def scored(result: dict[str, Any], model: str, data: str, metric: str) -> pd.DataFrame:
    """Return `value`, `weight` and `cluster` of the samples of a column that a metric scored, by their places."""
    values = result["scores"][model][data].get(metric) or []
    # Results of older versions name neither.
    weights = result.get("weights", {}).get(model, {}).get(data, {}).get(metric) or [1.0] * len(values)
    clusters = result.get("clusters", {}).get(data) or range(len(values))
    frame = pd.DataFrame({"value": pd.Series(values, dtype=float), "weight": weights})
    return frame.assign(cluster=list(clusters)[: len(frame)]).dropna()


def estimated(own: pd.DataFrame, metric: str) -> dict[str, Any]:
    """Return the mean of a column that `scored` returned, with its interval."""
    return estimate(own["value"], own["cluster"], own["weight"], TOP.get(metric, 1.0))


def cell_text(result: dict[str, Any], model: str, base: str | None, data: str, metric: str) -> str:
    """Mean and interval, how many have no score or no answer, and after a semicolon the difference to the model `base`."""
    own = scored(result, model, data, metric)
    if own.empty:
        return ""
    style: dict[str, Any] = {"digits": 1, "scale": 100.0 if metric in PERCENT else 1.0}
    text = score_text(estimated(own, metric), **style)
    # What such a metric is not about is not missing.
    unscored = 0 if metric in WEIGHTED else len(result["scores"][model][data][metric]) - len(own)
    failed = result["failed"][model][data]
    for count, what in ((unscored, "unscored"), (failed, "without an answer")):
        text += f" ({count} {what})" if count else ""
    both = own.join(scored(result, base, data, metric), rsuffix="_base", how="inner") if base is not None else own[:0]
    if both.empty:
        return text
    sides = (both[name] for name in ("value", "value_base", "cluster", "weight", "weight_base"))
    return f"{text}; {difference_text(difference(*sides), **style)}"


def markdown(table: dict[str, Any]) -> str:
    head = ["model", *(f"{data}: {metric} (n = {table['counts'][data]})" for data, metric in table["columns"])]
    lines = [[f"*{cell}*" if cell and row["paper"] else cell for cell in (row["name"], *row["cells"])] for row in table["rows"]]
    return "\n\n".join([markdown_table(head, lines, rule="---"), table["note"], *table["remarks"]]) + "\n"


NOTE = (
    "Means with 95 % bootstrap intervals over images, each with all its samples; after the semicolon the difference to {first} "
    "on the same samples, with its interval and the p-value of a permutation test over images. Rows marked (paper) are the "
    "paper's own figures, from its weights and subsets."
)
