"""Manifests: a subset as a file that names every row, to load the very same rows again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from granulon_hf.data.datasets.base import Adapter
from granulon_hf.data.datasets.custom import make_adapter
from granulon_hf.data.datasets.registry import ADAPTERS
from granulon_hf.data.opening import check_columns, open_place
from granulon_hf.data.readers import DatasetSource, Source
from granulon_hf.data.samples import Samples
from granulon_hf.errors import GranulonError

MANIFEST_FORMAT = 1


def describe(adapter: Adapter, source: Source, place: Any, columns: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the head of a manifest: which set, from where."""
    from granulon_hf import __version__

    in_memory = adapter.opener is not None or (isinstance(source, DatasetSource) and not source.stored)
    several = [str(path) for path in place] if isinstance(place, list | tuple) else None
    location = source.location if source.remote or in_memory else str(Path(source.location).resolve())
    return {
        "format": MANIFEST_FORMAT,
        "granulon_hf": __version__,
        "name": adapter.name,
        "columns": dict(columns) if columns is not None else None,
        "source": several or location,
        "revision": source.revision,
    }


def load_manifest(manifest, name, source, columns, on_error, verify) -> Samples:
    """Load the rows of a manifest; refuse files that are no longer those that it describes."""
    if not isinstance(manifest, Mapping):
        try:
            manifest = json.loads(Path(manifest).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise GranulonError(f"Cannot read the manifest {str(manifest)!r} ({error}).") from None
    if not isinstance(manifest, Mapping) or manifest.get("format") != MANIFEST_FORMAT or "files" not in manifest:
        raise GranulonError("This is no manifest of a subset that this version of granulon_hf can read.")
    check_manifest(manifest)
    if name is not None and name != manifest["name"]:
        raise GranulonError(f"The manifest describes {manifest['name']!r}, not {name!r}.")
    columns = columns or manifest["columns"]
    adapter = make_adapter(columns) if columns is not None else ADAPTERS.get(manifest["name"])
    if adapter is None:
        raise GranulonError(f"The manifest's data set {manifest['name']!r} is not known.")
    if source is None and manifest["source"] == "datasets.Dataset":
        raise GranulonError("The manifest describes a datasets.Dataset that was in memory: give it again with source=….")
    place = manifest["source"] if source is None else source
    opened = open_place(adapter, place, manifest["revision"], manifest["split"])
    opened.broken.update(manifest.get("unreadable", {}))
    rows = {}
    known = set(opened.parts)
    opened.prepare(part for part in manifest["files"] if part in known)
    for part, entry in manifest["files"].items():
        if part not in known:
            raise changed(opened, part, "it is gone")
        if opened.count(part) != entry["rows"]:
            raise changed(opened, part, f"it has {opened.count(part)} rows instead of {entry['rows']}")
        found = opened.fingerprint(part)
        if found and entry["fingerprint"] and found != entry["fingerprint"]:
            raise changed(opened, part, "its content is another")
        rows[part] = np.arange(entry["rows"]) if entry["take"] == "all" else np.asarray(entry["take"], dtype=np.int64)
    check_columns(adapter, opened, rows)
    header = {key: value for key, value in manifest.items() if key not in ("files", "filtered", "unreadable")}
    options: dict[str, Any] = {"on_error": on_error, "verify": verify, "description": header}
    samples = Samples(adapter, opened, manifest["split"], rows, filtered=manifest["filtered"], **options)
    ids = {part: entry["ids"] for part, entry in manifest["files"].items()}
    if None not in ids.values() and samples.ids != ids:
        part = next(part for part in ids if samples.ids is None or samples.ids[part] != ids[part])
        raise changed(opened, part, "its rows have other ids")
    return samples


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest that lacks something, or lists rows that its files do not have."""
    files: Mapping[str, Any] = manifest["files"] if isinstance(manifest["files"], Mapping) else {"files": None}
    own = ("name", "columns", "source", "revision", "split", "filtered")
    wanted: list[tuple[str, Any, tuple[str, ...]]] = [("the manifest", manifest, own)]
    wanted += [(repr(part), entry, ("rows", "fingerprint", "take", "ids")) for part, entry in files.items()]
    for where, entry, keys in wanted:
        if lacking := [key for key in keys if not isinstance(entry, Mapping) or key not in entry]:
            raise GranulonError(f"The manifest is not whole: {where} lacks {', '.join(map(repr, lacking))}.")
    for part, entry in files.items():
        rows, take = entry["rows"], entry["take"]
        listed = isinstance(take, list) and all(isinstance(row, int) and 0 <= row < rows for row in take)
        if take != "all" and not listed:
            raise GranulonError(f"The manifest is wrong: it takes rows of {part!r} that are none of its {rows}.")


def changed(source: Source, part: str, what: str) -> GranulonError:
    """Return the error for a file that is no longer what the manifest describes."""
    return GranulonError(f"{part!r} of {source.location!r} has changed since the manifest was written: {what}.")
