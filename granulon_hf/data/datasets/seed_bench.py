"""SEED-Bench: multiple choice about images; its video rows are filtered out, as in the paper."""

from granulon_hf.data.datasets.base import TABLES, BadRow, Row, define, encoded_list, list_options, single_turn, text
from granulon_hf.data.datasets.custom import by_group
from granulon_hf.data.sample import Sample

LETTERS = "ABCD"


def to_sample(row: Row) -> Sample:
    """Make a sample with options A–D and "(Answer with the option content)" (released code); the reference is the content."""
    choices = [text(row[f"choice_{letter.lower()}"], f"choice {letter}") for letter in LETTERS]
    letter = text(row["answer"], "answer").upper()
    if letter not in LETTERS or len(letter) != 1:
        raise BadRow(f"the answer is {row['answer']!r}, not one of the letters A to D")
    kind = int(row.get("question_type_id") or 0)
    return single_turn(
        row,
        id_column="question_id",
        images=encoded_list(row["image"]),
        question=list_options(text(row["question"], "question"), choices),
        answer=choices[LETTERS.index(letter)],
        task="vqa",
        choices=choices,
        meta={"category": dict(enumerate(TABLES["question_types"], 1)).get(kind), "data_id": row.get("data_id")},
    )


def is_video(data_type: str | None) -> str | None:
    """Say why a row is filtered out."""
    return "a video row" if data_type == "video" else None


ADAPTER = define("seed-bench", to_sample, unwanted=("data_type", is_video), group=("data_id", by_group))
