"""FLUX-Reason-6M: images made by FLUX.1-dev with captions that reason about them.

A text-to-image set: it has neither questions nor a test split. The paper trains on "a 200K subset" and holds out 1K; how it
asked is not published. Ours: an instruction drawn by the id, answered by `caption_detail`, the only caption always there.
"""

from granulon_hf.data.datasets.base import WORDS, Adapter, Row, draw, encoded, plain, single_turn, text
from granulon_hf.data.sample import Sample

SCORES = ("score_image_clarity", "score_image_structure")


def to_sample(row: Row) -> Sample:
    """Make a sample of an instruction and the detailed caption."""
    return single_turn(
        row,
        id_column="id",
        images=[encoded(row["image"])],
        question=draw(WORDS["flux_instructions"], plain(row.get("id"), "id")),
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
