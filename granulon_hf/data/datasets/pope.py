"""POPE: is this object in the image? Half of the objects are; the others are drawn at random, popular, or adversarial.

Both forms are read: the table that lmms-eval made, and the authors' `coco_pope_….json`, beside or below which the images are.
"""

from granulon_hf.data.datasets.base import BadRow, Row, by_image, define, encoded, plain, single_turn, text
from granulon_hf.data.sample import Sample


def yes_no(value: object) -> str:
    """Read an answer that must be yes or no."""
    word = text(value, "answer").lower()
    if word not in ("yes", "no"):
        raise BadRow(f"the answer is {value!r}, neither yes nor no")
    return word


def to_sample(row: Row) -> Sample:
    """Make a sample of the question as it is."""
    return single_turn(
        row,
        id_column="id",
        images=[encoded(row["image"])],
        question=text(row.get("question", row.get("text")), "question"),
        answer=yes_no(row.get("answer", row.get("label"))),
        task="vqa",
        meta={"category": plain(row.get("category"), "category") or None, "image_source": row.get("image_source")},
    )


ADAPTER = define("pope", to_sample, group=("image", by_image))
