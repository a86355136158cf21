"""Files that are whole or not there, and journals that survive `kill -9`."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a path to write to, which takes the place of `path` at the end: what was there stays until then."""
    part = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class Journal:
    """A JSONL file to which rows are added as they come, each of them whole on the disk before the next is made.

    What a killed process was writing is a torn line: it is no row, and whoever goes on begins a new line behind it.

    The file need not exist; `key` is what every row has.
    """

    def __init__(self, path: str | os.PathLike, key: str = "id"):
        self.path = Path(path)
        self.key = key

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that are there, one at a time; lines that are torn or damaged are left out."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict) and self.key in row:
                    yield row

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows, and wait until the disk has them."""
        with open(self.path, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                file.write(b"" if file.read(1) == b"\n" else b"\n")
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file whole or not at all; `errors` says what to do with lone surrogates, as in `str.encode`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors=errors)


def existing(path: Path) -> Path:
    """Return the path or, where there is none yet, the nearest folder above that exists."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield `size` items at a time, and at last what is left."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
