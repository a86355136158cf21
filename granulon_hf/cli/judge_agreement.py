"""`granulon judge agree` and `compare`: judges against people, and against each other."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from granulon_hf.cli.common import Debug, check_out, pairs, reports_bad_input


@reports_bad_input(extra="judge")
def agree(
    first: Annotated[Path, typer.Argument(help="Scores by id: a run's folder, or people's labels (JSONL, Parquet, CSV).")],
    second: Annotated[
        Path, typer.Argument(help="The other scores; people's labels, of a few answers chosen at random or of all.")
    ],
    column: Annotated[list[str] | None, typer.Option(help="FIELD=COLUMN of the second file, as accuracy=human.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    debug: Debug = False,
) -> None:
    """How far two judges, or a judge and people, agree, with 95 % intervals; and what the labels say of the judge.

    Agreement is Spearman's ρ, Krippendorff's α and Cohen's κ with quadratic weights. With the second file taken for the truth:
    the mean of all answers corrected by prediction-powered inference, and whether the judge favors length.
    """
    from granulon_hf.evaluation import agreement

    columns = pairs(column, "--column")
    a, b = agreement.read_scores(first), agreement.read_scores(second, columns)
    texts, images = agreement.read_answers(first)
    images = images or agreement.read_answers(second, columns)[1]
    found = agreement.agreement(a, b, images)
    told = agreement.calibration(a, b, texts, images)
    if as_json:
        powered = {
            score: {"calibration": means and dataclasses.asdict(means), "length_bias": bias}
            for score, (means, bias) in told.items()
        }
        typer.echo(json.dumps({result.score: {**dataclasses.asdict(result), **powered[result.score]} for result in found}))
        return
    console = Console(highlight=False)
    show_agreement(console, found)
    for path, only in ((first, a.keys() - b.keys()), (second, b.keys() - a.keys())):
        if only:
            console.print(f"{len(only)} ids are in {escape(str(path))} alone, such as {escape(min(only))}.", style="yellow")
    show_calibration(console, told, second)


def show_agreement(console: Console, found: list[Any]) -> None:
    head = ("", "samples", "Spearman's ρ", "Krippendorff's α", "mean difference", "limits of agreement", "weighted κ")
    table = Table(*head, box=None, padding=(0, 2, 0, 0))

    def cell(value: float | None, ci: tuple[float, float] | None) -> str:
        if value is None:
            return "undefined (no variation)"
        return f"{value:.3f}" + ("" if ci is None else f" [{ci[0]:.3f}, {ci[1]:.3f}]")

    for r in found:
        coefficients = cell(r.spearman, r.spearman_ci), cell(r.alpha, r.alpha_ci)
        limits = f"{r.limits[0]:+.1f} to {r.limits[1]:+.1f}"
        table.add_row(r.score, str(r.n), *coefficients, f"{r.mean_difference:+.1f}", limits, cell(r.kappa, r.kappa_ci))
    console.print(table)
    n_images = max(r.n_images for r in found)
    over = f"Intervals are over {n_images} images, each with all its answers; an answer whose image is not known counts as one."
    console.print(over if n_images > 1 else "All answers are about one image, of which there are no intervals.", style="dim")


def estimate_text(estimate: tuple[float, float | None, float | None]) -> str:
    mean, low, high = estimate
    return f"{mean:.1f} (no interval: all are alike)" if low is None else f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def show_calibration(console: Console, told: dict[str, Any], labels: Path) -> None:
    """Show corrected means and the bias towards length, both of a second file that holds the truth."""
    table = Table("mean of all answers", "judge", "labels alone", "corrected", "labels, of", box=None, padding=(0, 2, 0, 0))
    for score, (means, _) in told.items():
        if means is not None:
            cells = map(estimate_text, (means.labels, means.corrected))
            table.add_row(score, f"{means.judge:.1f}", *cells, f"{means.n_labels}, {means.n_labels + means.n_rest}")
    if table.rows:
        console.print(f"\nIf {escape(labels.name)} is the truth, and its answers were chosen at random:")
        console.print(table)
    for score, (means, bias) in told.items():
        if means is None:
            console.print(f"Labels of one image do not tell what people think of {score} in general.", style="yellow")
        if bias is None:
            takes = "labels of six images at least, answers of unequal length, and errors of the judge that differ"
            console.print(f"Whether {score} follows the length cannot be said: that takes {takes}.", soft_wrap=True)
        else:
            slope, low, high = bias
            verdict = "it follows the length" if low > 0 or high < 0 else "no bias towards length is seen"
            change = f"{slope:+.1f} [{low:+.1f}, {high:+.1f}]"
            note = f"At equal label the judge's {score} changes by {change} with every 100 words: {verdict}."
            console.print(note, soft_wrap=True)
    console.print("Each answer is scored alone, so that no order of answers can matter.", style="dim")


@reports_bad_input(extra="judge")
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a run, such as A.judged, or its samples.jsonl.")],
    second: Annotated[Path, typer.Argument(help="The same answers, scored by another judge.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the page and the plot; by default beside the first.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="FIELD=COLUMN of the second file, as accuracy=accuracy.gpt-4o of a panel.")
    ] = None,
    first_column: Annotated[list[str] | None, typer.Option(help="FIELD=COLUMN of the first file.")] = None,
    show: Annotated[int, typer.Option(help="Answers on the page, largest disagreements first.", min=1)] = 100,
    debug: Debug = False,
) -> None:
    """How far two judges of the same answers agree: coefficients, a Bland–Altman plot, the largest disagreements first."""
    from granulon_hf.evaluation import agreement, judge_comparison

    folder = out or first.with_name(f"{first.stem}-{second.stem}.compared")
    check_out(folder)
    columns = pairs(column, "--column")
    a, b = agreement.read_scores(first, pairs(first_column, "--first-column")), agreement.read_scores(second, columns)
    rows = judge_comparison.check_same_answers(first, second)
    images = agreement.read_answers(first)[1] or agreement.read_answers(second, columns)[1]
    found = agreement.agreement(a, b, images)
    page = judge_comparison.write_comparison(folder, first, second, a, b, found, rows, show)
    console = Console(highlight=False)
    show_agreement(console, found)
    table = Table("largest disagreements", "accuracy", "hallucination", box=None, padding=(0, 2, 0, 0))
    for row in judge_comparison.disagreements(a, b)[:5]:
        pair = (", ".join("none" if value is None else f"{value:g}" for value in row[score]) for score in agreement.SCORES)
        table.add_row(escape(row["id"]), *pair)
    console.print(table)
    console.print(f"Page: {escape(str(page))}", style="dim", soft_wrap=True)
