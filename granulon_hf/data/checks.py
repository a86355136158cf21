"""`check`: what is wrong with a prepared folder, and how long its texts are."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from granulon_hf.data import prepared
from granulon_hf.data.adapter import DataError
from granulon_hf.data.loading import Problem, Samples, load
from granulon_hf.data.sample import Sample
from granulon_hf.data.sources import open_source, splits_of
from granulon_hf.modeling.images_granulon import open_rgb

ELSEWHERE = "the other folder"
TINY = 8  # pixels: smaller than one patch of any vision tower


@dataclass
class Report:
    """What [`check`] found.

    Attributes:
        samples (`dict[str, int]`): usable samples by split.
        errors (`list[Problem]`): broken images, empty answers, repeated ids, images in both training and test, missing rows.
        warnings (`list[Problem]`): what is odd but can be used.
        lengths (`dict[str, list[int]]`): of every question and answer (words, or tokens) and image (longer side, pixels).
        unit (`str`): "words" or "tokens".
    """

    unit: str = "words"
    samples: dict[str, int] = field(default_factory=dict)
    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    lengths: dict[str, list[int]] = field(default_factory=lambda: {"question": [], "answer": [], "image": []})

    @property
    def statistics(self) -> dict[str, dict[str, float]]:
        names = {"min": 0, "median": 50, "p95": 95, "max": 100}
        result = {}
        for what, values in self.lengths.items():
            if values:
                result[what] = {name: float(np.percentile(values, q)) for name, q in names.items()} | {
                    "mean": float(np.mean(values))
                }
        return result


def open_splits(folder: str | Path) -> Iterator[Samples]:
    """Every split of a prepared folder, unverified.

    Raises:
        DataError: it is none.
    """
    if not Path(folder).expanduser().is_dir():
        raise DataError(f"There is no folder {str(folder)!r}.")
    prepared.missing_shards(Path(folder).expanduser())
    splits: list[str | None] = [*splits_of(open_source(folder))]
    for split in splits or [None]:
        yield load(folder, split=split, verify="none")


def hash_pixels(image) -> bytes:
    """Of the decoded RGB pixels: two files of one picture, losslessly stored in two formats, are the same."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()


def check(
    folder: str | Path,
    against: str | Path | None = None,
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read every sample and decode every image of a prepared folder.

    Args:
        against (*optional*): another prepared folder that must share no image with it, such as the test set. The splits of one
            folder are held against each other anyway.
        tokenizer (*optional*): measures lengths in its tokens instead of words.
        progress (`Callable`, *optional*): called with samples done and samples in all.

    Raises:
        DataError: this is no prepared folder.
    """
    report = Report(unit="tokens" if tokenizer is not None else "words")

    def measure(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"]) if tokenizer is not None else len(text.split())

    own, others = list(open_splits(folder)), list(open_splits(against)) if against is not None else []
    total, done = sum(map(len, own + others)), 0
    seen: dict[bytes, tuple[str, str]] = {}
    for i, samples in enumerate(own + others):
        mine = i < len(own)
        label = samples.split if mine else ELSEWHERE
        for part, row, sample in samples.walk():
            done += 1
            if progress is not None:
                progress(done, total)
            if sample is None:
                continue
            place = Problem(part if mine else f"{against}/{part}", row, "")
            if mine:
                report.samples[label] = report.samples.get(label, 0) + 1
                report.lengths["question"].append(measure(sample.question))
                report.lengths["answer"].append(measure(sample.reference))
            _check_images(report, sample, place, label, seen)
        if mine:
            report.samples.setdefault(label, 0)
            report.errors += samples.problems + samples.renamed
    _check_manifest(report, Path(folder).expanduser(), sum(map(len, own)))
    return report


def _check_images(report, sample: Sample, place: Problem, label: str, seen: dict[bytes, tuple[str, str]]) -> None:
    mine = label != ELSEWHERE
    for encoded in sample.images:
        try:
            picture = open_rgb(encoded)
        except ValueError as error:
            if mine:
                report.errors.append(Problem(place.file, place.row, str(error)))
            continue
        if mine:
            report.lengths["image"].append(max(picture.size))
            if min(picture.size) < TINY:
                report.warnings.append(
                    Problem(place.file, place.row, f"the image is only {picture.width} x {picture.height} pixels")
                )
        digest = hash_pixels(picture)
        split, where = seen.setdefault(digest, (label, f"{place.file}, row {place.row}"))
        if split != label:
            report.errors.append(Problem(place.file, place.row, f"the image is also in {split} ({where})"))


def _check_manifest(report: Report, folder: Path, rows: int) -> None:
    path = folder / "manifest.json"
    try:
        done = json.loads(path.read_text(encoding="utf-8"))["prepared"]
    except (OSError, ValueError, KeyError, TypeError):
        report.warnings.append(Problem("manifest.json", 0, "there is none that can be read"))
        return
    if not done["complete"]:
        report.errors.append(Problem("manifest.json", 0, "the preparation was interrupted; run granulon data prepare again"))
    elif rows != done["samples"]:
        report.errors.append(Problem("manifest.json", 0, f"there are {rows} rows instead of {done['samples']}"))
