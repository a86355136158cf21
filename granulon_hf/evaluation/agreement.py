"""Agreement of two judges, or of a judge with people."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
from scipy import stats

from granulon_hf.errors import GranulonError
from granulon_hf.evaluation.calibration import Calibration, length_bias, prediction_powered_mean
from granulon_hf.evaluation.judging import SCORES, id_of, rows_of, score_of
from granulon_hf.judge.images import image_id
from granulon_hf.stats import bootstrap_interval, clusters_of

Images = Mapping[str, list[str]]  # by the id of an answer which images it is about


@dataclass
class Agreement:
    """Agreement on one score: coefficients with 95 % bootstrap intervals over images; None where undefined.

    `alpha` is Krippendorff's, `kappa` Cohen's with quadratic weights; `limits` are those of Bland and Altman, between which
    95 % of the differences are expected.
    """

    score: str
    n: int
    n_images: int
    spearman: float | None
    spearman_ci: tuple[float, float] | None
    alpha: float | None
    alpha_ci: tuple[float, float] | None
    kappa: float | None
    kappa_ci: tuple[float, float] | None
    mean_difference: float
    limits: tuple[float, float]


def samples_of(path: Path) -> Path:
    """Return the file of scores: in the folder of a run it is `samples.jsonl`."""
    return path / "samples.jsonl" if (path / "samples.jsonl").is_file() else path


def read_scores(path: Path, columns: dict[str, str] | None = None) -> dict[str, dict[str, float | None]]:
    """Read scores by id from a run's folder, or a JSONL, Parquet or CSV file with "id" and "accuracy" or "hallucination" or
    both."""
    fields = ("id", *SCORES)
    if unknown := sorted(set(columns or {}) - set(fields)):
        raise GranulonError(f"There is no field {unknown[0]!r}; columns can be named for {', '.join(fields)}.")
    named = {name: name for name in fields} | (columns or {})
    found: dict[str, dict[str, float | None]] = {}
    there: set[str] = set()
    for place, row in rows_of(samples_of(path)):
        there |= row.keys()
        if row.get(named["id"]) is None or not any(named[score] in row for score in SCORES):
            wanted = ", ".join(named.values())
            raise GranulonError(f"{path}, {place} lacks an id or any score (columns looked for: {wanted}).")
        key = id_of(row[named["id"]])
        if key in found:
            raise GranulonError(f"{path}, {place} has the id {key!r} a second time.")
        found[key] = {score: score_of(row, named[score], f"{path}, {place}") for score in SCORES}
    if absent := [column for column in (columns or {}).values() if column not in there]:
        raise GranulonError(f"{path} has no column {absent[0]!r}; its columns are {', '.join(sorted(there))}.")
    return found


def read_answers(path: Path, columns: dict[str, str] | None = None) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return by id the answers, and which images they are about, where the file has them."""
    file, name = samples_of(path), (columns or {}).get("id", "id")
    rows = {id_of(row[name]): row for _, row in rows_of(file)}
    texts = {key: row["prediction"] for key, row in rows.items() if isinstance(row.get("prediction"), str)}
    images = {key: found for key, row in rows.items() if (found := images_of(row, file.parent))}
    return texts, images


def images_of(row: dict[str, Any], folder: Path) -> list[str]:
    """Return which images a row is about: its "image_id", or that of its image, which older runs and other files have alone."""
    if row.get("image_id") is not None:
        return [str(row["image_id"])]
    images = row["images"] if isinstance(row.get("images"), list) else [row.get("image")]
    return [name for image in images if (name := name_of_image(image, folder)) is not None]


def name_of_image(image: Any, folder: Path) -> str | None:
    """Return the id of an image in any of the forms that files have; of a path that leads nowhere it is the path."""
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, image)
    if isinstance(data, bytes):
        return image_id({"bytes": data})
    if not isinstance(path, str):
        return None
    places = os.path.expanduser(path), str(folder / path)
    return image_id({"path": next(filter(os.path.isfile, places), path)})


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation; NaN where one side is constant."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(stats.spearmanr(a, b).statistic)


def alpha(a: np.ndarray, b: np.ndarray) -> float:
    """Return Krippendorff's α of two raters on an interval scale; NaN where all values are the same.

    Resamples use this form that it has for two raters without gaps, 1 − mean((a − b)²) / (2 var(a and b)), since it is fast; a
    test holds it against the krippendorff package, which gives the coefficient itself.
    """
    values = np.concatenate([a, b]).astype(float)
    return math.nan if np.ptp(values) == 0 else float(1 - np.mean((a - b) ** 2) / (2 * values.var(ddof=1)))


def weighted_kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Return Cohen's κ with quadratic weights, which of numbers is 1 − mean((a − b)²) / (that of independent a and b); NaN
    where all values are the same. A test holds it against scikit-learn."""
    chance = a.var() + b.var() + (a.mean() - b.mean()) ** 2
    return math.nan if chance == 0 else float(1 - np.mean((a - b) ** 2) / chance)


def agreement(a: dict, b: dict, images: Images | None = None, n_resamples: int = 2000) -> list[Agreement]:
    """Compare every score that both sides have, over the ids, at least two, that both scored.

    Answers about the same one of the `images` are drawn together; where it names none, each is drawn on its own.
    """
    results = []
    for score in SCORES:
        both = sorted(key for key in a.keys() & b.keys() if a[key].get(score) is not None and b[key].get(score) is not None)
        if len(both) < 2:
            continue
        x, y = (np.array([side[key][score] for key in both], dtype=float) for side in (a, b))
        clusters = clusters_of((images or {}).get(key, []) for key in both)
        row: dict[str, Any] = {"n_images": len(set(clusters))}
        for name, function in (("spearman", spearman), ("alpha", alpha), ("kappa", weighted_kappa)):
            value = function(x, y)
            undefined = math.isnan(value)
            row[name] = None if undefined else value
            row[f"{name}_ci"] = None if undefined else interval(function, x, y, clusters, n_resamples)
        if row["alpha"] is not None:
            row["alpha"] = float(krippendorff.alpha(reliability_data=np.stack([x, y]), level_of_measurement="interval"))
        mean, half = float((x - y).mean()), 1.96 * float((x - y).std(ddof=1))
        results.append(Agreement(score, len(both), mean_difference=mean, limits=(mean - half, mean + half), **row))
    if not results:
        raise GranulonError(
            f"Fewer than two ids were scored on both sides ({len(a)} and {len(b)} ids, {len(a.keys() & b.keys())} in common)."
        )
    return results


def interval(
    function: Callable[[np.ndarray, np.ndarray], float], x: np.ndarray, y: np.ndarray, clusters: list[int], n_resamples: int
) -> tuple[float, float] | None:
    """Return the interval of a coefficient of paired scores."""
    return bootstrap_interval(lambda drawn: function(x[drawn], y[drawn]), clusters, n_resamples)


def panel_agreement(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return Krippendorff's α of a panel's judges, and of each judge's own samples, by score; None where undefined.

    Empty answers, on which nobody was asked, are left out.
    """
    places = [i for i, empty in enumerate(result["empty"]) if not empty]
    found: dict[str, dict[str, Any]] = {}
    for score in SCORES:
        columns = [[judge[f"{score}_scores"][i] for i in places] for judge in result["judges"].values()]
        found[score] = {"judges": alpha_of_many(columns) if len(columns) > 1 else None}
        if result["samples"] > 1:
            found[score]["samples"] = {
                name: alpha_of_many(list(zip(*(judge[f"{score}_samples"][i] for i in places), strict=True)))
                for name, judge in result["judges"].items()
            }
    return found


def alpha_of_many(raters: Sequence[Sequence[float | None]]) -> float | None:
    """Return Krippendorff's α of raters on an interval scale, some of whose ratings may be missing."""
    ratings = np.array(raters, dtype=float)
    ratings = ratings[:, (~np.isnan(ratings)).sum(0) > 1] if ratings.size else ratings
    if not ratings.size or np.nanmax(ratings) == np.nanmin(ratings):
        return None
    return float(krippendorff.alpha(reliability_data=ratings, level_of_measurement="interval"))


def calibration(
    judge: dict, human: dict, texts: dict[str, str], images: Images
) -> dict[str, tuple[Calibration | None, tuple[float, float, float] | None]]:
    """Return by score what human labels say about a judge: corrected means, and the bias towards length.

    Args:
        judge, human (`dict`): scores by id, as `read_scores` returns them.
        texts (`dict[str, str]`): the answers by id, for their lengths.
        images (`dict[str, list[str]]`): by id which images the answer is about; without any it is on its own.
    """
    groups = dict(zip(judge, clusters_of(images.get(key, []) for key in judge), strict=True))
    found = {}
    for score in SCORES:
        ids = sorted(key for key in judge if judge[key].get(score) is not None)
        labeled = [key for key in ids if human.get(key, {}).get(score) is not None]
        rest = [key for key in ids if key not in set(labeled)]
        if not labeled:
            continue
        y, f, u = (
            [human[key][score] for key in labeled],
            [judge[key][score] for key in labeled],
            [judge[key][score] for key in rest],
        )
        powered = prediction_powered_mean(y, f, u, [groups[key] for key in (*labeled, *rest)])
        long = [key for key in labeled if key in texts]
        bias = length_bias(
            [human[key][score] for key in long],
            [judge[key][score] for key in long],
            [len(texts[key].split()) for key in long],
            [groups[key] for key in long],
        )
        found[score] = powered, bias
    return found
