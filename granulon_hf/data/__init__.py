"""Data sets as one kind of record.

What reads data needs `datasets` and `pyarrow` (`pip install 'granulon-hf[train]'` or `[eval]`); it is imported when it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from granulon_hf.data.datasets.base import Adapter, BadRow
from granulon_hf.data.sample import TASKS, Sample
from granulon_hf.errors import GranulonError

if TYPE_CHECKING:
    from granulon_hf.data.datasets.registry import ADAPTERS
    from granulon_hf.data.loading import load
    from granulon_hf.data.prepared.check import check
    from granulon_hf.data.prepared.write import prepare
    from granulon_hf.data.samples import Problem, Samples

__all__ = [
    "ADAPTERS",
    "TASKS",
    "Adapter",
    "BadRow",
    "GranulonError",
    "Problem",
    "Sample",
    "Samples",
    "check",
    "load",
    "prepare",
]

_LAZY = {
    "ADAPTERS": "datasets.registry",
    "Problem": "samples",
    "Samples": "samples",
    "check": "prepared.check",
    "load": "loading",
    "prepare": "prepared.write",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
