"""What an adapter is, and the few helpers that all of them share; they raise [`BadRow`] for what they cannot use."""

import ast
import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from numbers import Number
from pathlib import PurePosixPath
from typing import Any

import yaml
from PIL import Image

from granulon_hf.data.sample import Sample
from granulon_hf.errors import GranulonError
from granulon_hf.errors import one_line as one_line

Row = Mapping[str, Any]
Levels = Sequence[Sequence[str]]
BYTES = (bytes, bytearray, memoryview)
TABLES = yaml.safe_load(files("granulon_hf.data.datasets").joinpath("sets.yaml").read_text(encoding="utf-8"))


class NoHoldout(GranulonError):
    """A hold-out was asked of a set that is too small to have one by default."""


class BadRow(ValueError):
    """A row of which no sample can be made; the message is the reason."""


@dataclass(frozen=True)
class Adapter:
    """How the rows of one data set become samples: all that distinguishes it from the others, as data."""

    name: str  # what `load` calls it
    # A pure function of one row; raises `BadRow`. Images may be raw bytes, structs or paths.
    to_sample: Callable[[Row], Sample]
    columns: Sequence[str]  # without which it cannot work; "a|b" means one of the two
    optional: Sequence[str] = ()  # columns that are read where they exist
    repo: str | None = None  # its repository on the Hub
    default_split: str = "train"  # the split that `load` takes unless told
    eval_split: str | None = None  # the split that evaluation takes unless told, where the default one is trained on
    id_column: str | None = "id"  # where the row's name is; rows without one are named by file and row
    title: str = ""  # what it is, in a few words
    metrics: Sequence[str] = ()  # what evaluation scores unless told; by default what suits the tasks
    split_by: str = ""  # field of `meta` that evaluation makes columns of
    # A cheap column, and a function of its value that says why such rows are filtered out, or `None`; no limit or hold-out ever
    # counts on them.
    unwanted: tuple[str, Callable[[Any], str | None]] | None = None
    # A column, and a function of its value that says what the row shares with others: names on one or more levels, the coarsest
    # first (`[[video], [image]]`). No hold-out shares a name with training.
    group: tuple[str, Callable[[Any], Levels]] | None = None
    paper: dict[str, int] = field(default_factory=dict)  # rows of the paper's subset by split (supplement, section 1)
    holdout: int = 0  # rows that are kept out of training by default, in a set that has no test split
    max_files: int = 0  # files that a sample of limited size is drawn from, 0 for all: what bounds reading (ours)
    withheld: dict[str, str] = field(default_factory=dict)  # splits without public answers, and the split to use instead
    license: str | None = None  # of the images and texts, for the card
    # Makes the `Source` of a generated set from what the user calls its source (or `None`) and the split.
    opener: Callable[[Any, str], Any] | None = None
    verify: str = "decode"  # how far images are checked by default: see `load`


def define(name: str, to_sample: Callable[[Row], Sample], **functions: Any) -> Adapter:
    """Make the adapter of a set that `sets.yaml` describes."""
    return Adapter(name, to_sample, **TABLES["adapters"][name], **functions)


def plain(value: Any, what: str) -> str:
    """Read a text, a number or UTF-8 bytes as a string; nothing, or NaN (how pandas writes it), as an empty one."""
    if isinstance(value, BYTES):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            raise BadRow(f"the {what} is bytes that are not UTF-8") from None
    if value is None or (isinstance(value, Number) and value != value):
        return ""
    if not isinstance(value, str | Number):
        raise BadRow(f"the {what} is {kind_of(value)}, not text")
    if has_lone_surrogate(words := str(value)):
        raise BadRow(f"the {what} holds a lone surrogate")
    return words


def kind_of(value: Any) -> str:
    """Say what a value is, in the words of JSON."""
    kinds = {type(None): "null", bool: "true or false", str: "a text", Number: "a number", Mapping: "an object"}
    kinds |= {list: "a list", tuple: "a list"}
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), f"a {type(value).__name__}")


def has_lone_surrogate(words: str) -> bool:
    """Tell whether a text has a lone surrogate, which no file can hold: JSON can, as half of an escaped pair."""
    return re.search("[\ud800-\udfff]", words) is not None


def text(value: Any, what: str) -> str:
    """Read a text that must not be empty; strip it."""
    words = plain(value, what).strip()
    if not words:
        raise BadRow(f"the {what} is empty")
    return words


def parse_list(value: Any, what: str) -> list[Any]:
    """Read a list, or a string that holds a Python list, as a literal that is never run; nothing is an empty list."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip()) if value.strip() else []
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise BadRow(f"{what} is not a list: {value[:60]!r}") from None
    if value is not None and not isinstance(value, list | tuple):
        raise BadRow(f"{what} is not a list: {str(value)[:60]!r}")
    return list(value or [])


def pick(choices: Sequence[str], index: Any, what: str) -> str:
    """Return the choice with an index from 0; integral floats are how pandas writes integers beside missing ones."""
    number = int(index) if isinstance(index, Number) and index == index and int(index) == index else -1  # type: ignore[call-overload]
    if not 0 <= number < len(choices):
        raise BadRow(f"{what} is {index}, but there are {len(choices)} choices")
    return choices[number]


def find_images(images: Any) -> list[dict[str, Any]]:
    """Read the images of a cell; none if it has none that could be used."""
    with suppress(BadRow):
        return encoded_list(images)
    return []


def by_image(images: Any) -> Levels:
    """Group rows by what tells images from others: a digest of the bytes, or the path."""
    return [[hashlib.sha256(i["bytes"]).hexdigest() if i["bytes"] else i["path"] for i in find_images(images)]]


def by_video(images: Any) -> Levels:
    """Group rows by folder and file name without the frame's number (`video1/25.jpg`, `images/video1_25.jpg`); and by image."""
    (names,) = by_image(images)
    paths = [PurePosixPath(image["path"] or "") for image in find_images(images)]
    videos = [(path.parent / re.sub(r"\d+$", "", path.stem)).as_posix() for path in paths]
    return [[*(video for video in videos if video != "."), *names], names]


def encoded(image: Any) -> dict[str, Any]:
    """Read an image as `{"bytes", "path"}`, from raw bytes, such a struct, a path, or a Pillow image (stored as PNG)."""
    if isinstance(image, BYTES):
        image = {"bytes": bytes(image)}
    elif isinstance(image, str):
        image = {"path": image}
    elif isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        image = {"bytes": buffer.getvalue()}
    if not isinstance(image, Mapping | None):
        raise BadRow(f"the image is {kind_of(image)}, neither bytes nor a struct of bytes and path")
    found = {name: (image or {}).get(name) or None for name in ("bytes", "path")}
    if not any(found.values()):
        raise BadRow("the image is missing")
    return found


def encoded_list(images: Any) -> list[dict[str, Any]]:
    """Read the images of a cell that holds one image or a list of them."""
    several = isinstance(images, Sequence) and not isinstance(images, (str, *BYTES))
    found = [encoded(image) for image in (images if several else [images])]
    if not found:
        raise BadRow("the image is missing")
    return found


def single_turn(
    row: Row,
    *,
    id_column: str,
    images: list[dict[str, Any]],
    question: str,
    answer: str,
    task: str,
    choices: list[str] | None = None,
    meta: dict[str, Any] | None = None,
) -> Sample:
    """Make a sample of a question about images, the images first, and its answer."""
    asked = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    said = [{"type": "text", "text": answer}]
    return Sample(
        id=plain(row.get(id_column), "id"),
        images=images,
        messages=[{"role": "user", "content": asked}, {"role": "assistant", "content": said}],
        reference=answer,
        task=task,
        choices=choices,
        meta={key: value for key, value in (meta or {}).items() if value is not None},
    )


def label(index: int) -> str:
    """Return the letter of a choice: A to Z, AA, AB, …, as the columns of a spreadsheet."""
    return (label(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def list_options(question: str, choices: Sequence[str]) -> str:
    """Add its options to a question, in the form of the released code: A–D, and a request for the option's content."""
    lines = [f"{label(i)}. {choice}" for i, choice in enumerate(choices)]
    return "\n".join([question, *lines, "(Answer with the option content)"])


def draw(pool: Sequence[str], key: str) -> str:
    """Draw one of a pool, the same for the same key on every machine."""
    return pool[int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % len(pool)]
