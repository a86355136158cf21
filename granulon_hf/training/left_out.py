"""Samples that are left out of training, told by whoever leaves them out: workers of the loader, and other processes."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def problems_of(collator: Any, samples: Any) -> list[Any]:
    """Return what a collator and its samples list as unusable; both lists only grow."""
    return [*getattr(samples, "problems", []), *getattr(collator, "problems", [])]


def as_line(problem: Any) -> str:
    """Write a problem as a line of JSON."""
    return json.dumps(problem if isinstance(problem, dict) else problem._asdict())


class Reporting:
    """A collator whose batches also say, as `problems`, what was left out since the one before.

    Workers of a DataLoader have copies of the collator and the samples, with lists that nobody else sees.

    Args:
        collator (`callable`): makes batches.
        samples: what the DataLoader reads.

    Attributes:
        told (`dict[str, None]`): what was said before, or is known where this is made.
    """

    def __init__(self, collator: Callable[[Any], Mapping[str, Any]], samples: Any):
        self.collator, self.samples = collator, samples
        self.told = dict.fromkeys(map(as_line, problems_of(collator, samples)))

    def __call__(self, rows: Sequence[Any]) -> Mapping[str, Any]:
        batch = self.collator(rows)
        problems = problems_of(self.collator, self.samples)
        if len(problems) == len(self.told):  # as nearly always
            return batch
        new = [line for line in map(as_line, problems) if line not in self.told]
        self.told |= dict.fromkeys(new)
        return {**batch, "problems": new} if new else batch
