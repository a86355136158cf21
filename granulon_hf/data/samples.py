"""`Samples`: chosen rows of a source as samples, made when they are asked for."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from granulon_hf.data import pictures
from granulon_hf.data.datasets.base import Adapter, BadRow, has_lone_surrogate, one_line, plain
from granulon_hf.data.prepared import format as prepared
from granulon_hf.data.readers import Source, StreamSource
from granulon_hf.data.sample import Sample
from granulon_hf.errors import GranulonError
from granulon_hf.io import write_text

NAMED_ROWS = 1_000_000  # of more, the ids are neither looked through for repetitions nor written into manifests
REASONS = 3  # that are told of many
Progress = Callable[[int, int], None]  # takes what is done, and all that there is to do


class Problem(NamedTuple):
    """Something wrong with a row: its file, its number (from 0; `None` for the whole file) and the reason."""

    file: str
    row: int | None
    reason: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.row is None else f', row {self.row}'}: {self.reason}"


def tell_reasons(reasons: Iterable[str]) -> str:
    """Return the commonest reasons and how often each is met, on one line."""
    counts = Counter(reasons).most_common()
    told = [f"{reason} ({times})" for reason, times in counts[:REASONS]]
    rest = sum(times for _, times in counts[REASONS:])
    return ", ".join(told + [f"other reasons ({rest})"] * bool(rest))


def none_usable(location: str, rows: int, reasons: Iterable[str]) -> GranulonError:
    """Return the error for rows of which not one can be used."""
    return GranulonError(f"Not one of the {rows} rows of {location!r} can be used: {tell_reasons(reasons)}.")


class Samples(Sequence[Sample]):
    """The samples of chosen rows, made when they are asked for; what [`load`] returns.

    Iterating goes through the files in order and reads each row group once: shuffle when training. Samples of local files can
    be indexed too, which reads a row group: this is quick in prepared folders, whose groups are small. Bad rows are skipped:
    iterating leaves them out, so that `len`, the number of chosen rows, may be larger; an index gives the next good sample
    instead, so that no epoch ends in the middle. `on_error="raise"` refuses them.

    Attributes:
        adapter ([`Adapter`]): how rows become samples.
        split (`str`): as asked for.
        problems (`list[Problem]`): files that cannot be read, and bad rows met so far, in this process, each once.
        renamed (`list[Problem]`): rows whose id was another row's too, and which therefore got a new one.
        filtered (`Counter`): rows that were filtered out, by reason.
    """

    def __init__(self, adapter, source, split, rows, *, on_error="skip", verify=None, description=None, filtered=None):
        self.adapter: Adapter = adapter
        self.split: str = split
        self.source: Source = source
        self.filtered: Counter[str] = Counter(filtered)
        self._rows: dict[str, np.ndarray | range] = rows
        self._on_error = on_error
        self._verify = verify or adapter.verify
        self._description: dict[str, Any] = description or {}
        self._problems: dict[tuple[str, int], Problem] = {}
        self._given_names: dict[tuple[str, int], tuple[str, str]] | None = None
        self._fingerprints = {part: source.fingerprint(part) for part in rows}  # also what `datasets` caches by
        self._ends = np.cumsum([len(numbers) for numbers in rows.values()])
        self._columns: dict[str, list[str]] = {}

    def __getstate__(self):
        # What follows from the rest is left out: it would only make `datasets` believe that something has changed.
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_names", "ids")}
        return kept | {"_problems": {}, "_columns": {}}

    @property
    def _endless(self) -> bool:
        return any(isinstance(numbers, range) and numbers.stop == sys.maxsize for numbers in self._rows.values())

    def __len__(self) -> int:
        if self._endless:
            raise TypeError("A stream has no length.")
        return sum(map(len, self._rows.values()))

    def __repr__(self) -> str:
        rows = "unknown" if self._endless else len(self)
        return f"Samples({self.adapter.name!r}, split={self.split!r}, rows={rows}, source={self.source.location!r})"

    def __iter__(self) -> Iterator[Sample]:
        for _, _, sample in self.walk():
            if sample is not None:
                yield sample

    def __getitem__(self, index):
        if isinstance(index, slice) and not isinstance(self.source, StreamSource):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise GranulonError(f"A slice of samples takes every row; got a step of {step}.")
            return self.slice(start, stop)
        if self.source.remote:
            advice = "iterate, or `granulon data prepare` it first"
            raise GranulonError(f"{self.source.location!r} is streamed and has no random access: {advice}.")
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} samples")
        for step in range(len(self)):
            position = (int(index) + step) % len(self)
            number = int(np.searchsorted(self._ends, position, side="right"))
            part, numbers = list(self._rows.items())[number]
            row = int(numbers[position - self._ends[number]])  # counted from the end
            if (part, row) not in self._problems and (sample := next(self._read(part, [row]))[2]) is not None:
                return sample
        raise none_usable(self.source.location, len(self), (problem.reason for problem in self.problems))

    @property
    def problems(self) -> list[Problem]:
        return self.unreadable + self.bad_rows

    @property
    def unreadable(self) -> list[Problem]:
        return [Problem(part, None, reason) for part, reason in self.source.broken.items()]

    @property
    def bad_rows(self) -> list[Problem]:
        return list(self._problems.values())

    @property
    def renamed(self) -> list[Problem]:
        return [
            Problem(*self.source.where(part, row), f"the id {old!r} is another row's too; here it is {new!r}")
            for (part, row), (old, new) in self._names.items()
        ]

    def walk(self) -> Iterator[tuple[str, int, Sample | None]]:
        """Give part, number and sample of every chosen row; `None` for a bad row, which is then among the problems."""
        for part, numbers in self._rows.items():
            yield from self._read(part, numbers)

    def slice(self, start: int, stop: int) -> "Samples":
        """Take the chosen rows from `start` up to `stop`, with the same ids."""
        rows, first = {}, 0
        for part, numbers in self._rows.items():
            if len(taken := numbers[max(0, start - first) : max(0, stop - first)]):
                rows[part] = taken
            first += len(numbers)
        places = ((part, int(number)) for part, numbers in rows.items() for number in numbers)
        piece = copy(self)
        piece._rows = rows
        piece._ends = np.cumsum([len(numbers) for numbers in rows.values()])
        piece._given_names = {place: self._names[place] for place in places if place in self._names}
        return piece

    def _read(self, part, numbers) -> Iterator[tuple[str, int, Sample | None]]:
        wanted = numbers if isinstance(numbers, range) else [int(number) for number in numbers]
        if part not in self._columns:
            known = "|".join([*self.adapter.columns, *self.adapter.optional]).split("|")
            self._columns[part] = [name for name in self.source.columns(part) if name in known]
        for number, row in self.source.rows(part, wanted, self._columns[part]):
            sample = None
            try:
                sample = self._make(part, number, row)
            except Exception as error:  # a value of a type that nobody thought of must not end an epoch
                foreseen = isinstance(error, BadRow)
                reason = str(error) if foreseen else f"the row is not as it should be ({type(error).__name__}: {error})"
                reason = reason.encode("utf-8", "backslashreplace").decode()  # it may cite what is no text
                problem = Problem(*self.source.where(part, number), reason)
                if self._on_error == "raise":
                    raise GranulonError(f"Bad row in {self.source.location!r}: {problem}.") from None
                self._problems[part, number] = problem
            yield part, number, sample

    def _make(self, part: str, number: int, row: dict[str, Any] | Exception) -> Sample:
        if isinstance(row, Exception):
            raise BadRow(f"the row cannot be read ({one_line(row)})")
        sample = self.adapter.to_sample(row)
        paths = [image["path"] or "" for image in sample.images]
        if has_lone_surrogate("".join([*paths, json.dumps(sample.meta, ensure_ascii=False, default=str)])):
            raise BadRow("the path of an image or the meta holds a lone surrogate")
        sample.images = [pictures.locate(image, self.source.roots) for image in sample.images]
        if self._verify != "none":
            for image in sample.images:
                pictures.verify(image, decode=self._verify == "decode")
        file, line = self.source.where(part, number)
        sample.meta = {"file": file, "row": line} | sample.meta
        if (part, number) in self._names:
            sample.id = self._names[part, number][1]
        sample.id = sample.id or f"{Path(file).with_suffix('').as_posix()}-{line}"
        return sample

    @cached_property
    def ids(self) -> dict[str, list[str]] | None:
        """What the rows call themselves, by part; `None` where they have no names, or are more than a million."""
        column = self.adapter.id_column
        if not column or isinstance(self.source, StreamSource) or len(self) > NAMED_ROWS:
            return None
        if not any(column in self.source.columns(part) for part in self._rows):
            return None
        values = self.source.gather(lambda part: self.source.column(part, column), self._rows)
        return {part: [name_of(values[part][number]) for number in numbers] for part, numbers in self._rows.items()}

    @cached_property
    def _names(self) -> dict[tuple[str, int], tuple[str, str]]:
        """Old and new id by part and row, for every repetition of an id."""
        if self._given_names is not None or self.ids is None:
            return self._given_names or {}
        taken = {name for names in self.ids.values() for name in names}
        result, met = {}, Counter[str]()
        for part, names in self.ids.items():
            for row, old in zip(self._rows[part], names, strict=True):
                met[old] += 1
                if old and met[old] > 1:
                    new = f"{old}#{met[old]}"
                    while new in taken:
                        new += "'"
                    result[part, int(row)] = (old, new)
        return result

    @property
    def manifest(self) -> dict[str, Any]:
        """What is needed to load the very same subset again: where from, which commit, which rows and their ids."""
        files = {}
        for part, numbers in self._rows.items():
            count = self.source.count(part)
            files[part] = {
                "rows": count,
                "fingerprint": self._fingerprints[part],
                "take": [int(number) for number in numbers] if len(numbers) < count else "all",
                "ids": self.ids[part] if self.ids is not None else None,
            }
        remarks = {"filtered": dict(self.filtered), "unreadable": dict(self.source.broken)}
        return {**self._description, **remarks, "files": files}

    def save_manifest(self, path: str | Path) -> None:
        """Write the manifest to a file, which `load(manifest=…)` takes."""
        write_text(Path(path), json.dumps(self.manifest, ensure_ascii=False) + "\n")

    def to_dataset(self):
        """Return a `datasets.Dataset` with the fields of [`Sample`] as columns (images decoded when looked at, `meta` as JSON).

        `datasets` caches it: bad rows are among `problems` only when it is made for the first time.
        """
        from datasets import Dataset

        return Dataset.from_generator(_rows_of, features=prepared.features(), gen_kwargs={"samples": self})


def name_of(value: Any) -> str:
    """Return a row's own name; none if it is no text, which makes it a bad row."""
    try:
        return plain(value, "id")
    except BadRow:
        return ""


def _rows_of(samples: Samples) -> Iterator[dict[str, Any]]:
    yield from map(prepared.to_row, samples)
