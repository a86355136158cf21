"""The samples that models are evaluated and analyzed on, and what loading left out of them."""

from contextlib import suppress
from typing import Any

from granulon_hf.data import load
from granulon_hf.data.datasets.base import NoHoldout
from granulon_hf.data.datasets.llava import is_chat
from granulon_hf.data.datasets.shapes import Shapes
from granulon_hf.data.loading import ADAPTERS, Samples, tell_reasons
from granulon_hf.errors import GranulonError

HELD_OUT = 1000  # drawn scenes have seeds from here on; training draws its own with smaller ones


def open_samples(name: str, *, drawn: int, seed: int = 0, limit: int | None = None, **options: Any) -> Samples | Shapes:
    """Open a set by its name; what is drawn is held out, as nothing that is trained on may be evaluated on.

    Args:
        name (`str`): of [`~granulon_hf.data.load`], a file of LLaVA's conversations or a folder with a `chat.json`, or
            "shapes", which is drawn: there is no end of its scenes, so that without a limit `drawn` says how many.
        options: further arguments of `load`, None for a default. Drawn scenes have none of them. The default split is one
            that training does not see, where the set has one.
    """
    if seed < 0:
        raise GranulonError(f"The seed must be 0 or more; got {seed}.")
    if name == "shapes":
        if given := [key for key, value in options.items() if value is not None]:
            raise GranulonError(f"Drawn shapes have no {' and no '.join(given)}.")
        return Shapes(limit or drawn, seed=HELD_OUT + seed)
    known = {key: value for key, value in options.items() if value is not None}
    wanted = ADAPTERS[name].eval_split if name in ADAPTERS and "split" not in known else None
    try:
        if is_chat(name):
            return load("llava", seed=seed, limit=limit, **({"source": name} | known))
        if wanted is not None:
            with suppress(NoHoldout):  # then training has none either
                return load(name, seed=seed, limit=limit, split=wanted, **known)
        return load(name, seed=seed, limit=limit, **known)
    except (GranulonError, OSError) as error:
        raise GranulonError(f"The data {name!r} cannot be used: {' '.join(str(error).split())}") from error


def no_sample(name: str, samples: Samples | Shapes) -> ValueError:
    """What to say of a set that was gone through without finding any."""
    return ValueError(f"Nothing of the data {name!r} can be used: {describe_set(0, left_out(samples))}.")


def left_out(samples: Samples | Shapes) -> dict[str, Any]:
    """What is missing from a set that has been gone through.

    Returns:
        `dict`: `rows`, those that cannot be used (file, row from 0, reason); `files` that cannot be read (file, reason);
        `filtered`, by reason the number of rows of the files that were looked at which are no part of the set.
    """
    if isinstance(samples, Shapes):
        return {"rows": [], "files": [], "filtered": {}}
    return {
        "rows": [{"file": problem.file, "row": problem.row, "reason": problem.reason} for problem in samples.bad_rows],
        "files": [{"file": problem.file, "reason": problem.reason} for problem in samples.unreadable],
        "filtered": dict(samples.filtered),
    }


def describe_set(count: int, left: dict[str, Any]) -> str:
    """`297 samples, 3 left out: …`, on one line."""
    text = f"{count} samples, {len(left['rows'])} left out"
    parts = []
    if left["rows"]:
        text += f": {tell_reasons(row['reason'] for row in left['rows'])}"
    if left["files"]:
        first = left["files"][0]
        parts.append(f"{len(left['files'])} files cannot be read, such as {first['file']} ({first['reason'].rstrip('.')})")
    if left["filtered"]:
        parts.append("no part of the set: " + ", ".join(f"{reason} ({times})" for reason, times in left["filtered"].items()))
    return " ".join("; ".join([text, *parts]).split())
