"""From what a user calls a source to its [`~granulon_hf.data.readers.Source`]."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from granulon_hf.data import readers
from granulon_hf.data.datasets.base import Adapter, one_line
from granulon_hf.data.readers import SPLIT_WORDS, DatasetSource, ParquetSource, Source, StreamSource
from granulon_hf.errors import GranulonError


def open_source(source: Any, revision: str | None = None, split: str = "train") -> Source:
    """Open what a user calls a source, the split of it where `datasets` keeps them apart.

    Args:
        source: `owner/name` on the Hub; a folder, file or list of files (Parquet, JSON, CSV, lines); a folder of
            `save_to_disk`; or a `datasets.Dataset`, `IterableDataset` or dictionary of these by split.
    """
    if isinstance(source, Mapping):
        known = {SPLIT_WORDS.get(name, name): name for name in source} | {name: name for name in source}
        # A hold-out is a part of train, unless it is a split of its own.
        words = (split, SPLIT_WORDS.get(split), "train" if split == "holdout" else None)
        if (picked := next((known[word] for word in words if word in known), None)) is None:
            raise GranulonError(f"The source has no split {split!r}; it has {', '.join(map(repr, source))}.")
        found = open_source(source[picked], revision, split)
        found.split = picked
        return found
    if hasattr(source, "with_format") and hasattr(source, "column_names"):
        return DatasetSource(source) if hasattr(source, "__len__") else StreamSource(source)
    if isinstance(source, list | tuple):
        files = [Path(path).expanduser().resolve() for path in source]
        if missing := [str(file) for file in files if not file.is_file()]:
            raise GranulonError(f"There is no file {missing[0]!r}.")
        root = Path(os.path.commonpath([file.parent for file in files]))
        return open_files(root, files, str(root))
    name = str(source).removeprefix("hf://datasets/")
    path = Path(name).expanduser()
    if path.is_file():
        return open_files(path.parent, [path], str(path))
    if path.is_dir():
        return open_folder(path, split)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return open_hub(name, revision)
    raise GranulonError(f"There is no file or folder {name!r}, and it is no owner/name of a data set on the Hub.")


def open_folder(path: Path, split: str) -> Source:
    """Open a folder of files, or one that `save_to_disk` wrote."""
    if (path / "dataset_dict.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_text())["splits"]
        return open_source({name: path / name for name in names}, split=split)
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        from datasets import load_from_disk

        return DatasetSource(load_from_disk(path), path)
    files = sorted(path.rglob("*"))
    if (path / "chat.json").is_file():
        files = [path / "chat.json"]
    shown = [file for file in files if not any(name.startswith((".", "_")) for name in file.relative_to(path).parts)]
    return open_files(path, [file for file in shown if file.is_file()], str(path))


def open_files(root: Path, files: list[Path], location: str) -> Source:
    """Open the files of the first kind of which there are any: Parquet, JSON, CSV, lines."""

    def of_kind(*endings: str) -> list[Path]:
        return [file for file in files if file.suffix.lower() in endings]

    if parquet := of_kind(".parquet"):
        return ParquetSource(location, str(root), [file.relative_to(root).as_posix() for file in parquet])
    if chats := of_kind(".json", ".jsonl"):
        return readers.read_json(root, chats, location)
    if tables := of_kind(".csv"):
        return readers.read_csv(root, tables, location)
    if lines := of_kind(".txt"):
        return readers.read_lines(root, lines, location)
    raise GranulonError(f"{location!r} holds no Parquet, JSON, CSV or question|answer files.")


def open_hub(repo: str, revision: str | None) -> Source:
    """Open the Parquet files of a repository at one commit; nothing but their list is fetched."""
    from huggingface_hub import HfApi, HfFileSystem

    try:
        sha = HfApi().dataset_info(repo, revision=revision).sha
        fs = HfFileSystem()
        root = f"datasets/{repo}@{sha}"
        files = fs.find(root)  # lists with sizes, so that opening a file asks no more
    except Exception as error:  # the client raises what its many layers raise
        reason = f"({one_line(error)}); give source=… for a local copy"
        raise GranulonError(f"Cannot reach the data set {repo!r} on the Hub {reason}.") from error
    parts = sorted(file.removeprefix(f"{root}/") for file in files if file.endswith(".parquet"))
    if not parts:
        raise GranulonError(f"The data set {repo!r} has no Parquet files; try revision='refs/convert/parquet'.")
    return ParquetSource(repo, root, parts, fs, sha)


def check_columns(adapter: Adapter, source: Source, parts: Iterable[str]) -> None:
    """Refuse files that lack a column which the adapter needs, before any work; a file without rows lacks nothing."""
    for part in parts:
        present = source.columns(part)
        missing = [column for column in adapter.columns if not set(column.split("|")) & set(present)]
        if present and missing:
            lacks = ", ".join(" or ".join(map(repr, column.split("|"))) for column in missing)
            what = "" if adapter.name == "columns" else f" is not {adapter.name}: it"
            has = ", ".join(map(repr, present))
            raise GranulonError(f"{part!r} of {source.location!r}{what} lacks the columns {lacks}; it has {has}.")
        if not present and isinstance(source, StreamSource):
            raise GranulonError(f"{source.location!r} is empty.")
        if not present and source.count(part):
            reason = next(source.rows(part, range(1), []))[1] or "its first record is empty"
            raise GranulonError(f"{part!r} of {source.location!r} is not {adapter.name}: {reason}.")
