"""`check`: find what is wrong with a prepared folder, and measure its texts."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from granulon_hf.data.loading import load
from granulon_hf.data.opening import open_source
from granulon_hf.data.prepared import format as prepared
from granulon_hf.data.sample import Sample
from granulon_hf.data.samples import Problem, Progress, Samples, none_usable
from granulon_hf.errors import GranulonError
from granulon_hf.modeling.images_granulon import open_rgb

ELSEWHERE = "the other folder"
TINY = 8  # pixels: smaller than one patch of any vision tower


@dataclass
class Report:
    """What [`check`] found."""

    unit: str = "words"  # or "tokens"
    samples: dict[str, int] = field(default_factory=dict)  # usable ones by split
    # Broken images, empty answers, repeated ids, missing rows, duplicates within a split, what is in both training and test.
    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)  # what is odd but can be used
    # Of every question and answer (in units) and image (longer side, pixels).
    lengths: dict[str, list[int]] = field(default_factory=lambda: {"question": [], "answer": [], "image": []})

    @property
    def statistics(self) -> dict[str, dict[str, float]]:
        """Statistics of every kind of length that was met."""
        result = {}
        for what, values in self.lengths.items():
            if values:
                low, median, p95, high = np.percentile(values, (0, 50, 95, 100)).tolist()
                result[what] = {"min": low, "median": median, "mean": float(np.mean(values)), "p95": p95, "max": high}
        return result


def open_splits(folder: str | Path) -> Iterator[Samples]:
    """Load every split of a prepared folder, unverified."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise GranulonError(f"{str(folder)!r} is no folder; `granulon data prepare` writes what is checked and shown here.")
    prepared.missing_shards(path)
    splits: list[str | None] = [*open_source(path).splits]
    for split in splits or [None]:
        yield load(folder, split=split, verify="none")


def check(
    folder: str | Path, against: str | Path | None = None, tokenizer: Any = None, progress: Progress | None = None
) -> Report:
    """Read every sample and decode every image of a prepared folder.

    Args:
        against (*optional*): another prepared folder that must share no image with it, such as the test set; neither may the
            splits of one folder.
        tokenizer (*optional*): measures lengths in its tokens instead of words.
        progress (`Callable`, *optional*): called with samples done and samples in all.

    Raises:
        GranulonError: this is no prepared folder, or nothing in it can be used.
    """
    report = Report(unit="words" if tokenizer is None else "tokens")

    def measure(text: str) -> int:
        return len(text.split() if tokenizer is None else tokenizer(text, add_special_tokens=False)["input_ids"])

    own = list(open_splits(folder))
    others = [] if against is None else list(open_splits(against))
    rows = sum(map(len, own))
    total = rows + sum(map(len, others))
    done = 0
    seen: dict[bytes, tuple[str, str]] = {}
    for samples in own + others:
        mine = samples not in others
        label = samples.split if mine else ELSEWHERE
        # Of the other folder nothing but what it shares is reported.
        about = report if mine else Report()
        about.samples[label] = 0
        for part, row, sample in samples.walk():
            done += 1
            if progress is not None:
                progress(done, total)
            if sample is not None:
                about.samples[label] += 1
                about.lengths["question"].append(measure(sample.question))
                about.lengths["answer"].append(measure(sample.reference))
                place = Problem(part if mine else f"{against}/{part}", row, "")
                check_sample(sample, place, label, seen, about, report)
        about.errors += samples.problems + samples.renamed
        if not about.samples[label]:
            about.errors.append(Problem(f"split {label}", None, "not one sample can be used"))
    if not any(report.samples.values()):
        raise none_usable(str(folder), rows, (problem.reason for samples in own for problem in samples.problems))
    check_manifest(report, Path(folder).expanduser(), rows)
    return report


def check_sample(
    sample: Sample, place: Problem, label: str, seen: dict[bytes, tuple[str, str]], about: Report, report: Report
) -> None:
    """Look at a sample, and whether another split has one of its images, or its own split all of it."""
    digests = []
    for encoded in sample.images:
        try:
            picture = open_rgb(encoded)
        except ValueError as error:
            about.errors.append(place._replace(reason=str(error)))
            continue
        # Of the decoded pixels: two files of one picture, losslessly stored in two formats, are the same.
        digests.append(hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).digest())
        about.lengths["image"].append(max(picture.size))
        if min(picture.size) < TINY:
            about.warnings.append(place._replace(reason=f"the image is only {picture.width} x {picture.height} pixels"))
    turns = json.dumps([[message["role"], message["content"]] for message in sample.messages]).encode()
    whole = hashlib.sha256(b"".join(digests) + turns).digest()
    here = (label, f"{place.file}, row {place.row}")
    for digest in digests if sample.images else [whole]:
        split, where = seen.setdefault(digest, here)
        if split != label:
            what = "image" if sample.images else "text"
            report.errors.append(place._replace(reason=f"the {what} is also in {split} ({where})"))
    first = seen.setdefault(label.encode() + whole, here) if len(digests) == len(sample.images) else here
    if first != here:
        reason = f"it is a duplicate: {first[1]}, has the same images, questions and answers"
        about.errors.append(place._replace(reason=reason))


def check_manifest(report: Report, folder: Path, rows: int) -> None:
    """Compare the manifest with what is there."""
    try:
        done = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["prepared"]
        samples = done["samples"] if done["complete"] else None
    except (OSError, ValueError, KeyError, TypeError):
        report.warnings.append(Problem("manifest.json", None, "there is none that can be read"))
        return
    if rows != samples:
        interrupted = "the preparation was interrupted; run granulon data prepare again"
        reason = interrupted if samples is None else f"there are {rows} rows instead of {samples}"
        report.errors.append(Problem("manifest.json", None, reason))
