"""CHAIR: descriptions of COCO's images, scored by the objects that they mention and that are not there.

`source` is a folder with COCO's `instances_*.json` and `captions_*.json` (anywhere below it) and the images. As in the paper,
an object is there where it was segmented or where one of the reference captions mentions it. A file `synonyms.txt` there, such
as the paper's (a line for each object: its name and other words for it, separated by commas), takes the place of ours.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from granulon_hf.data.datasets.base import TABLES, BadRow, Row, by_image, define, encoded, single_turn, text
from granulon_hf.data.joined import Rows, open_joined, read_table
from granulon_hf.data.mentions import named_objects, phrase_of
from granulon_hf.data.readers import RecordSource
from granulon_hf.data.sample import Sample
from granulon_hf.errors import GranulonError


def to_sample(row: Row) -> Sample:
    """Make a sample that asks for a description; the reference is the first of the captions."""
    if not row["captions"]:
        raise BadRow("the image has no caption")
    return single_turn(
        row,
        id_column="id",
        images=[encoded(row["image"])],
        question=TABLES["chair_instruction"],
        answer=text(row["captions"][0], "caption"),
        task="caption",
        meta={"words": row["words"], "objects": [[name] for name in row["objects"]]},
    )


def read_words(path: Path) -> dict[str, str]:
    """Read names by word from the lines of a file, or ours where there is none; with the phrases that mean something else."""
    lines = TABLES["coco_objects"]
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    words: dict[str, str] = {}
    for line in lines:
        names = [name.strip().lower() for name in line.split(",")]
        words |= dict.fromkeys(map(phrase_of, names), names[0])
    animals = {word: name for word, name in words.items() if name in TABLES["coco_animals"]}
    phrases = {f"{age} {word}": name for age in TABLES["coco_ages"] for word, name in animals.items()}
    phrases |= {phrase: words.get(name, "") for phrase, name in TABLES["coco_phrases"].items()}
    return phrases | words


def open_coco(place: Any, split: str) -> RecordSource:
    """Join the captions and the segmented objects of every image."""

    def join(root: Path) -> tuple[Rows, dict[str, Any]]:
        found = {kind: sorted(root.rglob(f"{kind}_*.json")) for kind in ("instances", "captions")}
        if missing := [kind for kind, files in found.items() if not files]:
            raise GranulonError(f"{str(root)!r} holds no COCO annotations: {missing[0]}_*.json is not there.")
        words = read_words(next(iter(sorted(root.rglob("synonyms.txt"))), root / "synonyms.txt"))
        names: dict[int, str] = {}
        captions: dict[int, list[str]] = defaultdict(list)
        objects: dict[int, list[str]] = defaultdict(list)
        for path in found["captions"]:
            table = read_table(path, "chair", ("images", "annotations"))
            names |= {image["id"]: image["file_name"] for image in table["images"]}
            for one in table["annotations"]:
                captions[one["image_id"]].append(one["caption"])
                objects[one["image_id"]] += named_objects(one["caption"], words)
        for path in found["instances"]:
            table = read_table(path, "chair", ("annotations", "categories"))
            kinds = {kind["id"]: words.get(phrase_of(kind["name"]), kind["name"]) for kind in table["categories"]}
            for one in table["annotations"]:
                objects[one["image_id"]].append(kinds[one["category_id"]])
        rows = [
            {"id": str(key), "image": name, "captions": captions[key], "objects": sorted(set(objects[key]))}
            for key, name in names.items()
        ]
        return rows, {"words": words}

    folders = ["images", "val2014", "val2017", "train2014", "train2017"]
    return open_joined("chair", place, "a folder with COCO's instances_*.json, captions_*.json and images", join, folders)


ADAPTER = define("chair", to_sample, group=("image", by_image), opener=open_coco)
