"""RealWorldQA: questions about photographs, many from vehicles, with options, or a word or a number as the answer."""

import re

from granulon_hf.data.datasets.base import BadRow, Row, by_image, define, encoded, label, single_turn, text
from granulon_hf.data.sample import Sample

OPTION = re.compile(r"^\(?([A-Z])[.):]\s*(.*\S)\s*$", re.MULTILINE)


def to_sample(row: Row) -> Sample:
    """Make a sample of the question as it is: it lists its options itself, and says how to answer. The reference is the
    content of the right one."""
    question, answer = text(row["question"], "question"), text(row["answer"], "answer")
    options = dict(OPTION.findall(question))
    choices = list(options.values())
    listed = len(choices) > 1 and list(options) == [label(i) for i in range(len(choices))]
    if listed and answer.strip("(). ").upper() in options:
        answer = options[answer.strip("(). ").upper()]
    elif listed and answer not in choices:
        raise BadRow(f"the answer {answer!r} is none of the options {', '.join(options)}")
    return single_turn(
        row,
        id_column="id",
        images=[encoded(row["image"])],
        question=question,
        answer=answer,
        task="vqa",
        choices=choices if listed else None,
        meta={"image_path": row.get("image_path")},
    )


ADAPTER = define("realworldqa", to_sample, group=("image", by_image))
