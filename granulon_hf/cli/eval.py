"""`granulon eval`: predictions, scores and tables of several models on several sets; the fair comparison of encoders."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from granulon_hf.cli.common import Debug, check_out, note, plain_warnings, quiet, reports_bad_input
from granulon_hf.errors import GranulonError, one_line

COLUMNS = 6  # that fit beside each other
app = typer.Typer(help="Evaluate models: answers, scores with intervals, tables.", no_args_is_help=True)


def read_yaml(path: Path | None, known: set[str]) -> dict[str, Any]:
    """Read the values of a YAML file that may have these names."""
    if path is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except Exception as error:
        raise GranulonError(f"{str(path)!r} cannot be read: {one_line(error)}") from None
    if not isinstance(values, dict) or (unknown := sorted(set(values) - known)):
        what = f"has the unknown name {unknown[0]!r}" if isinstance(values, dict) else "must map names to values"
        raise GranulonError(f"{str(path)!r} {what}; the names are {', '.join(map(repr, sorted(known)))}.")
    return values


def options_of(ctx: typer.Context) -> dict[str, bool]:
    """Return the names of the options that a file may hold, and whether each can be given several times."""
    parameters = {one.name: getattr(one, "multiple", False) for one in ctx.command.params}
    return {name: multiple for name, multiple in parameters.items() if name not in ("config", "debug", "help")}


def read_options(ctx: typer.Context, path: Path | None) -> dict[str, Any]:
    """Read options from a file as from the command line: of their types, within their bounds, one as a list of one."""
    known, line = options_of(ctx), []
    values = read_yaml(path, set(known))
    for name, value in values.items():
        items = [] if value is None or value is False else value if known[name] and isinstance(value, list) else [value]
        if any(isinstance(item, list | dict) for item in items):
            form = "a list of names" if known[name] else "one value"
            raise GranulonError(f"{str(path)!r}: {name} is {value!r}; it takes {form}.")
        line += [f"--{name.replace('_', '-')}" + (f"={item}" if item is not True else "") for item in items]
    try:
        found = ctx.command.make_context(ctx.info_name, line).params
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's way, of the copy that this version of typer uses
            raise
        raise GranulonError(f"{str(path)!r}: {' '.join(error.format_message().split())}") from None
    return {name: found[name] for name in values if found[name] is not None}


@app.command()
@reports_bad_input(extra="eval", resumes=True)
def run(
    ctx: typer.Context,
    config: Annotated[Path | None, typer.Argument(help="YAML with the options below as names; the line wins.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Folder, Hub id, demo, or tiny:VARIANT; the first is the baseline.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Name of a set (NAME=FOLDER says where it is), a folder, a chat.json, or shapes.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder of predictions and tables. \\[eval]")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the sets; by default what training does not see.")] = None,
    preset: Annotated[str | None, typer.Option(help="Subset of the sets, such as paper.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many samples of each set, uniformly drawn.", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Of the drawing. [0]")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Instead of those that suit the task.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer. [64]", min=1)] = None,
    granularity: Annotated[str | None, typer.Option(help="Force a level.")] = None,
    visual_tokens: Annotated[
        int | None, typer.Option(help="Semantic tokens of every image, instead of a level.", min=1)
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="Of a visual token, for controllers that were trained at prices.", min=0)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples at once; answers do not depend on it. \\[8; 64 with a token budget]", min=1)
    ] = None,
    max_tokens_per_batch: Annotated[
        int | None,
        typer.Option(
            "--max-tokens-per-batch",
            "--max_tokens_per_batch",
            help="Tokens of a batch, with images, padding and answers. \\[what a GPU's free memory holds; no bound on a CPU]",
            min=1,
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, or auto. \\[auto]")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto: the checkpoint's own; float32 on a CPU. \\[auto]")] = None,
    judge: Annotated[str | None, typer.Option(help="Score with this judge too, such as gpt-4o.")] = None,
    judge_base_url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server.")] = None,
    judge_max_cost: Annotated[float | None, typer.Option(help="USD for each model and set.", min=0)] = None,
    bertscore_model: Annotated[str | None, typer.Option(help="Encoder of BERTScore. \\[roberta-large]")] = None,
    bertscore_layers: Annotated[int | None, typer.Option(help="Its layer, for a folder.")] = None,
    results_yaml: Annotated[bool, typer.Option("--results-yaml", help="Write the Hub's .eval_results/*.yaml too.")] = False,
    debug: Debug = False,
) -> None:
    """Answer, score, compare. A stopped run goes on.

    Several GPUs: accelerate launch -m granulon_hf eval run … Several processes on a CPU, where accelerate starts only one:
    torchrun --nproc_per_node 2 -m granulon_hf eval run …
    """
    from granulon_hf.evaluation.answer import Generation
    from granulon_hf.evaluation.benchmark import Suite, make_table, run_suite
    from granulon_hf.loading import check_choice, check_models, load_model, read_config

    given = dict(locals())
    said = {name: given[name] for name in options_of(ctx) if given[name] not in (None, []) and given[name] is not False}
    options = {"model": [], "data": [], "out": "eval", **read_options(ctx, config), **said}

    def taken(**names: str) -> dict[str, Any]:
        return {name: options.pop(option) for name, option in names.items() if option in options}

    names = ("max_new_tokens", "granularity", "visual_tokens", "price", "batch_size", "max_tokens_per_batch")
    generation = Generation(**taken(**dict(zip(names, names, strict=True))))

    def check(sources: list[str], device: str, dtype: str) -> None:
        check_models(sources, device, dtype)
        for source in sources:
            config = read_config(source)
            # A plain model beside others answers without a level.
            level = generation.granularity if config.granularity_levels else None
            check_choice(config, level, generation.visual_tokens, generation.price, name=source)

    judged = taken(model="judge", base_url="judge_base_url", max_cost="judge_max_cost")
    lists, written = taken(models="model", metrics="metric"), options.pop("results_yaml", False)
    suite = Suite(**lists, **options, generation=generation, judge=judged if judged.get("model") else None)
    check_out(Path(suite.out))
    quiet()
    main = int(os.environ.get("RANK", 0)) == 0
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bars: dict[str, Any] = {}
    with Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True), disable=not main) as progress:

        def on_progress(what: str, total: int, done: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], advance=done * int(os.environ.get("WORLD_SIZE", 1)))

        def on_set(line: str) -> None:
            if main:
                progress.console.print(escape(line), soft_wrap=True)

        with plain_warnings(lambda line: on_set(f"Note: {line}")):
            result = run_suite(suite, load_model, on_progress, on_set, check)
    if main:
        show(make_table(result))
        typer.echo(f"Tables: {Path(suite.out) / 'table.md'}, {Path(suite.out) / 'table.html'}")
    if main and written:
        from granulon_hf.evaluation.results import write_results

        files, left = write_results(result, Path(suite.out))
        if files:
            typer.echo(f"Results for the Hub: {', '.join(map(str, files))}")
        if left:
            note(f"{', '.join(left)} is no data set of the Hub: nothing is written about it for --results-yaml.")


def show(table: dict[str, Any]) -> None:
    """Print the table, with the models side by side where it has more columns than a terminal."""
    heads = [escape(f"{data}\n{metric} (n = {table['counts'][data]})") for data, metric in table["columns"]]
    rows = [[escape(cell.replace("; ", "\n")) for cell in row["cells"]] for row in table["rows"]]
    names, styles = [escape(row["name"]) for row in table["rows"]], ["dim" if row["paper"] else "" for row in table["rows"]]
    corner = "model"
    if len(heads) > COLUMNS:
        corner = ""
        heads, names = names, [head.replace("\n", ": ") for head in heads]
        rows, styles = [list(cells) for cells in zip(*rows, strict=True)], [""] * len(names)
    printed = Table(corner, *heads, box=None, padding=(0, 2, 0, 0))
    for name, cells, style in zip(names, rows, styles, strict=True):
        printed.add_row(name, *cells, style=style)
    console = Console(highlight=False)
    console.print(printed)
    for remark in table["remarks"]:
        console.print(escape(remark), style="yellow", soft_wrap=True)


@app.command()
@reports_bad_input(extra="train,eval", resumes=True)
def compare(
    config: Annotated[Path, typer.Argument(help="YAML: llm, encoders, reducers, budgets … See examples/compare.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder of everything.")] = Path("compare"),
    debug: Debug = False,
) -> None:
    """Train the projector of several encoders or token reducers under one language model, identically, and evaluate them.
    Resumable."""
    from granulon_hf.evaluation.benchmark import make_table
    from granulon_hf.evaluation.comparison import compare as run_comparison

    values = read_yaml(config, {"llm", "encoders", "reducers", "budgets", "prices", "scored", "train", "eval", "controller"})
    check_out(out)
    with plain_warnings():
        result = run_comparison(values, out, on_set=lambda line: typer.echo(line, err=True))
    if not result:  # the first of several processes tells
        return
    show(make_table(result))
    typer.echo(f"Table, curves and manifest: {out}")
