"""Data sets as one kind of record."""

from granulon_hf.data.sample import TASKS, Sample

__all__ = ["TASKS", "Sample"]
