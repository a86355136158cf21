"""`granulon data`: prepare, check and show data sets."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from granulon_hf.cli.common import check_out, one_line, plain_warnings, reports_bad_input
from granulon_hf.errors import GranulonError

app = typer.Typer(
    help="Prepare, check and show data sets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
SHOWN = 20  # problems that are printed one by one


@contextmanager
def data_errors():
    """What the data package says in one sentence is what the command says."""
    try:
        yield
    except GranulonError as error:
        raise GranulonError(one_line(error)) from error
    except ModuleNotFoundError as error:
        if error.name not in ("datasets", "pyarrow"):
            raise
        raise GranulonError("This needs the packages of training: pip install 'granulon-hf[train]'.") from error


@contextmanager
def progress_bar(what: str):
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_problems(console: Console, problems: list, style: str) -> None:
    for problem in problems[:SHOWN]:
        console.print(escape(str(problem)), style=style, soft_wrap=True)
    if len(problems) > SHOWN:
        console.print(f"… and {len(problems) - SHOWN} more", style=style)


@app.command()
@reports_bad_input
def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help="flux-reason, a-okvqa, surgvlm, llava, granuscenes, …")],
    out: Annotated[Path, typer.Option(help="Folder to write: Parquet with images, manifest.json, README.md.")],
    source: Annotated[str | None, typer.Option(help="Local files, or another repository; by default the set's own.")] = None,
    split: Annotated[str | None, typer.Option(help="By default the set's own; holdout is what training never sees.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows, drawn uniformly.")] = None,
    preset: Annotated[str | None, typer.Option(help="paper: as many rows as the paper's subset.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same rows.")] = 0,
    holdout: Annotated[int | None, typer.Option(help="Rows held out of training; by default the set's own.")] = None,
    holdout_seed: Annotated[int, typer.Option(help="Which rows are held out, whatever the seed.")] = 0,
    max_files: Annotated[int | None, typer.Option(help="Files to draw from at most; 0 for all.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="For your own table: image=COLUMN, question=COLUMN, …")] = None,
    revision: Annotated[str | None, typer.Option(help="Of the repository; by default the newest commit.")] = None,
    on_error: Annotated[str, typer.Option(help="Bad rows: skip, or raise.")] = "skip",
    shard_rows: Annotated[int, typer.Option(help="Rows per Parquet file.")] = 1000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a subset with other settings.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write a subset of a data set as a folder of its own; run it again to go on where it was interrupted."""
    columns = dict(pair.partition("=")[::2] for pair in column) if column else None
    if columns and (not all(columns.values()) or len(columns) < len(column or ())):
        raise GranulonError(
            "--column takes image=COLUMN, question=…, answer=…, choices=…, index=… (instead of answer), id=… or group=…, "
            "each of them once."
        )
    if shard_rows < 1:
        raise GranulonError(f"--shard-rows must be at least 1; got {shard_rows}.")
    check_out(out)
    with data_errors():
        from granulon_hf.data import Problem
        from granulon_hf.data import prepare as write

        options: dict[str, Any] = {
            "source": source,
            "split": split,
            "limit": limit,
            "preset": preset,
            "seed": seed,
            "holdout": holdout,
            "holdout_seed": holdout_seed,
        }
        options |= {"max_files": max_files, "columns": columns, "revision": revision, "on_error": on_error}
        try:
            with progress_bar("Preparing") as progress, plain_warnings(lambda line: typer.echo(f"Note: {line}", err=True)):
                manifest = write(name, out, overwrite=overwrite, shard_rows=shard_rows, progress=progress, **options)
        except KeyboardInterrupt:
            typer.echo("Interrupted; finished shards are kept: run the same command again to go on.", err=True)
            raise typer.Exit(130) from None
    done, console = manifest["prepared"], Console(highlight=False)
    for reason, count in manifest["filtered"].items():
        console.print(f"{count} rows are no part of the set: {escape(reason)}")
    if done["problems"]:
        files = sum(row is None for _, row, _ in done["problems"])
        unread = f" and {files} files that cannot be read" if files else ""
        console.print(f"{len(done['problems']) - files} bad rows{unread} were left out:")
        print_problems(console, [Problem(*problem) for problem in done["problems"]], "yellow")
    if done["renamed"]:
        console.print(f"{len(done['renamed'])} ids were made unique")
    console.print(f"{done['samples']} samples in {escape(str(out))}", style="bold", soft_wrap=True)


@app.command()
@reports_bad_input
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that granulon data prepare wrote.")],
    against: Annotated[Path | None, typer.Option(help="Another one that may share no image with it.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Hub id or folder: lengths in its tokens, not words.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Look for broken images, empty answers, repeated ids, duplicates, images in both training and test; exit code 1 if there
    are any.

    A duplicate has the pixels and the turns of another sample of its split, whatever its id and the format of its images.
    """
    with data_errors():
        from granulon_hf.data import check as inspect

        with progress_bar("Checking") as progress:
            report = inspect(folder, against, load_tokenizer(tokenizer), progress)
    console = Console(highlight=False)
    table = Table("", "min", "median", "mean", "p95", "max", title=escape(str(folder)))
    units = {"question": report.unit, "answer": report.unit, "image": "pixels, longer side"}
    for what, values in report.statistics.items():
        numbers = (
            f"{values[name]:,.0f}" if values[name] >= 100 else f"{values[name]:.3g}"
            for name in ("min", "median", "mean", "p95", "max")
        )
        table.add_row(f"{what} ({units[what]})", *numbers)
    if table.row_count:
        console.print(table)
    print_problems(console, report.warnings, "yellow")
    print_problems(console, report.errors, "red")
    counts = ", ".join(f"{split} {count}" for split, count in report.samples.items())
    verdict = f"{len(report.errors)} errors" if report.errors else "no errors"
    console.print(f"{counts} samples · {len(report.warnings)} warnings · {verdict}", style="bold", soft_wrap=True)
    if report.errors:
        raise typer.Exit(1)


def load_tokenizer(name: str | None):
    """Raises GranulonError where there is none."""
    if name is None:
        return None
    from transformers import AutoTokenizer

    if os.path.isfile(os.path.expanduser(name)):
        raise GranulonError(f"{name!r} is a file; --tokenizer takes the folder that it is in.")
    try:
        return AutoTokenizer.from_pretrained(os.path.expanduser(name))
    except Exception as error:
        raise GranulonError(f"Cannot load the tokenizer {name!r} ({one_line(error).split('. ')[0]}).") from error


@app.command()
@reports_bad_input
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that granulon data prepare wrote.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("sheet.html"),
    split: Annotated[str | None, typer.Option(help="Which one, where there are several.")] = None,
    limit: Annotated[int, typer.Option(help="Samples to show.")] = 100,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Make a contact sheet: one HTML file with pictures, questions and answers, that works offline."""
    if limit < 1:
        raise GranulonError(f"--limit must be at least 1; got {limit}.")
    if out.is_dir() or not out.parent.is_dir():
        raise GranulonError(f"Cannot write {str(out)!r}: give the name of an HTML file in a folder that exists.")
    with data_errors():
        from granulon_hf.data.loading import load
        from granulon_hf.data.prepared.preview import contact_sheet

        if not folder.is_dir():
            raise GranulonError(f"There is no folder {str(folder)!r}.")
        samples = load(folder, split=split, verify="none")
        out.write_text(contact_sheet(samples, limit), encoding="utf-8")
    for problem in samples.unreadable:
        typer.echo(f"Note: {problem}", err=True)
    typer.echo(f"Contact sheet written to {out}")
