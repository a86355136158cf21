"""Sets whose rows are put together from several JSON files, with the images in a folder beside them."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from granulon_hf.data.readers import RecordSource, parse_json
from granulon_hf.errors import GranulonError

Rows = list[dict[str, Any]]


def read_table(path: Path, name: str, fields: Sequence[str] = ()) -> Any:
    """Read a JSON file of a set, an object where it must have `fields`."""
    if not path.is_file():
        raise GranulonError(f"The files of {name!r} are not complete: there is no {str(path)!r}.")
    found = parse_json(path.read_bytes(), f"The file {str(path)!r}")
    if isinstance(found, ValueError):
        raise GranulonError(f"{found}.")
    if missing := [field for field in fields if not isinstance(found, dict) or field not in found]:
        raise GranulonError(f"The file {str(path)!r} is not of {name!r}: it has no {missing[0]!r}.")
    return found


def open_joined(
    name: str, place: Any, wanted: str, join: Callable[[Path], tuple[Rows, dict[str, Any]]], images: Sequence[str]
) -> RecordSource:
    """Open a set in a folder.

    Args:
        name (`str`): of the set.
        place: what the user calls its source.
        wanted (`str`): what that must be, for messages.
        join (`callable`): makes rows of the folder, and the columns that are the same in all of them.
        images (`list[str]`): folders that images may be in.
    """
    root = Path(place or "").expanduser()
    if place is None or not root.is_dir():
        what = "is in no repository" if place is None else f"is not in {str(place)!r}, which is no folder"
        raise GranulonError(f"{name!r} {what}: say where its files are with --source, {wanted}.")
    try:
        rows, shared = join(root)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"a record lacks {error}" if isinstance(error, KeyError) else "a file has another form"
        raise GranulonError(f"The files in {str(root)!r} are not those of {name!r} ({reason}); it takes {wanted}.") from None
    digest = hashlib.sha256(json.dumps([rows, shared], sort_keys=True).encode()).hexdigest()[:24]
    source = RecordSource(str(root), root, {name: [(name, i, row | shared) for i, row in enumerate(rows)]}, {name: digest})
    source.roots = [root, *(root / folder for folder in images)]
    return source
