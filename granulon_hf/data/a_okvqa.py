"""A-OKVQA: questions that need knowledge beyond the image. The test split's answers are withheld."""

import ast
from typing import Any

from granulon_hf.data.adapter import Adapter, BadRow, Row, encoded, single_turn, text
from granulon_hf.data.sample import Sample


def parse_list(value: Any) -> list[str]:
    """`direct_answers` is a string that holds a Python list; it is parsed as a literal, and never run.

    Raises:
        BadRow: it is no such list.
    """
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if value.strip() else []
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise BadRow(f"direct_answers is not a list: {value[:60]!r}") from None
    if value is not None and not isinstance(value, list | tuple):
        raise BadRow(f"direct_answers is not a list: {str(value)[:60]!r}")
    return [str(item) for item in value or []]


def to_sample(row: Row) -> Sample:
    """The question alone; the reference is the correct choice (ours: the paper does not say whether it listed the options)."""
    direct_answers = parse_list(row["direct_answers"])
    choices = [str(choice) for choice in row["choices"] or []]
    correct = row["correct_choice_idx"]
    if correct is None and not direct_answers:
        raise BadRow("the answer is withheld, as in the test split; use validation")
    if correct is None or not 0 <= int(correct) < len(choices):
        raise BadRow(f"correct_choice_idx is {correct}, but there are {len(choices)} choices")
    return single_turn(
        row,
        id_column="question_id",
        images=[encoded(row["image"])],
        question=text(row["question"], "question"),
        answer=text(choices[int(correct)], "correct choice"),
        task="vqa",
        choices=choices,
        meta={
            "direct_answers": direct_answers,
            "rationales": row.get("rationales"),
            "difficult_direct_answer": row.get("difficult_direct_answer"),
        },
    )


ADAPTER = Adapter(
    name="a-okvqa",
    repo="HuggingFaceM4/A-OKVQA",
    to_sample=to_sample,
    columns=("image", "question_id", "question", "choices", "correct_choice_idx", "direct_answers"),
    optional=("rationales", "difficult_direct_answer"),
    default_split="validation",
    id_column="question_id",
    paper={"validation": 1_000},
    withheld={"test": "validation"},
)
