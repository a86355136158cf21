"""Where rows come from: Parquet files here or on the Hub, LLaVA's JSON, question|answer lines, `datasets` objects.

A source is a list of parts (files), each a list of rows. What is read of a part is only what is asked for: the footer for its
row count and columns, single cheap columns, and the row groups that hold chosen rows.
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
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from granulon_hf.data.datasets.base import kind_of
from granulon_hf.errors import GranulonError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLIT_WORDS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
SPLIT_WORDS |= {"test": "test", "holdout": "holdout"}
SPLITS = tuple(dict.fromkeys(SPLIT_WORDS.values()))  # what a source that names no split can be called
FINGERPRINT_BYTES = 1 << 16
REQUESTS = 16  # at a time: footers and single columns are small, latency is all they cost


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
        """Whether the part can be read at all; where not, it is noted as broken, or refused with [`BrokenFile`]."""
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
        """All values of one column, `None` for those that cannot be read."""
        return list(self.cells(part, name))

    def cells(self, part: str, name: str) -> Iterator[Any]:
        """The values of one column one by one, `None` for those that cannot be read or do not exist."""
        wanted = range(self.count(part)) if name in self.columns(part) else ()
        for _, row in self.rows(part, wanted, [name]):
            yield row.get(name) if isinstance(row, dict) else None

    def column_of(self, parts: Sequence[str], name: str) -> dict[str, list[Any]]:
        """All values of one column of several parts."""
        return {part: self.column(part, name) for part in parts}

    def rows(self, part: str, wanted: Sequence[int], columns: list[str]) -> Iterator[tuple[int, dict[str, Any] | Exception]]:
        """The wanted rows (ascending) with their numbers; in place of one that cannot be read, the reason."""
        raise NotImplementedError

    def fingerprint(self, part: str) -> str | None:
        """What changes when the part changes; `None` where a revision or nothing says so."""
        return None

    def where(self, part: str, row: int) -> tuple[str, int]:
        """File and row (from 0) as a person would look for them."""
        return part, row

    def prepare(self, parts: Iterable[str]) -> None:
        """Fetch what `count` and `columns` need, in one go where that is slow one by one."""


def hash_ends(path: Path) -> str:
    """Size, and a hash of the first and last 64 KiB: a Parquet footer is at the end, and names where everything else is."""
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
        self.location, self.root, self.fs, self.parts, self.revision = location, root, fs, parts, revision
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
            reason = " ".join(str(error).split())
            kind = GranulonError if self.remote and isinstance(error, OSError) else BrokenFile  # the network, not the file
            raise kind(f"The file {part!r} of {self.location!r} cannot be read as Parquet ({reason}).") from error
        self._metadata[part] = file.metadata
        return file

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
        """All values at once, or `None` where one of them cannot be read."""
        try:
            return file.read(columns=[name]).column(name).to_pylist() if name in self.columns(part) else None
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if not self.remote or not isinstance(error, OSError):
                return None
            reason = " ".join(str(error).split())
            raise GranulonError(
                f"Column {name!r} of the file {part!r} of {self.location!r} cannot be fetched ({reason})."
            ) from error

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
                except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                    if self.remote and isinstance(error, OSError):  # the network, not the row
                        reason = " ".join(str(error).split())
                        raise GranulonError(f"The file {part!r} of {self.location!r} cannot be fetched ({reason}).") from error
                    yield row, error

    def fingerprint(self, part: str) -> str | None:
        return None if self.remote else hash_ends(Path(self.root) / part)


class RecordSource(Source):
    """Rows that are read at once because they are small: LLaVA's JSON, lines of text."""

    def __init__(self, location: str, root: Path, tables: dict[str, list[tuple[str, int, Any]]], digest: dict[str, str]):
        self.location, self.tables, self.digest, self.parts = location, tables, digest, list(tables)
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
    """What is wrong with a text that `json` refuses."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error) if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else "a number in it has too many digits"


def read_json(root: Path, files: list[Path]) -> RecordSource:
    """`.json` files that hold a list, and `.jsonl` files with an object per line."""
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
    """`question|answer` lines: `<video>/…/<frame>_QA.txt`, with the frame's image anywhere below the same root.

    Of several images of that name the one is taken that shares most folders with the text. Folders say the split.
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
            record: Any = {
                "id": f"{relative.with_suffix('').as_posix()}:{i}",
                "image": found.as_posix() if found else None,
                "question": question,
                "answer": answer,
            }
            if line.strip():
                rows.append(
                    (relative.as_posix(), i, record if bar else ValueError("the line has no | between question and answer"))
                )
    return RecordSource(str(root), root, tables, {part: digest.hexdigest()[:24] for part, digest in digests.items()})


class DatasetSource(Source):
    """A `datasets.Dataset`, by object or as `save_to_disk` left it. Images stay encoded."""

    def __init__(self, dataset: Any, location: str = "datasets.Dataset", stored: bool = False):
        self.dataset, self.location, self.stored, self.parts = dataset, location, stored, ["dataset"]
        self.roots = [Path.cwd()] + ([Path(location)] if stored else [])

    def columns(self, part: str) -> list[str]:
        return list(self.dataset.column_names)

    def count(self, part: str) -> int:
        return len(self.dataset)

    def column(self, part: str, name: str) -> list[Any]:
        try:
            return self._plain(self.dataset.select_columns([name]).with_format("arrow")[:], [name])[name].to_pylist()
        except UnicodeDecodeError:
            return super().column(part, name)

    def rows(self, part, wanted, columns):
        dataset = self.dataset.select_columns(columns).with_format("arrow")
        for start in range(0, len(wanted), 16):
            numbers = [int(row) for row in wanted[start : start + 16]]
            table = self._plain(dataset[numbers], columns)
            for i, number in enumerate(numbers):
                try:
                    row = table.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    row = error
                yield number, row

    def _plain(self, table: pa.Table, columns: list[str]) -> pa.Table:
        """Class labels by their names."""
        for name in columns:
            names = getattr(self.dataset.features[name], "names", None)
            if names:
                texts = [None if i is None or i < 0 else names[i] for i in table[name].to_pylist()]
                table = table.set_column(table.column_names.index(name), name, pa.array(texts, pa.string()))
        return table

    def fingerprint(self, part: str) -> str | None:
        return self.dataset._fingerprint if self.stored else None


class StreamSource(Source):
    """A `datasets.IterableDataset`: its rows in its own order, as many as there are."""

    def __init__(self, dataset: Any):
        self.dataset, self.location, self.parts, self.roots = dataset, "datasets.IterableDataset", ["stream"], [Path.cwd()]
        self.remote = True

    def columns(self, part: str) -> list[str]:
        return list(self.dataset.column_names or next(iter(self.dataset), {}))

    def count(self, part: str) -> int:
        raise GranulonError("The rows of a stream cannot be counted: no manifest can describe them.")

    def rows(self, part, wanted, columns):
        features = self.dataset.features or {}
        labels = {name: feature.names for name, feature in features.items() if hasattr(feature, "names")}
        rows = self.dataset.decode(False) if features else self.dataset  # without known features there is nothing to decode
        for number, row in zip(wanted, itertools.islice(rows, wanted.start, wanted.stop), strict=False):
            named = {
                name: names[row[name]] for name, names in labels.items() if (row[name] or 0) >= 0 and row[name] is not None
            }
            yield number, row | named


# --- from a name to a source --------------------------------------------------------------------------------------------


def split_of(part: str) -> str | None:
    """The split that a file's name or folder says it belongs to: `data/train-00000-of-00002.parquet`, `val/x.parquet`.

    Shards in `data/` may name any split, as for `datasets.load_dataset`; other files only a usual one.
    """
    if shard := re.fullmatch(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\.parquet", part):
        return SPLIT_WORDS.get(shard[1], shard[1])
    for piece in reversed(PurePosixPath(part).with_suffix("").parts):
        for word in re.split(r"[^a-z]+", piece.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None


def splits_of(source: Source) -> list[str]:
    return [source.split] if source.split else sorted({split for split in map(split_of, source.parts) if split})


def take_split(source: Source, split: str, names: Sequence[str] = SPLITS) -> None:
    """Keep the parts of one split; files that name no split at all can be called by one of `names`.

    Raises:
        GranulonError: there is no such split.
    """
    present = splits_of(source)
    if split not in (present or names):
        has = "it has" if present else "its files name none, and it can be called"
        raise GranulonError(f"{source.location!r} has no split {split!r}; {has} {', '.join(map(repr, present or names))}.")
    if present and not source.split:
        source.parts = [part for part in source.parts if split_of(part) == split]


def open_source(source: Any, revision: str | None = None, split: str = "train") -> Source:
    """What a user calls a source, as a [`Source`].

    Args:
        source: `owner/name` on the Hub; a folder, file or list of files (Parquet, JSON, lines); a folder of `save_to_disk`; or
            a `datasets.Dataset`, `IterableDataset` or dictionary of these by split.
        split (`str`): which of the splits, where `datasets` keeps them apart.

    Raises:
        GranulonError: it does not exist, or holds nothing that can be read.
    """
    if isinstance(source, Mapping):
        picked = pick_split(source, split, "The dictionary of data sets")
        found = open_source(source[picked], revision, split)
        found.split = picked
        return found
    if hasattr(source, "with_format") and hasattr(source, "column_names"):
        return DatasetSource(source) if hasattr(source, "__len__") else StreamSource(source)
    if isinstance(source, list | tuple):
        files = [Path(path).expanduser().resolve() for path in source]
        return open_files(Path(os.path.commonpath([path.parent for path in files])), files, "the list of files")
    source = str(source).removeprefix("hf://datasets/")
    path = Path(source).expanduser()
    if path.is_file():
        return open_files(path.parent, [path], source, location=str(path))
    if path.is_dir():
        return open_folder(path, split)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        return open_hub(source, revision)
    raise GranulonError(f"There is no file or folder {source!r}, and it is no owner/name of a data set on the Hub.")


def pick_split(names: Iterable[str], split: str, what: str) -> str:
    """The name of a split among others, which may be another word for it.

    Raises:
        GranulonError: there is none; a hold-out is a part of what there is to train on, unless it is there as a split.
    """
    known = {SPLIT_WORDS.get(name, name): name for name in names}
    known |= {name: name for name in names}
    for wanted in (split, SPLIT_WORDS.get(split), "train" if split == "holdout" else None):
        if wanted in known:
            return known[wanted]
    raise GranulonError(f"{what} has no split {split!r}; it has {', '.join(map(repr, names))}.")


def open_folder(path: Path, split: str) -> Source:
    if (path / "dataset_dict.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_text())["splits"]
        picked = pick_split(names, split, repr(str(path)))
        found = open_folder(path / picked, split)
        found.split = picked
        return found
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        from datasets import load_from_disk

        return DatasetSource(load_from_disk(path), str(path), stored=True)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not is_hidden(file.relative_to(path)))
    if (path / "chat.json") in files:
        files = [path / "chat.json"]
    return open_files(path, files, str(path))


def is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def open_files(root: Path, files: list[Path], name: str, location: str | None = None) -> Source:
    """The first kind of which there are any: Parquet, JSON, lines."""
    by_kind: dict[str, list[Path]] = {}
    for file in files:
        by_kind.setdefault({".jsonl": ".json"}.get(file.suffix.lower(), file.suffix.lower()), []).append(file)
    found: Source
    if ".parquet" in by_kind:
        parts = [file.relative_to(root).as_posix() for file in by_kind[".parquet"]]
        missing = [part for part in parts if not (root / part).is_file()]
        if missing:
            raise GranulonError(f"There is no file {str(root / missing[0])!r}.")
        found = ParquetSource(str(root), str(root), parts)
    elif ".json" in by_kind:
        found = read_json(root, by_kind[".json"])
    elif ".txt" in by_kind:
        found = read_lines(root, by_kind[".txt"])
    else:
        raise GranulonError(f"{name!r} holds no Parquet, JSON or question|answer files.")
    found.location = location or found.location
    return found


def open_hub(repo: str, revision: str | None) -> Source:
    """The Parquet files of a repository at one commit; nothing but their list is fetched."""
    from huggingface_hub import HfApi, HfFileSystem

    try:
        sha = HfApi().dataset_info(repo, revision=revision).sha
        fs = HfFileSystem()
        root = f"datasets/{repo}@{sha}"
        files = fs.find(root)  # lists with sizes, so that opening a file asks no more
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise GranulonError(
            f"Cannot reach the data set {repo!r} on the Hub ({reason}); give source=… for a local copy."
        ) from error
    parts = sorted(file.removeprefix(f"{root}/") for file in files if file.endswith(".parquet"))
    if not parts:
        raise GranulonError(f"The data set {repo!r} has no Parquet files; try revision='refs/convert/parquet'.")
    return ParquetSource(repo, root, parts, fs, sha)
