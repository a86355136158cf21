"""`granulon push`: a model to the Hub, checked before it goes."""

import json
import tempfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from granulon_hf.cli.common import note, quiet, reports_bad_input
from granulon_hf.errors import GranulonError


@reports_bad_input(extra="eval")
def push(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model, or the output folder of examples/train.py.")],
    repo_id: Annotated[str, typer.Argument(help="Where to, as org/name.")],
    form: Annotated[
        str | None,
        typer.Option(help="full (all weights) or adapter (trained ones, backbones by name); by default the model's own."),
    ] = None,
    vision: Annotated[str | None, typer.Option(help="Adapter form: where the vision tower is, org/name\\[@revision].")] = None,
    text: Annotated[str | None, typer.Option(help="Adapter form: where the language model is, org/name\\[@revision].")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="4bit or 8bit: the language model's weights (full form); quantization.md says how.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the paper that it is, for the card.")] = None,
    results: Annotated[Path | None, typer.Option(help="scores.json of granulon eval run, for the card.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Anyone may see it; private by default.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the exported folder here.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Export and check, show what would change, upload nothing.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")] = False,
) -> None:
    """Export a model, load it where this package is not installed, compare, and upload it.

    Only weights as safetensors, configs, processor, code, licence and card go; the model card is written anew.
    """
    from granulon_hf import hub  # brings the trainer along, which no other command waits for

    scores = read_results(results)
    quiet(debug)
    backbones = {part: value for part, value in (("vision", vision), ("text", text)) if value}
    options: dict[str, Any] = {"form": form, "backbones": backbones or None, "name": variant, "results": scores}
    options["quantize"] = quantize
    console = Console(stderr=True)
    if not dry_run:
        with console.status(f"Exporting and checking {escape(model)}"):
            commit = hub.push(model, repo_id, private=not public, revision=revision, message=message, folder=out, **options)
        typer.echo(commit.commit_url)
        return
    target = None
    try:
        target = hub.find_target(repo_id, private=not public, revision=revision)
        remark = target.doubt
    except hub.HubNotAsked as error:
        remark = f"{repo_id} was not looked at. {error}"
    with nullcontext(out) if out else tempfile.TemporaryDirectory() as place:
        with console.status(f"Exporting and checking {escape(model)}"):
            folder = hub.export(model, place, repo_id=target.repo_id if target else repo_id, **options)
        if target:
            hub.check_card(folder)
        plan = hub.plan(folder, target) if target else {}
        show(folder, plan)
    if remark:
        note(remark)
    where = target.repo_id if target else repo_id
    where += f" ({'public' if public else 'private'}{f', branch {revision}' if revision else ''})"
    if target:
        where += f", {describe(target, plan)}"
    Console().print(f"Nothing was uploaded. Without --dry-run this goes to {escape(where)}.", style="dim", soft_wrap=True)


def read_results(path: Path | None) -> dict[str, Any] | None:
    """Read the scores, or raise GranulonError where the file is not what `granulon eval run` writes."""
    if path is None:
        return None
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        scores["models"], scores["scores"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GranulonError(f"{str(path)!r} is not the scores.json of granulon eval run.") from error
    return scores


def describe(target: Any, plan: dict[str, str]) -> str:
    """Say what is there now, and how many of its files stay and go."""
    if not target.exists:
        return "which does not exist yet"
    counts = Counter(plan.values())
    files = ", ".join(f"{counts[what]} {what}" for what in ("new", "changed", "same", "removed", "left") if counts[what])
    return f"which exists{' (the branch will begin as main)' if target.new_branch else ''}: {files}"


def show(folder: Path, plan: dict[str, str]) -> None:
    """Show what would be uploaded and, where it is known, what becomes of every file of the repository."""
    table = Table("file", "size", *(["on the Hub"] if plan else []), box=None, padding=(0, 2, 0, 0))
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    for name in plan or sizes:
        size = decimal(sizes[name]) if name in sizes else ""
        table.add_row(escape(name), size, *([plan[name]] if plan else []))
    table.add_row("in all", decimal(sum(sizes.values())), style="bold")
    Console().print(table)
