"""`load`: a data set, or a described subset of one, as samples."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from granulon_hf.data import pictures
from granulon_hf.data.datasets import a_okvqa, flux_reason, llava, recap, seed_bench
from granulon_hf.data.datasets import surgvlm as medical
from granulon_hf.data.datasets.base import Adapter, BadRow, broken_text, plain
from granulon_hf.data.datasets.custom import make_adapter
from granulon_hf.data.granuscenes import scenes as granuscenes
from granulon_hf.data.prepared import format as prepared
from granulon_hf.data.readers import (
    SPLIT_WORDS,
    SPLITS,
    DatasetSource,
    Source,
    StreamSource,
    open_source,
    split_of,
    splits_of,
    take_split,
)
from granulon_hf.data.sample import Sample
from granulon_hf.data.sampling import choose
from granulon_hf.errors import GranulonError

ADAPTERS: dict[str, Adapter] = {
    module.ADAPTER.name: module.ADAPTER
    for module in (flux_reason, seed_bench, a_okvqa, recap, medical, llava, granuscenes, prepared)
}
KNOWN = ", ".join(name for name in ADAPTERS if name != "prepared")
MANIFEST_FORMAT = 1
NAMED_ROWS = 1_000_000  # of more, the ids are neither looked through for repetitions nor written into manifests
ON_ERROR = ("skip", "raise")
VERIFY = ("decode", "header", "none")
REASONS = 3  # that are told of many


@dataclass(frozen=True)
class Problem:
    """A row that something is wrong with: its file, its row (from 0; `None` for the whole file) and what."""

    file: str
    row: int | None
    reason: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.row is None else f', row {self.row}'}: {self.reason}"


def tell_reasons(reasons: Iterable[str]) -> str:
    """The commonest reasons and how often each is met, on one line."""
    counts = Counter(reasons).most_common()
    told = [f"{reason} ({times})" for reason, times in counts[:REASONS]]
    rest = sum(times for _, times in counts[REASONS:])
    return ", ".join(told + [f"other reasons ({rest})"] * bool(rest))


def none_usable(location: str, rows: int, reasons: Iterable[str]) -> GranulonError:
    """What to say of rows of which not one can be used."""
    return GranulonError(f"Not one of the {rows} rows of {location!r} can be used: {tell_reasons(reasons)}.")


class Samples(Sequence[Sample]):
    """The samples of a chosen set of rows, made when they are asked for; what [`load`] returns.

    Iterating goes through the files in order and reads each row group once: shuffle when training. Where the files are local it
    can be indexed too. Bad rows are skipped: iterating leaves them out, so that `len`, the number of chosen rows, may be a few
    more; an index gives the next good sample instead, so that no epoch ends in the middle. `on_error="raise"` refuses them.
    An index reads a row group: quick in prepared folders, which have small ones.

    Attributes:
        adapter ([`Adapter`]): how rows become samples.
        split (`str`): as asked for.
        problems (`list[Problem]`): files that cannot be read, and bad rows met so far, in this process, each once.
        renamed (`list[Problem]`): rows whose id was another row's too, and which therefore got a new one.
        filtered (`Counter`): rows that are no part of the set, by reason.
    """

    def __init__(
        self, adapter, source, split, rows, *, on_error="skip", verify="decode", description=None, filtered=None, names=None
    ):
        self.adapter: Adapter = adapter
        self.split: str = split
        self.source: Source = source
        self.filtered: Counter[str] = Counter(filtered)
        self._rows: dict[str, np.ndarray | range] = rows
        self._on_error, self._verify = on_error, verify
        self._description: dict[str, Any] = description or {}
        self._problems: dict[tuple[str, int], Problem] = {}
        self._given_names: dict[tuple[str, int], tuple[str, str]] | None = names
        self._fingerprints = {part: source.fingerprint(part) for part in rows}  # also what `datasets` caches by
        self._ends = np.cumsum([len(numbers) for numbers in rows.values()])
        self._columns: dict[str, list[str]] = {}

    def __getstate__(self):
        # What follows from the rest is left out: it would only make `datasets` believe that something has changed.
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_names", "ids")}
        return kept | {"_problems": {}, "_columns": {}}

    def __len__(self) -> int:
        if rows_unknown(self):
            raise TypeError("A stream has no length.")
        return int(self._ends[-1]) if len(self._ends) else 0

    def __repr__(self) -> str:
        rows = "unknown" if rows_unknown(self) else len(self)
        return f"Samples({self.adapter.name!r}, split={self.split!r}, rows={rows}, source={self.source.location!r})"

    def __iter__(self) -> Iterator[Sample]:
        for _, _, sample in self.walk():
            if sample is not None:
                yield sample

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "Samples": ...
    def __getitem__(self, index):
        if isinstance(index, slice) and not isinstance(self.source, StreamSource):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise GranulonError("A slice of samples has no step.")
            return self.slice(start, stop)
        if self.source.remote:
            raise GranulonError(
                f"{self.source.location!r} is streamed and has no random access: iterate, or `granulon data prepare` it first."
            )
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} samples")
        for step in range(len(self)):
            position = (int(index) % len(self) + step) % len(self)
            part_number = int(np.searchsorted(self._ends, position, side="right"))
            part = list(self._rows)[part_number]
            start = int(self._ends[part_number - 1]) if part_number else 0
            row = int(self._rows[part][position - start])
            if (part, row) not in self._problems:
                sample = next(self._read(part, [row]))[2]
                if sample is not None:
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
        """Every chosen row: part, number, and the sample or `None` for a bad row, which is then among the problems."""
        for part, numbers in self._rows.items():
            yield from self._read(part, numbers)

    def slice(self, start: int, stop: int) -> "Samples":
        """The chosen rows from `start` up to `stop`, with the same ids."""
        rows, first = {}, 0
        for part, numbers in self._rows.items():
            if len(taken := numbers[max(0, start - first) : max(0, stop - first)]):
                rows[part] = taken
            first += len(numbers)
        kwargs = {"on_error": self._on_error, "verify": self._verify, "description": self._description}
        own = {part: set(map(int, numbers)) for part, numbers in rows.items()}
        names = {(part, row): name for (part, row), name in self._names.items() if row in own.get(part, ())}
        return Samples(self.adapter, self.source, self.split, rows, filtered=self.filtered, names=names, **kwargs)

    def _read(self, part, numbers) -> Iterator[tuple[str, int, Sample | None]]:
        wanted = numbers if isinstance(numbers, range) else [int(number) for number in numbers]
        if part not in self._columns:
            present, names = self.source.columns(part), [name for column in self.adapter.columns for name in column.split("|")]
            self._columns[part] = [name for name in dict.fromkeys([*names, *self.adapter.optional]) if name in present]
        for number, row in self.source.rows(part, wanted, self._columns[part]):
            try:
                yield part, number, self._make(part, number, row)
            except BadRow as error:
                reason = str(error).encode("utf-8", "backslashreplace").decode()  # it may cite what is no text
                problem = Problem(*self.source.where(part, number), reason)
                if self._on_error == "raise":
                    raise GranulonError(f"Bad row in {self.source.location!r}: {problem}.") from None
                self._problems[part, number] = problem
                yield part, number, None

    def _make(self, part: str, number: int, row: dict[str, Any] | Exception) -> Sample:
        if isinstance(row, Exception):
            raise BadRow(f"the row cannot be read ({' '.join(str(row).split())})")
        try:
            sample = self.adapter.to_sample(row)
        except BadRow:
            raise
        except Exception as error:  # a value of a type that nobody thought of must not end an epoch
            raise BadRow(f"the row is not as it should be ({type(error).__name__}: {error})") from error
        paths = [image["path"] or "" for image in sample.images]
        if broken_text("".join([*paths, json.dumps(sample.meta, ensure_ascii=False, default=str)])):
            raise BadRow("the path of an image or what else the row says holds half a character (a lone surrogate)")
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
        named = [part for part in self._rows if column in self.source.columns(part)]
        if not named:
            return None
        values = self.source.column_of(named, column)
        return {
            part: [name_of(values[part][i]) if part in values else "" for i in numbers] for part, numbers in self._rows.items()
        }

    @cached_property
    def _names(self) -> dict[tuple[str, int], tuple[str, str]]:
        """Old and new id by part and row, for every repetition of an id."""
        if self._given_names is not None or self.ids is None:
            return self._given_names or {}
        seen = Counter(name for names in self.ids.values() for name in names)
        if max(seen.values(), default=0) < 2:
            return {}
        result, met = {}, Counter[str]()
        for part, names in self.ids.items():
            for row, old in zip(self._rows[part], names, strict=True):
                met[old] += 1
                if old and met[old] > 1:
                    new = f"{old}#{met[old]}"
                    while new in seen:
                        new += "'"
                    result[part, int(row)] = (old, new)
        return result

    @property
    def manifest(self) -> dict[str, Any]:
        """All that is needed to load the very same subset again: where from, which commit, which rows and their ids."""
        files = {
            part: {
                "rows": self.source.count(part),
                "fingerprint": self._fingerprints[part],
                "take": [int(number) for number in numbers] if len(numbers) < self.source.count(part) else "all",
                "ids": self.ids[part] if self.ids is not None else None,
            }
            for part, numbers in self._rows.items()
        }
        remarks = {"filtered": dict(self.filtered), "unreadable": dict(self.source.broken)}
        return {**self._description, **remarks, "files": files}

    def save_manifest(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.manifest, ensure_ascii=False) + "\n", encoding="utf-8")

    def to_dataset(self):
        """A `datasets.Dataset` with the fields of [`Sample`] as columns (images decoded when looked at, `meta` as JSON).

        `datasets` caches it: bad rows are among `problems` only when it is made for the first time.
        """
        from datasets import Dataset

        return Dataset.from_generator(_rows_of, features=prepared.features(), gen_kwargs={"samples": self})


def name_of(value: Any) -> str:
    """A row's own name; none for what is no text, and makes it a bad row."""
    try:
        return plain(value, "id")
    except BadRow:
        return ""


def _rows_of(samples: Samples) -> Iterator[dict[str, Any]]:
    for sample in samples:
        yield prepared.to_row(sample)


def find_adapter(name: Any, source: Any, columns: Mapping[str, str] | None) -> tuple[Adapter, Any]:
    """The adapter that a name means, and where its data are.

    Raises:
        GranulonError: there is no such set, or it needs a source.
    """
    if columns is not None:
        adapter, place = make_adapter(columns), name if source is None else source
    elif isinstance(name, str) and name in ADAPTERS:
        adapter = ADAPTERS[name]
        place = adapter.repo if source is None else source
    elif source is None and isinstance(name, str | Path) and name and Path(name).expanduser().is_dir():
        adapter, place = prepared.ADAPTER, Path(name).expanduser()
        prepared.missing_shards(place)
    elif not isinstance(name, str | Path):
        raise GranulonError("Say which columns are image, question and answer: columns=….")
    else:
        raise GranulonError(
            f"There is no data set or prepared folder {str(name)!r}; known are {KNOWN}, and with columns=… your own."
        )
    if place is None and adapter.opener is None:
        raise GranulonError(f"{adapter.name!r} is in no repository: say where its files are with source=….")
    return adapter, place


def open_place(adapter: Adapter, place: Any, revision: str | None, split: str) -> Source:
    return adapter.opener(place, split) if adapter.opener else open_source(place, revision, split)


def load(
    name: Any = None,
    split: str | None = None,
    source: Any = None,
    limit: int | None = None,
    seed: int = 0,
    holdout: int | None = None,
    preset: str | None = None,
    on_error: str = "skip",
    manifest: str | Path | Mapping[str, Any] | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    max_files: int | None = None,
    revision: str | None = None,
    verify: str | None = None,
    holdout_seed: int = 0,
) -> Samples:
    """Load a data set as [`Sample`]s. Nothing but row counts and names is read before samples are asked for.

        load("flux-reason", preset="paper")                          # the 200 K rows of training
        load("flux-reason", split="holdout", preset="paper")         # the 1 K held out of them
        load("a-okvqa", source="folder/with/parquet", limit=100)
        load("granuscenes", "test_heldout", source="pictures?scenes=500&seed=7")    # generated: see granuscenes.open_scenes
        load(dataset, columns={"image": "picture", "question": "q", "answer": "a"})
        load("prepared/folder")                                      # of `granulon data prepare`
        load(manifest="manifest.json")                               # the very same rows again

    From a set to training batches:

        from torch.utils.data import DataLoader
        from transformers import AutoProcessor
        from granulon_hf.data import load
        from granulon_hf.data.collator import GranulonCollator

        samples = load("a-okvqa", "train", source="folder/with/parquet")
        collator = GranulonCollator(AutoProcessor.from_pretrained("path/to/model"), max_length=2048)
        for batch in DataLoader(samples, batch_size=8, shuffle=True, num_workers=2, collate_fn=collator):
            model(**batch).loss.backward()

    Args:
        name: a set (`ADAPTERS`), a prepared folder, or with `columns` any table.
        split (`str`, *optional*): by default the set's own: one that the source names in its files, folders or keys ("val" is
            "validation"); a source that names none can be called train, validation or test. "holdout" is what training never
            sees.
        source (*optional*): local files, a `datasets.Dataset` or another repository; by default the set's own on the Hub.
        limit (`int`, *optional*): rows, drawn uniformly; of a stream the first (shuffle it before). Bad ones among them are
            left out and not replaced.
        seed (`int`): the same seed draws the same rows from the same files.
        holdout (`int`, *optional*): rows held out of training; give both loads the same. By default the set's own (1,000 for
            flux-reason and surgvlm) if there are ten times as many rows. Where several rows may show one image or video, none
            of training shows one of the hold-out; to know, images are read. Of a stream it is the first rows, groups or not.
        holdout_seed (`int`): of the hold-out alone: no `seed` of training ever sees its rows.
        preset (`str`, *optional*): `"paper"`: as many rows as the paper's subset of this split (supplement, section 1).
        on_error (`str`): "skip" bad rows and files that cannot be read (they are listed in `.problems`) or "raise".
        manifest (*optional*): of an earlier load, as file or dictionary; the files must not have changed.
        columns (`dict`, *optional*): for your own tables: the columns that are "image", "question", "answer", "choices", "id";
            "index" instead of "answer" where a number from 0 says which choice is right (so does an answer's column that is
            called `…_idx` or `…_index`); "group" where rows belong together that no hold-out may part, such as patients.
        max_files (`int`, *optional*): files that a limited subset is drawn from, spread over the folders in proportion; 0 for
            all. By default the set's own: 118 of FLUX-Reason's 1,180 and 64 of recap's 8,700, because drawing rows from all of
            them reads nearly all of them.
        revision (`str`, *optional*): of the repository; by default the newest commit, which the manifest names.
        verify (`str`, *optional*): "decode" images in full before they are given out, read only the "header", or "none"; by
            default "decode", and "header" for prepared folders, which were decoded when they were written.

    Raises:
        GranulonError: what was asked for cannot be had, or there is no row of it; one sentence, which names arguments in
            backticks.
    """
    for what, word, words in (("on_error", on_error, ON_ERROR), ("verify", verify or "none", VERIFY)):
        if word not in words:
            raise GranulonError(f"`{what}` must be {' or '.join(map(repr, words))}; got {word!r}.")
    numbers = {"limit": limit, "holdout": holdout, "max_files": max_files, "seed": seed, "holdout_seed": holdout_seed}
    for what, value in numbers.items():
        least = 1 if what == "limit" else 0
        if value is not None and value < least:
            raise GranulonError(f"`{what}` must be at least {least}; got {value}.")
    if manifest is not None:
        if any(value is not None for value in (split, limit, holdout, preset, max_files, revision)):
            raise GranulonError("A manifest says which rows to take: give source=… and a name with it at most.")
        return load_manifest(manifest, name, source, columns, on_error, verify)
    if name is None:
        raise GranulonError(f"Say which data set: {KNOWN}, a prepared folder, or a manifest.")

    adapter, place = find_adapter(name, source, columns)
    if split in adapter.withheld:  # before anything is fetched
        raise withheld(adapter, split)
    opened = open_place(adapter, place, revision, adapter.default_split if split is None else split)
    if revision is not None and not opened.remote:
        raise GranulonError(f"revision={revision!r} is of a repository, and {opened.location!r} is none; leave it out.")
    opened.tolerant = on_error == "skip"
    present = splits_of(opened)
    default = adapter.default_split if adapter.default_split in present or len(present) != 1 else present[0]
    split = default if split is None else split
    if split not in present:
        split = opened.split if opened.split and split != "holdout" else SPLIT_WORDS.get(split, split)
    if split in adapter.withheld:
        raise withheld(adapter, split)
    if preset is not None:
        if preset != "paper" or not adapter.paper:
            raise GranulonError(
                f"There is no preset {preset!r} of {adapter.name!r}; there is {'paper' if adapter.paper else 'none'}."
            )
        if split not in adapter.paper:
            raise GranulonError(
                f"The paper has no subset of {adapter.name}'s split {split!r}, only of {', '.join(adapter.paper)}."
            )
        limit = adapter.paper[split] if limit is None else limit
    drawn = split == "holdout" and split not in present
    names = (adapter.default_split, "holdout") if adapter.holdout else SPLITS
    take_split(opened, default if drawn else split, names)
    bound = adapter.max_files if max_files is None else max_files
    note_missing(adapter, opened, split)
    check_columns(adapter, opened, first_readable(opened))
    if isinstance(opened, StreamSource):
        opened, rows = open_stream(adapter, opened, split, limit, holdout or 0)
        return Samples(adapter, opened, split, rows, on_error=on_error, verify=verify or default_verify(adapter))
    choice = choose(
        opened,
        adapter,
        seed=seed,
        holdout_seed=holdout_seed,
        limit=limit,
        draw_holdout=drawn,
        holdout=holdout,
        max_files=bound,
    )
    if not choice.rows:
        reasons = tell_reasons([*choice.filtered.elements(), *opened.broken.values()])
        what = f"the split {split!r} of {opened.location!r}" if present else repr(opened.location)
        raise GranulonError(f"There are no rows that can be used in {what}: {reasons or 'it is empty'}.")
    check_columns(adapter, opened, choice.rows)
    description = describe(adapter, opened, place, columns) | {"split": split, "preset": preset, "limit": limit}
    description |= {"seed": seed, "holdout": choice.holdout, "holdout_seed": holdout_seed, "max_files": bound}
    return Samples(
        adapter,
        opened,
        split,
        choice.rows,
        on_error=on_error,
        verify=verify or default_verify(adapter),
        description=description,
        filtered=choice.filtered,
    )


def note_missing(adapter: Adapter, source: Source, split: str) -> None:
    """Of a prepared folder the shards that should be there; raises GranulonError where they are not to be skipped."""
    for shard in prepared.missing_shards(Path(source.location)) if adapter is prepared.ADAPTER else []:
        if split_of(shard) in (split, None):
            if not source.tolerant:
                raise GranulonError(f"{source.location!r}: {shard}: {prepared.MISSING}.")
            source.broken[shard] = prepared.MISSING


def first_readable(source: Source) -> list[str]:
    """Raises GranulonError where there are parts, but none that can be read."""
    first = next(([part] for part in source.parts if source.readable(part)), [])
    if source.parts and not first:
        reason = source.broken[source.parts[0]]
        raise GranulonError(reason if len(source.parts) == 1 else f"Not one of {len(source.parts)} files can be read: {reason}")
    return first


def rows_unknown(samples: Samples) -> bool:
    return any(isinstance(numbers, range) and numbers.stop == sys.maxsize for numbers in samples._rows.values())


def open_stream(adapter: Adapter, source: StreamSource, split: str, limit: int | None, holdout: int):
    """The rows of a stream, which cannot be drawn from: the hold-out is its beginning, and a limit takes what comes first."""
    if adapter.unwanted is not None:
        column, judge = adapter.unwanted
        source = StreamSource(source.dataset.filter(lambda value: judge(value) is None, input_columns=[column]))
    first, last = (0, holdout) if split == "holdout" else (holdout, sys.maxsize)
    return source, {"stream": range(first, min(last, sys.maxsize if limit is None else first + limit))}


def withheld(adapter: Adapter, split: str) -> GranulonError:
    return GranulonError(f"The answers of {adapter.name}'s split {split!r} are withheld; use {adapter.withheld[split]!r}.")


def default_verify(adapter: Adapter) -> str:
    return "header" if adapter is prepared.ADAPTER else "decode"


def describe(adapter: Adapter, source: Source, place: Any, columns: Mapping[str, str] | None) -> dict[str, Any]:
    from granulon_hf import __version__

    in_memory = adapter.opener is not None or (isinstance(source, DatasetSource) and not source.stored)
    several = [str(path) for path in place] if isinstance(place, list | tuple) else None
    location = source.location if source.remote or in_memory else str(Path(source.location).resolve())
    return {
        "format": MANIFEST_FORMAT,
        "granulon_hf": __version__,
        "name": adapter.name,
        "columns": dict(columns) if columns is not None else None,
        "source": several or location,
        "revision": source.revision,
    }


def check_columns(adapter: Adapter, source: Source, parts) -> None:
    """Raises GranulonError before any work where a file lacks what the adapter needs; one without rows lacks nothing."""
    for part in parts:
        present = source.columns(part)
        if not present:
            if isinstance(source, StreamSource):
                raise GranulonError(f"{source.location!r} is empty.")
            if not source.count(part):
                continue
            reason = next(source.rows(part, range(1), []))[1]
            raise GranulonError(
                f"{part!r} of {source.location!r} is not {adapter.name}: {reason or 'its first record is empty'}."
            )
        missing = [column for column in adapter.columns if not set(column.split("|")) & set(present)]
        if missing:
            lacks = ", ".join(" or ".join(map(repr, column.split("|"))) for column in missing)
            what = "" if adapter.name == "columns" else f" is not {adapter.name}: it"
            raise GranulonError(
                f"{part!r} of {source.location!r}{what} lacks the columns {lacks}; it has {', '.join(map(repr, present))}."
            )


def load_manifest(manifest, name, source, columns, on_error, verify) -> Samples:
    """Raises GranulonError where the files are no longer those that the manifest describes."""
    if not isinstance(manifest, Mapping):
        try:
            manifest = json.loads(Path(manifest).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise GranulonError(f"Cannot read the manifest {str(manifest)!r} ({error}).") from None
    if not isinstance(manifest, Mapping) or manifest.get("format") != MANIFEST_FORMAT or "files" not in manifest:
        raise GranulonError("This is no manifest of a subset that this version of granulon_hf can read.")
    check_manifest(manifest)
    if name is not None and name != manifest["name"]:
        raise GranulonError(f"The manifest describes {manifest['name']!r}, not {name!r}.")
    columns = columns or manifest["columns"]
    adapter = make_adapter(columns) if columns is not None else ADAPTERS.get(manifest["name"])
    if adapter is None:
        raise GranulonError(f"The manifest's data set {manifest['name']!r} is not known.")
    if source is None and manifest["source"] == "datasets.Dataset":
        raise GranulonError("The manifest describes a datasets.Dataset that was in memory: give it again with source=….")
    place = manifest["source"] if source is None else source
    opened = open_place(adapter, place, manifest["revision"], manifest["split"])
    opened.broken.update(manifest.get("unreadable", {}))
    rows = {}
    known = set(opened.parts)
    opened.prepare(part for part in manifest["files"] if part in known)
    for part, entry in manifest["files"].items():
        if part not in known:
            raise changed(opened, part, "it is gone")
        if opened.count(part) != entry["rows"]:
            raise changed(opened, part, f"it has {opened.count(part)} rows instead of {entry['rows']}")
        found = opened.fingerprint(part)
        if found and entry["fingerprint"] and found != entry["fingerprint"]:
            raise changed(opened, part, "its content is another")
        rows[part] = np.arange(entry["rows"]) if entry["take"] == "all" else np.asarray(entry["take"], dtype=np.int64)
    check_columns(adapter, opened, rows)
    header = {key: value for key, value in manifest.items() if key not in ("files", "filtered", "unreadable")}
    options = {"on_error": on_error, "verify": verify or default_verify(adapter), "description": header}
    samples = Samples(adapter, opened, manifest["split"], rows, filtered=manifest["filtered"], **options)
    ids = {part: entry["ids"] for part, entry in manifest["files"].items()}
    if None not in ids.values() and samples.ids != ids:
        part = next(part for part in ids if samples.ids is None or samples.ids[part] != ids[part])
        raise changed(opened, part, "its rows have other ids")
    return samples


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raises GranulonError where something is missing, or rows are listed that cannot be."""
    files: Mapping[str, Any] = manifest["files"] if isinstance(manifest["files"], Mapping) else {"files": None}
    own = ("name", "columns", "source", "revision", "split", "filtered")
    wanted: list[tuple[str, Any, tuple[str, ...]]] = [("the manifest", manifest, own)]
    wanted += [(repr(part), entry, ("rows", "fingerprint", "take", "ids")) for part, entry in files.items()]
    for where, entry, keys in wanted:
        if lacking := [key for key in keys if not isinstance(entry, Mapping) or key not in entry]:
            raise GranulonError(f"The manifest is not whole: {where} lacks {', '.join(map(repr, lacking))}.")
    for part, entry in files.items():
        rows, take = entry["rows"], entry["take"]
        listed = isinstance(take, list) and all(isinstance(row, int) and 0 <= row < rows for row in take)
        if take != "all" and not listed:
            raise GranulonError(f"The manifest is wrong: it takes rows of {part!r} that are none of its {rows}.")


def changed(source: Source, part: str, what: str) -> GranulonError:
    return GranulonError(f"{part!r} of {source.location!r} has changed since the manifest was written: {what}.")
