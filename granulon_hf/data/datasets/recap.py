"""CC12M and ImageNet21K, recaptioned: a long and a short caption per image."""

from granulon_hf.data.datasets.base import TABLES, Row, define, draw, encoded, plain, single_turn, text
from granulon_hf.data.sample import Sample


def to_sample(row: Row) -> Sample:
    """Make a sample that asks for the long caption.

    Long and short are swapped in CC12M rows (a known flaw of the set): there the longer of the two is taken as the long one,
    and `meta["swapped"]` says where that changed anything.
    """
    long, short = (plain(row.get(name), name).strip() for name in ("recaption", "recaption_short"))
    swapped = row.get("class") == "CC12M" and len(short) > len(long)
    if swapped:
        long, short = short, long
    return single_turn(
        row,
        id_column="id",
        images=[encoded(row["image"])],
        question=draw(TABLES["caption_instructions"], plain(row.get("id"), "id")),
        answer=text(long, "recaption"),
        task="caption",
        meta={"category": row.get("class"), "caption_short": short, "swapped": swapped},
    )


ADAPTER = define("recap", to_sample)
