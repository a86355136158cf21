"""Your own data: any table whose columns you name."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from granulon_hf.data.adapter import (
    Adapter,
    BadRow,
    DataError,
    Row,
    draw,
    encoded_list,
    list_options,
    row_id,
    single_turn,
    text,
)
from granulon_hf.data.recap import INSTRUCTIONS
from granulon_hf.data.sample import Sample

NAMES = ("image", "question", "answer", "choices", "id")


def pick_choice(answer: Any, choices: list[str]) -> str:
    """The content of the answer: one of the choices by content, by index or by letter.

    Raises:
        BadRow: it is none of them.
    """
    if not isinstance(answer, int):
        answer = text(answer, "answer")
        if answer in choices:
            return answer
        answer = ord(answer.upper()) - ord("A") if len(answer) == 1 else -1
    if not 0 <= answer < len(choices):
        raise BadRow("the answer is neither one of the choices nor the index or letter of one")
    return choices[answer]


def to_sample(row: Row, columns: Mapping[str, str]) -> Sample:
    """Without a question column the answer is a caption; a cell with an empty list of images is text alone."""
    cell = {name: row.get(column) for name, column in columns.items()}
    choices = [str(choice) for choice in cell.get("choices") or []]
    images = encoded_list(cell["image"]) if "image" in columns and not is_empty_list(cell["image"]) else []
    if "question" in columns:
        question = text(cell["question"], "question")
    else:
        question = draw(INSTRUCTIONS, row_id(row, columns.get("id", "id")))
    return single_turn(
        row,
        id_column=columns.get("id", "id"),
        images=images,
        question=list_options(question, choices) if choices else question,
        answer=pick_choice(cell["answer"], choices) if choices else text(cell["answer"], "answer"),
        task="vqa" if "question" in columns else "caption",
        choices=choices or None,
    )


def is_empty_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and not value


def make_adapter(columns: Mapping[str, str]) -> Adapter:
    """The adapter of a table with the named columns.

    Raises:
        DataError: no column is named as the answer, or for something else.
    """
    unknown = sorted(set(columns) - set(NAMES))
    if unknown or not {"answer"} <= set(columns):
        wrong = f"not {', '.join(map(repr, unknown))}" if unknown else "and 'answer' is needed"
        raise DataError(f"columns may name {', '.join(map(repr, NAMES))}, {wrong}.")
    return Adapter(
        name="columns",
        to_sample=partial(to_sample, columns=dict(columns)),
        columns=tuple(dict.fromkeys(columns.values())),
        optional=() if "id" in columns else ("id",),
        id_column=columns.get("id", "id"),
    )
