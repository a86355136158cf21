"""FLUX-Reason-6M: images made by FLUX.1-dev with captions that reason about them.

A text-to-image set: it has neither questions nor a test split. The paper trains on "a 200K subset" and holds out 1K; how it
asked is not published. Ours: an instruction drawn by the id, answered by `caption_detail`, the only caption always there.
"""

from granulon_hf.data.datasets.base import TABLES, Row, define, draw, encoded, plain, single_turn, text
from granulon_hf.data.sample import Sample


def to_sample(row: Row) -> Sample:
    """Make a sample of an instruction and the detailed caption."""
    return single_turn(
        row,
        id_column="id",
        images=[encoded(row["image"])],
        question=draw(TABLES["flux_instructions"], plain(row.get("id"), "id")),
        answer=text(row["caption_detail"], "caption_detail"),
        task="reasoning",
        meta={name: row.get(name) for name in ADAPTER.optional},
    )


ADAPTER = define("flux-reason", to_sample)
