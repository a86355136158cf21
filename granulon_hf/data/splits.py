"""Names of splits: what files, folders and people call them."""

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from granulon_hf.errors import GranulonError

if TYPE_CHECKING:
    from granulon_hf.data.readers import Source

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


def splits_of(source: "Source") -> list[str]:
    """List the splits that a source names, sorted."""
    return [source.split] if source.split else sorted({split for split in map(split_of, source.parts) if split})


def take_split(source: "Source", split: str, names: Sequence[str] = SPLITS) -> None:
    """Keep the parts of one split; a source that names no split can be called by one of `names`.

    Raises:
        GranulonError: there is no such split.
    """
    present = splits_of(source)
    if split not in (present or names):
        has = "it has" if present else "its files name none, and it can be called"
        raise GranulonError(f"{source.location!r} has no split {split!r}; {has} {', '.join(map(repr, present or names))}.")
    if present and not source.split:
        source.parts = [part for part in source.parts if split_of(part) == split]


def pick_split(names: Iterable[str], split: str, what: str) -> str:
    """Choose a split by its name or another word for it.

    Raises:
        GranulonError: there is none; a hold-out is a part of the training split, unless it is a split of its own.
    """
    known = {SPLIT_WORDS.get(name, name): name for name in names} | {name: name for name in names}
    for wanted in (split, SPLIT_WORDS.get(split), "train" if split == "holdout" else None):
        if wanted in known:
            return known[wanted]
    raise GranulonError(f"{what} has no split {split!r}; it has {', '.join(map(repr, names))}.")
