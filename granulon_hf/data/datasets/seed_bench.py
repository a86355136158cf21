"""SEED-Bench: multiple choice about images; its video rows are filtered out, as in the paper."""

from granulon_hf.data.datasets.base import WORDS, Adapter, BadRow, Row, encoded_list, list_options, single_turn, text
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
        meta={"category": dict(enumerate(WORDS["question_types"], 1)).get(kind), "data_id": row.get("data_id")},
    )


def is_video(data_type: str | None) -> str | None:
    """Say why a row is filtered out."""
    return "a video row" if data_type == "video" else None


ADAPTER = Adapter(
    name="seed-bench",
    repo="lmms-lab/SEED-Bench",
    to_sample=to_sample,
    columns=("answer", "choice_a", "choice_b", "choice_c", "choice_d", "data_type", "image", "question", "question_id"),
    optional=("question_type_id", "data_id"),
    default_split="test",
    id_column="question_id",
    unwanted=("data_type", is_video),
    group=("data_id", by_group),
    paper={"test": 1_000},
    license="cc-by-nc-4.0",
)
