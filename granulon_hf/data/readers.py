"""Where rows come from: Parquet files here or on the Hub, LLaVA's JSON, question|answer lines, `datasets` objects.

A source is a list of parts (files), each a list of rows. What is read of a part is only what is asked for: the footer for its
row count and columns, single cheap columns, and the row groups that hold chosen rows. This is why the files are not opened by
`datasets.load_dataset`, which would copy every row of a Parquet set to draw a few, and refuses a JSON file for one bad line.
"""

import bisect
import csv
import hashlib
import io
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from granulon_hf.data.datasets.base import kind_of, one_line
from granulon_hf.data.pictures import IMAGE_ENDINGS
from granulon_hf.errors import GranulonError
from granulon_hf.io import batches

FINGERPRINT_BYTES = 1 << 16
REQUESTS = 16  # at a time: footers and single columns are small, latency is all they cost
OPEN_FILES = 32
UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)
SPLIT_WORDS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
SPLIT_WORDS |= {"test": "test", "holdout": "holdout"}
SPLITS = tuple(dict.fromkeys(SPLIT_WORDS.values()))  # what a source that names no split can be called


def split_of(part: str) -> str | None:
    """Return the split that a file's name or folder says it belongs to: `data/train-00000-of-00002.parquet`, `val/x.parquet`.

    Shards in `data/` may name any split, as for `datasets.load_dataset`; other files only a usual one.
    """
    if shard := re.fullmatch(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\.parquet", part):
        return SPLIT_WORDS.get(shard[1], shard[1])
    pieces = reversed(PurePosixPath(part).with_suffix("").parts)
    words = (word for piece in pieces for word in re.split(r"[^a-z]+", piece.lower()))
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


class BrokenFile(GranulonError):
    """A file that is there, but cannot be read at all."""


class Source:
    """Parts with rows; the kinds below say how they are read."""

    location: str  # repository or path, as it is written into manifests
    revision: str | None = None  # commit of a repository
    split: str | None = None  # the split that all of it is, where it was opened as one of several
    parts: list[str]  # names of the files, relative to the location
    roots: list[Path]  # folders that images given as paths are relative to
    remote = False
    tolerant = False  # whether files that cannot be read are noted as broken, and left out

    @cached_property
    def broken(self) -> dict[str, str]:
        """The files that cannot be read, and why."""
        return {}

    @property
    def splits(self) -> list[str]:
        """The splits that the source names, sorted."""
        return [self.split] if self.split else sorted({split for split in map(split_of, self.parts) if split})

    def readable(self, part: str) -> bool:
        """Tell whether the part can be read at all; raise [`BrokenFile`] if it cannot, and the source is not tolerant."""
        try:
            self.columns(part)
        except BrokenFile as error:
            if not self.tolerant:
                raise
            self.broken[part] = str(error)
        return part not in self.broken

    def columns(self, part: str) -> list[str]:
        raise NotImplementedError

    def count(self, part: str) -> int:
        raise NotImplementedError

    def rows(self, part: str, wanted: Sequence[int], columns: list[str]) -> Iterator[tuple[int, dict[str, Any] | Exception]]:
        """Give the wanted rows (ascending) with their numbers; in place of one that cannot be read, the reason."""
        raise NotImplementedError

    def cells(self, part: str, name: str) -> Iterator[Any]:
        """Give the values of one column one by one, `None` for those that cannot be read or do not exist."""
        rows = range(self.count(part))
        if name not in self.columns(part):
            yield from (None for _ in rows)
            return
        for _, row in self.rows(part, rows, [name]):
            yield row.get(name) if isinstance(row, dict) else None

    def column(self, part: str, name: str) -> list[Any]:
        """Return all values of one column at once."""
        return list(self.cells(part, name))

    def gather(self, function: Callable[[str], Any], parts: Iterable[str]) -> dict[str, Any]:
        """Return what a function says of every part; several are asked at a time where that is slow one by one."""
        if not self.remote:
            return {part: function(part) for part in parts}
        with ThreadPoolExecutor(REQUESTS) as pool:
            return dict(pool.map(lambda part: (part, function(part)), parts))

    def fingerprint(self, part: str) -> str | None:
        """Return what changes when the part changes; `None` if a revision or nothing says so."""
        return None

    def where(self, part: str, row: int) -> tuple[str, int]:
        """Return file and row (from 0) as a person would look for them."""
        return part, row


class ParquetSource(Source):
    """Parquet files under one root: of a remote `fsspec` file system, or of this machine."""

    def __init__(self, location: str, root: str, parts: list[str], fs: Any = None, revision: str | None = None):
        self.location = location
        self.root = root
        self.parts = parts
        self.fs = fs
        self.revision = revision
        self.remote = fs is not None
        self.roots = [] if self.remote else [Path(root), Path(root) / "images"]
        self._metadata: dict[str, Any] = {}
        self._files: dict[tuple[int, str], pq.ParquetFile] = {}
        self._group: tuple[Any, Any] = (None, None)

    def __getstate__(self):
        return self.__dict__ | {"_metadata": {}, "_files": {}, "_group": (None, None)}

    def _file(self, part: str) -> pq.ParquetFile:
        key = (os.getpid(), part)  # after a fork handles would be shared
        if key not in self._files:
            self._files[key] = self._open(part)
            for oldest in list(self._files)[:-OPEN_FILES]:
                self._files.pop(oldest, None)
        return self._files[key]

    def _open(self, part: str) -> pq.ParquetFile:
        path, known = f"{self.root}/{part}", self._metadata.get(part)
        try:
            # No read-ahead: Parquet knows which ranges it needs, and joins them itself.
            handle = self.fs.open(path, "rb", cache_type="none") if self.remote else path
            file = pq.ParquetFile(handle, metadata=known, pre_buffer=self.remote, memory_map=not self.remote)
        except FileNotFoundError:
            raise GranulonError(f"The file {part!r} of {self.location!r} is gone.") from None
        except (pa.ArrowException, OSError) as error:
            self._refuse_network(error, part)
            reason = f"cannot be read as Parquet ({one_line(error)})"
            raise BrokenFile(f"The file {part!r} of {self.location!r} {reason}.") from error
        self._metadata[part] = file.metadata
        return file

    def _refuse_network(self, error: Exception, part: str) -> None:
        """Raise if it is the network that failed, and not the file or the row."""
        if self.remote and isinstance(error, OSError):
            raise GranulonError(f"The file {part!r} of {self.location!r} cannot be fetched ({one_line(error)}).") from error

    def _meta(self, part: str) -> Any:
        if part not in self._metadata:
            self._file(part)
        return self._metadata[part]

    def columns(self, part: str) -> list[str]:
        return list(self._meta(part).schema.to_arrow_schema().names)

    def count(self, part: str) -> int:
        return self._meta(part).num_rows

    def column(self, part: str, name: str) -> list[Any]:
        try:
            return self._file(part).read(columns=[name]).column(name).to_pylist()
        except (*UNREADABLE, KeyError) as error:  # of one row or, in an earlier group, of many; or there is none
            self._refuse_network(error, part)
            return super().column(part, name)

    def _read_group(self, part: str, group: int, columns: list[str]) -> pa.Table:
        wanted = (part, group, tuple(columns))
        found, table = self._group
        if found != wanted:
            self._group = table = None, None  # one row group at a time in memory
            table = self._file(part).read_row_group(group, columns=columns)
            self._group = wanted, table
        return table

    def rows(self, part, wanted, columns):
        meta = self._meta(part)
        sizes = (meta.row_group(group).num_rows for group in range(meta.num_row_groups))
        starts = list(itertools.accumulate(sizes, initial=0))
        for row in wanted:
            group = bisect.bisect_right(starts, row) - 1
            try:
                yield row, self._read_group(part, group, columns).slice(row - starts[group], 1).to_pylist()[0]
            except UNREADABLE as error:
                self._refuse_network(error, part)
                yield row, error

    def fingerprint(self, part: str) -> str | None:
        """Return size and hash of the first and last 64 KiB: a Parquet footer is at the end, and says where the rest is."""
        if self.remote:
            return None
        with Path(self.root, part).open("rb") as file:
            head, size = file.read(FINGERPRINT_BYTES), file.seek(0, os.SEEK_END)
            file.seek(max(0, size - FINGERPRINT_BYTES))
            return f"{size}-{hashlib.sha256(head + file.read()).hexdigest()[:16]}"


class RecordSource(Source):
    """Rows that are read at once because they are small: LLaVA's JSON, lines of text.

    Of every row of a part, `tables` has the file, its number there, and the record or what is wrong with it.
    """

    def __init__(self, location: str, root: Path, tables: dict[str, list[tuple[str, int, Any]]], digest: dict[str, str]):
        self.location = location
        self.tables = tables
        self.digest = digest
        self.parts = list(tables)
        self.roots = [root, root / "images"]

    def columns(self, part: str) -> list[str]:
        return list(dict.fromkeys(key for _, _, record in self.tables[part] if isinstance(record, dict) for key in record))

    def count(self, part: str) -> int:
        return len(self.tables[part])

    def rows(self, part, wanted, columns):
        for row in wanted:
            yield row, self.tables[part][row][2]

    def fingerprint(self, part: str) -> str | None:
        return self.digest[part]

    def where(self, part: str, row: int) -> tuple[str, int]:
        return self.tables[part][row][:2]


def parse_json(data: bytes, what: str) -> Any:
    """Parse JSON, or return a `ValueError` that says why it cannot be read."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        faults = {RecursionError: "it is nested too deeply", ValueError: "a number in it has too many digits"}
        return ValueError(f"{what} is not JSON that can be read: {faults.get(type(error), error)}")


def parse_lines(data: bytes) -> dict[int, Any]:
    """Parse the lines that are not empty, by their numbers; a `ValueError` says why one cannot be read."""
    return {i: parse_json(line, "the line") for i, line in enumerate(data.splitlines()) if line}


def read_json(root: Path, files: list[Path], location: str) -> RecordSource:
    """Read `.json` files that hold a list, and `.jsonl` files with an object per line, which some call `.json` too."""
    tables, digest = {}, {}
    for path in files:
        data, name = path.read_bytes(), path.relative_to(root).as_posix()
        if path.suffix.lower() == ".jsonl":
            records = parse_lines(data)
        else:
            found = parse_json(data.strip() or b"[]", f"The file {str(path)!r}")
            records = dict(enumerate(found)) if isinstance(found, list) else {}
            if isinstance(found, ValueError):
                records = parse_lines(data)
                if not all(isinstance(record, dict) for record in records.values()):
                    raise GranulonError(f"{found}.")
            elif not isinstance(found, list):
                raise GranulonError(f"The file {str(path)!r} holds {kind_of(found)}, not a list of conversations.")
        for i, record in records.items():
            if not isinstance(record, dict | ValueError):
                records[i] = ValueError(f"the record is {kind_of(record)}, not an object")
        tables[name] = [(name, i, record) for i, record in records.items()]
        digest[name] = f"{len(data)}-{hashlib.sha256(data).hexdigest()[:16]}"
    return RecordSource(location, root, tables, digest)


def read_csv(root: Path, files: list[Path], location: str) -> RecordSource:
    """Read tables with their columns' names in the first line, in UTF-8; all values are texts."""
    tables, digest = {}, {}
    for path in files:
        data, name = path.read_bytes(), path.relative_to(root).as_posix()
        try:
            records = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), restkey=""))
        except (UnicodeDecodeError, csv.Error) as error:
            raise GranulonError(f"The file {str(path)!r} is not a CSV table in UTF-8 ({one_line(error)}).") from None
        tables[name] = [(name, i, record) for i, record in enumerate(records)]
        digest[name] = f"{len(data)}-{hashlib.sha256(data).hexdigest()[:16]}"
    return RecordSource(location, root, tables, digest)


def read_lines(root: Path, files: list[Path], location: str) -> RecordSource:
    """Read `question|answer` lines: `<video>/…/<frame>_QA.txt`, with the frame's image anywhere below the same root.

    Of several images of that name it takes the one that shares most folders with the text. Folders say the split.
    """
    frames: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in IMAGE_ENDINGS:
            frames[path.stem].append(path.relative_to(root))
    digests: dict[str, Any] = defaultdict(hashlib.sha256)
    tables: dict[str, list[tuple[str, int, Any]]] = defaultdict(list)
    for path in files:
        data, relative = path.read_bytes(), path.relative_to(root)
        name, split = relative.as_posix(), split_of(f"{relative.parent.as_posix()}/lines")
        # One part per split: a set has tens of thousands of such files, with a line or two each.
        part = f"{split}/lines" if split else "lines"
        tables[part] += []  # also a file without a line is one
        digests[part].update(f"{name} {len(data)}\n".encode("utf-8", "surrogateescape") + data)
        stem = re.sub(r"_QA$", "", path.stem, flags=re.IGNORECASE)
        image = max(frames[stem], key=lambda frame: len(set(frame.parts) & set(relative.parts)), default=None)
        for i, line in enumerate(data.decode("utf-8", "replace").splitlines()):
            question, bar, answer = line.partition("|")
            record = {"question": question, "answer": answer, "image": image.as_posix() if image else None}
            record["id"] = f"{relative.with_suffix('').as_posix()}:{i}"
            if line.strip():
                fault = ValueError("the line has no | between question and answer")
                tables[part].append((name, i, record if bar else fault))
    return RecordSource(location, root, tables, {part: digest.hexdigest()[:24] for part, digest in digests.items()})


class DatasetSource(Source):
    """A `datasets.Dataset`, by object or as `save_to_disk` left it. Images stay encoded, class labels become their names."""

    location = "datasets.Dataset"
    parts = ["dataset"]

    def __init__(self, dataset: Any, folder: Path | None = None):
        self.dataset = dataset
        self.stored = folder is not None
        self.roots = [Path.cwd()]
        if folder is not None:
            self.location = str(folder)
            self.roots.append(folder)

    def columns(self, part: str) -> list[str]:
        return list(self.dataset.column_names)

    def count(self, part: str) -> int:
        return len(self.dataset)

    def rows(self, part, wanted, columns):
        # The Arrow format leaves images encoded, and text that is not UTF-8 fails in its own row alone.
        dataset = self.dataset.select_columns(columns).with_format("arrow")
        for numbers in batches(map(int, wanted), 64):
            table = dataset[numbers]
            for i, number in enumerate(numbers):
                try:
                    yield number, name_labels(table.slice(i, 1).to_pylist()[0], self.dataset.features)
                except UnicodeDecodeError as error:
                    yield number, error

    def fingerprint(self, part: str) -> str | None:
        return self.dataset._fingerprint if self.stored else None


class StreamSource(DatasetSource):
    """A `datasets.IterableDataset`: its rows in its own order, as many as there are."""

    location = "datasets.IterableDataset"
    parts = ["stream"]
    remote = True

    def columns(self, part: str) -> list[str]:
        return list(self.dataset.column_names or next(iter(self.dataset), {}))

    def count(self, part: str) -> int:
        raise GranulonError("The rows of a stream cannot be counted: no manifest can describe them.")

    def rows(self, part, wanted, columns):
        features = self.dataset.features or {}
        rows = self.dataset.decode(False) if features else self.dataset  # without known features there is nothing to decode
        for number, row in zip(wanted, itertools.islice(rows, wanted.start, wanted.stop), strict=False):
            yield number, name_labels(row, features)


def name_labels(row: dict[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """Replace class labels by their names; a negative one is none."""
    labels = ((name, features[name].names) for name in row if hasattr(features.get(name), "names"))
    return row | {name: None if row[name] is None or row[name] < 0 else names[row[name]] for name, names in labels}
