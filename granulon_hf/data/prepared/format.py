"""A subset that `granulon data prepare` wrote: samples as Parquet, images embedded."""

import json
from pathlib import Path
from typing import Any

from granulon_hf.data.datasets.base import Adapter, BadRow, Row, encoded
from granulon_hf.data.sample import TASKS, Sample, conversation
from granulon_hf.errors import GranulonError

COLUMNS = ("id", "images", "messages", "reference", "task", "choices", "meta")
MISSING = "the shard is missing; run granulon data prepare again"


def shard_name(split: str, number: int, count: int) -> str:
    """Return the path of a shard below its folder."""
    return f"data/{split}-{number:05d}-of-{count:05d}.parquet"


def missing_shards(folder: Path) -> list[str]:
    """List the shards that the manifest of a finished folder promises and that are missing; refuse a folder without any."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        done, split = manifest["prepared"], manifest["split"]
        count = range(done["shards"] if done["complete"] else 0).stop
    except (OSError, ValueError, KeyError, TypeError):
        return []
    missing = [name for i in range(count) if not (folder / (name := shard_name(split, i, count))).is_file()]
    if not any(folder.rglob("*.parquet")):
        reason = f"{missing[0]} is missing" if missing else "its preparation was interrupted"
        raise GranulonError(f"{str(folder)!r} has no shards: {reason}; run granulon data prepare again.")
    return missing


def features():
    """Return the columns as `datasets` knows them; images are decoded when they are looked at, `meta` is JSON."""
    from datasets import Features, Image, List, Value

    string = Value("string")
    message = {"role": string, "content": List({"type": string, "text": string})}
    fields = {"id": string, "images": List(Image()), "messages": List(message)}
    return Features(fields | {"reference": string, "task": string, "choices": List(string), "meta": string})


def to_row(sample: Sample) -> dict[str, Any]:
    """Make a sample into a row of a prepared folder."""
    return sample.to_dict() | {"meta": json.dumps(sample.meta, ensure_ascii=False, default=str)}


def to_sample(row: Row) -> Sample:
    """Make a row of a prepared folder into the sample that it was."""
    messages = conversation(row["messages"] or [])
    if not messages or messages[-1]["role"] != "assistant" or not (row["reference"] or "").strip():
        raise BadRow("the answer is empty")
    if all(message["role"] != "user" for message in messages):
        raise BadRow("there is no question")
    if row["task"] not in TASKS:
        raise BadRow(f"the task is {row['task']!r}, none of {', '.join(TASKS)}")
    try:
        meta = json.loads(row["meta"] or "{}")
    except ValueError:
        meta = None
    if not isinstance(meta, dict):
        raise BadRow("the meta is not a JSON object")
    images = [encoded(image) for image in row["images"] or []]
    return Sample(row["id"] or "", images, messages, row["reference"], row["task"], row["choices"], meta)


# The images were decoded when they were written.
ADAPTER = Adapter(name="prepared", to_sample=to_sample, columns=COLUMNS, verify="header")
