"""FLUX-Reason-6M: images made by FLUX.1-dev with captions that reason about them.

A text-to-image set: it has neither questions nor a test split. The paper trains on "a 200K subset" and holds out 1K; how it
asked is not published. Ours: an instruction drawn by the id, answered by `caption_detail`, the only caption always there.
"""

from granulon_hf.data.datasets.base import Adapter, Row, draw, encoded, row_id, single_turn, text
from granulon_hf.data.sample import Sample

INSTRUCTIONS = (
    "Describe this image in detail.",
    "Look closely at this image and explain step by step what it shows.",
    "What does this image show? Reason about its composition, its objects and how they relate.",
    "Give a detailed account of the scene, from its overall layout down to fine details.",
    "Explain what is depicted here, including style, mood and anything written in the image.",
    "Study the image and describe everything that matters in it.",
    "Write a thorough description of this image that someone could draw it from.",
    "What can be seen in this image, and how do its parts fit together?",
)
SCORES = ("score_image_clarity", "score_image_structure")


def to_sample(row: Row) -> Sample:
    """Make a sample of an instruction and the detailed caption."""
    return single_turn(
        row,
        id_column="id",
        images=[encoded(row["image"])],
        question=draw(INSTRUCTIONS, row_id(row, "id")),
        answer=text(row["caption_detail"], "caption_detail"),
        task="reasoning",
        meta={name: row.get(name) for name in SCORES},
    )


ADAPTER = Adapter(
    name="flux-reason",
    repo="LucasFang/FLUX-Reason-6M",
    to_sample=to_sample,
    columns=("id", "image", "caption_detail"),
    optional=SCORES,
    paper={"train": 200_000, "holdout": 1_000},
    holdout=1_000,
    eval_split="holdout",
    max_files=118,  # a tenth of the files: 200 K rows would otherwise touch all 820 GB
    license="apache-2.0",
)
