"""A subset that `granulon data prepare` wrote: samples as Parquet, images embedded."""

import json
from typing import Any

from granulon_hf.data.adapter import Adapter, BadRow, Row, encoded
from granulon_hf.data.sample import TASKS, Sample

COLUMNS = ("id", "images", "messages", "reference", "task", "choices", "meta")


def features():
    """The columns as `datasets` knows them; images are decoded when they are looked at, `meta` is JSON."""
    from datasets import Features, Image, List, Value

    string = Value("string")
    return Features(
        {
            "id": string,
            "images": List(Image()),
            "messages": List({"role": string, "content": List({"type": string, "text": string})}),
            "reference": string,
            "task": string,
            "choices": List(string),
            "meta": string,
        }
    )


def to_row(sample: Sample) -> dict[str, Any]:
    return sample.to_dict() | {"meta": json.dumps(sample.meta, ensure_ascii=False, default=str)}


def to_sample(row: Row) -> Sample:
    messages = [
        {
            "role": message["role"],
            "content": [
                {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]}
                for part in message["content"]
            ],
        }
        for message in row["messages"] or []
    ]
    if not messages or messages[-1]["role"] != "assistant" or not (row["reference"] or "").strip():
        raise BadRow("the answer is empty")
    if row["task"] not in TASKS:
        raise BadRow(f"the task is {row['task']!r}, none of {', '.join(TASKS)}")
    return Sample(
        id=row["id"] or "",
        images=[encoded(image) for image in row["images"] or []],
        messages=messages,
        reference=row["reference"],
        task=row["task"],
        choices=row["choices"],
        meta=json.loads(row["meta"] or "{}"),
    )


ADAPTER = Adapter(name="prepared", to_sample=to_sample, columns=COLUMNS)
