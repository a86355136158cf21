"""`granulon judge`: score a file of predictions, compare two judges, install the metric for offline use."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from granulon_hf.cli.common import Debug, check_out, in_options, pairs, progress_bar, reports_bad_input
from granulon_hf.errors import GranulonError, one_line
from granulon_hf.io import write_text

LONG = 100_000  # tokens, which most models do not take

app = typer.Typer(help="Score answers about images with GPT-4o or any OpenAI-compatible judge.", no_args_is_help=True)


Price = Annotated[
    tuple[str, str] | None,
    typer.Option(
        metavar="PROMPT COMPLETION",
        help="Two amounts for a model whose price is not known: USD per million prompt tokens, and per million completion "
        "tokens, such as --price 2.5 10.",
    ),
]


def judge_options(given: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return those arguments of a command that are options of the judge by the same name, the prices, and `more`."""
    from granulon_hf.judge.judge import Options

    options = {field.name: given[field.name] for field in dataclasses.fields(Options) if field.name in given}
    if price := given["price"]:
        try:
            amounts = float(price[0]), float(price[1])
        except ValueError:
            amounts = -1.0, -1.0
        if not all(0 <= amount < math.inf for amount in amounts):
            raise GranulonError(
                "--price takes two amounts with a space between, USD per million prompt tokens and per million completion "
                f"tokens, such as --price 2.5 10; got {' '.join(price)!r}."
            )
        options["prices"] = {given["model"]: amounts}
    return {**options, **more}


@contextmanager
def judge_errors(store: Path) -> Iterator[None]:
    """Turn what the judge says of its arguments, and why it stops, into the command's sentences."""
    from granulon_hf.judge.judge import JudgeError

    try:
        yield
    except ValueError as error:
        raise GranulonError(str(error)) from None
    except JudgeError as error:
        raise GranulonError(f"{one_line(error)} What was paid for is in {str(store)!r}; the same command goes on.") from None


@contextmanager
def progress(what: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show a bar with what was spent; what is yielded is the judge's `on_result`."""
    with progress_bar(what) as update:
        yield lambda event: update(completed=event["done"], total=event["total"], description=what + spent(event, ""))


@app.command()
@reports_bad_input(extra="judge", resumes=True)
def run(
    predictions: Annotated[Path, typer.Argument(help="JSONL, Parquet, or a datasets folder: columns prediction, image, …")],
    task: Annotated[
        str | None, typer.Option(help="reasoning, vqa or caption; by default what the file's task column says, or reasoning.")
    ] = None,
    model: Annotated[str, typer.Option(help="The judge.")] = "gpt-4o",
    out: Annotated[Path | None, typer.Option(help="Folder for answers, scores and report; by default beside the file.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N predictions.", min=1)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would ask and cost, and send nothing.")] = False,
    max_cost: Annotated[float | None, typer.Option(help="USD that this run may spend; then it stops cleanly.", min=0)] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Use the answers that are stored; --no-resume refuses a used folder.")
    ] = True,
    retry_unscored: Annotated[bool, typer.Option("--retry-unscored", help="Ask again what has no score.")] = False,
    backend: Annotated[str, typer.Option(help="chat, or batch: half the price, up to a day.")] = "chat",
    hardened: Annotated[
        bool, typer.Option("--hardened/--printed-prompt", help="Guard against instructions; or the paper's prompt alone.")
    ] = True,
    segments: Annotated[int | None, typer.Option(help="Also score this many chronological segments.", min=1)] = None,
    detail: Annotated[str, typer.Option(help="high or low, of the image.")] = "high",
    max_tokens: Annotated[
        int, typer.Option(help="Tokens of an answer at most; a judge that reasons before it answers needs more.", min=1)
    ] = 100,
    column: Annotated[list[str] | None, typer.Option(help="FIELD=COLUMN where a column has another name.")] = None,
    image_root: Annotated[Path | None, typer.Option(help="Where relative image paths start, if not beside the file.")] = None,
    price: Price = None,
    base_url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server; by default OPENAI_BASE_URL.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests under way at once.", min=1)] = 64,
    rpm: Annotated[float | None, typer.Option(help="Requests a minute; by default what the server allows.")] = None,
    tpm: Annotated[float | None, typer.Option(help="Tokens a minute; by default what the server allows.")] = None,
    poll_seconds: Annotated[float, typer.Option(help="Between two looks at a batch.")] = 30.0,
    show: Annotated[int, typer.Option(help="Worst samples on the report's page.", min=1)] = 200,
    debug: Debug = False,
) -> None:
    """Score predictions. A run that was killed is started again with the same command, and pays for nothing twice."""
    given = dict(locals())
    from granulon_hf.evaluation import judging as work

    console = Console(highlight=False)
    samples = work.read_predictions(predictions, pairs(column, "--column"), image_root)[:limit]
    tasks = sorted({sample.task or "reasoning" for sample in samples})
    if task is None and len(tasks) > 1:
        raise GranulonError(f"The predictions are of the tasks {' and '.join(tasks)}; judge one file for each, or say --task.")
    folder = out or predictions.with_name(f"{predictions.stem}.judged")
    check_out(folder)
    store = folder / "answers.jsonl"
    if not resume and store.exists():
        raise GranulonError(
            f"{str(store)!r} already holds answers; leave out --no-resume to use them, or say --out ANOTHER_FOLDER."
        )
    inputs = {f"{name}s": [getattr(s, name) for s in samples] for name in ("prediction", "image", "reference", "question")}
    options = judge_options(given, task=task or tasks[0], store=str(store))
    with judge_errors(store):
        chosen = work.judge.Options(**options)
        units = work.judge.units_of(work.judge.columns_of(**inputs), chosen)
        warn_of_lengths(console, chosen, units, [sample.id for sample in samples])
        if dry_run:
            show_estimate(console, work.judge.estimate(**inputs, **options), model)
            return
        if backend == "batch":
            console.print(f"Looking at batches every {poll_seconds:g} s; stop at will, the same command goes on.", style="dim")
        with progress("judging") as on_result:
            result = work.judge.Judge().compute(**inputs, **options, on_result=on_result)
    rows = work.judged(samples, result)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(folder / "samples.jsonl", lines, errors="replace")
    write_text(folder / "results.json", json.dumps({"predictions": str(predictions), **result}, indent=1) + "\n")
    work.write_report(folder / "report.html", f"{predictions.name} judged by {model}", samples, result, show)
    show_result(console, result, folder)


def warn_of_lengths(console: Console, options: Any, units: list[Any], ids: list[str]) -> None:
    """Name what the judge's context does not hold, which is not sent, or may not hold."""
    tokens = [options.tokens(unit) for unit in units]
    too_long = list(dict.fromkeys(ids[unit.sample] for unit, n in zip(units, tokens, strict=True) if options.too_long(n)))
    longest = max(tokens, default=0)
    if too_long:
        more = f" and {len(too_long) - 1} more" if len(too_long) > 1 else ""
        note = f"{options.model} cannot take prompts as long as that of {too_long[0]!r}{more}; what is too long is not sent."
    elif options.context is None and longest > LONG:
        name = ids[units[tokens.index(longest)].sample]
        note = f"The prompt of {name!r} has about {longest:,} tokens; whether {options.model} takes so many is not known."
    else:
        return
    console.print(escape(note), style="yellow", soft_wrap=True)


def show_estimate(console: Console, estimate: dict[str, Any], model: str, what: str = "predictions") -> None:
    cost, date = estimate["cost_usd"], estimate["prices_date"]
    known = cost is not None and f"{cost:.4f} USD ({f'prices of {date}' if date else 'by --price'})"
    lines = {
        what: f"{estimate['n']}",
        "empty, not sent": estimate.get("n_empty"),
        "unreadable images": estimate["n_unreadable"],
        "already stored": estimate["n_stored"],
        "too long, not sent": len(estimate["too_long"]),
        "requests": f"{estimate['n_requests']}",
        "prompt tokens, about": f"{estimate['prompt_tokens']:,}",
        "completion tokens, about": f"{estimate['completion_tokens']:,}",
        "cost, about": known or f"unknown for {escape(model)}; say --price PROMPT COMPLETION",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        if value:
            table.add_row(name, str(value))
    console.print(table)
    console.print("Nothing was sent.", style="dim")


def show_reasons(console: Console, reasons: list[str | None]) -> None:
    for reason, count in Counter(filter(None, reasons)).most_common(5):
        console.print(f"  {count} × {escape(in_options(reason, ['max_cost']))}", style="yellow", soft_wrap=True)


def spent(result: dict[str, Any], where: str = " in this run") -> str:
    return "" if result["spent_usd"] is None else f" · {result['spent_usd']:.4f} USD{where}"


def show_result(console: Console, result: dict[str, Any], folder: Path) -> None:
    table = Table("", "mean", "95 % interval", box=None, padding=(0, 2, 0, 0))
    for name in ("accuracy", "hallucination"):
        mean, ci, rest = result[name], result[f"{name}_ci"], result[f"{name}_nonempty"]
        table.add_row(name, "none" if mean is None else f"{mean:.1f}", "" if ci is None else f"{ci[0]:.1f} to {ci[1]:.1f}")
        if result["n_empty"] and rest is not None:
            table.add_row(f"{name}, without empty answers", f"{rest:.1f}", "", style="dim")
    console.print(table)
    counts = f"{result['n_scored']} scored, {result['n_unscored']} unscored, {result['n_empty']} empty"
    console.print(counts + (f"{spent(result)}, {result['cost_usd']:.4f} in all" if spent(result) else ""))
    show_reasons(console, result["reasons"])
    console.print(f"Report: {escape(str(folder / 'report.html'))}", style="dim", soft_wrap=True)


@app.command()
@reports_bad_input(extra="judge")
def agree(
    first: Annotated[Path, typer.Argument(help="Scores by id: samples.jsonl of a run, or people's labels (JSONL, Parquet).")],
    second: Annotated[Path, typer.Argument(help="The other scores.")],
    column: Annotated[list[str] | None, typer.Option(help="FIELD=COLUMN of the second file, as accuracy=human.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    debug: Debug = False,
) -> None:
    """How far two judges, or a judge and people, agree: Spearman's ρ and Krippendorff's α, with 95 % bootstrap intervals."""
    from granulon_hf.evaluation import agreement

    a, b = agreement.read_scores(first), agreement.read_scores(second, pairs(column, "--column"))
    found = agreement.agreement(a, b)
    if as_json:
        typer.echo(json.dumps({result.score: dataclasses.asdict(result) for result in found}))
        return
    table = Table("", "samples", "Spearman's ρ", "Krippendorff's α", "mean difference", box=None, padding=(0, 2, 0, 0))

    def cell(value: float | None, ci: tuple[float, float] | None) -> str:
        if value is None:
            return "undefined (no variation)"
        return f"{value:.3f}" + ("" if ci is None else f" [{ci[0]:.3f}, {ci[1]:.3f}]")

    for r in found:
        coefficients = cell(r.spearman, r.spearman_ci), cell(r.alpha, r.alpha_ci)
        table.add_row(r.score, str(r.n), *coefficients, f"{r.mean_difference:+.1f}")
    console = Console(highlight=False)
    console.print(table)
    for path, only in ((first, a.keys() - b.keys()), (second, b.keys() - a.keys())):
        if only:
            console.print(f"{len(only)} ids are in {escape(str(path))} alone, such as {escape(min(only))}.", style="yellow")


@app.command()
@reports_bad_input(extra="judge")
def install(debug: Debug = False) -> None:
    """Put the judge into evaluate's cache, so that `evaluate.load("granulon/judge")` works offline."""
    from granulon_hf.evaluation.judging import install as put_into_cache

    typer.echo(f'Installed {put_into_cache()}\nNow this works without a network: evaluate.load("granulon/judge")')
