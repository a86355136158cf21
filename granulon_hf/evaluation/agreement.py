"""Agreement of two judges, or of a judge with people."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
from scipy import stats

from granulon_hf.errors import GranulonError
from granulon_hf.evaluation.judging import rows_of, score_of

SCORES = ("accuracy", "hallucination")


@dataclass
class Agreement:
    """Agreement on one score: coefficients with 95 % percentile bootstrap intervals over samples; None where undefined."""

    score: str
    n: int
    spearman: float | None
    spearman_ci: tuple[float, float] | None
    alpha: float | None
    alpha_ci: tuple[float, float] | None
    mean_difference: float


def read_scores(path: Path, columns: dict[str, str] | None = None) -> dict[str, dict[str, float | None]]:
    """Read scores by id from a JSONL or Parquet file with the column "id", and "accuracy" or "hallucination" or both."""
    named = {name: name for name in ("id", *SCORES)} | (columns or {})
    found: dict[str, dict[str, float | None]] = {}
    for place, row in rows_of(path):
        if named["id"] not in row or not any(named[score] in row for score in SCORES):
            wanted = ", ".join(named.values())
            raise GranulonError(f"{path}, {place} lacks an id or any score (columns looked for: {wanted}).")
        key = str(row[named["id"]])
        if key in found:
            raise GranulonError(f"{path}, {place} has the id {key!r} a second time.")
        found[key] = {score: score_of(row, named[score], f"{path}, {place}") for score in SCORES}
    return found


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


def agreement(a: dict, b: dict, n_resamples: int = 2000) -> list[Agreement]:
    """Compare every score that both sides have, over the ids, at least two, that both scored."""
    results = []
    for score in SCORES:
        both = sorted(key for key in a.keys() & b.keys() if a[key].get(score) is not None and b[key].get(score) is not None)
        if len(both) < 2:
            continue
        x, y = (np.array([side[key][score] for key in both], dtype=float) for side in (a, b))
        row: dict[str, Any] = {}
        for name, function in (("spearman", spearman), ("alpha", alpha)):
            value = function(x, y)
            undefined = math.isnan(value)
            row[name] = None if undefined else value
            row[f"{name}_ci"] = None if undefined else interval(function, x, y, n_resamples)
        if row["alpha"] is not None:
            row["alpha"] = float(krippendorff.alpha(reliability_data=np.stack([x, y]), level_of_measurement="interval"))
        results.append(Agreement(score, len(both), mean_difference=float((x - y).mean()), **row))
    if not results:
        raise GranulonError(
            f"Fewer than two ids were scored on both sides ({len(a)} and {len(b)} ids, {len(a.keys() & b.keys())} in common)."
        )
    return results


def interval(function: Any, x: np.ndarray, y: np.ndarray, n_resamples: int) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap over samples, seed 0; None where a resample has no coefficient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scipy, about resamples without variation
        found = stats.bootstrap(
            (x, y), function, paired=True, vectorized=False, n_resamples=n_resamples, method="percentile", random_state=0
        )
    low, high = (float(edge) for edge in found.confidence_interval)
    return None if math.isnan(low) or math.isnan(high) else (low, high)
