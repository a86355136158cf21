"""`granulon controller`: labels for the questions that the granularity controller is trained on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from granulon_hf.cli.common import Debug, check_out, pairs, plain_warnings, progress_bar, reports_bad_input
from granulon_hf.cli.judge import Price, judge_errors, judge_options, progress, show_estimate, show_reasons, spent
from granulon_hf.errors import GranulonError
from granulon_hf.io import write_text

app = typer.Typer(help="The granularity controller: label questions to train it on.", no_args_is_help=True)
LOSS = "Labels by loss"  # the panel of its options
KEPT = ("id", "split")  # columns that go on into the labels


@app.callback()
def root() -> None:
    # A callback keeps `label` a command of its own however many there are.
    pass


@app.command()
@reports_bad_input(extra="judge", resumes=True)
def label(
    ctx: typer.Context,
    questions: Annotated[
        Path | None, typer.Argument(help="Text (one a line), JSONL, Parquet, or a folder of granulon data prepare.")
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="JSONL of labels to write; the answers are kept beside it.")],
    by: Annotated[
        str,
        typer.Option(
            help="wording: how far a question's words want each level, asked of a language model (paper); loss: how well a "
            "Granulon model answers at each level (ours)."
        ),
    ] = "wording",
    model: Annotated[str | None, typer.Option(help="Who labels; by loss a folder, Hub id or demo. \\[gpt-4o]")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N questions; by loss N drawn samples.", min=1)] = None,
    level: Annotated[
        list[str] | None, typer.Option(help="NAME=MEANING, once per level; by default coarse, middle and fine.")
    ] = None,
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
    data: Annotated[
        str | None,
        typer.Option(help="Name of a set, a prepared folder, a chat.json, or shapes.", rich_help_panel=LOSS),
    ] = None,
    source: Annotated[str | None, typer.Option(help="Where the set is.", rich_help_panel=LOSS)] = None,
    split: Annotated[str | None, typer.Option(help="By default what is trained on.", rich_help_panel=LOSS)] = None,
    preset: Annotated[str | None, typer.Option(help="Subset of the set, such as paper.", rich_help_panel=LOSS)] = None,
    batch_size: Annotated[
        int, typer.Option(help="Samples at once; scores do not depend on it.", min=1, rich_help_panel=LOSS)
    ] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.", rich_help_panel=LOSS)] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=LOSS)] = "auto",
    debug: Debug = False,
) -> None:
    """Label questions with how far each wants each level. A run that was stopped goes on with the same command, and pays for
    nothing twice."""
    check_form(ctx, by)
    console = Console(highlight=False)
    if not out.name or out.is_dir():
        raise GranulonError(f"--out {str(out)!r} is a folder; it takes the name of a file, such as labels.jsonl.")
    check_out(out.parent)
    if by == "loss":
        from granulon_hf.training.arguments import DataArguments

        wanted = DataArguments(str(data), source, split, preset, limit)
        label_loss(console, out, str(model), wanted, batch_size, device, dtype)
        return
    model = model or "gpt-4o"
    questions = Path(questions or "")
    given = dict(locals())
    from granulon_hf.training import labelling

    levels = pairs(level, "--level", "NAME=MEANING, such as --level fine='details and places'") or dict(labelling.LEVELS)
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
    write_labels(console, out, labelled)


def write_labels(console: Console, out: Path, rows: list[dict[str, Any]]) -> None:
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    console.print(f"Labels: {escape(str(out))}", style="dim", soft_wrap=True)


def check_form(ctx: typer.Context, by: str) -> None:
    """Refuse options that the other way of labelling has, and the lack of those that this one needs."""
    if by not in ("wording", "loss"):
        raise GranulonError(f"--by must be wording or loss; got {by!r}.")
    parameters = {one.name or "": one for one in ctx.command.params}
    given = {name for name in parameters if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"}
    of_loss = {name for name, one in parameters.items() if getattr(one, "rich_help_panel", None) == LOSS}
    if by == "wording":
        if "questions" not in given:
            raise GranulonError("Name a file of QUESTIONS to label; --by loss labels those of --data.")
        if other := sorted(given & of_loss):
            raise GranulonError(f"--{other[0].replace('_', '-')} is for --by loss; leave it out, or say --by loss.")
        return
    if "questions" in given:
        raise GranulonError("--by loss labels the questions of --data, with their images and answers; leave QUESTIONS out.")
    if other := sorted(given - of_loss - {"out", "by", "model", "limit", "debug"}):
        raise GranulonError(f"--{other[0].replace('_', '-')} is for labels by wording; leave it out of --by loss.")
    for name, what in (("model", "a folder, Hub id or demo, whose answers are scored"), ("data", "samples with answers")):
        if name not in given:
            raise GranulonError(f"--by loss needs --{name}: {what}.")


def label_loss(console: Console, out: Path, source: str, wanted: Any, batch_size: int, device: str, dtype: str) -> None:
    """Score the answers of a set at every level; what was scored is kept in a folder beside the labels."""
    from granulon_hf.cli.analyze import load, show_left_out
    from granulon_hf.evaluation.answer import open_folder, read_description
    from granulon_hf.loading import check_models, read_config
    from granulon_hf.training.loss_labels import check_choice, label_by_loss
    from granulon_hf.training.run import load_samples

    folder = out.with_suffix(".scores")
    known = folder / "run.json"
    if out.exists() and not known.exists():
        raise GranulonError(f"--out {str(out)!r} exists and was not written by this command; name another file.")
    check_models([source], device, dtype)
    check_choice(read_config(source).level_names)
    with plain_warnings():
        samples = load_samples(wanted)
    model, processor, name, described = load(source, device, dtype)
    before = read_description(known) if known.exists() else None
    data = {name: getattr(wanted, name) for name in ("data", "source", "split", "preset", "limit")}
    description = open_folder(folder, {"model": described, "data": data}, before, "holds scores of")
    write_text(known, json.dumps(description, indent=1) + "\n")
    with progress_bar(f"scoring with {name}", len(samples)) as update:
        rows = label_by_loss(
            model, processor, samples, folder / "scores.jsonl", batch_size, lambda count: update(advance=count)
        )
    split = {} if wanted.split is None else {"split": wanted.split}
    show_left_out(console, wanted.data, samples)
    console.print(f"{len(rows)} labelled, {len(samples) - len(rows)} left out")
    if not rows:
        raise GranulonError(f"No question got a label, and nothing was written to {out}.")
    write_labels(console, out, [row | split for row in rows])


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
