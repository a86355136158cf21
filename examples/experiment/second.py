"""The study's second part: how few visual tokens, chosen how, keep the accuracy? Its claims, and its report.

    python -m examples.experiment.second OUT

reads the finished runs in `OUT/runs` as `report.py` does, and writes `OUT/second.md`, `OUT/second.json` and `OUT/tokens.png`.
Everything is counted from raw predictions. Rules, controls and corrections are those of the first part, but for one: budgets of
a nested arm are views of one training and vary together from seed to seed, so that the spread between seeds is that of each
comparison's own differences, seed by seed, and not pooled over arms; and controls of all views of a training are corrected
together.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from granulon_hf.cli.common import reports_bad_input

from .arms import ARMS, BUDGETS, PRICED, PRICES
from .report import (
    ALPHA,
    DECISIVE,
    MARGIN,
    MIN_SEEDS,
    QUESTION,
    RESAMPLES,
    SPLIT_NAMES,
    Comparison,
    Scores,
    Study,
    compare_family,
    control_tests,
    costs,
    difference,
    find_obstacles,
    nan_mean,
    read,
    render,
    save,
    tidy,
    verdict,
)

BLIND = ("adata", "pool", "queries", "attention-merge", "adaptive-prune", "region-attention")  # to the question
QUESTIONED = ("question-dpp",)
CONTROLS = ("random", "downsample")
REDUCERS = (*BLIND, *QUESTIONED, *CONTROLS)
MOST = max(count for count in BUDGETS if count <= 32)
FEWEST = min(BUDGETS)
NEAR = 0.02  # of accuracy: what may be lost against all pixel tokens that are told where they are
SAME = 0.01  # what one projector for all budgets may lose against one for each
ALONE = (4, 16, 64)  # budgets that are also trained alone


def at(reducer: str, budget: int) -> str:
    """A nested arm at a budget."""
    return f"{reducer}{budget}+nested+place"


def training_of(arm: str) -> str:
    """The run that an arm is a view of, or the arm."""
    return ARMS[arm][1].get("view", arm)


def over_budgets(one: str, other: str) -> Comparison:
    """Of two nested arms, the mean over all budgets."""
    terms = [(sign / len(BUDGETS), at(arm, count), "overall") for count in BUDGETS for sign, arm in ((1, one), (-1, other))]
    return Comparison(f"{one} − {other}, mean over budgets", tuple(terms))


def curve_weights(tokens: float) -> dict[int, float]:
    """Weights of the two budgets next to a number of tokens: drawing between them at random costs as much."""
    tokens = min(max(tokens, BUDGETS[0]), BUDGETS[-1])
    low = max(count for count in BUDGETS if count <= tokens)
    high = min((count for count in BUDGETS if count > low), default=low)
    share = (tokens - low) / (high - low) if high > low else 0.0
    return {count: weight for count, weight in ((low, 1 - share), (high, share)) if weight}


def against_curve(study: Study, reducer: str, price: float, split: str) -> Comparison:
    """A chosen budget against the interpolated curve of fixed ones at its own mean number of tokens."""
    arm = f"{reducer}+price{price:g}+place"
    used = [run.visual_tokens[split, "none"] for run in study.runs if run.arm == arm]
    weights = curve_weights(float(np.mean(used)) if used else BUDGETS[0])
    fixed = tuple((-weight, at(reducer, count), "overall") for count, weight in weights.items())
    return Comparison(f"{arm} − fixed budgets at as many tokens", ((1, arm, "overall"), *fixed))


def family_of(study: Study, split: str) -> dict[str, Comparison]:
    """The comparisons that were declared before the first run."""
    return {
        **{f"near {name}": difference(at(name, MOST), "pixel+places", margin=NEAR) for name in (*BLIND, *QUESTIONED)},
        **{f"adata {name}": over_budgets("adata", name) for name in ("pool", *CONTROLS)},
        **{f"question {name}": difference(at("question-dpp", FEWEST), at(name, FEWEST)) for name in ("pool", "adata")},
        **{f"price {price:g}": against_curve(study, name, price, split) for name in PRICED for price in PRICES},
        **{f"alone {count}": difference(at("adata", count), f"adata{count}+place", margin=SAME) for count in ALONE},
    }


# A claim is supported where all its comparisons are decided in its favor ("any": where one is), contradicted where one is
# decided against it ("any": where all are). Declared before any run of this part: the history of this file shows it.
CLAIMS = (
    ("A", f"Some reducer at {MOST} tokens is within {NEAR} of 196 pixel tokens, all told where they are", "near ", "any"),
    ("B", "AdaTA's clusters beat plain pooling, random patches and a smaller image at equal budgets", "adata ", "all"),
    ("C", f"Reducers that read the question beat those that do not, at {FEWEST} tokens", "question ", "all"),
    ("D", "A budget chosen by measured loss beats fixed budgets at as many tokens, in held-out phrasings too", "price ", "all"),
    ("E", f"One projector for all budgets is within {SAME} of one for each", "alone ", "all"),
)
FASTER = "The time of an answer falls as the tokens do"


def any_verdict(results: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The rule of a claim that one comparison is enough for; as [`verdict`] has it."""
    made = [result for result in results if "missing" not in result]
    signs = [result["sign"] if not result["obstacles"] else 0 for result in made]
    if 1 in signs:
        return "supported", f"by {', '.join(r['title'] for r, sign in zip(made, signs, strict=True) if sign == 1)}"
    if made and len(made) == len(results) and all(sign == -1 for sign in signs):
        return "contradicted", ""
    return "undecided", verdict(results)[1] or f"{signs.count(-1)} of {len(results)} decided against it"


def time_verdict(times: Mapping[str, Any]) -> tuple[str, str]:
    """Measured, not tested: whether each reducer's slowest turn at the fewest tokens is faster than its fastest at the most.

    Args:
        times (`Mapping[str, Any]`): by arm, as `timing.py` writes it. What is trained makes no difference to it.
    """
    ends = [(at(name, FEWEST), at(name, BUDGETS[-1])) for name in REDUCERS]
    known = [(times[few]["answer"]["range"], times[many]["answer"]["range"]) for few, many in ends if {few, many} <= {*times}]
    if not known:
        return "undecided", "not measured"
    faster = sum(few[1] < many[0] for few, many in known)
    return ("supported" if faster == len(REDUCERS) else "undecided"), f"{faster} of {len(REDUCERS)} reducers"


def oracle(study: Study, scores: Scores, reducer: str, split: str) -> dict[str, Any] | None:
    """A bound that nothing reaches: of each question the least budget that answers it right, or the least of all."""
    rows, tokens = [], []
    for seed in sorted({run.seed for run in study.runs if run.arm == at(reducer, FEWEST)}):
        runs = {run.arm: run for run in study.runs if run.seed == seed}
        views = [runs[at(reducer, count)] for count in BUDGETS if at(reducer, count) in runs]
        right = np.array([view.correct[split, "none"] for view in views])
        seen = np.array([view.visual_tokens[split, "none"] for view in views])
        rows.append(float(nan_mean(scores.means((split, "none"), right.max(0))[0])))
        tokens.append(float(seen[right.argmax(0), np.arange(right.shape[1])].mean()))
    return {"accuracy": float(np.mean(rows)), "tokens": float(np.mean(tokens)), "seeds": len(rows)} if rows else None


def mean_tokens(study: Study, arm: str, split: str) -> dict[str, float]:
    """Visual tokens of an arm, over all questions and over those of each level."""
    rows = np.array([run.visual_tokens[split, "none"] for run in study.runs if run.arm == arm], dtype=float).mean(0)
    asked = np.array([question[QUESTION.index("level")] for question in study.questions[split, "none"]])
    return {"overall": float(rows.mean())} | {level: float(rows[asked == level].mean()) for level in study.levels}


def analyse(study: Study, resamples: int = RESAMPLES) -> dict[str, Any]:
    """All numbers of the report, as they are written to `second.json`."""
    scores = Scores(study, resamples)
    controls = control_tests(scores, training_of)
    obstacles = find_obstacles(study, controls)
    families = {
        split: compare_family(scores, obstacles, split, family_of(study, split), own_spread=True) for split in study.splits
    }
    claims = []
    for letter, title, prefix, rule in CLAIMS:
        splits = study.splits if letter == "D" else [DECISIVE]
        results = [
            one if split == DECISIVE else {**one, "title": f"{one['title']}, {SPLIT_NAMES[split]}"}
            for split in splits
            for name, one in families[split].items()
            if name.startswith(prefix)
        ]
        word, why = any_verdict(results) if rule == "any" else verdict(results)
        if word == "no difference":
            equal = sum(one["equal"] for one in results)
            won = sum(one["sign"] == 1 and not one["obstacles"] for one in results)
            why = f"within ±{MARGIN:g}: {equal} of {len(results)}, decided in favor: {won}"
        claims.append({"letter": letter, "claim": title, "verdict": word, "why": why, "results": results})
    word, why = time_verdict(study.timing)
    claims.append({"letter": "F", "claim": FASTER, "verdict": word, "why": why, "results": []})
    present = {run.arm for run in study.runs}
    levels = ("overall", *study.levels)
    arms = {
        arm: {split: {level: scores.arm(arm, split, level) for level in levels} for split in study.splits}
        for arm in ARMS
        if arm in present
    }
    return {
        "claims": claims,
        "comparisons": families,
        "arms": arms,
        "levels": levels,
        "tokens": {arm: {split: mean_tokens(study, arm, split) for split in study.splits} for arm in arms},
        "curve": {name: [count for count in BUDGETS if at(name, count) in present] for name in REDUCERS},
        "oracle": {split: {name: oracle(study, scores, name, split) for name in REDUCERS} for split in study.splits},
        "costs": costs(study),
        "times_alone": {arm: study.timing[arm] for arm in ARMS if arm in study.timing and arm not in present},
        "loud": [test for test in controls if test["above"]],
        "controls": [test for test in controls if test["type"] == "overall"],
        "no_plateau": [run.name for run in study.runs if not run.plateau],
        "unfinished": study.unfinished,
        "seeds": {arm: len(cells[DECISIVE]["overall"]["seeds"]) for arm, cells in arms.items()},
        "settings": study.runs[0].manifest["settings"],
        "experiment": study.experiment,
        "rules": {"resamples": resamples, "alpha": ALPHA, "min_seeds": MIN_SEEDS, "near": NEAR, "same": SAME, "margin": MARGIN},
    }


STYLES = {
    "adata": ("#d55e00", "D"),
    "pool": ("#0072b2", "s"),
    "queries": ("#cc79a7", "X"),
    "attention-merge": ("#56b4e9", "v"),
    "adaptive-prune": ("#009e73", "<"),
    "region-attention": ("#e69f00", "P"),
    "question-dpp": ("#000000", "^"),
    "random": ("#999999", "o"),
    "downsample": ("#bbbbbb", "d"),
}


def draw_tokens(found: Mapping[str, Any], path: Path) -> None:
    """Accuracy over the mean number of visual tokens: each reducer's fixed budgets, and those chosen by price."""
    from matplotlib.figure import Figure

    levels = found["levels"]
    figure = Figure(figsize=(3.4 * len(levels) + 1.8, 4.2), layout="constrained")
    panels = figure.subplots(1, len(levels), squeeze=False)[0]
    for axes, level in zip(panels, levels, strict=True):
        for arm, line in (("pixel+places", "-"), ("pixel", ":")):
            if arm in found["arms"]:
                axes.axhline(
                    found["arms"][arm][DECISIVE][level]["mean"], color="black", ls=line, lw=1, label=f"{arm}, 196 tokens"
                )
        for name, counts in found["curve"].items():
            if counts:
                color, marker = STYLES[name]
                cells = [found["arms"][at(name, count)][DECISIVE][level] for count in counts]
                tokens = [found["tokens"][at(name, count)][DECISIVE][level] for count in counts]
                low, high = np.array([cell["interval"] for cell in cells]).T
                axes.fill_between(tokens, low, high, color=color, alpha=0.1, linewidth=0)
                axes.plot(tokens, [cell["mean"] for cell in cells], color=color, marker=marker, ms=5, lw=1.4, label=name)
        for name in PRICED:
            priced = [arm for price in PRICES if (arm := f"{name}+price{price:g}+place") in found["arms"]]
            if priced:
                tokens = [found["tokens"][arm][DECISIVE][level] for arm in priced]
                values = [found["arms"][arm][DECISIVE][level]["mean"] for arm in priced]
                axes.plot(tokens, values, "*", color=STYLES[name][0], ms=12, mec="black", label=f"{name}, budget chosen")
        axes.set(title=level, xlabel="visual tokens (mean)", xscale="log", ylabel="" if axes is not panels[0] else "accuracy")
        axes.set_xticks(BUDGETS, [str(count) for count in BUDGETS])
        axes.minorticks_off()
        tidy(axes)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    save(figure, path)


def write(out: Path, resamples: int = RESAMPLES) -> Path:
    """Write `second.md`, `second.json` and `tokens.png` into the folder of the runs; returns the path of the first."""
    found = analyse(read(out), resamples)
    draw_tokens(found, out / "tokens.png")
    names = {"split_names": SPLIT_NAMES, "decisive": DECISIVE, "at": at, "prices": PRICES, "priced": PRICED}
    return render(out / "second.md", found, **names)


@reports_bad_input
def main(
    out: Annotated[Path, typer.Argument(help="Folder of the experiment.")],
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write second.md, second.json and tokens.png of the finished runs of the second part."""
    typer.echo(f"Report: {write(out)}")


if __name__ == "__main__":
    typer.run(main)
