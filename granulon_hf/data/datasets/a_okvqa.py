"""A-OKVQA: questions that need knowledge beyond the image. The test split's answers are withheld."""

from granulon_hf.data.datasets.base import BadRow, Row, by_image, define, encoded, parse_list, pick, plain, single_turn, text
from granulon_hf.data.sample import Sample


def to_sample(row: Row) -> Sample:
    """Make a sample of the question alone, answered by the correct choice (ours: the paper may have listed the options)."""
    given = parse_list(row["direct_answers"], "direct_answers")  # a string that holds a Python list
    direct_answers = [answer for answer in (plain(item, "direct answer") for item in given) if answer]
    choices = [text(choice, "choice") for choice in parse_list(row["choices"], "choices")]
    extra = {name: row.get(name) for name in ADAPTER.optional}
    if row["correct_choice_idx"] is None and not direct_answers:
        raise BadRow("the answer is withheld, as in the test split; use validation")
    answer = pick(choices, row["correct_choice_idx"], "correct_choice_idx")
    return single_turn(
        row,
        id_column="question_id",
        images=[encoded(row["image"])],
        question=text(row["question"], "question"),
        answer=answer,
        task="vqa",
        choices=choices,
        meta={"direct_answers": direct_answers, **extra},
    )


ADAPTER = define("a-okvqa", to_sample, group=("image", by_image))
