"""`prepare`: a subset as a folder of its own: Parquet with embedded images, manifest, card.

The images of every row are decoded once on the way, so that what lies in the folder can be used. A shard holds a fixed range of
the chosen rows and is renamed into place when it is whole: whatever interrupts the work, the next call goes on.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from granulon_hf.data.loading import load
from granulon_hf.data.prepared import format as prepared
from granulon_hf.data.readers import StreamSource
from granulon_hf.data.samples import Progress, Samples, none_usable
from granulon_hf.errors import GranulonError
from granulon_hf.io import batches, replacing, write_text

GROUP_ROWS = 16  # what is read to get at one sample
LOCK = ".lock"
NOTE = b"granulon"  # bad and renamed rows of a shard, in its own metadata


def prepare(
    name: Any, out: str | Path, *, overwrite: bool = False, shard_rows: int = 1000, progress: Progress | None = None, **options
) -> dict[str, Any]:
    """Write a subset; finished shards of an earlier, interrupted call with the same settings are kept.

    Args:
        out (`str` or `Path`): a folder that is new, empty or of the same subset.
        overwrite (`bool`): delete what an earlier call wrote there, unless it was this very one, and interrupted.
        shard_rows (`int`): chosen rows per file.
        progress (`Callable`, *optional*): called with rows done and rows in all.
        options: as for [`load`].

    Returns:
        `dict`: the manifest: that of [`load`] with `prepared`: samples, bad and renamed rows, and whether it is complete.

    Raises:
        GranulonError: the folder holds something else, another call is writing it, no row can be used, or as [`load`].
    """
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise GranulonError(f"{str(folder)!r} is a file; --out takes a folder.")
    settings = {"name": str(name), "shard_rows": shard_rows} | dict(sorted(options.items()))
    settings = json.loads(json.dumps(settings, default=str))  # as the manifest gives them back
    with locked(folder):
        samples = start(folder, name, settings, options, overwrite)
        return write(folder, samples, settings, progress or (lambda done, total: None))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder for one process at a time; one that was made for nothing is taken away again."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            try:
                yield
            finally:
                # While it is held, so that nobody else locks a file that is about to go. Windows deletes it on release.
                with suppress(PermissionError):
                    (folder / LOCK).unlink(missing_ok=True)
    except Timeout:
        advice = "wait for it, or take another folder"
        raise GranulonError(f"Another granulon data prepare is writing to {str(folder)!r}; {advice}.") from None
    finally:
        if new and not any(folder.iterdir()):
            folder.rmdir()


def write(folder: Path, samples: Samples, settings: dict[str, Any], note: Progress) -> dict[str, Any]:
    """Write the shards that are missing, then card and manifest; return the manifest."""
    total, shard_rows = len(samples), settings["shard_rows"]
    firsts = range(0, total, shard_rows)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for leftover in (folder / "data").glob(".*.part"):
        leftover.unlink()
    problems, renamed = [list(problem) for problem in samples.unreadable], []
    written = 0
    tasks: Counter[str] = Counter()

    def note_from(first: int, done: int) -> None:
        note(first + done, total)

    for i, first in enumerate(firsts):
        path = folder / prepared.shard_name(samples.split, i, len(firsts))
        if not is_whole(path):
            write_shard(path, samples.slice(first, first + shard_rows), partial(note_from, first))
        note(min(total, first + shard_rows), total)
        found = pq.read_metadata(path)
        remarks = json.loads(found.metadata[NOTE])
        problems += remarks["problems"]
        renamed += remarks["renamed"]
        tasks.update(remarks["tasks"])
        written += found.num_rows
    if not written:  # a folder of nothing would look finished
        shutil.rmtree(folder / "data")
        (folder / "manifest.json").unlink()
        raise none_usable(samples.source.location, total, (str(reason) for *_, reason in problems))
    done = {"complete": True, "settings": settings, "samples": written, "shards": len(firsts)}
    manifest = samples.manifest | {"prepared": done | {"problems": problems, "renamed": renamed}}
    write_text(folder / "README.md", make_card(samples, manifest, tasks))
    write_text(folder / "manifest.json", json.dumps(manifest, ensure_ascii=False) + "\n")
    return manifest


def is_whole(path: Path) -> bool:
    """Tell whether a shard is there; it may be lost to a full disk or a power cut."""
    try:
        return NOTE in pq.read_metadata(path).metadata
    except (pa.ArrowException, OSError):
        return False


def start(folder: Path, name: Any, settings: dict[str, Any], options: dict[str, Any], overwrite: bool) -> Samples:
    """Load the samples and write their manifest: an earlier call's if there was one, so that its commit is kept."""
    given = {"verify": "decode"} | {key: value for key, value in options.items() if value is not None}
    if (earlier := find_earlier(folder, settings, overwrite)) is not None:
        kept = {key: given[key] for key in ("source", "columns", "on_error", "verify") if key in given}
        source = {"source": name} if "columns" in given else {}
        try:
            return load(manifest=earlier, **source | kept)
        except GranulonError:
            if not overwrite:
                raise
    samples = load(name, **given)
    if isinstance(samples.source, StreamSource):
        raise GranulonError("A stream cannot be prepared: its rows cannot be counted; give it as files or a datasets.Dataset.")
    shutil.rmtree(folder / "data", ignore_errors=True)  # of a subset that is written over
    manifest = samples.manifest | {"prepared": {"complete": False, "settings": settings}}
    write_text(folder / "manifest.json", json.dumps(manifest, ensure_ascii=False) + "\n")
    return samples


def find_earlier(folder: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Return the manifest of an earlier call that this one goes on with; refuse a folder of something else."""
    path = folder / "manifest.json"
    if not path.is_file():
        if any(found.name != LOCK for found in folder.iterdir()):
            raise GranulonError(f"{str(folder)!r} is not empty and holds no prepared subset; choose another folder.")
        return None
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        done = earlier.pop("prepared")
        before, complete = done["settings"], done["complete"]
        differing = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise GranulonError(f"{str(path)!r} is none of granulon's manifests; choose another folder.") from None
    if overwrite and (differing or complete):
        return None
    if differing:
        advice = "take another folder, or --overwrite it"
        raise GranulonError(f"{str(folder)!r} was prepared with another {' and '.join(differing)}; {advice}.")
    return earlier


def write_shard(path: Path, samples: Samples, progress: Callable[[int], None]) -> None:
    """Write samples as one Parquet file, with their problems in its metadata, whole or not at all."""
    schema = prepared.features().arrow_schema
    tasks: Counter[str] = Counter()
    # Images are compressed as it is.
    with replacing(path) as part, pq.ParquetWriter(part, schema, compression="none") as writer:
        for rows in batches(embedded_rows(samples, tasks, progress), GROUP_ROWS):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        remarks = {"problems": samples.bad_rows, "renamed": samples.renamed, "tasks": tasks}
        writer.add_key_value_metadata({NOTE: json.dumps(remarks, ensure_ascii=False)})


def embedded_rows(samples: Samples, tasks: Counter[str], progress: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    """Make samples into rows with their images in them; of an image's path the file's name is kept."""
    for done, (_, _, sample) in enumerate(samples.walk(), start=1):
        if sample is not None:
            for image in sample.images:
                if not image["bytes"]:
                    path = Path(image["path"])
                    image |= {"bytes": path.read_bytes(), "path": path.name}
            tasks[sample.task] += 1
            yield prepared.to_row(sample)
        progress(done)


def make_card(samples: Samples, manifest: dict[str, Any], tasks: Counter[str]) -> str:
    """Render the README.md of a prepared folder."""
    from huggingface_hub import DatasetCard, DatasetCardData

    names = {"reasoning": "image-text-to-text", "vqa": "visual-question-answering", "caption": "image-to-text"}
    adapter, split = samples.adapter, samples.split
    title = f"{adapter.name}, {split}: {manifest['prepared']['samples']:,} samples"
    shards = [{"split": split, "path": f"data/{split}-*.parquet"}]
    data = DatasetCardData(
        license=adapter.license or "other",
        task_categories=[names[task] for task in names if tasks[task]],
        pretty_name=title,
        tags=["granulon"],
        source_datasets=[adapter.repo] if adapter.repo else None,
        configs=[{"config_name": "default", "data_files": shards}],
    )
    template = files("granulon_hf.data.prepared").joinpath("card.md").read_text(encoding="utf-8")
    reasons = Counter(reason for _, _, reason in manifest["prepared"]["problems"]).most_common(10)
    return str(DatasetCard.from_template(data, template_str=template, title=title, manifest=manifest, reasons=reasons))
