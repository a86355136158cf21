"""`granulon controller`: labels for the questions that the granularity controller is trained on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from granulon_hf.cli.common import Debug, check_out, pairs, reports_bad_input
from granulon_hf.cli.judge import Price, judge_errors, judge_options, progress, show_estimate, show_reasons, spent
from granulon_hf.errors import GranulonError
from granulon_hf.io import write_text

app = typer.Typer(help="The granularity controller: label questions to train it on.", no_args_is_help=True)
KEPT = ("id", "split")  # columns that go on into the labels


@app.callback()
def root() -> None:
    # A callback keeps `label` a command of its own however many there are.
    pass


@app.command()
@reports_bad_input(extra="judge", resumes=True)
def label(
    questions: Annotated[Path, typer.Argument(help="Text (one a line), JSONL, Parquet, or a folder of granulon data prepare.")],
    out: Annotated[Path, typer.Option(help="JSONL of labels to write; the answers are kept beside it.")],
    level: Annotated[
        list[str] | None, typer.Option(help="NAME=MEANING, once per level; by default coarse, middle and fine.")
    ] = None,
    model: Annotated[str, typer.Option(help="Who labels.")] = "gpt-4o",
    limit: Annotated[int | None, typer.Option(help="Only the first N questions.", min=1)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would ask and cost, and send nothing.")] = False,
    max_cost: Annotated[float | None, typer.Option(help="USD that this run may spend; then it stops cleanly.", min=0)] = None,
    retry_unlabelled: Annotated[bool, typer.Option("--retry-unlabelled", help="Ask again what got no label.")] = False,
    backend: Annotated[str, typer.Option(help="chat, or batch: half the price, up to a day.")] = "chat",
    poll_seconds: Annotated[float, typer.Option(help="Between two looks at a batch.")] = 30.0,
    column: Annotated[list[str] | None, typer.Option(help="question=COLUMN where it is neither question nor text.")] = None,
    price: Price = None,
    base_url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server; by default OPENAI_BASE_URL.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests under way at once.", min=1)] = 64,
    rpm: Annotated[float | None, typer.Option(help="Requests a minute; by default what the server allows.")] = None,
    tpm: Annotated[float | None, typer.Option(help="Tokens a minute; by default what the server allows.")] = None,
    debug: Debug = False,
) -> None:
    """Ask a model how far each question wants each level. A run that was stopped goes on with the same command, and pays for
    nothing twice."""
    given = dict(locals())
    from granulon_hf.training import labelling

    console = Console(highlight=False)
    levels = pairs(level, "--level", "NAME=MEANING, such as --level fine='details and places'") or dict(labelling.LEVELS)
    if not out.name or out.is_dir():
        raise GranulonError(f"--out {str(out)!r} is a folder; it takes the name of a file, such as labels.jsonl.")
    check_out(out.parent)
    found = read_questions(questions, pairs(column, "--column"))
    first: dict[str, dict[str, Any]] = {}
    for row in found:
        first.setdefault(row["text"], row)
    rows = list(first.values())[:limit]
    store = out.with_suffix(".answers.jsonl")
    if out.exists() and (not store.exists() or out.samefile(questions)):
        raise GranulonError(f"--out {str(out)!r} exists and was not written by this command; name another file.")
    options = judge_options(given, levels=levels, store=str(store), retry_unscored=retry_unlabelled)
    texts = [row["text"] for row in rows]
    with judge_errors(store):
        if dry_run:
            show_estimate(console, labelling.estimate(texts, **options), model, "questions")
            return
        with progress("labelling") as on_result:
            result = labelling.label(texts, **options, on_result=on_result)
    labelled = [
        {**row, "weights": dict(zip(levels, weights, strict=True)), "model": by}
        for row, weights, by in zip(rows, result["weights"], result["models"], strict=True)
        if weights is not None
    ]
    if len(found) > len(first):
        console.print(f"{len(found) - len(first)} questions are there twice, and are labelled once", style="dim")
    console.print(f"{len(labelled)} labelled, {len(rows) - len(labelled)} left out without a label{spent(result)}")
    show_reasons(console, result["reasons"])
    if not labelled:
        raise GranulonError(f"No question got a label, and nothing was written to {out}.")
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in labelled))
    console.print(f"Labels: {escape(str(out))}", style="dim", soft_wrap=True)


def read_questions(path: Path, columns: dict[str, str]) -> list[dict[str, Any]]:
    """Read the questions of a file as rows with `text` and, where the file has them, `id` and `split`.

    A text file has a question a line; `columns` may have another name for the column "question" (or "text").
    """
    unknown = sorted(set(columns) - {"question"})
    if unknown:
        raise GranulonError(f"--column takes question=COLUMN; there is no field {unknown[0]!r}.")
    rows = []
    for place, row in rows_of(path):
        names = [columns["question"]] if columns else [name for name in ("question", "text") if name in row]
        text = row.get(names[0]) if names else None
        if not isinstance(text, str) or not text.strip():
            has = ", ".join(map(repr, row)) or "nothing"
            raise GranulonError(f"{path}, {place} has no question (it has {has}); name its column with --column question=NAME.")
        rows.append({"text": text.strip(), **{name: row[name] for name in KEPT if row.get(name) is not None}})
    if not rows:
        raise GranulonError(f"{str(path)!r} holds no questions.")
    return rows


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".txt" and path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise GranulonError(f"{str(path)!r} is no UTF-8 text; save it as UTF-8.") from None
        yield from ((f"line {i}", {"text": line}) for i, line in enumerate(lines, 1) if line.strip())
    elif (path / "manifest.json").exists():
        from granulon_hf.data import load

        samples = load(str(path), verify="none")
        samples[0]  # says why, where not one can be used
        yield from ((f"sample {s.id}", {"id": s.id, "question": s.question}) for s in samples)
    else:
        from granulon_hf.evaluation import judging

        yield from judging.rows_of(path)
