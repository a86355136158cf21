"""Small things about files and sequences that several parts need."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file whole or not at all.

    Args:
        errors (`str`): what to do with half characters, as in `str.encode`.
    """
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8", errors=errors)
    os.replace(part, path)


def existing(path: Path) -> Path:
    """The path or, where there is none yet, the nearest folder above that exists."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """`size` items at a time, and at last what is left."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
