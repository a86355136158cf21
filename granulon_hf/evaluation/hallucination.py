"""Scores of hallucination benchmarks: answers of yes or no, groups of questions, objects that captions name.

Each is a mean with weights, so that its interval is drawn as every other: a sample's weight is its part in what could count.
Precision, for one, has the weight 1 where the answer is "yes". None stands for samples that a score is not about.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from granulon_hf.data.mentions import named_objects
from granulon_hf.evaluation.metrics import accuracy, asks_yes_or_no, yes_or_no

Row = dict[str, Any]  # of a run, with the sample's `meta`
Weighted = list[tuple[float | None, float]]  # value and weight of each sample
LEFT_OUT = (None, 0.0)


# --- answers of yes or no, of which one is what is looked for ------------------------------------------------------------


def by_answer(count: Callable[[bool, bool], tuple[float, float]], word: str) -> Callable[[Sequence[Row]], Weighted]:
    """Make a score of whether `word` is said and whether it is right to say so, which `count` makes into value and weight."""

    def score(rows: Sequence[Row]) -> Weighted:
        return [
            count(yes_or_no(row["prediction"]) == word, row["reference"].strip().lower() == word)
            if asks_yes_or_no(row)
            else LEFT_OUT
            for row in rows
        ]

    return score


def precision(said: bool, right: bool) -> tuple[float, float]:
    return float(right), float(said)


def sensitivity(said: bool, right: bool) -> tuple[float, float]:
    return float(said), float(right)


def f1(said: bool, right: bool) -> tuple[float, float]:
    """Twice the hits over all that is said and all that is right, which is the harmonic mean of precision and recall."""
    return float(said and right), float(said) + float(right)


def share(said: bool, right: bool) -> tuple[float, float]:
    return float(said), 1.0


# --- groups of questions, right as a whole -------------------------------------------------------------------------------


def by_group(field: str, size: int | None = None) -> Callable[[Sequence[Row]], Weighted]:
    """Make the share of groups with nothing but right answers; `field` of `meta` names them.

    Groups of another size than `size`, where one is given, are left out: some of their samples are not there.
    """

    def score(rows: Sequence[Row]) -> Weighted:
        groups = defaultdict(list)
        for row in rows:
            groups[row["meta"].get(field)].append(accuracy(row))
        found = {name: (min(right), 1 / len(right)) for name, right in groups.items() if size in (None, len(right))}
        found.pop(None, None)
        return [found.get(row["meta"].get(field), LEFT_OUT) for row in rows]

    return score


# --- objects that captions name ------------------------------------------------------------------------------------------


def by_objects(count: Callable[[list[str], dict[str, Any]], tuple[float, float]]) -> Callable[[Sequence[Row]], Weighted]:
    """Make a score of the objects that a caption names, from which `count` makes value and weight.

    The `meta` of such a sample has `words` (see [`~granulon_hf.data.mentions.named_objects`]), `objects` (of each that is there
    the names), and may have `neutral` (names that are never wrong) and `unlikely` (the names of each object that one would
    expect, and that is not there).
    """

    def score(rows: Sequence[Row]) -> Weighted:
        return [
            count(named_objects(row["prediction"], row["meta"]["words"]), row["meta"]) if "objects" in row["meta"] else LEFT_OUT
            for row in rows
        ]

    return score


def wrong(named: list[str], meta: dict[str, Any]) -> int:
    there = {name for names in meta["objects"] for name in names} | set(meta.get("neutral", ()))
    return sum(name not in there for name in named)


def chair_s(named: list[str], meta: dict[str, Any]) -> tuple[float, float]:
    """Captions with an object that is not there, of all."""
    return float(wrong(named, meta) > 0), 1.0


def chair_i(named: list[str], meta: dict[str, Any]) -> tuple[float, float]:
    """Mentions of objects that are not there, of all mentions."""
    return wrong(named, meta) / max(1, len(named)), float(len(named))


def covered(groups: Sequence[Sequence[str]], named: list[str]) -> tuple[float, float]:
    hits = sum(bool(set(names) & set(named)) for names in groups)
    return hits / max(1, len(groups)), float(len(groups))


def of_questions(rows: Sequence[Row]) -> Weighted:
    """Score questions as right or wrong; captions have no accuracy."""
    return [LEFT_OUT if row["task"] == "caption" else (accuracy(row), 1.0) for row in rows]


WEIGHTED: dict[str, Callable[[Sequence[Row]], Weighted]] = {
    f"{word}_{name}": by_answer(count, word)
    for word in ("yes", "no")
    for name, count in {"precision": precision, "recall": sensitivity, "f1": f1, "ratio": share}.items()
}
WEIGHTED["accuracy"] = of_questions
WEIGHTED |= {"pair_accuracy": by_group("pair", 2), "fAcc": by_group("figure"), "qAcc": by_group("set_question")}
WEIGHTED |= {"chair_s": by_objects(chair_s), "chair_i": by_objects(chair_i)}
WEIGHTED["object_recall"] = by_objects(lambda named, meta: covered(meta["objects"], named))
WEIGHTED["cog"] = by_objects(lambda named, meta: covered(meta.get("unlikely", ()), named))
