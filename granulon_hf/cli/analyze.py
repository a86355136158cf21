"""`granulon analyze`: what goes on inside: alignment layer by layer, and what the levels are worth."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from granulon_hf.cli.common import Debug, Device, check_out, plain_warnings, progress_bar, quiet, reports_bad_input
from granulon_hf.errors import GranulonError

app = typer.Typer(help="Look inside: alignment layer by layer, and what granularity levels are worth.", no_args_is_help=True)
DEFAULT_SAMPLES = 100  # of drawn scenes, of which there is no end

Data = Annotated[str, typer.Option(help="A data set (a-okvqa, …), a prepared folder, a chat.json, or shapes: drawn scenes.")]
Out = Annotated[Path, typer.Option(help="Folder to write; the same command goes on where it was interrupted.")]
Split = Annotated[str | None, typer.Option(help="By default what training does not see.")]
Source = Annotated[str | None, typer.Option(help="Local files, or another repository.")]
Seed = Annotated[int, typer.Option(help="The same seed draws the same samples.")]
Limit = Annotated[int | None, typer.Option(help="Samples, drawn uniformly.", min=1)]
Batch = Annotated[int, typer.Option(help="Samples at once; results do not depend on it.", min=1)]
Tokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]


def open_data(name: str, split: str | None, source: str | None, limit: int | None, seed: int) -> tuple[Any, dict[str, Any]]:
    """Open samples, at least one of which can be used, and describe them."""
    from granulon_hf.evaluation.sets import no_sample, open_samples

    with plain_warnings():
        samples: Any = open_samples(name, drawn=DEFAULT_SAMPLES, seed=seed, limit=limit, split=split, source=source)
    if next(iter(samples), None) is None:
        raise no_sample(name, samples)
    if name == "shapes":
        return samples, {"name": name, "limit": len(samples), "seed": samples.seed}
    return samples, {"name": name, "split": samples.split, "source": source, "limit": limit, "seed": seed}


def notice(console: Console, text: str) -> None:
    console.print(escape(text), style="yellow", soft_wrap=True)


def show_left_out(console: Console, name: str, samples: Any) -> None:
    from granulon_hf.evaluation.sets import describe_set, left_out

    left = left_out(samples)
    if any(left.values()):
        notice(console, f"{name}: {describe_set(len(samples) - len(left['rows']), left)}")


def load(source: str, device: str, dtype: str) -> tuple[Any, Any, str, dict[str, Any]]:
    """Load model and processor, and return a name and a description too, without the readers' own bars and notes."""
    from granulon_hf.evaluation.answer import describe_model
    from granulon_hf.loading import load_model

    quiet()
    model, processor, name = load_model(source, device, dtype)
    return model, processor, name, describe_model(source, model)


def slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


@app.command()
@reports_bad_input(extra="eval", resumes=True)
def alignment(
    model: Annotated[list[str], typer.Option(help="Hub id, folder, demo or tiny:VARIANT; repeat it to compare several.")],
    out: Out,
    data: Data = "shapes",
    answer: Annotated[
        str, typer.Option(help="What follows the question: the model's own prediction, or the reference.")
    ] = "prediction",
    tokens: Annotated[
        str, typer.Option(help="Mean over content (image, question, answer) or all tokens, markup too.")
    ] = "content",
    split: Split = None,
    source: Source = None,
    limit: Limit = None,
    seed: Seed = 0,
    granularity: Annotated[str | None, typer.Option(help="Force a level; by default the controller chooses.")] = None,
    max_new_tokens: Tokens = 64,
    batch_size: Batch = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    debug: Debug = False,
) -> None:
    """Cosine between a model's states and those of the reference text, layer by layer: heatmaps and mean curves."""
    from granulon_hf.evaluation.alignment import Alignment, AlignmentRun, report
    from granulon_hf.evaluation.answer import Generation
    from granulon_hf.evaluation.sets import left_out
    from granulon_hf.loading import check_models

    what = Alignment(answer, tokens, Generation(max_new_tokens, granularity, batch_size=batch_size))
    if len(set(model)) < len(model):
        raise GranulonError("--model names the same model twice.")
    check_out(out)
    check_models(model, device, dtype)
    samples, described = open_data(data, split, source, limit, seed)
    runs: dict[str, AlignmentRun] = {}
    for where in model:
        loaded, processor, name, description = load(where, device, dtype)
        if granularity is not None and granularity not in loaded.config.level_names:
            known = ", ".join(loaded.config.level_names) or "none"
            raise GranulonError(f"Unknown granularity {granularity!r}; the levels of {name} are {known}.")
        name = name if name not in runs else where  # two folders of the same name
        run = AlignmentRun(out / "cosines" / slug(name), {"model": description, "data": described, "settings": what.settings()})
        with progress_bar(name, len(samples)) as update:
            run.run(loaded, processor, samples, what, lambda done: update(advance=done))
        runs[name] = run
        del loaded
    summary = report(out, runs, left_out(samples))
    console = Console(highlight=False)
    show_left_out(console, data, samples)
    show_alignment(console, summary, out)
    if summary["failed"]:
        raise typer.Exit(1)


def show_alignment(console: Console, summary: dict[str, Any], out: Path) -> None:
    table = Table("model", "samples", "mean", "first layer", "middle", "last", box=None, padding=(0, 2, 0, 0))
    for name, one in summary["models"].items():
        mean = one["mean"]
        numbers = (one["mean_of_layers"], mean[0], mean[len(mean) // 2], mean[-1])
        table.add_row(escape(name), str(one["samples"]), *(f"{number:.3f}" for number in numbers))
    console.print(table)
    for name, one in summary["models"].items():
        if one["left_out"]:
            first = one["left_out"][0]
            count = len(one["left_out"])
            notice(console, f"{count} samples were left out of {name}, such as {first['id']}: {first['reason']}")
        if one["samples"] < one["usable"]:
            notice(
                console, f"{name}: of {one['usable']} samples the {one['samples']} count that all models could be compared on"
            )
    for name, reason in summary["failed"].items():
        typer.echo(f"Error: no sample could be compared with {name} ({reason}); the others are written.", err=True)
    console.print(f"Figures and numbers: {escape(str(out))}", style="dim", soft_wrap=True)


def numbers(text: str, option: str) -> list[int]:
    """Read `"5,10"` as `[5, 10]`, and "none" as no number."""
    if text == "none":
        return []
    parts = [part.strip() for part in text.split(",")]
    if all(re.fullmatch(r"0*[1-9]\d{0,3}", part) for part in parts):
        return [int(part) for part in parts]
    raise GranulonError(f"{option} takes numbers from 1 to 9999 with commas between, such as 5,10,50, or none; got {text!r}.")


@app.command()
@reports_bad_input(extra="eval", resumes=True)
def granularity(
    model: Annotated[str, typer.Option(help="Hub id, folder, demo or tiny:VARIANT; with granularity levels.")],
    out: Out,
    data: Data = "shapes",
    by: Annotated[list[str] | None, typer.Option(help="Group by task, or a field of the samples' meta; repeat it.")] = None,
    score: Annotated[
        str, typer.Option(help="auto, exact, recall or option_accuracy; auto takes what fits the sample.")
    ] = "auto",
    beta: Annotated[
        str, typer.Option(help="Clusters (tokens, in the compact form) of the sweep, with commas between, or none.")
    ] = "5,10,20,30,40,50",
    k: Annotated[str | None, typer.Option(help="Slots K of the sweep; by default as many as clusters.")] = None,
    alpha: Annotated[int, typer.Option(help="Pooling kernel side of the sweep.", min=1)] = 1,
    split: Split = None,
    source: Source = None,
    limit: Limit = None,
    seed: Seed = 0,
    max_new_tokens: Tokens = 64,
    batch_size: Batch = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    debug: Debug = False,
) -> None:
    """Which levels are chosen, what the choice is worth against fixed levels and an oracle, and a sweep over clusters."""
    from granulon_hf.evaluation import granularity as work
    from granulon_hf.evaluation.answer import Generation
    from granulon_hf.evaluation.sets import left_out
    from granulon_hf.loading import check_models

    scorer, fields = work.find_scorer(score), by or ["task"]
    betas, slots = numbers(beta, "--beta"), numbers(k, "--k") if k is not None else None
    work.sweep_cells(betas, slots)  # refused before a model is read
    check_out(out)
    check_models([model], device, dtype)
    opened, described = open_data(data, split, source, limit, seed)
    samples = list(opened)
    for name in fields:
        if name != "task" and not any(name in sample.meta for sample in samples):
            known = sorted({field for sample in samples for field in sample.meta})
            raise GranulonError(f"No sample has the field {name!r}; there are {', '.join(['task', *known])}.")
    if score == "option_accuracy" and not all(sample.choices for sample in samples):
        raise GranulonError("--score option_accuracy needs samples with choices; use auto.")
    loaded, processor, name, description = load(model, device, dtype)
    cells = work.plan_sweep(loaded.config, betas, slots, alpha)
    total = len(samples) * (len(loaded.config.granularity_levels) + len(cells))
    with progress_bar(name, total) as update:
        analysis = work.GranularityAnalysis(
            loaded,
            processor,
            samples,
            folder=out / "answers",
            description={"model": description, "data": described},
            generation=Generation(max_new_tokens, batch_size=batch_size),
            scorer=scorer,
            on_progress=lambda done: update(advance=done),
        )
        found = analysis.levels()
        swept = analysis.sweep(betas, slots, alpha) if cells else []
    settings = {**analysis.description, "generation": analysis.generation.settings(), "left_out": left_out(opened)}
    settings |= {"score": score, "levels": loaded.config.granularity_levels, "alpha": alpha, "beta": betas, "k": slots}
    title = f"Granularity of {name} on {data}, {len(samples)} samples"
    result = work.report(out, found, swept, fields, title, settings)
    console = Console(highlight=False)
    show_left_out(console, data, opened)
    show_granularity(console, result, out)


def show_granularity(console: Console, result: dict[str, Any], out: Path) -> None:
    shares = {row["level"]: row["share"] for row in result["choices"] if row["group"] == "all"}
    table = Table("level", "chosen", "score", "95 % interval", "to the controller", box=None, padding=(0, 2, 0, 0))
    for row in result["levels"]:
        if row["group"] == "all":
            change = f"{row['difference']:+.3f} (p = {row['p']:.3f})" if "difference" in row else ""
            share = f"{shares[row['policy']]:.0%}" if row["policy"] in shares else ""
            interval = "none" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
            table.add_row(escape(row["policy"]), share, f"{row['score']:.3f}", interval, change)
    console.print(table)
    console.print(f"Tables and figures: {escape(str(out))}", style="dim", soft_wrap=True)
