"""What was paid for, in JSONL files that survive kill -9 and that several processes share.

An *answer* is one reply of the judge; a *row* is an answer in the store.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


class Log:
    """An append-only JSONL file that several processes may write: one `write` per row, under a lock, then fsync.

    A torn last line (a killed writer, a full disk) is skipped by readers and closed off by the next writer.

    Args:
        path: of the file; None keeps rows in memory.
        add: called with every row, old ones first, rows of other processes too.
    """

    def __init__(self, path: str | os.PathLike | None, add: Callable[[dict], None]):
        self.path = path
        self.add = add
        self.offset = 0
        self.fd = -1
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
        self.lock = FileLock(f"{path}.lock")
        self.refresh()

    def read(self, start: int, size: int = -1) -> bytes:
        with open(self.fd, "rb", closefd=False) as file:
            file.seek(start)
            return file.read(size)

    def refresh(self) -> None:
        """Read the rows that were added since."""
        if self.path is None or os.fstat(self.fd).st_size <= self.offset:
            return
        data = self.read(self.offset)
        end = data.rfind(b"\n") + 1
        self.offset += end
        for line in data[:end].split(b"\n"):
            try:
                self.add(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                continue  # torn, or no row of ours

    def append(self, row: dict) -> None:
        if self.path is None:
            self.add(row)
            return
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self.lock:
            size = os.fstat(self.fd).st_size
            if size and self.read(size - 1, 1) != b"\n":
                line = b"\n" + line
            if os.write(self.fd, line) != len(line):
                raise OSError(f"{self.path} could not be written: is the disk full?")
        os.fsync(self.fd)
        self.refresh()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Store(Log):
    """The answers to requests, by key.

    `claim` keeps two processes from paying for the same key at the same time. A claim is a file lock, which the system lets go
    when its process ends, however it ends. Keys that begin alike share one of 256 files: another process may wait for longer
    than it has to, but never pays twice.
    """

    def __init__(self, path: str | os.PathLike | None):
        self.rows: dict[str, dict[int, dict]] = {}
        self.claims: dict[str, FileLock] = {}
        super().__init__(path, self.keep)

    def keep(self, row: dict) -> None:
        if not isinstance(row["key"], str) or row["attempt"] not in (0, 1):
            raise ValueError
        self.rows[row["key"]] = {**(self.rows.get(row["key"], {}) if row["attempt"] else {}), row["attempt"]: row}

    def answers(self, key: str) -> list[dict]:
        return [row for _, row in sorted(self.rows.get(key, {}).items())]

    def claim(self, key: str) -> bool:
        """Return whether this process alone may ask for a key now; `release` has to follow."""
        if self.path is None:
            return True
        folder = Path(f"{self.path}.claims")
        folder.mkdir(exist_ok=True)
        try:
            self.claims.setdefault(key[:2], FileLock(folder / key[:2])).acquire(blocking=False)
        except Timeout:
            return False
        return True

    def release(self, key: str) -> None:
        if self.path is not None:
            self.claims[key[:2]].release()


class Ledger(Log):
    """The batches of a store, `<store>.batches.jsonl`: an intent before a batch is created, its id after, and its end.

    Its `lock` is held by the one process that submits and collects for the store.
    """

    def __init__(self, store: str | os.PathLike | None, create: bool):
        self.intents: dict[str, dict] = {}
        path = f"{store}.batches.jsonl"
        super().__init__(path if create or (store is not None and os.path.exists(path)) else None, self.keep)

    def keep(self, row: dict) -> None:
        self.intents.setdefault(row["intent"], {}).update(row)

    def unfinished(self) -> list[dict[str, Any]]:
        return [intent for intent in self.intents.values() if "done" not in intent and "names" in intent]
