"""`load`: a data set, or a described subset of one, as samples; manifests name every row of a subset, to load it again."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from granulon_hf.data.datasets.base import Adapter
from granulon_hf.data.datasets.custom import make_adapter
from granulon_hf.data.datasets.registry import ADAPTERS
from granulon_hf.data.opening import check_columns, open_source
from granulon_hf.data.prepared import format as prepared
from granulon_hf.data.readers import SPLIT_WORDS, SPLITS, DatasetSource, Source, StreamSource, split_of
from granulon_hf.data.samples import Samples, tell_reasons
from granulon_hf.data.sampling import Population, choose
from granulon_hf.errors import GranulonError

KNOWN = ", ".join(name for name in ADAPTERS if name != "prepared")
ON_ERROR = ("skip", "raise")
VERIFY = ("decode", "header", "none")
MANIFEST_FORMAT = 1


def load(
    name: Any = None,
    split: str | None = None,
    source: Any = None,
    limit: int | None = None,
    seed: int = 0,
    holdout: int | None = None,
    preset: str | None = None,
    on_error: str = "skip",
    manifest: str | Path | Mapping[str, Any] | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    max_files: int | None = None,
    revision: str | None = None,
    verify: str | None = None,
    holdout_seed: int = 0,
) -> Samples:
    """Load a data set as [`Sample`]s. Nothing but row counts and names is read before samples are asked for.

        load("flux-reason", preset="paper")                          # the 200 K rows of training
        load("flux-reason", split="holdout", preset="paper")         # the 1 K held out of them
        load("a-okvqa", source="folder/with/parquet", limit=100)
        load("granuscenes", "test_heldout", source="pictures?scenes=500&seed=7")    # generated: see granuscenes.open_scenes
        load(dataset, columns={"image": "picture", "question": "q", "answer": "a"})
        load("prepared/folder")                                      # of `granulon data prepare`
        load(manifest="manifest.json")                               # the very same rows again

    Args:
        name: a set (`ADAPTERS`), a prepared folder, or with `columns` any table.
        split (`str`, *optional*): by default the set's own: one that the source names in its files, folders or keys ("val" is
            "validation"); a source that names none can be called train, validation or test. "holdout" is what training never
            sees.
        source (*optional*): local files, a `datasets.Dataset` or another repository; by default the set's own on the Hub.
        limit (`int`, *optional*): rows, drawn uniformly; of a stream the first. Bad ones are left out and not replaced.
        seed (`int`): the same seed draws the same rows from the same files.
        holdout (`int`, *optional*): rows held out of training; give both loads the same. By default the set's own (1,000 for
            flux-reason and surgvlm) if there are ten times as many rows. Where several rows may show one image or video, none
            of training shows one of the hold-out; to know, images are read. Of a stream it is the first rows, groups or not.
        holdout_seed (`int`): of the hold-out alone: no `seed` of training ever sees its rows.
        preset (`str`, *optional*): `"paper"`: as many rows as the paper's subset of this split (supplement, section 1).
        on_error (`str`): "skip" bad rows and files that cannot be read (they are listed in `.problems`) or "raise".
        manifest (*optional*): of an earlier load, as file or dictionary; the files must not have changed.
        columns (`dict`, *optional*): for your own tables: the columns that are "image", "question", "answer", "choices", "id";
            "index" instead of "answer" where a number from 0 says which choice is right (so does an answer's column that is
            called `…_idx` or `…_index`); "group" where rows belong together that no hold-out may part, such as patients.
        max_files (`int`, *optional*): files that a limited subset is drawn from, spread over the folders in proportion; 0 for
            all. By default the set's own, because drawing rows from all files reads nearly all of them.
        revision (`str`, *optional*): of the repository; by default the newest commit, which the manifest names.
        verify (`str`, *optional*): "decode" images in full, read only the "header", or "none"; by default "decode", and
            "header" for prepared folders, which were decoded when they were written.

    Raises:
        GranulonError: what was asked for cannot be had, or there is no row of it.
    """
    for what, word, words in (("on_error", on_error, ON_ERROR), ("verify", verify or "none", VERIFY)):
        if word not in words:
            raise GranulonError(f"`{what}` must be {' or '.join(map(repr, words))}; got {word!r}.")
    numbers = {"limit": limit, "holdout": holdout, "max_files": max_files, "seed": seed, "holdout_seed": holdout_seed}
    for what, value in numbers.items():
        least = 1 if what == "limit" else 0
        if value is not None and value < least:
            raise GranulonError(f"`{what}` must be at least {least}; got {value}.")
    if manifest is not None:
        if any(value is not None for value in (split, limit, holdout, preset, max_files, revision)):
            raise GranulonError("A manifest says which rows to take: give source=… and a name with it at most.")
        return load_manifest(manifest, name, source, columns, on_error, verify)
    if name is None:
        raise GranulonError(f"Say which data set: {KNOWN}, a prepared folder, or a manifest.")

    adapter, place = find_adapter(name, source, columns)
    refuse_withheld(adapter, split)  # before anything is fetched
    opened = open_place(adapter, place, revision, adapter.default_split if split is None else split)
    if revision is not None and not opened.remote:
        raise GranulonError(f"revision={revision!r} is of a repository, and {opened.location!r} is none; leave it out.")
    opened.tolerant = on_error == "skip"
    split, drawn = take_split(adapter, opened, split)
    if preset is not None:
        if preset != "paper" or not adapter.paper:
            known = "paper" if adapter.paper else "none"
            raise GranulonError(f"There is no preset {preset!r} of {adapter.name!r}; there is {known}.")
        if split not in adapter.paper:
            known = ", ".join(adapter.paper)
            raise GranulonError(f"The paper has no subset of {adapter.name}'s split {split!r}, only of {known}.")
        limit = limit or adapter.paper[split]
    check_files(adapter, opened, split)
    if isinstance(opened, StreamSource):
        opened, span = open_stream(adapter, opened, split, limit, holdout or 0)
        return Samples(adapter, opened, split, {"stream": span}, on_error=on_error, verify=verify)
    bound = adapter.max_files if max_files is None else max_files
    draws: dict[str, Any] = {"limit": limit, "seed": seed, "holdout_seed": holdout_seed, "max_files": bound}
    population = Population(opened, adapter)
    rows, held = choose(population, drawn=drawn, holdout=holdout, **draws)
    filtered = population.filtered
    if not rows:
        reasons = tell_reasons([*filtered.elements(), *opened.broken.values()])
        what = f"the split {split!r} of {opened.location!r}" if opened.splits else repr(opened.location)
        raise GranulonError(f"There are no rows that can be used in {what}: {reasons or 'it is empty'}.")
    check_columns(adapter, opened, rows)
    description = describe(adapter, opened, place, columns) | {"split": split, "preset": preset, "limit": limit}
    description |= {"seed": seed, "holdout": held, "holdout_seed": holdout_seed, "max_files": bound}
    return Samples(adapter, opened, split, rows, on_error=on_error, verify=verify, description=description, filtered=filtered)


def find_adapter(name: Any, source: Any, columns: Mapping[str, str] | None) -> tuple[Adapter, Any]:
    """Find the adapter that a name means, and where its data are."""
    if columns is not None:
        return make_adapter(columns), name if source is None else source
    if not isinstance(name, str | Path):
        raise GranulonError("Say which columns are image, question and answer: columns=….")
    if name in ADAPTERS:
        adapter = ADAPTERS[str(name)]
        place = adapter.repo if source is None else source
        if place is None and adapter.opener is None:
            raise GranulonError(f"{name!r} is in no repository: say where its files are with source=….")
        return adapter, place
    if source is None and name and (folder := Path(name).expanduser()).is_dir():
        prepared.missing_shards(folder)
        return prepared.ADAPTER, folder
    known = f"{KNOWN}, and with columns=… your own"
    raise GranulonError(f"There is no data set or prepared folder {str(name)!r}; known are {known}.")


def open_place(adapter: Adapter, place: Any, revision: str | None, split: str) -> Source:
    return adapter.opener(place, split) if adapter.opener else open_source(place, revision, split)


def refuse_withheld(adapter: Adapter, split: str | None) -> None:
    if split in adapter.withheld:
        raise GranulonError(f"The answers of {adapter.name}'s split {split!r} are withheld; use {adapter.withheld[split]!r}.")


def take_split(adapter: Adapter, source: Source, split: str | None) -> tuple[str, bool]:
    """Keep the parts of a split, by default the set's own; return its name, and whether it is a hold-out yet to be drawn."""
    present = source.splits
    default = adapter.default_split if adapter.default_split in present or len(present) != 1 else present[0]
    split = default if split is None else split
    if split not in present:
        split = source.split if source.split and split != "holdout" else SPLIT_WORDS.get(split, split)
    refuse_withheld(adapter, split)
    drawn = split == "holdout" and split not in present
    wanted = default if drawn else split
    if wanted not in (known := present or (adapter.default_split, *(["holdout"] if adapter.holdout else SPLITS))):
        has = "it has" if present else "its files name none, and it can be called"
        raise GranulonError(f"{source.location!r} has no split {wanted!r}; {has} {', '.join(map(repr, known))}.")
    if present and not source.split:
        source.parts = [part for part in source.parts if split_of(part) == wanted]
    return split, drawn


def check_files(adapter: Adapter, source: Source, split: str) -> None:
    """Note files that are missing or cannot be read, or refuse them if they are not to be skipped; check the first good one."""
    for shard in prepared.missing_shards(Path(source.location)) if adapter is prepared.ADAPTER else []:
        if split_of(shard) in (split, None):
            if not source.tolerant:
                raise GranulonError(f"{source.location!r}: {shard}: {prepared.MISSING}.")
            source.broken[shard] = prepared.MISSING
    first = next((part for part in source.parts if source.readable(part)), None)
    if first is not None:
        check_columns(adapter, source, [first])
    elif source.parts:
        reason = source.broken[source.parts[0]]
        raise GranulonError(reason if len(source.parts) == 1 else f"Not one of {len(source.parts)} files can be read: {reason}")


def open_stream(adapter: Adapter, source: StreamSource, split: str, limit: int | None, holdout: int):
    """Choose rows of a stream, which cannot be drawn from: the hold-out is its beginning, a limit takes what comes first."""
    if adapter.unwanted is not None:
        column, judge = adapter.unwanted
        source = StreamSource(source.dataset.filter(lambda value: judge(value) is None, input_columns=[column]))
    first, last = (0, holdout) if split == "holdout" else (holdout, sys.maxsize)
    return source, range(first, last if limit is None else min(last, first + limit))


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
    manifest = read_manifest(manifest)
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

    def refuse(part: str, what: str) -> None:
        raise GranulonError(f"{part!r} of {opened.location!r} has changed since the manifest was written: {what}.")

    counts = opened.gather(opened.count, manifest["files"].keys() & set(opened.parts))
    rows = {}
    for part, entry in manifest["files"].items():
        if part not in counts:
            refuse(part, "it is gone")
        if counts[part] != entry["rows"]:
            refuse(part, f"it has {counts[part]} rows instead of {entry['rows']}")
        found = opened.fingerprint(part)
        if found and entry["fingerprint"] and found != entry["fingerprint"]:
            refuse(part, "its content is another")
        rows[part] = np.arange(entry["rows"]) if entry["take"] == "all" else np.asarray(entry["take"], dtype=np.int64)
    check_columns(adapter, opened, rows)
    header = {key: value for key, value in manifest.items() if key not in ("files", "filtered", "unreadable")}
    options: dict[str, Any] = {"on_error": on_error, "verify": verify, "description": header}
    samples = Samples(adapter, opened, manifest["split"], rows, filtered=manifest["filtered"], **options)
    for part, entry in manifest["files"].items():
        if entry["ids"] is not None and entry["ids"] != (samples.ids or {}).get(part):
            refuse(part, "its rows have other ids")
    return samples


def read_manifest(manifest: Any) -> Mapping[str, Any]:
    """Read a manifest, if it is a file; refuse one that lacks something, or lists rows that its files do not have."""
    if not isinstance(manifest, Mapping):
        try:
            manifest = json.loads(Path(manifest).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise GranulonError(f"Cannot read the manifest {str(manifest)!r} ({error}).") from None
    if not isinstance(manifest, Mapping) or manifest.get("format") != MANIFEST_FORMAT or "files" not in manifest:
        raise GranulonError("This is no manifest of a subset that this version of granulon_hf can read.")
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
    return manifest
