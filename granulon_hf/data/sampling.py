"""Which rows a subset is made of: uniform, the same for the same seed, apart from the hold-out, and with few files read."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from granulon_hf.data.adapter import DataError
from granulon_hf.data.sources import Source

HOLDOUT_FILES = 32  # that a hold-out is drawn from
HOLDOUT_SHARE = 10  # a hold-out is taken from at least so many times its rows


@dataclass
class Choice:
    """Chosen rows by part, ascending; how many are held out; and what was no part of the set, by reason."""

    rows: dict[str, np.ndarray]
    holdout: int
    filtered: Counter[str] = field(default_factory=Counter)


def file_order(parts: Iterable[str], seed: int) -> list[str]:
    """Parts in a seeded order of which every beginning holds each folder in proportion (sets are ordered by category)."""
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
    """The eligible rows of parts, found when they are needed."""

    def __init__(self, source: Source, unwanted: tuple[str, Callable[[Any], str | None]] | None):
        self.source, self.unwanted = source, unwanted
        self.rows: dict[str, np.ndarray] = {}
        self.filtered: Counter[str] = Counter()

    def find(self, parts: list[str]) -> None:
        parts = [part for part in parts if part not in self.rows]
        self.source.prepare(parts)
        self.rows |= {part: np.arange(self.source.count(part)) for part in parts}
        if self.unwanted is not None:
            column, judge = self.unwanted
            for part, values in self.source.column_of(parts, column).items():
                reasons = [judge(value) for value in values]
                self.filtered.update(reason for reason in reasons if reason)
                self.rows[part] = self.rows[part][[reason is None for reason in reasons]]

    def prefix(self, order: list[str], files: int, rows: int) -> tuple[list[str], int]:
        """The first parts, at least `files` and with at least `rows` rows, or all; and their rows."""
        taken, total = 0, 0
        while taken < len(order) and (taken < files or total < rows):
            batch = order[taken : max(files, taken + 1)]
            self.find(batch)
            total += sum(len(self.rows[part]) for part in batch)
            taken += len(batch)
        return order[:taken], total


def choose(
    source: Source,
    *,
    seed: int,
    limit: int | None,
    draw_holdout: bool,
    holdout: int | None,
    default_holdout: int,
    max_files: int,
    unwanted: tuple[str, Callable[[Any], str | None]] | None,
) -> Choice:
    """Draw a subset.

    The hold-out is drawn first: `holdout` rows from the first 32 parts of the seeded order (more where these are small).
    Training never sees these rows, whatever its own limit and `max_files`: the two are disjoint by construction. Within the
    parts that are drawn from, every row is equally likely. (Ours; the paper says "uniformly sampling" and "hold out".)

    Args:
        draw_holdout (`bool`): whether the hold-out is wanted, and not what is left.
        holdout (`int`, *optional*): rows held out; by default `default_holdout` if the set has ten times as many, else none.
        max_files (`int`): parts that a limited subset is drawn from, 0 for all.

    Raises:
        DataError: the hold-out does not fit.
    """
    population, order = Population(source, unwanted), file_order(source.parts, seed)
    held: dict[str, np.ndarray] = {}
    asked = default_holdout if holdout is None else holdout
    if asked:
        pool, total = population.prefix(order, HOLDOUT_FILES, HOLDOUT_SHARE * asked)
        if holdout is None and total < HOLDOUT_SHARE * asked:
            asked = 0
        elif asked >= total:
            raise DataError(f"{source.location!r} has {total} rows, too few to hold out {asked}.")
        # Sorted names: the permutation, not the order of files, decides.
        held = trim({part: population.rows[part] for part in sorted(pool)}, asked, np.random.default_rng([seed, 1]))
    if draw_holdout:
        if not asked:
            raise DataError(
                f"{source.location!r} has no hold-out by default; say how many rows: holdout=… here and for training alike."
            )
        chosen = held if limit is None else trim(held, limit, np.random.default_rng([seed, 2]))
        if limit is not None and limit > asked:
            raise DataError(f"The hold-out has {asked} rows, not {limit}; ask for holdout={limit} here and for training.")
    else:
        bound = max_files if max_files and limit is not None else len(order)
        parts, _ = population.prefix(order, bound, (limit or 0) + asked)
        free = {part: np.setdiff1d(population.rows[part], held.get(part, [])) for part in sorted(parts)}
        if limit is not None and (have := sum(map(len, free.values()))) < limit:
            warnings.warn(f"{limit} rows were asked for, but {source.location!r} has only {have}: all are taken.", stacklevel=4)
        chosen = free if limit is None else trim(free, limit, np.random.default_rng([seed, 2]))
    return Choice({part: rows for part, rows in sorted(chosen.items()) if len(rows)}, asked, population.filtered)


def trim(rows: dict[str, np.ndarray], count: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """`count` of the rows, uniformly."""
    ends = np.cumsum([len(numbers) for numbers in rows.values()])
    total = int(ends[-1]) if len(ends) else 0
    kept = np.sort(random.permutation(total)[:count])
    where = np.searchsorted(kept, ends)
    starts, result = 0, {}
    for (part, numbers), end, first in zip(rows.items(), where, ends - [len(n) for n in rows.values()], strict=True):
        result[part] = numbers[kept[starts:end] - first]
        starts = end
    return result
