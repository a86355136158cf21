"""MMVP: pairs of images that CLIP takes for the same, with one question and two answers.

Both forms are read: `Questions.csv` beside `MMVP Images/`, as its authors have it, and the table that lmms-eval made of it.
"""

import re

from granulon_hf.data.datasets.base import TABLES, BadRow, Row, define, encoded, list_options, plain, single_turn, text
from granulon_hf.data.sample import Sample


def to_sample(row: Row) -> Sample:
    """Make a sample with the options listed; `pair` and `group` say which two belong together.

    Two pairs of the authors' table have their answers swapped (their issue 30); they are put right.
    """
    index, question, options, answer = (row.get(name, row.get(other)) for name, other in NAMES.items())
    number = plain(index, "Index").removesuffix(".0")
    if not number.isdecimal() or number == "0":
        raise BadRow(f"the Index is {index!r}, not a whole number from 1")
    found = re.split(r"\(([a-z])\)", text(options, "Options"))
    choices = dict(zip(found[1::2], map(str.strip, found[2::2]), strict=True))
    letter = TABLES["mmvp_corrections"].get(int(number)) or plain(answer, "Correct Answer").strip("() ").lower()
    if letter not in choices or not all(choices.values()):
        raise BadRow(f"the Correct Answer {answer!r} is none of the Options {options!r}")
    pair = str((int(number) + 1) // 2)
    image = row.get("image", f"MMVP Images/{number}.jpg")
    return single_turn(
        {"id": number},
        id_column="id",
        images=[encoded(image)],
        question=list_options(text(question, "Question"), list(choices.values())),
        answer=choices[letter],
        task="vqa",
        choices=list(choices.values()),
        meta={"pair": pair, "group": pair},
    )


NAMES = {"Index": "index", "Question": "question", "Options": "options", "Correct Answer": "answer"}
ADAPTER = define("mmvp", to_sample)
