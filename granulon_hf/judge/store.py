"""What was paid for, in JSONL files that survive kill -9 and that several processes share.

An *answer* is one reply of the judge; a *row* is an answer in the store.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

# Of one key: the request, and one more each for an answer that cannot be read or that reached its limit.
ATTEMPTS = 3


class Log:
    """An append-only JSONL file that several processes may write: one `write` per row, under a lock, then fsync.

    A torn last line (a killed writer, a full disk) is skipped by readers and closed off by the next writer. Without a path the
    rows are in memory alone.
    """

    def __init__(self, path: str | os.PathLike | None):
        self.path = path
        self.offset = 0
        self.lock = FileLock(f"{path}.lock")
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a+b", buffering=0)  # noqa: SIM115
            self.refresh()

    def keep(self, row: dict) -> None:
        """Take in a row, this process's or another's; what this raises says that it is no row of ours."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Read the rows that were added since."""
        if self.path is None:
            return
        self.file.seek(self.offset)
        data = self.file.readall()
        end = data.rfind(b"\n") + 1
        self.offset += end
        for line in data[:end].split(b"\n"):
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):  # torn, or not ours
                self.keep(json.loads(line))

    def append(self, row: dict) -> None:
        if self.path is None:
            self.keep(row)
            return
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self.lock:
            if self.file.seek(0, os.SEEK_END):
                self.file.seek(-1, os.SEEK_END)
                line = line if self.file.read() == b"\n" else b"\n" + line
            if self.file.write(line) != len(line):
                raise OSError(f"{self.path} could not be written: is the disk full?")
        os.fsync(self.file.fileno())
        self.refresh()

    def close(self) -> None:
        if self.path is not None:
            self.file.close()


class Store(Log):
    """The answers to requests, by key.

    `claim` keeps two processes from paying for the same key at the same time. A claim is a file lock, which the system lets go
    when its process ends, however it ends. Keys that begin alike share one of 256 files: another process may wait for longer
    than it has to, but never pays twice.
    """

    def __init__(self, path: str | os.PathLike | None):
        self.rows: dict[str, dict[int, dict]] = {}
        self.claims: dict[str, FileLock] = {}
        super().__init__(path)

    def keep(self, row: dict) -> None:
        if not isinstance(row["key"], str) or row["attempt"] not in range(ATTEMPTS):
            raise ValueError
        self.rows[row["key"]] = {**(self.rows.get(row["key"], {}) if row["attempt"] else {}), row["attempt"]: row}

    def answers(self, key: str) -> list[dict]:
        """Return the answers to a request as of now, other processes' too, in the order in which they were asked for."""
        self.refresh()
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

    def __init__(self, store: str | os.PathLike | None):
        self.intents: dict[str, dict] = {}
        super().__init__(f"{store}.batches.jsonl")

    def keep(self, row: dict) -> None:
        self.intents.setdefault(row["intent"], {}).update(row)

    def unfinished(self) -> list[dict[str, Any]]:
        return [intent for intent in self.intents.values() if "done" not in intent and "names" in intent]
