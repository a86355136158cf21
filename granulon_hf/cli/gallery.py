"""`granulon analyze gallery`: the answers of several models side by side, on a page that needs nothing else."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from granulon_hf.cli.common import Debug, progress_bar, quiet, reports_bad_input
from granulon_hf.errors import GranulonError

LARGE = 20_000_000  # bytes


def by_folder(options: list[str] | None, folders: list[Path], name: str) -> dict[Path, str]:
    """Read `["runs/a=x"]` as `{Path("runs/a"): "x"}`."""
    found = {}
    for option in options or []:
        # A folder's name may hold "=" itself: the longest folder that fits is meant.
        cuts = [i for i, character in enumerate(option) if character == "="]
        fits = [(folder, option[i + 1 :]) for i in cuts for folder in folders if Path(option[:i]) == folder and option[i + 1 :]]
        if not fits:
            raise GranulonError(f"{name} takes FOLDER=VALUE with one of the prediction folders; got {option!r}.")
        found[fits[-1][0]] = fits[-1][1]
    return found


@reports_bad_input(extra="eval,judge")
def gallery(
    predictions: Annotated[list[Path], typer.Argument(help="Folders of `granulon eval run`, over the same data.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("gallery.html"),
    scores: Annotated[
        list[str] | None,
        typer.Option(
            help="FOLDER=SCORES: samples.jsonl of `granulon judge run`, or its folder; by default FOLDER/predictions.judged."
        ),
    ] = None,
    name: Annotated[list[str] | None, typer.Option(help="FOLDER=NAME: what to call these predictions.")] = None,
    overlay: Annotated[
        str | None, typer.Option(help="Draw the clusters that this model keeps: Hub id, folder or demo.")
    ] = None,
    sort: Annotated[
        str | None, typer.Option(help="judge or recall (worst first), difference, data; by default judge if there are scores.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Samples on the page: the first N in that order.", min=1)] = 200,
    mark_unsupported: Annotated[
        bool,
        typer.Option("--mark-unsupported", help="Also mark words that neither question nor reference has: a hint, no verdict."),
    ] = False,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Case studies",
    device: Annotated[str, typer.Option(help="For the overlay: cpu, cuda, cuda:1, mps, or auto.")] = "auto",
    debug: Debug = False,
) -> None:
    """Case studies: photograph, clusters, question, ground truth and the answers of all models, as one offline HTML page."""
    from granulon_hf.evaluation import gallery as work

    if sort is not None and sort not in work.ORDERS:
        raise GranulonError(f"Unknown --sort {sort!r}; the choices are {', '.join(work.ORDERS)}.")
    if out.is_dir() or not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise GranulonError(f"--out {str(out)!r} cannot be written; it takes a file in a folder that exists.")
    console = Console(highlight=False)
    runs = work.read_runs(predictions, by_folder(name, predictions, "--name"))
    given = {folder: Path(path) for folder, path in by_folder(scores, predictions, "--scores").items()}
    for run in runs:
        usual = run.folder / "predictions.judged" / "samples.jsonl"
        if usual.is_file():
            given.setdefault(run.folder, usual)
    judged = {run.name: work.read_scores(given[run.folder], run) for run in runs if run.folder in given}
    cases = work.join(runs, judged)
    notes = [
        f"Left out of {run.name}, since not every folder has them: {count} of {len(run.rows)}."
        for run in runs
        if (count := len(run.rows) - len(cases))
    ]
    draw, overlay_model = None, ""
    if overlay is not None:
        from granulon_hf.loading import load_model

        quiet()
        model, processor, overlay_model = load_model(overlay, device)
        # Where the model's own answers are on the page, the clusters are those that it answered with.
        own = next((run for run in runs if run.source == overlay), None)
        levels = {key: row["granularity"] for key, row in own.rows.items()} if own else None
        draw = work.cluster_drawer(model, processor, levels, own.visual_tokens if own else None)
        overlay_model = own.name if own else overlay_model
    order = sort or ("judge" if judged else "recall")
    shown = min(limit, len(cases))
    with progress_bar("pictures", shown) as update:
        size = work.write_gallery(
            out,
            cases,
            title=title,
            order=order,
            limit=limit,
            draw=draw,
            overlay_model=overlay_model,
            mark_unsupported=mark_unsupported,
            notes=notes,
            on_progress=lambda count: update(advance=count),
        )
    for note in notes:
        console.print(escape(note), style="yellow", soft_wrap=True)
    console.print(
        f"{escape(str(out))}: {shown} of {len(cases)} samples, {len(runs)} models, {size / 1e6:.1f} MB", soft_wrap=True
    )
    if size > LARGE:
        console.print("That is a lot for a phone; a smaller --limit makes a lighter page.", style="yellow")
