"""`granulon judge`: score a file of predictions, compare judges with each other and with people, install the metric."""

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
from granulon_hf.cli.judge_agreement import agree, compare
from granulon_hf.errors import GranulonError, one_line
from granulon_hf.io import write_text

LONG = 100_000  # tokens, which most models do not take
SOON = 180  # days before a judge retires

app = typer.Typer(help="Score answers about images with GPT-4o or any OpenAI-compatible judge.", no_args_is_help=True)


Price = Annotated[
    tuple[str, str] | None,
    typer.Option(
        metavar="PROMPT COMPLETION",
        help="Two amounts for a model whose price is not known: USD per million prompt tokens, and per million completion "
        "tokens, such as --price 2.5 10.",
    ),
]

Models = Annotated[
    Path | None,
    typer.Option(
        "--judge-models",
        metavar="FILE.yaml",
        help="What judges cost and are, for those that granulon judge models does not list or lists otherwise.",
    ),
]


def judge_options(given: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return those arguments of a command that are options of the judge by the same name, the prices, and `more`."""
    from granulon_hf.judge.judge import Options, find_model

    options = {field.name: given[field.name] for field in dataclasses.fields(Options) if field.name in given}
    if file := given.get("judge_models"):
        options["judge_models"] = read_models(file)
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
        names = [given["model"]] if isinstance(given["model"], str) else given["model"]
        known = {name: find_model(name, options.get("judge_models")) for name in names}
        priced = [(name, model) for name, model in known.items() if model and model.prompt is not None]
        if priced and len(names) > 1:
            other, costs = priced[0]
            raise GranulonError(
                f"--price is the price of every judge of a panel, and {other!r} has another ({costs.prompt:g} "
                f"{costs.completion:g}); leave --price out, and say in --judge-models what the others cost."
            )
        options["prices"] = dict.fromkeys(names, amounts)
    return {**options, **more}


def read_models(path: Path) -> dict[str, Any]:
    """Read a YAML file of judges; the judge checks the fields."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise GranulonError(f"--judge-models {str(path)!r} cannot be read as YAML ({one_line(error)}).") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise GranulonError(
            f"--judge-models {str(path)!r} must map names of judges to what they cost and are, such as "
            "gpt-4o: {prompt: 2.5, completion: 10}; granulon judge models shows the names of the fields."
        )
    return found


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
    predictions: Annotated[Path, typer.Argument(help="JSONL, Parquet, CSV or datasets folder: columns prediction, image, …")],
    task: Annotated[
        str | None, typer.Option(help="reasoning, vqa or caption; by default what the file's task column says, or reasoning.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--judge", "--model", help="The judge, gpt-4o by default; several are a panel, whose scores are averaged."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="How often each judge scores each answer; see --temperature.", min=1)] = 1,
    judge_models: Models = None,
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
        int | None,
        typer.Option(
            help="Tokens of an answer at most, else 100, or 4,000 where the judge reasons; asked once more with more.", min=1
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Of the judge; above 0 the samples differ. One that reasons has none.", min=0)
    ] = 0.0,
    reasoning_effort: Annotated[
        str | None, typer.Option(help="Of a judge that reasons: low by default, or what else it takes.")
    ] = None,
    column: Annotated[list[str] | None, typer.Option(help="FIELD=COLUMN where a column has another name.")] = None,
    image_root: Annotated[Path | None, typer.Option(help="Where relative image paths start, if not beside the file.")] = None,
    price: Price = None,
    base_url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server; by default OPENAI_BASE_URL.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests under way at once.", min=1)] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds that an answer may take; long ones get more.")] = 120.0,
    rpm: Annotated[float | None, typer.Option(help="Requests a minute; by default what the server allows.")] = None,
    tpm: Annotated[float | None, typer.Option(help="Tokens a minute; by default what the server allows.")] = None,
    poll_seconds: Annotated[float, typer.Option(help="Between two looks at a batch.")] = 30.0,
    show: Annotated[int, typer.Option(help="Worst samples on the report's page.", min=1)] = 200,
    debug: Debug = False,
) -> None:
    """Score predictions. A run that was killed is started again with the same command, and pays for nothing twice."""
    given = {**locals(), "model": (model or ["gpt-4o"]) if len(model or []) != 1 else model[0]}  # type: ignore[index]
    from granulon_hf.evaluation import judging as work
    from granulon_hf.evaluation.agreement import panel_agreement

    console = Console(highlight=False)
    read = work.read_predictions(predictions, pairs(column, "--column"), image_root)[:limit]
    tasks = sorted({sample.task or "reasoning" for sample in read})
    if task is None and len(tasks) > 1:
        raise GranulonError(f"The predictions are of the tasks {' and '.join(tasks)}; judge one file for each, or say --task.")
    folder = out or predictions.with_name(f"{predictions.stem}.judged")
    check_out(folder)
    store = folder / "answers.jsonl"
    if not resume and store.exists():
        raise GranulonError(
            f"{str(store)!r} already holds answers; leave out --no-resume to use them, or say --out ANOTHER_FOLDER."
        )
    inputs = {f"{name}s": [getattr(s, name) for s in read] for name in ("prediction", "image", "reference", "question")}
    options = judge_options(given, task=task or tasks[0], store=str(store))
    with judge_errors(store):
        panel = work.judge.panel_of(**options)
        for chosen in panel:
            units = work.judge.units_of(work.judge.columns_of(**inputs), chosen)
            warn_of_lengths(console, chosen, units, [sample.id for sample in read])
            warn_of_retirement(console, chosen)
        if dry_run:
            estimate = work.judge.estimate(**inputs, **options)
            refusal = next(filter(None, (chosen.refusal() for chosen in panel)), None)
            if refusal and estimate["n_requests"]:
                raise GranulonError(refusal)
            show_estimate(console, estimate, " and ".join(chosen.model for chosen in panel))
            return
        if backend == "batch":
            console.print(f"Looking at batches every {poll_seconds:g} s; stop at will, the same command goes on.", style="dim")
        with progress("judging") as on_result:
            result = work.judge.Judge().compute(**inputs, **options, on_result=on_result)
    if "judges" in result:
        result["agreement"] = panel_agreement(result)
    rows = work.judged(read, result)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(folder / "samples.jsonl", lines, errors="replace")
    write_text(folder / "results.json", json.dumps({"predictions": str(predictions), **result}, indent=1) + "\n")
    by = " and ".join(chosen.model for chosen in panel)
    work.write_report(folder / "report.html", f"{predictions.name} judged by {by}", read, result, show)
    show_result(console, result, folder)


def warn_of_retirement(console: Console, options: Any) -> None:
    """Say that the judge will be gone soon, while there is time to compare another one with it."""
    from granulon_hf.judge import models

    retires = options.known.retires
    if not options.is_openai or retires is None or not 0 < (retires - models.today()).days <= SOON:
        return
    follows = f"; its maker names {options.known.successor} as its successor" if options.known.successor else ""
    note = f"{options.model} will be retired on {retires}{follows}. granulon judge compare shows how far two judges agree."
    console.print(escape(note), style="dim", soft_wrap=True)


def warn_of_lengths(console: Console, options: Any, units: list[Any], ids: list[str]) -> None:
    """Name what the judge's context does not hold, which is not sent, or may not hold."""
    tokens = [options.tokens(unit) for unit in units]
    too_long = list(dict.fromkeys(ids[unit.sample] for unit, n in zip(units, tokens, strict=True) if options.too_long(n)))
    longest = max(tokens, default=0)
    if too_long:
        more = f" and {len(too_long) - 1} more" if len(too_long) > 1 else ""
        note = f"{options.model} cannot take prompts as long as that of {too_long[0]!r}{more}; what is too long is not sent."
    elif options.known.context is None and longest > LONG:
        name = ids[units[tokens.index(longest)].sample]
        note = f"The prompt of {name!r} has about {longest:,} tokens; whether {options.model} takes so many is not known."
    else:
        return
    console.print(escape(note), style="yellow", soft_wrap=True)


def show_estimate(console: Console, estimate: dict[str, Any], model: str, what: str = "predictions") -> None:
    cost, date = estimate["cost_usd"], estimate["prices_date"]
    whose = {"table": date, "judge_models": "--judge-models", "prices": "--price"}
    source = " and ".join(whose[one] for one in estimate["priced_by"])
    told = f"prices of {source}" if source else "a server of your own; say --price if it charges"
    known = cost is not None and f"{cost:.4f} USD ({told})"
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
    if result["spent_usd"] is None:
        return ""
    lost = f", up to {result['lost_usd']:.4f} more for answers that were lost on the way" if result.get("lost_usd") else ""
    return f" · {result['spent_usd']:.4f} USD{where}{lost}"


def show_result(console: Console, result: dict[str, Any], folder: Path) -> None:
    from granulon_hf.evaluation.judging import interval_text

    table = Table("", "mean", "95 % interval", box=None, padding=(0, 2, 0, 0))
    for name in ("accuracy", "hallucination"):
        mean, rest = result[name], result[f"{name}_nonempty"]
        table.add_row(name, "none" if mean is None else f"{mean:.1f}", interval_text(result, name))
        if result["n_empty"] and rest is not None:
            table.add_row(f"{name}, without empty answers", f"{rest:.1f}", "", style="dim")
    for judge, one in result.get("judges", {}).items():
        for name in ("accuracy", "hallucination"):
            shown = "none" if one[name] is None else f"{one[name]:.1f}"
            table.add_row(escape(f"{name}, {judge}"), shown, interval_text(one, name), style="dim")
    console.print(table)
    if result["n_images"] > 1:
        console.print(f"Intervals are over {result['n_images']} images, each with all its answers.", style="dim")
    counts = f"{result['n_scored']} scored, {result['n_unscored']} unscored, {result['n_empty']} empty"
    console.print(counts + (f"{spent(result)}, {result['cost_usd']:.4f} in all" if spent(result) else ""))
    for name, alpha in result.get("agreement", {}).items():
        by_samples = {f"the samples of {judge}": value for judge, value in alpha.get("samples", {}).items()}
        for who, value in {"the judges": alpha["judges"], **by_samples}.items():
            if value is not None:
                console.print(escape(f"Agreement of {who} on {name}: Krippendorff's α {value:.3f}"), soft_wrap=True)
    show_reasons(console, result["reasons"])
    console.print(f"Report: {escape(str(folder / 'report.html'))}", style="dim", soft_wrap=True)


app.command()(agree)
app.command()(compare)


@app.command()
@reports_bad_input(extra="judge")
def models(
    judge_models: Models = None,
    litellm: Annotated[
        Path | None, typer.Option(help="litellm's model_prices_and_context_window_backup.json, newer than this package.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the table as YAML, for --judge-models.")] = None,
    debug: Debug = False,
) -> None:
    """The judges that are known: what they cost, whether they reason, and when they retire."""
    import yaml

    from granulon_hf.evaluation.judge_table import read_litellm
    from granulon_hf.judge.judge import PRICES_DATE, SOURCE, find_model, known_names

    skipped: dict[str, str] = {}
    given = {**(read_litellm(litellm, skipped) if litellm else {}), **(read_models(judge_models) if judge_models else {})}
    console = Console(highlight=False)
    for name, why in skipped.items():
        console.print(escape(f"{name} is left out: {why}"), style="yellow", soft_wrap=True)
    names = list(given) if litellm else known_names(given)
    found = {name: model for name in names if (model := find_model(name, given))}
    if out:
        rows = {name: model.model_dump(mode="json", exclude_defaults=True) for name, model in found.items()}
        write_text(out, yaml.safe_dump(rows, sort_keys=False, default_flow_style=None, width=1_000))
        console.print(f"{len(rows)} judges are in {escape(str(out))}.")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("judge", "USD/M prompt", "USD/M answer", "reasons", "retires", "successor"):
        table.add_column(head, overflow="fold")
    for name, model in found.items():
        prices = ("" if price is None else f"{price:g}" for price in (model.prompt, model.completion))
        table.add_row(escape(name), *prices, "yes" if model.reasons else "", str(model.retires or ""), model.successor or "")
    console.print(table)
    source = escape(str(litellm)) if litellm else f"{SOURCE}, {PRICES_DATE}"
    console.print(f"Prices of {source}. Any other name can judge through --base-url.", style="dim")


@app.command()
@reports_bad_input(extra="judge")
def install(debug: Debug = False) -> None:
    """Put the judge into evaluate's cache, so that `evaluate.load("granulon/judge")` works offline."""
    from granulon_hf.evaluation.judging import install as put_into_cache

    typer.echo(f'Installed {put_into_cache()}\nNow this works without a network: evaluate.load("granulon/judge")')
