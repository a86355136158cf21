"""`granulon controller`: labels for the questions that the granularity controller is trained on."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from granulon_hf.cli.common import check_out, one_line, reports_bad_input
from granulon_hf.cli.judge import Price, as_option, judging, pairs, progress_bar, read_price, show_estimate
from granulon_hf.errors import GranulonError

app = typer.Typer(help="The granularity controller: label questions to train it on.", no_args_is_help=True)
KEPT = ("id", "split")  # columns that go on into the labels


@app.callback()
def root() -> None:
    # A callback keeps `label` a command of its own however many there are.
    pass


@app.command()
@reports_bad_input
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
    column: Annotated[list[str] | None, typer.Option(help="question=COLUMN where it is neither question nor text.")] = None,
    price: Price = None,
    base_url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server; by default OPENAI_BASE_URL.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests under way at once.", min=1)] = 64,
    rpm: Annotated[float | None, typer.Option(help="Requests a minute; by default what the server allows.")] = None,
    tpm: Annotated[float | None, typer.Option(help="Tokens a minute; by default what the server allows.")] = None,
    poll_seconds: Annotated[float, typer.Option(help="Between two looks at a batch.")] = 30.0,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Ask a model how far each question wants each level. A run that was stopped goes on with the same command, and pays for
    nothing twice."""
    judging()  # says what to install
    from granulon_hf.judge.judge import JudgeError
    from granulon_hf.training import labelling

    console = Console(highlight=False)
    levels = pairs(level, "--level", "NAME=MEANING, such as --level fine='details and places'") or dict(labelling.LEVELS)
    if len(levels) < len(level or []):
        raise GranulonError("--level names a level twice.")
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
    options: dict[str, Any] = {
        **{"levels": levels, "model": model, "store": str(store), "max_cost": max_cost, "retry_unscored": retry_unlabelled},
        **{"backend": backend, "rpm": rpm, "tpm": tpm, "base_url": base_url, "concurrency": concurrency},
        **{"poll_seconds": poll_seconds, "prices": read_price(price, model, max_cost)},
    }
    texts = [row["text"] for row in rows]
    try:
        foreseen = labelling.estimate(texts, **options)
        if dry_run:
            show_estimate(console, foreseen, model, "questions")
            return
        with progress_bar(console) as bar:
            task = bar.add_task("labelling", total=len(texts), cost="")

            def on_result(event: dict[str, Any]) -> None:
                spent = "" if event["spent_usd"] is None else f"{event['spent_usd']:.4f} USD"
                bar.update(task, completed=event["done"], cost=spent)

            result = labelling.label(texts, **options, on_result=on_result)
    except ValueError as error:  # of the options: one sentence each
        raise GranulonError(as_option(error)) from None
    except JudgeError as error:
        raise GranulonError(f"{as_option(error)} What was paid for is in {store}; the same command goes on.") from None
    except KeyboardInterrupt:
        console.print(f"Stopped. What was paid for is in {escape(str(store))}; the same command goes on.", style="yellow")
        raise typer.Exit(130) from None
    labelled = [
        {**row, "weights": dict(zip(levels, weights, strict=True)), "model": by}
        for row, weights, by in zip(rows, result["weights"], result["models"], strict=True)
        if weights is not None
    ]
    if len(found) > len(first):
        console.print(f"{len(found) - len(first)} questions are there twice, and are labelled once", style="dim")
    cost = "" if result["spent_usd"] is None else f" · {result['spent_usd']:.4f} USD in this run"
    console.print(f"{len(labelled)} labelled, {len(rows) - len(labelled)} left out without a label{cost}")
    for reason, count in Counter(reason for reason in result["reasons"] if reason).most_common(5):
        console.print(f"  {count} × {escape(reason.replace('max_cost', '--max-cost'))}", style="yellow", soft_wrap=True)
    if not labelled:
        raise GranulonError(f"No question got a label, and nothing was written to {out}.")
    judging().write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in labelled))
    console.print(f"Labels: {escape(str(out))}", style="dim", soft_wrap=True)


def read_questions(path: Path, columns: dict[str, str]) -> list[dict[str, Any]]:
    """Questions of a file as rows with `text` and, where the file has them, `id` and `split`.

    Args:
        path (`Path`): `.txt` with a question a line; JSONL, Parquet or a `datasets` folder with a column "question" or "text";
            or a folder that `granulon data prepare` wrote.
        columns (`dict[str, str]`): `{"question": name}` where the column has another name.

    Raises:
        GranulonError: it cannot be read, or a row has no question.
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
    work = judging()
    if path.suffix == ".txt" and path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise GranulonError(f"{str(path)!r} cannot be read: {one_line(error)}.") from None
        yield from ((f"line {i}", {"text": line}) for i, line in enumerate(lines, 1) if line.strip())
    elif (path / "manifest.json").exists():
        from granulon_hf.data import load

        try:
            samples = load(str(path), verify="none")
            samples[0]  # says why, where not one can be used
            yield from ((f"sample {s.id}", {"id": s.id, "question": s.question}) for s in samples)
        except GranulonError as error:
            raise GranulonError(one_line(error)) from None
    else:
        try:
            yield from work.rows_of(path)
        except GranulonError as error:
            raise GranulonError(str(error)) from None
