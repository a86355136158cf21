"""Where rows come from: Parquet files here or on the Hub, LLaVA's JSON, question|answer lines, `datasets` objects.

A source is a list of parts (files), each a list of rows. What is read of a part is only what is asked for: the footer for its
row count and columns, single cheap columns, and the row groups that hold chosen rows. This is why the files are not opened by
`datasets.load_dataset`, which would copy every row of a Parquet set to draw a few, and refuses a JSON file for one bad line.
"""

import bisect
import hashlib
import itertools
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from granulon_hf.data.datasets.base import kind_of, one_line
from granulon_hf.data.pictures import IMAGE_ENDINGS
from granulon_hf.data.splits import split_of
from granulon_hf.errors import GranulonError

FINGERPRINT_BYTES = 1 << 16
REQUESTS = 16  # at a time: footers and single columns are small, latency is all they cost
UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)


class BrokenFile(GranulonError):
    """A file that is there, but cannot be read at all."""


class Source:
    """Parts with rows; the kinds below say how they are read.

    Attributes:
        location (`str`): repository or path, as it is written into manifests.
        revision (`str`, *optional*): commit of a repository.
        parts (`list[str]`): names of the files, relative to the location.
        roots (`list[Path]`): folders that images given as paths are relative to.
        tolerant (`bool`): whether files that cannot be read are left out.
        broken (`dict[str, str]`): those that were, and why.
        split (`str`, *optional*): the split that all of it is, where it was opened as one of several.
    """

    location: str
    revision: str | None = None
    split: str | None = None
    parts: list[str]
    roots: list[Path]
    remote = False
    tolerant = False

    @cached_property
    def broken(self) -> dict[str, str]:
        return {}

    def readable(self, part: str) -> bool:
        """Tell whether the part can be read at all; if not, it is noted as broken, or refused with [`BrokenFile`]."""
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

    def column(self, part: str, name: str) -> list[Any]:
        """Return all values of one column, `None` for those that cannot be read."""
        return list(self.cells(part, name))

    def cells(self, part: str, name: str) -> Iterator[Any]:
        """Give the values of one column one by one, `None` for those that cannot be read or do not exist."""
        wanted = range(self.count(part)) if name in self.columns(part) else ()
        for _, row in self.rows(part, wanted, [name]):
            yield row.get(name) if isinstance(row, dict) else None

    def column_of(self, parts: Sequence[str], name: str) -> dict[str, list[Any]]:
        """Return all values of one column of several parts."""
        return {part: self.column(part, name) for part in parts}

    def rows(self, part: str, wanted: Sequence[int], columns: list[str]) -> Iterator[tuple[int, dict[str, Any] | Exception]]:
        """Give the wanted rows (ascending) with their numbers; in place of one that cannot be read, the reason."""
        raise NotImplementedError

    def fingerprint(self, part: str) -> str | None:
        """Return what changes when the part changes; `None` if a revision or nothing says so."""
        return None

    def where(self, part: str, row: int) -> tuple[str, int]:
        """Return file and row (from 0) as a person would look for them."""
        return part, row

    def prepare(self, parts: Iterable[str]) -> None:
        """Fetch what `count` and `columns` need, in one go where that is slow one by one."""


def hash_ends(path: Path) -> str:
    """Return the size, and a hash of the first and last 64 KiB: a Parquet footer is at the end, and says where the rest is."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        digest.update(file.read(FINGERPRINT_BYTES))
        file.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(file.read(FINGERPRINT_BYTES))
    return f"{size}-{digest.hexdigest()[:16]}"


class ParquetSource(Source):
    """Parquet files under one root of a file system.

    Args:
        fs (`fsspec.AbstractFileSystem`, *optional*): of a remote root; `None` for files of this machine.
    """

    OPEN_FILES = 32

    def __init__(self, location: str, root: str, parts: list[str], fs: Any = None, revision: str | None = None):
        self.location = location
        self.root = root
        self.parts = parts
        self.fs = fs
        self.revision = revision
        self.remote = fs is not None
        self.roots = [] if self.remote else [Path(root), Path(root) / "images"]
        self._reset()

    def _reset(self) -> None:
        self._metadata: dict[str, Any] = {}
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._last: tuple[Any, Any] = (None, None)
        self._pid = os.getpid()

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._reset()

    def _file(self, part: str) -> pq.ParquetFile:
        if self._pid != os.getpid():  # after a fork handles would be shared
            self._files, self._last, self._pid = OrderedDict(), (None, None), os.getpid()
        if part not in self._files:
            self._files[part] = self._open(part)
            while len(self._files) > self.OPEN_FILES:
                self._files.popitem(last=False)[1].close(force=True)
        self._files.move_to_end(part)
        return self._files[part]

    def _open(self, part: str) -> pq.ParquetFile:
        path, known = f"{self.root}/{part}", self._metadata.get(part)
        try:
            # No read-ahead: Parquet knows which ranges it needs, and joins them itself.
            handle = self.fs.open(path, "rb", cache_type="none") if self.remote else path
            file = pq.ParquetFile(handle, metadata=known, pre_buffer=self.remote, memory_map=not self.remote)
        except FileNotFoundError:
            raise GranulonError(f"The file {part!r} of {self.location!r} is gone.") from None
        except (pa.ArrowException, OSError) as error:
            self._refuse_network(error, f"The file {part!r}")
            raise BrokenFile(
                f"The file {part!r} of {self.location!r} cannot be read as Parquet ({one_line(error)})."
            ) from error
        self._metadata[part] = file.metadata
        return file

    def _refuse_network(self, error: Exception, what: str) -> None:
        """Raise if it is the network that failed, and not the file or the row."""
        if self.remote and isinstance(error, OSError):
            raise GranulonError(f"{what} of {self.location!r} cannot be fetched ({one_line(error)}).") from error

    def prepare(self, parts: Iterable[str]) -> None:
        missing = [part for part in parts if part not in self._metadata]
        if self.remote and len(missing) > 1:
            with ThreadPoolExecutor(REQUESTS) as pool:
                list(pool.map(self._footer, missing))

    def _footer(self, part: str) -> None:
        with suppress(BrokenFile):  # said when the part is needed
            self._open(part).close(force=True)

    def _meta(self, part: str):
        if part not in self._metadata:
            self._file(part)
        return self._metadata[part]

    def columns(self, part: str) -> list[str]:
        return list(self._meta(part).schema.to_arrow_schema().names)

    def count(self, part: str) -> int:
        return self._meta(part).num_rows

    def column(self, part: str, name: str) -> list[Any]:
        values = self._column(self._file(part), part, name)
        return super().column(part, name) if values is None else values

    def _column(self, file: pq.ParquetFile, part: str, name: str) -> list[Any] | None:
        """Return all values at once, or `None` if one of them cannot be read."""
        try:
            return file.read(columns=[name]).column(name).to_pylist() if name in self.columns(part) else None
        except UNREADABLE as error:
            self._refuse_network(error, f"Column {name!r} of the file {part!r}")
            return None

    def column_of(self, parts: Sequence[str], name: str) -> dict[str, list[Any]]:
        if not self.remote:
            return super().column_of(parts, name)
        with ThreadPoolExecutor(REQUESTS) as pool:
            found = pool.map(lambda part: self._column(self._open(part), part, name), parts)
            return {p: self.column(p, name) if values is None else values for p, values in zip(parts, found, strict=True)}

    def _group(self, part: str, group: int, columns: list[str]) -> pa.Table:
        key = (part, group, tuple(columns))
        if self._last[0] != key:
            self._last = (None, None)  # one row group at a time in memory
            self._last = (key, self._file(part).read_row_group(group, columns=columns))
        return self._last[1]

    def rows(self, part, wanted, columns):
        metadata = self._meta(part)
        sizes = (metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        starts = list(itertools.accumulate(sizes, initial=0))
        for group, members in itertools.groupby(wanted, key=lambda row: bisect.bisect_right(starts, row) - 1):
            for row in members:
                try:
                    table = self._group(part, group, columns)
                    yield row, table.slice(row - starts[group], 1).to_pylist()[0]
                except UNREADABLE as error:
                    self._refuse_network(error, f"The file {part!r}")
                    yield row, error

    def fingerprint(self, part: str) -> str | None:
        return None if self.remote else hash_ends(Path(self.root) / part)


class RecordSource(Source):
    """Rows that are read at once because they are small: LLaVA's JSON, lines of text."""

    def __init__(self, location: str, root: Path, tables: dict[str, list[tuple[str, int, Any]]], digest: dict[str, str]):
        self.location = location
        self.tables = tables
        self.digest = digest
        self.parts = list(tables)
        self.roots = [root, root / "images"]

    def columns(self, part: str) -> list[str]:
        records = (self._parse(record) for _, _, record in self.tables[part][:1000])
        return list(dict.fromkeys(key for record in records if isinstance(record, dict) for key in record))

    def count(self, part: str) -> int:
        return len(self.tables[part])

    def cells(self, part: str, name: str) -> Iterator[Any]:  # a record may have what the first thousand have not
        for _, row in self.rows(part, range(self.count(part)), [name]):
            yield row.get(name) if isinstance(row, dict) else None

    def rows(self, part, wanted, columns):
        for row in wanted:
            yield row, self._parse(self.tables[part][row][2])

    def _parse(self, record: Any) -> Any:
        if isinstance(record, bytes):
            try:
                record = json.loads(record)
            except (ValueError, RecursionError) as error:
                return ValueError(f"the line is not JSON that can be read: {json_fault(error)}")
        return record if isinstance(record, dict | Exception) else ValueError(f"the record is {kind_of(record)}, not an object")

    def fingerprint(self, part: str) -> str | None:
        return self.digest[part]

    def where(self, part: str, row: int) -> tuple[str, int]:
        return self.tables[part][row][:2]


def json_fault(error: ValueError | RecursionError) -> str:
    """Say what is wrong with a text that `json` refuses."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error) if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else "a number in it has too many digits"


def read_json(root: Path, files: list[Path]) -> RecordSource:
    """Read `.json` files that hold a list, and `.jsonl` files with an object per line."""
    tables, digest = {}, {}
    for path in files:
        data, name = path.read_bytes(), path.relative_to(root).as_posix()
        if path.suffix.lower() == ".jsonl":
            records: list[Any] = data.splitlines()
        else:
            try:
                records = json.loads(data.strip() or b"[]")
            except (ValueError, RecursionError) as error:
                raise GranulonError(f"The file {str(path)!r} is not JSON that can be read: {json_fault(error)}.") from None
            if not isinstance(records, list):
                raise GranulonError(f"The file {str(path)!r} holds {kind_of(records)}, not a list of conversations.")
        rows = [(name, i, record) for i, record in enumerate(records) if record != b""]
        tables[name], digest[name] = rows, f"{len(data)}-{hashlib.sha256(data).hexdigest()[:16]}"
    return RecordSource(str(root), root, tables, digest)


def read_lines(root: Path, files: list[Path]) -> RecordSource:
    """Read `question|answer` lines: `<video>/…/<frame>_QA.txt`, with the frame's image anywhere below the same root.

    Of several images of that name it takes the one that shares most folders with the text. Folders say the split.
    """
    frames: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in IMAGE_ENDINGS:
            frames.setdefault(path.stem, []).append(path.relative_to(root))
    digests: dict[str, Any] = {}
    tables: dict[str, list[tuple[str, int, Any]]] = {}
    for path in files:
        data, relative = path.read_bytes(), path.relative_to(root)
        split = split_of(f"{relative.parent.as_posix()}/lines")
        # One part per split: a set has tens of thousands of such files, with a line or two each.
        part = f"{split}/lines" if split else "lines"
        rows = tables.setdefault(part, [])
        digest = digests.setdefault(part, hashlib.sha256())
        digest.update(f"{relative.as_posix()} {len(data)}\n".encode("utf-8", "surrogateescape") + data)
        stem = re.sub(r"_QA$", "", path.stem, flags=re.IGNORECASE)
        found = max(frames.get(stem, []), key=lambda frame: len(set(frame.parts) & set(relative.parts)), default=None)
        for i, line in enumerate(data.decode("utf-8", "replace").splitlines()):
            question, bar, answer = line.partition("|")
            if not line.strip():
                continue
            record: Any = ValueError("the line has no | between question and answer")
            if bar:
                name = f"{relative.with_suffix('').as_posix()}:{i}"
                image = found.as_posix() if found else None
                record = {"id": name, "image": image, "question": question, "answer": answer}
            rows.append((relative.as_posix(), i, record))
    return RecordSource(str(root), root, tables, {part: digest.hexdigest()[:24] for part, digest in digests.items()})


class DatasetSource(Source):
    """A `datasets.Dataset`, by object or as `save_to_disk` left it. Images stay encoded, class labels become their names."""

    def __init__(self, dataset: Any, location: str = "datasets.Dataset", stored: bool = False):
        self.dataset = dataset
        self.location = location
        self.stored = stored
        self.parts = ["dataset"]
        self.roots = [Path.cwd()] + ([Path(location)] if stored else [])

    def columns(self, part: str) -> list[str]:
        return list(self.dataset.column_names)

    def count(self, part: str) -> int:
        return len(self.dataset)

    def column(self, part: str, name: str) -> list[Any]:
        try:
            values = self.dataset.select_columns([name]).with_format("arrow")[:][name].to_pylist()
        except UnicodeDecodeError:
            return super().column(part, name)
        return [name_labels({name: value}, self.dataset.features)[name] for value in values]

    def rows(self, part, wanted, columns):
        # The Arrow format leaves images encoded, and text that is not UTF-8 fails in its own row alone.
        dataset = self.dataset.select_columns(columns).with_format("arrow")
        for start in range(0, len(wanted), 16):
            numbers = [int(row) for row in wanted[start : start + 16]]
            table = dataset[numbers]
            for i, number in enumerate(numbers):
                try:
                    yield number, name_labels(table.slice(i, 1).to_pylist()[0], self.dataset.features)
                except UnicodeDecodeError as error:
                    yield number, error

    def fingerprint(self, part: str) -> str | None:
        return self.dataset._fingerprint if self.stored else None


class StreamSource(Source):
    """A `datasets.IterableDataset`: its rows in its own order, as many as there are."""

    remote = True
    location = "datasets.IterableDataset"

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.parts = ["stream"]
        self.roots = [Path.cwd()]

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
