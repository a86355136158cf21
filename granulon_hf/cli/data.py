"""`granulon data`: prepare, check and show data sets."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from granulon_hf.cli.common import Debug, check_out, note, pairs, plain_warnings, progress_bar, reports_bad_input
from granulon_hf.errors import GranulonError, first_sentence

app = typer.Typer(help="Prepare, check and show data sets.", no_args_is_help=True)
COLUMNS = "image=COLUMN, question=…, answer=…, choices=…, index=… (instead of answer), id=… or group=…"
SHOWN = 20  # problems that are printed one by one


def print_problems(console: Console, problems: list, style: str) -> None:
    for problem in problems[:SHOWN]:
        console.print(escape(str(problem)), style=style, soft_wrap=True)
    if len(problems) > SHOWN:
        console.print(f"… and {len(problems) - SHOWN} more", style=style)


@app.command("list")
@reports_bad_input(extra="train")
def list_sets(debug: Debug = False) -> None:
    """List the sets that are known by name: what they are, where they are read from, and what granulon eval run scores."""
    from granulon_hf.data import ADAPTERS

    heads = (Column(name, overflow="fold") for name in ("what", "where", "scores"))
    table = Table(Column("name", no_wrap=True), *heads, box=None, padding=(0, 2, 0, 0))
    for adapter in ADAPTERS.values():
        if adapter.title:
            place = adapter.repo or ("drawn, or --source" if adapter.name == "granuscenes" else "--source")
            table.add_row(adapter.name, escape(adapter.title), place, ", ".join(adapter.metrics) or "by task")
    table.add_row("shapes", "drawn shapes, for quick tests", "drawn", "by task")
    Console(highlight=False).print(table)


@app.command()
@reports_bad_input(extra="train", resumes=True)
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
    shard_rows: Annotated[int, typer.Option(help="Rows per Parquet file.", min=1)] = 1000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a subset with other settings.")] = False,
    debug: Debug = False,
) -> None:
    """Write a subset of a data set as a folder of its own; run it again to go on where it was interrupted."""
    options = {name: value for name, value in locals().items() if name not in ("name", "out", "column", "debug")}
    columns = pairs(column, "--column", COLUMNS) or None
    check_out(out)
    from granulon_hf.data import Problem
    from granulon_hf.data import prepare as write

    with progress_bar("Preparing") as update, plain_warnings():
        manifest = write(
            name, out, columns=columns, progress=lambda done, total: update(completed=done, total=total), **options
        )
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
@reports_bad_input(extra="train")
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that granulon data prepare wrote.")],
    against: Annotated[Path | None, typer.Option(help="Another one that may share no image with it.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Hub id or folder: lengths in its tokens, not words.")] = None,
    debug: Debug = False,
) -> None:
    """Look for broken images, empty answers, repeated ids, duplicates, images in both training and test; exit code 1 if there
    are any.

    A duplicate has the pixels and the turns of another sample of its split, whatever its id and the format of its images.
    """
    from granulon_hf.data import check as inspect

    tokens = load_tokenizer(tokenizer) if tokenizer is not None else None
    with progress_bar("Checking") as update:
        report = inspect(folder, against, tokens, lambda done, total: update(completed=done, total=total))
    console = Console(highlight=False)
    shown = ("min", "median", "mean", "p95", "max")
    table = Table("", *shown, title=escape(str(folder)))
    units = {"question": report.unit, "answer": report.unit, "image": "pixels, longer side"}
    for what, values in report.statistics.items():
        numbers = (values[name] for name in shown)
        table.add_row(f"{what} ({units[what]})", *(f"{n:,.0f}" if n >= 100 else f"{n:.3g}" for n in numbers))
    if table.row_count:
        console.print(table)
    print_problems(console, report.warnings, "yellow")
    print_problems(console, report.errors, "red")
    counts = ", ".join(f"{split} {count}" for split, count in report.samples.items())
    verdict = f"{len(report.errors)} errors" if report.errors else "no errors"
    console.print(f"{counts} samples · {len(report.warnings)} warnings · {verdict}", style="bold", soft_wrap=True)
    if report.errors:
        raise typer.Exit(1)


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer, or raise GranulonError where there is none."""
    from transformers import AutoTokenizer

    path = os.path.expanduser(name)
    if os.path.isfile(path):
        raise GranulonError(f"{name!r} is a file; --tokenizer takes the folder that it is in.")
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise GranulonError(f"Cannot load the tokenizer {name!r} ({first_sentence(error)}).") from error


@app.command()
@reports_bad_input(extra="train")
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that granulon data prepare wrote.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("sheet.html"),
    split: Annotated[str | None, typer.Option(help="Which one, where there are several.")] = None,
    limit: Annotated[int, typer.Option(help="Samples to show.")] = 100,
    debug: Debug = False,
) -> None:
    """Make a contact sheet: one HTML file with pictures, questions and answers, that works offline."""
    if limit < 1:
        raise GranulonError(f"--limit must be at least 1; got {limit}.")
    if out.is_dir() or not out.parent.is_dir():
        raise GranulonError(f"Cannot write {str(out)!r}: give the name of an HTML file in a folder that exists.")
    from granulon_hf.data.loading import load
    from granulon_hf.data.prepared.preview import contact_sheet

    samples = load(folder, split=split, verify="none")
    out.write_text(contact_sheet(samples, limit), encoding="utf-8")
    for problem in samples.unreadable:
        note(str(problem))
    typer.echo(f"Contact sheet written to {out}")
