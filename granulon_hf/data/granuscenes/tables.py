"""The set's wording and pictures' names, which are data."""

from importlib.resources import files
from typing import Any

import yaml


def read_table(name: str) -> Any:
    """Read a YAML file of this folder."""
    return yaml.safe_load(files("granulon_hf.data.granuscenes").joinpath(name).read_text(encoding="utf-8"))
