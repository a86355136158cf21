"""Which rows a subset is made of: uniform, the same for the same seed, apart from the hold-out, and with few files read."""

import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from granulon_hf.data.datasets.base import Adapter, Levels, NoHoldout
from granulon_hf.data.readers import Source
from granulon_hf.errors import GranulonError

HOLDOUT_FILES = 32  # that a hold-out is drawn from
HOLDOUT_SHARE = 10  # a hold-out is taken from at least so many times its rows


def file_order(parts: Iterable[str], seed: int) -> list[str]:
    """Put parts in a seeded order of which every beginning holds each folder in proportion (sets are ordered by category)."""
    folders: dict[str, list[str]] = {}
    for part in sorted(parts):
        folders.setdefault(str(PurePosixPath(part).parent), []).append(part)
    random = np.random.default_rng([seed, 0])
    keys = {}
    for _, members in sorted(folders.items()):
        start = random.random()
        for i, position in enumerate(random.permutation(len(members))):
            keys[members[position]] = (i + start) / len(members)
    return sorted(keys, key=lambda part: (keys[part], part))


class Population:
    """The eligible rows of parts, and what they share, found when they are needed."""

    def __init__(self, source: Source, adapter: Adapter):
        self.source = source
        self.adapter = adapter
        self.rows: dict[str, np.ndarray] = {}
        self.filtered: Counter[str] = Counter()
        self.held: dict[str, np.ndarray] = {}
        self.level = 0
        self.shared: frozenset[str] = frozenset()  # names on that level, which are held out
        self._names: dict[str, list[Levels]] = {}

    def prefix(self, order: list[str], files: int, rows: int) -> tuple[list[str], int]:
        """Take the first parts, at least `files` and with at least `rows` eligible rows, or all; return them and their rows."""
        taken, total = 0, 0
        while taken < len(order) and (taken < files or total < rows):
            batch = order[taken : max(files, taken + 1)]
            self.find([part for part in batch if part not in self.rows])
            total += sum(len(self.rows[part]) for part in batch)
            taken += len(batch)
        return order[:taken], total

    def find(self, parts: list[str]) -> None:
        """Look at new parts: which of their rows are eligible."""
        readable = self.source.gather(self.source.readable, parts)
        self.rows |= {part: np.arange(self.source.count(part) if readable[part] else 0) for part in parts}
        if self.adapter.unwanted is not None:
            column, judge = self.adapter.unwanted
            parts = [part for part in parts if readable[part]]
            for part, values in self.source.gather(lambda part: self.source.column(part, column), parts).items():
                reasons = [judge(value) for value in values]
                self.filtered.update(reason for reason in reasons if reason)
                self.rows[part] = self.rows[part][[reason is None for reason in reasons]]

    def names(self, part: str) -> list[Levels]:
        """Return what each row shares with others, level by level."""
        if part not in self._names and self.adapter.group is not None:
            column, name = self.adapter.group
            names = [name(value) for value in self.source.cells(part, column)]
            self._names[part] = [names[row] for row in self.rows[part]]
        return self._names[part]

    def hold_out(self, pool: list[str], count: int, random: np.random.Generator) -> bool:
        """Draw `count` rows, and note what no other row may then share with them; tell whether enough others are left.

        Rows are taken by whole groups: of the coarsest level (videos) that leaves half of the rows, or else of the finest
        (images). Of the last group only so many as are wanted: its other rows are on neither side.
        """
        rows = {part: self.rows[part] for part in pool}
        if self.adapter.group is None:
            self.held = trim(rows, count, random)
            return True
        every = [levels for part in pool for levels in self.names(part)]
        for level in range(last := len(every[0])):
            names = [levels[level] for levels in every]
            groups: dict[Any, list[int]] = {}
            for i, own in enumerate(names):
                groups.setdefault(own[0] if own else i, []).append(i)
            members, taken = list(groups.values()), list[int]()
            for group in random.permutation(len(members)):
                taken += members[group] if len(taken) < count else []
            kept = random.permutation(taken)[:count]
            shared = frozenset(name for i in kept for name in names[i])
            free = sum(shared.isdisjoint(own) for own in names) - sum(not names[i] for i in kept)
            if free >= len(names) / 2 or (free and level == last - 1):
                self.held, self.level, self.shared = share_out(rows, kept), level, shared
                return True
        return False

    def free(self, part: str) -> np.ndarray:
        """Return the rows of a part that are not held out and share nothing with those that are."""
        rows = self.rows[part]
        if self.shared:
            rows = rows[[self.shared.isdisjoint(levels[self.level]) for levels in self.names(part)]]
        return np.setdiff1d(rows, self.held.get(part, rows[:0]))


def choose(
    population: Population, *, seed: int, holdout_seed: int, limit: int | None, drawn: bool, holdout: int | None, max_files: int
) -> tuple[dict[str, np.ndarray], int]:
    """Draw a subset of a population whose rows nobody has looked at.

    The hold-out is drawn first: `holdout` rows from the first 32 parts of its own seeded order (more where these are small).
    Training never sees these rows, nor others of their groups, whatever its own seed, limit and `max_files`: the two are
    disjoint by construction. Within the parts that are drawn from, every row is equally likely. (Ours; the paper says
    "uniformly sampling" and "hold out".)

    With `drawn` the hold-out itself is wanted, and not what is left; of `max_files` parts a limited subset is drawn, 0 for all.

    Returns:
        `tuple`: chosen rows by part, ascending; and how many are held out.
    """
    source, order = population.source, file_order(population.source.parts, seed)
    asked = population.adapter.holdout if holdout is None else holdout
    if asked:
        pool, total = population.prefix(file_order(source.parts, holdout_seed), HOLDOUT_FILES, HOLDOUT_SHARE * asked)
        enough = asked < total and (holdout is not None or total >= HOLDOUT_SHARE * asked)
        # Sorted names: the permutation, not the order of files, decides.
        if not enough or not population.hold_out(sorted(pool), asked, np.random.default_rng([holdout_seed, 1])):
            if holdout is not None:
                reason = "too few" if asked >= total else "but too few that share no video or image with others,"
                raise GranulonError(f"{source.location!r} has {total} rows, {reason} to hold out {asked}.")
            asked = 0
    if drawn:
        if not asked:
            advice = "say how many rows: holdout=… here and for training alike"
            raise NoHoldout(f"{source.location!r} has no hold-out by default; {advice}.")
        if limit is not None and limit > asked:
            raise GranulonError(f"The hold-out has {asked} rows, not {limit}; ask for holdout={limit} here and for training.")
        free = population.held
    else:
        bound = max_files if max_files and limit is not None else len(order)
        parts, _ = population.prefix(order, bound, (limit or 0) + asked)
        free = {part: population.free(part) for part in sorted(parts)}
        if limit is not None and 0 < (have := sum(map(len, free.values()))) < limit:
            warnings.warn(f"{limit} rows were asked for, but {source.location!r} has only {have}: all are taken.", stacklevel=4)
    chosen = free if limit is None else trim(free, limit, np.random.default_rng([seed, 2]))
    return {part: rows for part, rows in sorted(chosen.items()) if len(rows)}, asked


def trim(rows: dict[str, np.ndarray], count: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw `count` of the rows, uniformly."""
    return share_out(rows, random.permutation(sum(map(len, rows.values())))[:count])


def share_out(rows: dict[str, np.ndarray], kept: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows at positions that count through all parts, in their order."""
    ends = np.cumsum([len(numbers) for numbers in rows.values()])
    chosen = np.zeros(sum(map(len, rows.values())), dtype=bool)
    chosen[kept] = True
    return {part: numbers[piece] for (part, numbers), piece in zip(rows.items(), np.split(chosen, ends), strict=False)}
