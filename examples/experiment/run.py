"""The whole study in one command.

    python -m examples.experiment.run examples/experiment/quick.yaml --out study --pictures pictures
    python -m examples.experiment.run examples/experiment/full.yaml --out study --pictures pictures
    python -m examples.experiment.run examples/experiment/quick.yaml --out drawn --arms pixel,pixel+adaptive --seeds 0,1

Stages, each skipped where it is complete: language model, features, clusters, controller, runs (the first of a seed aligns the
projector that all of that seed begin with), timing, report. A killed study goes on
with the same command, at the last validation of each run. Runs are shared out to processes of one thread each.
"""

import argparse
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from granulon_hf.data.granuscenes.questions import LEVELS as QUESTION_LEVELS
from granulon_hf.errors import GranulonError
from granulon_hf.io import write_text
from granulon_hf.training.run import versions

from . import language_model
from .arms import ARMS, views_of
from .report import differing
from .report import write as write_report
from .timing import time_arms, timed
from .training import Run, Settings, Study, commit, read_json

# One thread a process, and memory that is kept: to give large buffers back and take them again costs as much as the layers.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="quick.yaml, full.yaml, or your own")
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--pictures", help="folder with objects/ and backgrounds/ (examples/fetch_pictures.sh); default: drawn")
    parser.add_argument("--arms", help="comma-separated, instead of the file's")
    parser.add_argument("--seeds", help="comma-separated, instead of the file's")
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1), help="processes of one thread each")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # ARM/SEED: one run, in this process
    return parser.parse_args(given)


def read_config(path: Path) -> dict[str, Any]:
    """The YAML file: `arms` (a list, or "all"), `seeds` (a list), `more_seeds` (a list for each of some arms), `settings`.

    Raises:
        GranulonError: it cannot be read, or holds a name that means nothing.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise GranulonError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or set(config) - {"arms", "seeds", "more_seeds", "settings"}:
        raise GranulonError(f"{path} must hold arms, seeds, settings and, if wanted, more_seeds.")
    known = {one.name for one in fields(Settings)}
    settings = config.get("settings") or {}
    if not isinstance(settings, dict):
        raise GranulonError(f"{path} has the settings {settings!r}; they are names with values.")
    if unknown := sorted(map(str, set(settings) - known)):
        raise GranulonError(f"{path} has the unknown setting {unknown[0]!r}; there are {', '.join(sorted(known))}.")
    return config


def whole_numbers(given: Any, what: str) -> list[int]:
    """
    Raises:
        GranulonError: anything but a list of seeds.
    """
    fits = isinstance(given, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in given)
    if not fits or not given or not all(0 <= one < 2**32 for one in given):
        raise GranulonError(f"{what} must be a list of whole numbers from 0 to 2**32 - 1; got {given!r}.")
    return given


def known_arms(given: Any, what: str) -> list[str]:
    """
    Raises:
        GranulonError: anything but names of arms.
    """
    if not isinstance(given, list) or not given:
        raise GranulonError(f"{what} must be a list of arms; got {given!r}.")
    if unknown := [name for name in given if not isinstance(name, str) or name not in ARMS]:
        raise GranulonError(f"{what}: there is no arm {unknown[0]!r}; the arms are {', '.join(ARMS)}.")
    for name in given:
        if whole := ARMS[name][1].get("view"):
            raise GranulonError(f"{what}: {name!r} is how {whole!r} is tested; name that.")
    return given


def jobs_of(config: dict[str, Any], args: argparse.Namespace) -> list[tuple[str, int]]:
    """(arm, seed) in the order of seeds, so that every arm has one run before any has two.

    Raises:
        GranulonError: an unknown arm, or a seed that is no number.
    """
    given = args.arms.split(",") if args.arms is not None else config.get("arms", "all")
    first = [name for name, (_, one) in ARMS.items() if "reducer" not in one]  # those of the first study
    arms = first if given in ("all", ["all"]) else known_arms(given, "arms")
    if args.seeds is not None:
        parts = args.seeds.split(",")
        common = whole_numbers([int(part) if part.strip().isdecimal() else part for part in parts], "--seeds")
        more = {}
    else:
        common, more = whole_numbers(config.get("seeds"), "seeds"), config.get("more_seeds") or {}
        if not isinstance(more, dict):
            raise GranulonError(f"more_seeds takes a list of seeds for each of its arms; got {more!r}.")
        if more:
            known_arms([*more], "more_seeds")
    seeds = {name: [*common, *(whole_numbers(more[name], f"more_seeds of {name}") if name in more else [])] for name in arms}
    rank = {name: i for i, name in enumerate(arms)}
    return sorted({(name, seed) for name in arms for seed in seeds[name]}, key=lambda job: (job[1], rank[job[0]]))


def timed_arms(jobs: list[tuple[str, int]]) -> list[str]:
    """The arms of the jobs, a nested one at each of its budgets."""
    names = dict.fromkeys(name for name, _ in jobs)
    fixed = ([view for view in views_of(name) if ARMS[view][1]["policy"] == "fixed"] or [name] for name in names)
    return [view for views in fixed for view in views]


def describe(study: Study, config: dict[str, Any], command: str, text: dict[str, Any]) -> None:
    scenes = study.scenes["train"]
    types = {kind: level for level, kinds in QUESTION_LEVELS.items() for kind in kinds}
    path = study.out / "experiment.json"
    made_by = read_json(path, "made_by")["made_by"] if path.exists() else []
    this = {"command": command, "versions": versions(), "commit": commit()}
    content = {
        "config": config,
        "made_by": [*(one for one in made_by if one != this), this],
        "pictures": "drawn" if study.pictures.drawn else study.pictures.digest,
        "language_model": {name: text[name] for name in ("name", "accuracy_by_form")},
        "chance": {kind: 1 / len(scenes.choices(kind)) for kind in types},
        "level_of_type": types,
    }
    write_text(path, json.dumps(content, indent=1) + "\n")


def start(args: argparse.Namespace, run: str, log: Path) -> subprocess.Popen:
    """This command for one part of the study, in a process of one thread."""
    options = [f"--{name}={value}" for name in ("pictures", "arms", "seeds") if (value := getattr(args, name)) is not None]
    line = [sys.executable, "-m", f"{__package__}.run", str(args.config), "--out", str(args.out), *options, "--run", run]
    with open(log, "a") as file:
        return subprocess.Popen(line, stdout=file, stderr=file, env={**os.environ, **ENVIRONMENT})


def wait_for(process: subprocess.Popen, log: Path, progress: Progress, total: int, look: Callable[[], tuple[str, int]]) -> None:
    """Show what a part of the study is at and how far it is, which `look` says.

    Raises:
        GranulonError: it failed.
    """
    task = progress.add_task(look()[0], total=total)
    while process.poll() is None:
        text, completed = look()
        progress.update(task, completed=completed, description=text)
        time.sleep(0.5)
    progress.remove_task(task)
    if process.returncode:
        raise GranulonError(f"A stage failed; {log} says why. The same command goes on.")


def prepared(study: Study, scenes: int) -> tuple[str, int]:
    index = study.out / "features" / "index.jsonl"
    known = index.read_bytes().count(b"\n") if index.exists() else 0
    clusters = len(list((study.out / "clusters").glob("*.bin")))
    return (f"clusters, {clusters} levels done" if known == scenes else "features"), known


def execute(study: Study, jobs: list[tuple[str, int]], args: argparse.Namespace, progress: Progress) -> list[str]:
    """Give the runs to the workers; names of those that failed."""
    steps = study.settings.max_steps
    waiting = [job for job in jobs if not Run(study, *job).done()]
    whole = progress.add_task("runs", total=len(jobs), completed=len(jobs) - len(waiting))
    active: dict[Any, tuple[Run, Any]] = {}
    failed = []
    try:
        while waiting or active:
            while waiting and len(active) < args.workers:
                name, seed = waiting.pop(0)
                run = Run(study, name, seed)
                run.folder.mkdir(parents=True, exist_ok=True)
                process = start(args, f"{name}/{seed}", run.folder / "log.txt")
                active[process] = (run, progress.add_task(f"{name} {seed}", total=steps))
            time.sleep(0.5)
            for process, (run, task) in list(active.items()):
                rows = run.read_history()
                if rows:
                    accuracy = rows[-1]["validation"]["accuracy"]
                    text = f"{run.name} {run.seed}, validation {accuracy:.3f}"
                    progress.update(task, completed=rows[-1]["step"], description=text)
                if process.poll() is not None:
                    progress.remove_task(task)
                    del active[process]
                    if process.returncode or not run.done():
                        failed.append(str(run.folder / "log.txt"))
                    else:
                        progress.advance(whole)
    finally:
        for process in active:
            process.terminate()
        for process in active:
            process.wait()
    return failed


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    config = read_config(args.config)
    jobs = jobs_of(config, args)
    if args.pictures == "":
        raise GranulonError("--pictures is empty; name a folder, or leave it out for drawn pictures.")
    if args.workers < 1:
        raise GranulonError(f"--workers {args.workers}: it takes one or more processes.")
    settings = Settings(**(config.get("settings") or {}))
    study = Study(args.out, settings, args.pictures)
    if args.run == "prepare":
        torch.set_num_threads(1)
        with open(args.out / ".prepare.lock", "w") as lock, Progress(disable=True) as progress:
            fcntl.flock(lock, fcntl.LOCK_EX)  # that of a study that was killed may still be at it
            study.fill_features()
            study.fill_aggregates([*dict.fromkeys(name for name, _ in jobs), "pixel+adaptive"], progress)
        return
    if args.run == "timing":
        torch.set_num_threads(1)
        time_arms(study, timed_arms(jobs))
        return
    if args.run:
        torch.set_num_threads(1)
        name, _, seed = args.run.rpartition("/")
        Run(study, name, int(seed))()
        return
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GranulonError(f"--out {str(args.out)!r} cannot be made: {error.strerror}.") from None
    with open(args.out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GranulonError(f"Another process is at the study in {str(args.out)!r}; wait for it, or end it.") from None
        command = "python -m examples.experiment.run " + shlex.join(sys.argv[1:] if given is None else given)
        conduct(study, config, args, jobs, command)
    print(write_report(args.out))


def conduct(study: Study, config: dict[str, Any], args: argparse.Namespace, jobs: list[tuple[str, int]], command: str) -> None:
    """All stages but the report.

    Raises:
        GranulonError: the folder holds another study, or something failed.
    """
    settings = study.settings
    shared = {"settings": json.loads(json.dumps(asdict(settings))), **study.source()}
    path = args.out / "settings.json"
    flat = {**shared["settings"], **{name: value for name, value in shared.items() if name != "settings"}}
    known = [(read_json(path), shared)] if path.exists() else []
    manifests = sorted(args.out.glob("runs/*/*/manifest.json"))  # the archive of a study has nothing else that tells
    for before, now in (*known, *((read_json(one, "settings")["settings"], flat) for one in manifests)):
        if what := differing(before, now):
            raise GranulonError(f"{str(args.out)!r} holds another study: {what} differ; name another --out.")
    write_text(path, json.dumps(shared, indent=1) + "\n")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        torch.set_num_threads(1)
        preparing = start(args, "prepare", args.out / "prepare.log")  # beside the language model, which needs no picture
        text: dict[str, Any] = {"name": "SmolLM2-135M-Instruct", "accuracy_by_form": {}}
        try:
            if settings.language_model.get("name") != "smollm2":
                text = language_model.train(args.out / "language_model", study.pictures, study.text_settings(), progress)
            scenes = sum(map(len, study.scenes.values()))
            wait_for(preparing, args.out / "prepare.log", progress, scenes, lambda: prepared(study, scenes))
        finally:
            preparing.terminate()
        study.train_controller()
        describe(study, config, command, text)
        if failed := execute(study, jobs, args, progress):
            raise GranulonError(
                f"{len(failed)} runs failed; the first says why in {failed[0]}. The same command tries them again."
            )
        timing = start(args, "timing", args.out / "timing.log")  # when no run is beside it
        arms = set(timed_arms(jobs))
        try:
            wait_for(timing, args.out / "timing.log", progress, len(arms), lambda: ("timing", len(arms & timed(study).keys())))
        finally:
            timing.terminate()


if __name__ == "__main__":
    try:
        main()
    except (GranulonError, ValueError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command goes on.")
