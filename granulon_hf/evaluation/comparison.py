"""The fair comparison: encoders or reducers under one language model, each trained and evaluated with the same settings."""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.progress import track
from safetensors.torch import load_file

from granulon_hf.errors import GranulonError
from granulon_hf.evaluation.answer import Generation, OtherPredictions, process_state
from granulon_hf.evaluation.benchmark import Suite, open_set, run_suite, slug
from granulon_hf.evaluation.budgets import measure_costs, write_curve
from granulon_hf.evaluation.tables import empty_figure
from granulon_hf.io import write_text
from granulon_hf.loading import DEMO, DTYPES, pick_device, read_config
from granulon_hf.modeling.reducers_granulon import REDUCERS
from granulon_hf.overrides import set_prices
from granulon_hf.training.arguments import parse
from granulon_hf.training.checkpoints import ADAPTER, RUN, check_settings, last_checkpoint, settings_of
from granulon_hf.training.controller import ControllerArguments, train_controller
from granulon_hf.training.loss_labels import label_by_loss
from granulon_hf.training.loss_targets import ScoredQuestion
from granulon_hf.training.run import build_model, load_samples, train
from granulon_hf.training.stages import load_adapter_state, save_adapter
from granulon_hf.variants import DECODERS, ENCODERS

PIXEL = "pixel"  # among reducers: all pixel tokens, the reference
CONTROLLER, SCORED = "controller", 400  # the folder of a controller, and questions whose answers are scored for it
# What differs between the rows of a fair comparison, and only that; an adapter is a trained controller, and how many tokens are
# packed into a row changes no gradient.
OWN = set("variant feature_cache adapter max_tokens_per_batch visual_tokens reducer levels slot_position budgets".split())
FIXED = ("variant", "output_dir", "resume_from_checkpoint", "feature_cache")
OF_REDUCERS = ("visual_tokens", "reducer", "levels", "slot_position")


@dataclass(frozen=True)
class Row:
    """What is trained once."""

    name: str
    variant: str
    reducer: str | None = None  # of the compact form; without one it is the variant as it is


@dataclass(frozen=True)
class Arm:
    """What is evaluated: a row, and how many visual tokens it may show."""

    name: str
    row: Row
    visual_tokens: int | None = None
    price: float | None = None


def has_levels(encoder: str) -> bool:
    return ENCODERS[encoder].config.get("granularity_levels") != []


def training_arguments(config: dict[str, Any], row: Row, out: Path) -> list[str]:
    """Return the command line of one row."""
    arguments = {**(config.get("train") or {}), "variant": row.variant, "output_dir": str(out / row.name / "training")}
    if row.reducer == PIXEL:
        arguments |= {"visual_tokens": "pixel", "slot_position": "all"}
        arguments.pop("budgets", None)
    elif row.reducer:
        levels = ",".join(map(str, config["budgets"]))
        arguments = {"budgets": "random", **arguments, "visual_tokens": "semantic", "reducer": row.reducer, "levels": levels}
    elif config.get("controller") and has_levels(row.variant.rpartition("-")[0]):
        arguments["adapter"] = config["controller"]
    looks_at = REDUCERS[row.reducer].needs if row.reducer in REDUCERS else frozenset()
    if arguments.pop("cache_features", False) and looks_at.isdisjoint(("attention", "scales")):  # which no cache keeps
        arguments["feature_cache"] = str(out / "features" / row.variant.replace("/", "--"))
    return [part for name, value in arguments.items() for part in (f"--{name}", str(value))]


def check(config: dict[str, Any]) -> list[Row]:
    """Return the rows of a comparison; raise GranulonError where something is missing, unknown or fixed by it.

    It has `llm` and `encoders`, or as `llm` a Granulon model ("demo", a folder, a Hub id) whose encoder is kept; `train`
    (arguments of examples/train.py) and `eval` (fields of [`Suite`]). A comparison of reducers has `reducers` and `budgets`
    (numbers of visual tokens, each of which every reducer is evaluated at) and, if wanted, `prices` of a visual token, at which
    a controller chooses each question's budget, and `scored`, the training questions that it learns from. Another one has, if
    wanted, `controller` (a folder of examples/train_controller.py, for the rows that have levels).
    """
    mapping, names = (dict, "names with values"), (list, "a list of names")
    forms: dict[str, tuple[type, str]] = {"llm": (str, "a name"), "encoders": names, "reducers": names}
    forms |= dict.fromkeys(("budgets", "prices"), (list, "a list of numbers"))
    forms |= {"controller": (str, "a folder"), "train": mapping, "eval": mapping}
    for name, (kind, form) in forms.items():
        if not isinstance(config.get(name) or kind(), kind):
            raise GranulonError(f"`{name}` must be {form}; got {config[name]!r}.")
    llm, encoders, reducers = config.get("llm") or "", config.get("encoders") or [], config.get("reducers") or []
    if not llm:
        raise GranulonError(
            f"`llm` must be one of {', '.join(DECODERS)}, demo, or a folder with a Granulon model; got nothing."
        )
    if llm in DECODERS:
        variants = [f"{name}-{llm}" for name in encoders]
    elif encoders:
        raise GranulonError(f"With `encoders`, `llm` must be one of {', '.join(DECODERS)}; {llm!r} would have its own.")
    else:
        if llm != DEMO:  # which is assembled at first use
            read_config(llm)
        variants = [llm]
    if unknown := [name for name in encoders if name not in ENCODERS]:
        raise GranulonError(f"Unknown encoder {unknown[0]!r}; the encoders are {', '.join(ENCODERS)}.")
    if unknown := [name for name in reducers if name not in (PIXEL, *REDUCERS)]:
        raise GranulonError(f"Unknown reducer {unknown[0]!r}; the reducers are {', '.join((PIXEL, *REDUCERS))}.")
    towers = [ENCODERS[name].hub_id if reducers else name for name in encoders]
    if len(set(towers)) < len(towers) or len(set(reducers)) < len(reducers):
        raise GranulonError("An encoder or reducer is named twice (with reducers, dinov3 and granulon are the same encoder).")
    check_budgets(config, reducers)
    check_options(config, reducers, encoders)
    rows = [Row(name, name) for name in variants]
    if reducers:
        pairs = list(itertools.product(variants, reducers))
        rows = [Row(name if len(variants) == 1 else f"{variant}+{name}", variant, name) for variant, name in pairs]
    if len(rows) < 2:
        raise GranulonError("A comparison needs at least two rows: different encoders, or different reducers.")
    return rows


def check_budgets(config: dict[str, Any], reducers: Sequence[str]) -> None:
    budgets = config.get("budgets") or []
    if bool(budgets) != any(name != PIXEL for name in reducers):
        raise GranulonError("`reducers` and `budgets` go together: which reducers, at which numbers of visual tokens.")
    if not all(type(number) is int and number >= 1 for number in budgets) or len(set(budgets)) < len(budgets):
        raise GranulonError(f"`budgets` must be different whole numbers from 1; got {budgets!r}.")
    prices = config.get("prices") or []
    if prices and len(budgets) < 2:
        raise GranulonError("`prices` let a controller choose among budgets: name at least two `budgets`.")
    if not all(type(price) in (int, float) and price >= 0 for price in prices) or len(set(prices)) < len(prices):
        raise GranulonError(f"`prices` must be different numbers from 0; got {prices!r}.")
    if type(scored := config.get("scored", SCORED)) is not int or scored < 10:
        raise GranulonError(f"`scored` must be a whole number from 10; got {scored!r}.")


def check_options(config: dict[str, Any], reducers: Sequence[str], encoders: Sequence[str]) -> None:
    training, evaluation, controller = config.get("train") or {}, config.get("eval") or {}, config.get("controller")
    if controller and not os.path.exists(controller):
        raise GranulonError(f"`controller` names {controller!r}, which is not there; examples/train_controller.py makes one.")
    if controller and (reducers or not any(map(has_levels, encoders))):
        raise GranulonError("`controller` is for encoders with levels, and there is none among the rows; leave it out.")
    for name in FIXED + (OF_REDUCERS if reducers else ()):
        if name in training:
            raise GranulonError(f"`{name}` is set by the comparison itself; leave it out of `train`.")
    fields = {field.name for field in dataclass_fields(Suite)} - {"models", "out", "generations"}
    if unknown := sorted(set(evaluation) - fields):
        raise GranulonError(f"`eval` has {unknown[0]!r}; its names are {', '.join(sorted(fields))}.")
    if (dtype := evaluation.get("dtype", "auto")) not in DTYPES:
        raise GranulonError(f"`dtype` of `eval` must be one of {', '.join(DTYPES)}; got {dtype!r}.")
    if not evaluation.get("data"):
        raise GranulonError("`eval` needs `data`: what to evaluate on.")


def arms_of(config: dict[str, Any], rows: Sequence[Row]) -> dict[str, Arm]:
    """Return what is evaluated, by name: rows of reducers at every budget, others as they are."""
    arms = []
    for row in rows:
        if row.reducer in (None, PIXEL):
            arms.append(Arm(row.name, row))
        else:
            arms += [Arm(f"{row.name}@{number}", row, visual_tokens=number) for number in sorted(config["budgets"])]
            arms += [Arm(f"{row.name} at price {price:g}", row, price=price) for price in sorted(config.get("prices") or [])]
    return {arm.name: arm for arm in arms}


def compare(config: dict[str, Any], out: Path, on_set: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Train what is not trained yet, evaluate what is not evaluated yet, and write table, curves and manifest into `out`.

    Returns what [`run_suite`] does. Settings that differ between rows are refused, and answers made with another `eval`.
    """
    rows = check(config)
    arms = arms_of(config, rows)
    generation = Generation(**config["eval"].get("generation") or {})
    own = {name: replace(generation, visual_tokens=arm.visual_tokens, price=arm.price) for name, arm in arms.items()}
    fields = {**config["eval"], "models": list(arms), "generation": generation, "generations": own}
    suite = Suite(**fields, out=str(out / "evaluation"))
    lines = {row: parse(training_arguments(config, row, out)) for row in rows}
    for name in suite.data:
        open_set(suite, name)  # to know before anything is trained
    models: dict[Row, tuple[Any, Any]] = {}  # the one that was used last
    for row, (model_args, data_args, args) in lines.items():
        folder = Path(args.output_dir or "")
        if (folder / ADAPTER).exists():
            check_settings(folder / RUN, settings_of(model_args, data_args, args, world_size=args.world_size))
            continue
        if last_checkpoint(folder) is not None:
            args.resume_from_checkpoint = "last"
        on_set(f"Training {row.name}")
        train(model_args, data_args, args)
    prices, count = sorted(config.get("prices") or []), config.get("scored", SCORED)
    weights = {row: out / row.name / "training" / ADAPTER for row in rows}
    state = process_state(pick_device(suite.device))
    with state.main_process_first():  # the others find what it has made
        for row in rows if prices else ():
            if row.reducer != PIXEL:
                weights[row] = train_by_loss(row, lines[row], prices, count, out)
    manifest = {row.name: json.loads((out / row.name / "training" / RUN).read_text()) for row in rows}
    check_equal(manifest)

    def load_model(source: str, device: str, dtype: str) -> tuple[Any, Any, str]:
        row, place = arms[source].row, pick_device(device)
        if row not in models:
            models.clear()
            model, processor = build_model(lines[row][0])
            if weights[row].parent.name == CONTROLLER:
                set_prices(model, prices)
            load_adapter_state(model, load_file(weights[row]))
            if dtype != "auto" or place.type == "cpu":  # as load_model has it
                model = model.to(torch.float32 if dtype == "auto" else getattr(torch, dtype))
            models[row] = model.to(place).eval(), processor
        return *models[row], source

    for name, arm in arms.items() if state.is_main_process else ():  # answers of weights that are not there any more
        answers, made = Path(suite.out) / slug(name), weights[arm.row].stat().st_mtime
        if answers.exists() and any(file.stat().st_mtime < made for file in answers.rglob("run.json")):
            shutil.rmtree(answers)
    state.wait_for_everyone()
    try:
        result = run_suite(suite, load_model, on_set=on_set)
    except OtherPredictions:
        raise GranulonError(
            f"{suite.out!r} holds answers that were made with another `eval`; remove that folder: what is trained stays."
        ) from None
    if result:  # the first of several processes writes
        write_text(out / "manifest.json", json.dumps({"config": config, "rows": manifest}, indent=1) + "\n")
        plot_losses([row.name for row in rows], out)
        if config.get("reducers"):
            by_row = {name: arm.row.name for name, arm in arms.items()}
            settings = {name: suite.generation_of(name).settings() for name in arms}
            stamps = {name: [weights[arm.row].stat().st_mtime_ns, settings[name]] for name, arm in arms.items()}
            costs = measure_costs(suite, by_row, stamps, load_model, out / "costs.json")
            write_curve(result, by_row, [name for name, arm in arms.items() if arm.price is not None], costs, out)
    return result


def train_by_loss(row: Row, line: Any, prices: Sequence[float], count: int, out: Path) -> Path:
    """Let the controller of a trained row choose budgets: score training questions at each, and train it at these prices.

    Leaves the scores, by which it goes on where it was stopped, and results; returns the row's weights with the controller,
    which are made anew where any of this has changed.
    """
    model_args, data_args, args = line
    folder, trained = out / row.name / CONTROLLER, out / row.name / "training" / ADAPTER
    made_of = {"prices": list(prices), "scored": count, "trained": trained.stat().st_mtime_ns}
    if (folder / ADAPTER).exists() and json.loads((folder / "results.json").read_text())["made_of"] == made_of:
        return folder / ADAPTER
    model, processor = build_model(model_args)
    load_adapter_state(model, load_file(trained))
    model.to(args.device).eval()
    samples = load_samples(data_args)
    count = min(count, len(samples))
    folder.mkdir(parents=True, exist_ok=True)
    scores = folder / f"scores-{made_of['trained']}.jsonl"  # which are those of these weights
    drawn = track((samples[i * len(samples) // count] for i in range(count)), f"{row.name} at every budget", count)
    scored = label_by_loss(model, processor, drawn, scores)
    questions = [
        ScoredQuestion(one["text"], one["losses"], one["tokens"], number % 5 == 0) for number, one in enumerate(scored)
    ]
    options = ControllerArguments(variant=row.variant, targets="loss", price=list(prices), labels=str(scores))
    results = train_controller(model.cpu(), processor, questions, options)
    save_adapter(folder, model)
    write_text(folder / "results.json", json.dumps({**results, "made_of": made_of}, indent=1) + "\n")
    return folder / ADAPTER


def check_equal(manifest: dict[str, dict[str, Any]]) -> None:
    """Raise GranulonError where rows were not trained with the same settings on the same data."""
    first, *others = manifest
    for name in others:
        a, b = manifest[first], manifest[name]
        settings = sorted((a["settings"].keys() | b["settings"].keys()) - OWN)
        different = [one for one in settings if a["settings"].get(one) != b["settings"].get(one)]
        different += [one for one in ("data", "versions") if a[one] != b[one]]
        if different:
            raise GranulonError(
                f"{first} and {name} were not trained alike: {', '.join(different)} differ. Remove the training folder of "
                "one, so that it is trained again."
            )


def plot_losses(names: Sequence[str], out: Path) -> None:
    """Draw the training losses of all rows into one picture."""
    figure = empty_figure(7, 4)
    axes = figure.subplots()
    for name in names:
        history = json.loads((out / name / "training" / "trainer_state.json").read_text())["log_history"]
        axes.plot("step", "loss", data=pd.DataFrame(history, columns=["step", "loss"]).dropna(), label=name)
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend(frameon=False)
    figure.savefig(out / "losses.png", dpi=120)
