"""Checkpoints that are whole or not there, and runs that go on as the same run."""

import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.utils import logging

from granulon_hf.errors import GranulonError
from granulon_hf.io import existing
from granulon_hf.modeling.adapter_granulon import ADAPTER_WEIGHTS

logger = logging.get_logger(__name__)
ADAPTER, RUN = ADAPTER_WEIGHTS, "run.json"
UNFINISHED = ".unfinished"
# What may differ between a run and its continuation; everything else would make another run of it.
FREE = tuple(
    "logging save_total_limit save_full dataloader_num_workers report_to run_name project trackio disable_tqdm log_".split()
)
CHOSEN = ("batching", "max_tokens_per_batch")  # by the run itself where nobody says


def is_whole(checkpoint: Path) -> bool:
    """Say whether the files of a checkpoint can be opened; one that a full disk or another program has cut off cannot."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        for file in checkpoint.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                opened.keys()
        pickles = [file for ending in ("*.pt", "*.pth") for file in checkpoint.rglob(ending)]
        # Weights, optimizer, random states, schedule: each in one of its forms.
        parts = "*.safetensors pytorch_model*", "optimizer* global_step*", "rng_state*", "scheduler.pt global_step*"
        present = all(any(any(checkpoint.glob(name)) for name in part.split()) for part in parts)
        return present and all(zipfile.is_zipfile(file) for file in pickles)
    except Exception:  # whatever the readers raise
        return False


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Return the folders `checkpoint-N`, the latest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def last_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """Return the latest checkpoint that is whole; those that are not are skipped with a warning."""
    for path in checkpoints(output_dir):
        if is_whole(path):
            return path
        logger.warning(f"{path} is incomplete or damaged and is skipped.")
    return None


def remove_unfinished(output_dir: str | os.PathLike) -> None:
    """Remove what a killed run was writing."""
    unfinished = Path(output_dir) / UNFINISHED
    if unfinished.exists():
        logger.warning(f"{unfinished} is a checkpoint that was not finished; it is removed.")
        shutil.rmtree(unfinished, ignore_errors=True)


def settings_of(*groups: Any, **more: Any) -> dict[str, Any]:
    """Return what makes a run the run it is, as plain values."""
    settings: dict[str, Any] = {}
    for group in groups:
        values = group.to_dict() if hasattr(group, "to_dict") else vars(group)
        settings |= {name: value for name, value in values.items() if not callable(value)}
    local = ("output_dir", "local_rank", "resume_from_checkpoint", "logging_dir", "ddp_backend", "auto_precision")
    settings = {name: value for name, value in settings.items() if name not in local} | more
    if cache := settings.get("feature_cache"):  # the same features, wherever they are
        settings["feature_cache"] = os.path.basename(os.path.normpath(cache))
    return json.loads(json.dumps(settings, default=str, sort_keys=True))


def check_settings(path: Path, settings: dict[str, Any], data: Any = None) -> None:
    """Refuse to go on with other settings, or on other data."""
    if not path.exists():
        return
    written = json.loads(path.read_text())
    before = written["settings"]
    differing = [name for name in sorted(before) if name in settings and before[name] != settings[name]]
    differing = [name for name in differing if name not in CHOSEN or settings[name] is not None]
    changed = [f"{name} was {before[name]!r} and is {settings[name]!r}" for name in differing if not name.startswith(FREE)]
    if data is not None and "data" in written and written["data"] != json.loads(json.dumps(data, default=str)):
        changed.append("the data are not the same files or rows")
    if changed:
        raise GranulonError(
            f"The run in {str(path.parent)!r} has other settings: {'; '.join(changed)}. Go on with the same settings, or "
            "start a new run with another --output_dir."
        )


def check_output_dir(output_dir: str) -> None:
    """Refuse a place where no folder can be made or written."""
    place = existing(Path(output_dir))
    if not place.is_dir():
        raise GranulonError(f"--output_dir {output_dir!r} cannot be used: {str(place)!r} is a file; it takes a folder.")
    if not os.access(place, os.W_OK):
        raise GranulonError(f"--output_dir {output_dir!r} cannot be written; name another.")


def check_unused(output_dir: str) -> None:
    """Refuse to overwrite what an earlier run left."""
    folder = Path(output_dir)
    if held := [*folder.glob(ADAPTER), *folder.glob("model*.safetensors*"), *checkpoints(folder)]:
        raise GranulonError(f"--output_dir {output_dir!r} already holds {held[0].name}; name another, or remove that one.")


def find_resume(resume: str | None, output_dir: str) -> str | None:
    """Return the checkpoint to go on from: `resume`, or for "last" the latest whole one of `output_dir`, if there is one yet.

    Raises:
        GranulonError: that checkpoint cannot be used; none is asked for, and the folder holds a run; or there is none to go on
            from, and the folder holds weights or damaged checkpoints.
    """
    check_output_dir(output_dir)
    if resume is None and checkpoints(output_dir):
        raise GranulonError(
            f"{output_dir!r} already holds a run; say --resume_from_checkpoint last to go on, or another --output_dir."
        )
    if resume is not None and resume.lower() not in ("last", "true"):
        if not is_whole(Path(resume)):
            raise GranulonError(f"{resume!r} is no whole checkpoint; say --resume_from_checkpoint last for the latest that is.")
        return resume
    if resume is not None and (found := last_checkpoint(output_dir)):
        return str(found)
    if damaged := checkpoints(output_dir):
        raise GranulonError(
            f"No checkpoint in {output_dir!r} is whole ({', '.join(path.name for path in damaged)}): there is nothing to go on "
            "from. Name another --output_dir, or remove them to start again."
        )
    check_unused(output_dir)
    return None
