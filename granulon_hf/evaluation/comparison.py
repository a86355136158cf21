"""The fair comparison: encoders under one language model, each trained and evaluated with identical settings."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file

from granulon_hf.errors import GranulonError
from granulon_hf.evaluation.answer import Generation, OtherPredictions, process_state
from granulon_hf.evaluation.benchmark import Suite, open_set, run_suite
from granulon_hf.evaluation.tables import empty_figure
from granulon_hf.io import write_text
from granulon_hf.loading import pick_device
from granulon_hf.training.arguments import parse
from granulon_hf.training.checkpoints import ADAPTER, RUN, check_settings, last_checkpoint, settings_of
from granulon_hf.training.run import build_model, train
from granulon_hf.training.stages import load_adapter_state
from granulon_hf.variants import DECODERS, ENCODERS

# What differs between the rows of a fair comparison, and only that.
OWN = ("variant", "feature_cache", "adapter")  # the last is a trained controller


def training_arguments(config: dict[str, Any], variant: str, out: Path) -> list[str]:
    """The command line of one row."""
    arguments = {**(config.get("train") or {}), "variant": variant, "output_dir": str(out / variant / "training")}
    if config.get("controller") and has_levels(variant.partition("-")[0]):
        arguments["adapter"] = config["controller"]
    if arguments.pop("cache_features", False):
        arguments["feature_cache"] = str(out / variant / "features")
    return [part for name, value in arguments.items() for part in (f"--{name}", str(value))]


def has_levels(encoder: str) -> bool:
    return ENCODERS[encoder].config.get("granularity_levels") != []


def check(config: dict[str, Any]) -> list[str]:
    """Return the variants of a comparison; raise GranulonError where something is missing, unknown or fixed by it.

    It has `llm`, `encoders`, `train` (arguments of examples/train.py), `eval` (fields of [`Suite`]) and, if wanted,
    `controller` (a folder of examples/train_controller.py, for the rows that have levels).
    """
    llm, controller = config.get("llm"), config.get("controller")
    if llm not in DECODERS:
        raise GranulonError(f"`llm` must be one of {', '.join(DECODERS)}; got {'nothing' if llm is None else repr(llm)}.")
    mapping = (dict, "names with values")
    forms = {"encoders": (list, "a list of names"), "controller": (str, "a folder"), "train": mapping, "eval": mapping}
    for name, (kind, form) in forms.items():
        if not isinstance(config.get(name) or kind(), kind):
            raise GranulonError(f"`{name}` must be {form}; got {config[name]!r}.")
    encoders, training, evaluation = config.get("encoders") or [], config.get("train") or {}, config.get("eval") or {}
    if unknown := [name for name in encoders if name not in ENCODERS]:
        raise GranulonError(f"Unknown encoder {unknown[0]!r}; the encoders are {', '.join(ENCODERS)}.")
    if len(encoders) < 2 or len(set(encoders)) < len(encoders):
        raise GranulonError("A comparison needs at least two different encoders.")
    if controller and not os.path.exists(controller):
        raise GranulonError(f"`controller` names {controller!r}, which is not there; examples/train_controller.py makes one.")
    if controller and not any(map(has_levels, encoders)):
        raise GranulonError(f"`controller` is for encoders with levels, and {', '.join(encoders)} have none; leave it out.")
    for name in ("variant", "output_dir", "resume_from_checkpoint", "feature_cache"):
        if name in training:
            raise GranulonError(f"`{name}` is set by the comparison itself; leave it out of `train`.")
    fields = {field.name for field in dataclass_fields(Suite)} - {"models", "out"}
    if unknown := sorted(set(evaluation) - fields):
        raise GranulonError(f"`eval` has {unknown[0]!r}; its names are {', '.join(sorted(fields))}.")
    if not evaluation.get("data"):
        raise GranulonError("`eval` needs `data`: what to evaluate on.")
    return [f"{name}-{llm}" for name in encoders]


def compare(config: dict[str, Any], out: Path, on_set: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Train what is not trained yet, evaluate what is not evaluated yet, and write table, curves and manifest into `out`.

    Returns what [`run_suite`] does. Settings that differ between rows are refused, and answers made with another `eval`.
    """
    names = check(config)
    generation = Generation(**config["eval"].get("generation") or {})
    suite = Suite(**{**config["eval"], "models": names, "out": str(out / "evaluation"), "generation": generation})
    lines = {name: parse(training_arguments(config, name, out)) for name in names}
    for name in suite.data:
        open_set(suite, name)  # to know before anything is trained
    models: dict[str, tuple[Any, Any]] = {}
    for name, (model_args, data_args, args) in lines.items():
        folder = Path(args.output_dir or "")
        if (folder / ADAPTER).exists():
            check_settings(folder / RUN, settings_of(model_args, data_args, args, world_size=args.world_size))
            continue
        if last_checkpoint(folder) is not None:
            args.resume_from_checkpoint = "last"
        models[name] = train(model_args, data_args, args)
    manifest = {name: json.loads((out / name / "training" / RUN).read_text()) for name in names}
    check_equal(manifest)

    def load_model(source: str, device: str, dtype: str) -> tuple[Any, Any, str]:
        if source in models:
            model, processor = models.pop(source)
        else:
            model, processor = build_model(lines[source][0])
            load_adapter_state(model, load_file(out / source / "training" / ADAPTER))
        place = pick_device(device)
        if place.type == "cpu":  # as load_model has it
            model = model.float()
        return model.to(place).eval(), processor, source

    state = process_state(pick_device(suite.device))
    for name in names if state.is_main_process else ():  # answers of weights that are not there any more
        weights, answers = out / name / "training" / ADAPTER, Path(suite.out) / name
        if answers.exists() and any(file.stat().st_mtime < weights.stat().st_mtime for file in answers.rglob("run.json")):
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
        plot_curves(names, out)
    return result


def check_equal(manifest: dict[str, dict[str, Any]]) -> None:
    """Raise GranulonError where rows were not trained with the same settings on the same data."""
    first, *others = manifest
    for name in others:
        a, b = manifest[first], manifest[name]
        settings = sorted((a["settings"].keys() | b["settings"].keys()) - set(OWN))
        different = [one for one in settings if a["settings"].get(one) != b["settings"].get(one)]
        different += [one for one in ("data", "versions") if a[one] != b[one]]
        if different:
            raise GranulonError(
                f"{first} and {name} were not trained alike: {', '.join(different)} differ. Remove the training folder of "
                "one, so that it is trained again."
            )


def plot_curves(names: Sequence[str], out: Path) -> None:
    """Draw the training losses of all rows into one picture."""
    figure = empty_figure(7, 4)
    axes = figure.subplots()
    for name in names:
        if (checkpoint := last_checkpoint(out / name / "training")) is None:
            continue
        history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        axes.plot("step", "loss", data=pd.DataFrame(history, columns=["step", "loss"]).dropna(), label=name)
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend(frameon=False)
    figure.savefig(out / "losses.png", dpi=120)
