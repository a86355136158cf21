"""`prepare`: a subset as a folder of its own: Parquet with embedded images, manifest, card.

The images of every row are decoded once on the way, so that what lies in the folder can be used. A shard holds a fixed range of
the chosen rows and is renamed into place when it is whole: whatever interrupts the work, the next call goes on.
"""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from granulon_hf.data import pictures
from granulon_hf.data.loading import load
from granulon_hf.data.prepared import format as prepared
from granulon_hf.data.readers import StreamSource
from granulon_hf.data.sample import Sample
from granulon_hf.data.samples import Problem, Samples, none_usable
from granulon_hf.errors import GranulonError
from granulon_hf.io import write_text

SHARD_ROWS = 1000
GROUP_ROWS = 16  # what is read to get at one sample
LOCK = ".lock"
NOTE = b"granulon"  # bad and renamed rows of a shard, in its own metadata


def prepare(
    name: Any,
    out: str | Path,
    *,
    overwrite: bool = False,
    shard_rows: int = SHARD_ROWS,
    progress: Callable[[int, int], None] | None = None,
    **options,
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
    with locked(folder):
        return write(name, folder, overwrite, shard_rows, progress, options)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, for one process at a time; one that was made for nothing is taken away again.

    Raises:
        GranulonError: another process has it.
    """
    new, path = not folder.exists(), folder / LOCK
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                raise BlockingIOError  # a call that ended in this moment took its file away
        except BlockingIOError:
            raise GranulonError(
                f"Another granulon data prepare is writing to {str(folder)!r}; wait for it, or take another folder."
            ) from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if new and not any(folder.iterdir()):
                folder.rmdir()


def write(
    name: Any,
    folder: Path,
    overwrite: bool,
    shard_rows: int,
    progress: Callable[[int, int], None] | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    note = progress or (lambda done, total: None)
    settings = {"name": str(name), "shard_rows": shard_rows} | {key: plain(value) for key, value in sorted(options.items())}
    samples = start(folder, name, settings, options, overwrite)
    total, split = len(samples), samples.split
    count = -(-total // shard_rows)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for leftover in (folder / "data").glob(".*.tmp"):
        leftover.unlink()
    problems = samples.unreadable
    renamed: list[Problem] = []
    written = 0
    tasks: Counter[str] = Counter()
    for i in range(count):
        path = folder / prepared.shard_name(split, i, count)
        first = i * shard_rows
        if not is_whole(path):
            write_shard(path, samples.slice(first, first + shard_rows), partial(shift, note, first, total))
        note(min(total, first + shard_rows), total)
        found = pq.read_metadata(path)
        remarks = json.loads(found.metadata[NOTE])
        problems += [Problem(*problem) for problem in remarks["problems"]]
        renamed += [Problem(*problem) for problem in remarks["renamed"]]
        tasks.update(remarks["tasks"])
        written += found.num_rows
    if not written:  # a folder of nothing would look finished
        shutil.rmtree(folder / "data")
        (folder / "manifest.json").unlink()
        raise none_usable(samples.source.location, total, (problem.reason for problem in problems))
    manifest = samples.manifest | {
        "prepared": {
            "complete": True,
            "settings": settings,
            "samples": written,
            "shards": count,
            "problems": [[problem.file, problem.row, problem.reason] for problem in problems],
            "renamed": [[problem.file, problem.row, problem.reason] for problem in renamed],
        }
    }
    write_text(folder / "README.md", make_card(samples, manifest, tasks))
    write_text(folder / "manifest.json", json.dumps(manifest, ensure_ascii=False) + "\n")
    return manifest


def is_whole(path: Path) -> bool:
    try:
        return NOTE in pq.read_metadata(path).metadata
    except (pa.ArrowException, OSError):  # not there, or lost to a full disk or a power cut
        return False


def shift(note: Callable[[int, int], None], first: int, total: int, done: int) -> None:
    note(first + done, total)


def plain(value: Any) -> Any:
    """A setting as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def start(folder: Path, name: Any, settings: dict[str, Any], options: dict[str, Any], overwrite: bool) -> Samples:
    """The samples to write, their manifest in place: an earlier call's if there was one, so that its commit is kept."""
    manifest_path = folder / "manifest.json"
    earlier = None
    if manifest_path.is_file():
        try:
            earlier = json.loads(manifest_path.read_text(encoding="utf-8"))
            before, complete = earlier["prepared"]["settings"], earlier["prepared"]["complete"]
        except (ValueError, KeyError, TypeError):
            raise GranulonError(f"{str(manifest_path)!r} is none of granulon's manifests; choose another folder.") from None
        if before != settings and not overwrite:
            differing = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
            raise GranulonError(
                f"{str(folder)!r} was prepared with another {' and '.join(differing)}; take another folder, or --overwrite it."
            )
        if overwrite and (before != settings or complete):
            earlier = None
    elif any(path.name != LOCK for path in folder.iterdir()):
        raise GranulonError(f"{str(folder)!r} is not empty and holds no prepared subset; choose another folder.")
    if earlier is not None:
        kept = {key: options[key] for key in ("source", "columns", "on_error", "verify") if options.get(key) is not None}
        if options.get("columns") is not None and options.get("source") is None:
            kept["source"] = name
        kept.setdefault("verify", "decode")
        try:
            return load(manifest={k: v for k, v in earlier.items() if k != "prepared"}, **kept)
        except GranulonError:
            if not overwrite:
                raise
    samples = load(name, **({"verify": "decode"} | {key: value for key, value in options.items() if value is not None}))
    if isinstance(samples.source, StreamSource):
        raise GranulonError(
            "A stream cannot be prepared: its rows cannot be counted. Give it as files or as a datasets.Dataset."
        )
    if overwrite and manifest_path.is_file():
        shutil.rmtree(folder / "data", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    started = samples.manifest | {"prepared": {"complete": False, "settings": settings}}
    write_text(manifest_path, json.dumps(started, ensure_ascii=False) + "\n")
    return samples


def write_shard(path: Path, samples: Samples, progress: Callable[[int], None]) -> None:
    features = prepared.features()
    schema = features.arrow_schema
    temporary = path.with_name(f".{path.name}.tmp")
    tasks: Counter[str] = Counter()
    # Images are compressed as it is.
    with pq.ParquetWriter(temporary, schema, compression="none") as writer:
        rows: list[dict[str, Any]] = []
        for done, (_, _, sample) in enumerate(samples.walk(), start=1):
            if sample is not None:
                rows.append(prepared.to_row(embed(sample)))
                tasks[sample.task] += 1
            if len(rows) == GROUP_ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows = []
            progress(done)
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        remarks = {
            "problems": [[problem.file, problem.row, problem.reason] for problem in samples.bad_rows],
            "renamed": [[problem.file, problem.row, problem.reason] for problem in samples.renamed],
            "tasks": tasks,
        }
        writer.add_key_value_metadata({NOTE: json.dumps(remarks, ensure_ascii=False)})
    os.replace(temporary, path)


def embed(sample: Sample) -> Sample:
    """The sample with its images in it; of a path the file's name is kept."""
    sample.images = [
        image if image["bytes"] else {"bytes": pictures.read(image), "path": Path(image["path"]).name}
        for image in sample.images
    ]
    return sample


def make_card(samples: Samples, manifest: dict[str, Any], tasks: Counter[str]) -> str:
    """The README.md of a prepared folder."""
    from huggingface_hub import DatasetCard, DatasetCardData

    names = {"reasoning": "image-text-to-text", "vqa": "visual-question-answering", "caption": "image-to-text"}
    done, adapter = manifest["prepared"], samples.adapter
    title = f"{adapter.name}, {samples.split}: {done['samples']:,} samples"
    data = DatasetCardData(
        license=adapter.license or "other",
        task_categories=[names[task] for task in names if tasks[task]],
        pretty_name=title,
        tags=["granulon"],
        source_datasets=[adapter.repo] if adapter.repo else None,
        configs=[
            {"config_name": "default", "data_files": [{"split": samples.split, "path": f"data/{samples.split}-*.parquet"}]}
        ],
    )
    return str(
        DatasetCard.from_template(
            data,
            template_str=files("granulon_hf.data.prepared").joinpath("card.md").read_text(encoding="utf-8"),
            title=title,
            manifest=manifest,
            done=done,
            origin=source_text(manifest),
            files=len(manifest["files"]),
            reasons=Counter(reason for _, _, reason in done["problems"]).most_common(10),
        )
    )


def source_text(manifest: dict[str, Any]) -> str:
    """Where the rows are from, without naming a folder of somebody's machine."""
    repo, sha = manifest["source"], manifest["revision"]
    return f"[{repo}](https://huggingface.co/datasets/{repo}) at commit `{sha}`" if sha else "local files"
