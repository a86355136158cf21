"""Your own data: any table whose columns you name."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from granulon_hf.data.datasets import base
from granulon_hf.data.datasets.base import Adapter, Levels, Row
from granulon_hf.data.sample import Sample
from granulon_hf.errors import GranulonError

NAMES = ("image", "question", "answer", "index", "choices", "id", "group")


def pick_choice(answer: Any, choices: list[str]) -> str:
    """Return the content of the answer: one of the choices by content or, if none reads so, by letter."""
    words = base.text(answer, "answer")
    whole = str(int(answer)) if isinstance(answer, float) and answer.is_integer() else words
    labels = {base.label(i): choice for i, choice in enumerate(choices)}
    for content in (words, whole, labels.get(words.upper())):
        if content in choices:
            return content
    raise base.BadRow(
        "the answer is none of the choices nor the letter of one (a column that counts from 0 is 'index', not 'answer')"
    )


def by_group(value: Any) -> Levels:
    """Group rows by name."""
    name = base.plain(value, "group")
    return [[name] if name else []]


def to_sample(row: Row, columns: Mapping[str, str]) -> Sample:
    """Make a sample; without a question column the answer is a caption, and an empty list of images is text alone."""
    cell = {name: row.get(column) for name, column in columns.items()}
    choices = [base.text(choice, "choice") for choice in base.parse_list(cell.get("choices"), "choices")]
    if "index" in columns:
        answer = base.pick(choices, cell["index"], "the index")
    else:
        answer = pick_choice(cell["answer"], choices) if choices else base.text(cell["answer"], "answer")
    image = cell.get("image", [])
    images = [] if isinstance(image, list | tuple) and not image else base.encoded_list(image)
    id_column = columns.get("id", "id")
    question = base.draw(base.TABLES["caption_instructions"], base.plain(row.get(id_column), "id"))
    if "question" in columns:
        question = base.text(cell["question"], "question")
    return base.single_turn(
        row,
        id_column=id_column,
        images=images,
        question=base.list_options(question, choices) if choices else question,
        answer=answer,
        task="vqa" if "question" in columns else "caption",
        choices=choices or None,
        meta={"group": base.plain(cell.get("group"), "group") or None},
    )


def make_adapter(columns: Mapping[str, str]) -> Adapter:
    """Make the adapter of a table with the named columns."""
    columns = dict(columns)
    unknown = sorted(set(columns) - set(NAMES))
    if unknown or ("answer" in columns) == ("index" in columns):
        wrong = f"not {', '.join(map(repr, unknown))}" if unknown else "and 'answer' is needed, or 'index' instead"
        raise GranulonError(f"`columns` may name {', '.join(map(repr, NAMES))}, {wrong}.")
    if "choices" in columns and re.search(r"(^|_)(idx|index)$", columns.get("answer", "")):
        columns["index"] = columns.pop("answer")  # its name says that it counts
    if "index" in columns and "choices" not in columns:
        raise GranulonError("An 'index' counts choices from 0: name the column of the 'choices' too.")
    groups = {"group": by_group, "image": base.by_image}
    group = next(((columns[name], by) for name, by in groups.items() if name in columns), None)
    return Adapter(
        name="columns",
        to_sample=partial(to_sample, columns=columns),
        columns=tuple(dict.fromkeys(columns.values())),
        optional=() if "id" in columns else ("id",),
        group=group,
        id_column=columns.get("id", "id"),
    )
