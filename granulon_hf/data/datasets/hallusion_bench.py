"""HallusionBench: questions about figures and their edited copies, and (split `non_image`) without any figure.

Both forms are read: the table that lmms-eval made, and the authors' `HallusionBench.json`, which names files.
"""

from granulon_hf.data.datasets.base import BadRow, Row, define, encoded_list, plain, single_turn, text
from granulon_hf.data.sample import Sample

ANSWERS = {"0": "no", "1": "yes"}


def to_sample(row: Row) -> Sample:
    """Make a sample of the question as it is, with the names of what is scored as a whole.

    `figure` is all questions about a figure (fAcc), `set_question` one question about all figures of a set (qAcc), `group` the
    set. Where a question of the category VS comes without its figure there is nothing to know from, and to say so is right.
    """
    answer = plain(row["gt_answer"], "gt_answer").strip().removesuffix(".0")
    if answer not in ANSWERS:
        raise BadRow(f"the gt_answer is {row['gt_answer']!r}, neither 0 (no) nor 1 (yes)")
    kind, part, group, figure, asked = (text(row[name], name) for name in NAMES)
    without = kind == "VS" and figure == "0"
    image = row.get("image", row.get("filename"))
    # A figure that should be there and is not makes a bad row.
    images = [] if not image and plain(row["visual_input"], "visual_input") in ("0", "0.0") else image
    return single_turn(
        {"id": "-".join((kind, part, group, figure, asked))},
        id_column="id",
        images=[] if isinstance(images, list) and not images else encoded_list(images),
        question=text(row["question"], "question"),
        answer=ANSWERS[answer],
        task="vqa",
        meta={
            "category": kind,
            "subcategory": part,
            "group": f"{kind}/{part}/{group}",
            "figure": None if without else f"{kind}/{part}/{group}/{figure}",
            "set_question": f"{kind}/{part}/{group}/{asked}",
            "may_abstain": without or None,
            "details": row.get("gt_answer_details"),
        },
    )


NAMES = ("category", "subcategory", "set_id", "figure_id", "question_id")
ADAPTER = define("hallusion-bench", to_sample)
