"""Names of splits: what files, folders and people call them."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from granulon_hf.errors import GranulonError

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


def pick_split(names: Iterable[str], split: str) -> str:
    """Choose a split by its name or another word for it; a hold-out is a part of train, unless it is a split of its own."""
    known = {SPLIT_WORDS.get(name, name): name for name in names} | {name: name for name in names}
    for wanted in (split, SPLIT_WORDS.get(split), "train" if split == "holdout" else None):
        if wanted in known:
            return known[wanted]
    raise GranulonError(f"The source has no split {split!r}; it has {', '.join(map(repr, names))}.")
