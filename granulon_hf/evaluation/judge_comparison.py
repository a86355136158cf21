"""Two judges of the same answers, side by side: coefficients, a Bland–Altman plot, and where they differ most."""

import base64
from pathlib import Path
from typing import Any

import numpy as np

from granulon_hf.errors import GranulonError
from granulon_hf.evaluation.agreement import SCORES, Agreement, samples_of
from granulon_hf.evaluation.judging import as_json, id_of, rows_of
from granulon_hf.evaluation.tables import empty_figure, write_page
from granulon_hf.io import replacing


def check_same_answers(first: Path, second: Path) -> dict[str, dict[str, Any]]:
    """Return the first file's rows by id; raise GranulonError where both files have another answer by the same id."""
    rows = {id_of(row.get("id")): row for _, row in rows_of(samples_of(first))}
    for _, row in rows_of(samples_of(second)):
        other = rows.get(id_of(row.get("id")), {})
        if "prediction" in row and "prediction" in other and row["prediction"] != other["prediction"]:
            raise GranulonError(
                f"{str(first)!r} and {str(second)!r} are not of the same answers: {row['id']!r} is "
                f"{as_json(other['prediction'])} and {as_json(row['prediction'])}; judge one file of predictions twice."
            )
    return rows


def disagreements(a: dict, b: dict) -> list[dict[str, Any]]:
    """Return both judges' scores by id, those that differ most first."""
    found = []
    for key in sorted(a.keys() & b.keys()):
        pairs = {score: (a[key].get(score), b[key].get(score)) for score in SCORES}
        apart = [abs(x - y) for x, y in pairs.values() if x is not None and y is not None]
        if apart:
            found.append({"id": key, **pairs, "apart": max(apart)})
    return sorted(found, key=lambda row: -row["apart"])


def draw(path: Path, results: list[Agreement], pairs: list[dict[str, Any]], names: tuple[str, str]) -> None:
    """Draw the Bland–Altman plot of each score: the difference of two judges over their mean, with the limits of agreement."""
    figure = empty_figure(5.5 * len(results), 4)
    axes = np.atleast_1d(figure.subplots(1, len(results), sharey=True))
    for axis, result in zip(axes, results, strict=True):
        both = np.array([row[result.score] for row in pairs if None not in row[result.score]], dtype=float)
        axis.scatter(both.mean(1), both[:, 0] - both[:, 1], s=12, alpha=0.5, linewidths=0)
        for value, style in ((result.mean_difference, "-"), *((limit, "--") for limit in result.limits)):
            axis.axhline(value, linestyle=style, linewidth=1, color="0.3")
            axis.annotate(f"{value:+.1f}", (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        axis.set(title=f"{result.score} (n = {result.n})", xlabel="mean of both judges", xlim=(-3, 103))
    axes[0].set_ylabel(f"{names[0]} − {names[1]}")
    with replacing(path) as part:
        figure.savefig(part, dpi=150, format="png")


def write_comparison(
    folder: Path, first: Path, second: Path, a: dict, b: dict, results: list[Agreement], rows: dict, show: int = 100
) -> Path:
    """Write the page of a comparison and its plot into a folder; return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = disagreements(a, b)
    names = (first.stem, second.stem) if first.stem != second.stem else (str(first), str(second))
    draw(folder / "bland_altman.png", results, pairs, names)
    plot = "data:image/png;base64," + base64.b64encode((folder / "bland_altman.png").read_bytes()).decode()
    cards = [{**row, "text": str(rows.get(row["id"], {}).get("prediction") or "")} for row in pairs[:show]]
    page = folder / "comparison.html"
    write_page(page, "judge_comparison.html.jinja", names=names, results=results, plot=plot, cards=cards, n=len(pairs))
    return page
