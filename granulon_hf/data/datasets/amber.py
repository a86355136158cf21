"""AMBER: descriptions of images, of which the objects are known, and questions about existence, attributes and relations.

`source` is a copy of its repository (`data/` with `query/query_all.json`, `annotations.json`, `relation.json` and
`safe_words.txt`), with the images, which are apart, in `image/`.
"""

from pathlib import Path
from typing import Any

from granulon_hf.data.datasets.base import Row, by_image, define, encoded, single_turn, text
from granulon_hf.data.datasets.pope import yes_no
from granulon_hf.data.joined import Rows, open_joined, read_table
from granulon_hf.data.mentions import phrase_of
from granulon_hf.data.readers import RecordSource
from granulon_hf.data.sample import Sample
from granulon_hf.errors import GranulonError

FILES = ("query/query_all.json", "annotations.json", "relation.json")
CATEGORIES = {"discriminative-hallucination": "existence", "discriminative-relation": "relation", "relation": "relation"}


def to_sample(row: Row) -> Sample:
    """Make a sample of a query; of descriptions the reference is the objects that are there, and `meta` what scores need."""
    generative = row["type"] == "generative"
    meta: dict[str, Any] = {"category": CATEGORIES.get(row["type"], "attribute"), "type": row["type"]}
    if generative:
        objects, unlikely = ([[name, *row["relation"].get(name, [])] for name in dict.fromkeys(row[key])] for key in KINDS)
        words = {phrase_of(word): word for name, others in row["relation"].items() for word in (name, *others)}
        meta |= {"category": "generative", "words": words, "objects": objects, "unlikely": unlikely, "neutral": row["safe"]}
    return single_turn(
        row,
        id_column="id",
        images=[encoded(row["image"])],
        question=text(row["query"], "query"),
        answer=text(", ".join(dict.fromkeys(row["truth"])), "truth") if generative else yes_no(row["truth"]),
        task="caption" if generative else "vqa",
        meta=meta,
    )


def open_amber(place: Any, split: str) -> RecordSource:
    """Join queries with their annotations."""

    def join(root: Path) -> tuple[Rows, dict[str, Any]]:
        folder = root / "data" if (root / "data").is_dir() else root
        queries, annotations, relation = (read_table(folder / name, "amber") for name in FILES)
        relation = {name: [*words] for name, words in relation.items()}  # or the file has another form
        safe = folder / "safe_words.txt"
        shared = {"relation": relation, "safe": safe.read_text(encoding="utf-8").split() if safe.is_file() else []}
        known = {one["id"]: one for one in annotations}
        if missing := [query["id"] for query in queries if query["id"] not in known]:
            raise GranulonError(f"{str(folder)!r}: annotations.json has nothing on query {missing[0]}.")
        return [{**known[query["id"]], **query} for query in queries], shared

    return open_joined("amber", place, f"a copy of AMBER's repository, with {', '.join(FILES)} in data/", join, ["image"])


KINDS = ("truth", "hallu")
ADAPTER = define("amber", to_sample, group=("image", by_image), opener=open_amber)
