"""What an adapter is, and the few helpers that all of them share."""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from granulon_hf.data.sample import Sample

Row = Mapping[str, Any]


class DataError(ValueError):
    """What was asked of a data set cannot be done; the message is one sentence that says what is wrong and what to do."""


class BadRow(ValueError):
    """A row of which no sample can be made; the message is the reason."""


@dataclass(frozen=True)
class Adapter:
    """How the rows of one data set become samples: all that distinguishes it from the others, as data.

    Args:
        name (`str`): what `load` calls it.
        to_sample (`Callable`): a pure function of one row; raises [`BadRow`]. Images may be raw bytes, structs or paths.
        columns (`tuple[str]`): columns without which it cannot work; `"a|b"` means one of the two.
        optional (`tuple[str]`): columns that are read where they exist.
        repo (`str`, *optional*): its repository on the Hub.
        default_split (`str`): the split that `load` takes unless told.
        id_column (`str`, *optional*): where the row's name is; rows without one are named by file and row.
        unwanted (`tuple`, *optional*): a cheap column, and a function of its value that says why such rows are no part of the
            set, or `None`; they are counted, and no limit or hold-out ever counts on them.
        paper (`dict[str, int]`): rows of the paper's subset by split (supplement, section 1: preset `"paper"`).
        holdout (`int`): rows that are kept out of training by default, in a set that has no test split.
        max_files (`int`): files that a sample of limited size is drawn from at most, 0 for all: what bounds reading (ours).
        withheld (`dict[str, str]`): splits without public answers, and the split to use instead.
        license (`str`, *optional*): of the images and texts, for the card.
    """

    name: str
    to_sample: Callable[[Row], Sample]
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    repo: str | None = None
    default_split: str = "train"
    id_column: str | None = "id"
    unwanted: tuple[str, Callable[[Any], str | None]] | None = None
    paper: dict[str, int] = field(default_factory=dict)
    holdout: int = 0
    max_files: int = 0
    withheld: dict[str, str] = field(default_factory=dict)
    license: str | None = None


def text(value: Any, what: str) -> str:
    """A non-empty string, stripped.

    Raises:
        BadRow: there is nothing in it.
    """
    words = "" if value is None or value != value else str(value).strip()  # NaN is how pandas writes a missing text
    if not words:
        raise BadRow(f"the {what} is empty")
    return words


def row_id(row: Row, column: str) -> str:
    """The row's name, or an empty string: then file and row name it."""
    value = row.get(column)
    return "" if value is None else str(value)


def encoded(image: Any) -> dict[str, Any]:
    """An image as `{"bytes", "path"}`, from raw bytes, such a struct, a path, or a Pillow image (stored as PNG).

    Raises:
        BadRow: there is none.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        image = {"bytes": bytes(image)}
    elif isinstance(image, str):
        image = {"path": image}
    elif isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        image = {"bytes": buffer.getvalue()}
    if image is None or (isinstance(image, Mapping) and not image.get("bytes") and not image.get("path")):
        raise BadRow("the image is missing")
    if not isinstance(image, Mapping):
        raise BadRow(f"the image is a {type(image).__name__}, neither bytes nor a struct of bytes and path")
    return {"bytes": image.get("bytes") or None, "path": image.get("path") or None}


def encoded_list(images: Any) -> list[dict[str, Any]]:
    """The images of a cell that holds one image or a list of them.

    Raises:
        BadRow: one is missing, or there are none.
    """
    several = isinstance(images, Sequence) and not isinstance(images, str | bytes | bytearray | memoryview)
    found = [encoded(image) for image in (images if several else [images])]
    if not found:
        raise BadRow("the image is missing")
    return found


def user(question: str, images: int = 1) -> dict[str, Any]:
    return {"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]}


def assistant(answer: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}


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
    """A question about images, the images first, and its answer."""
    return Sample(
        id=row_id(row, id_column),
        images=images,
        messages=[user(question, len(images)), assistant(answer)],
        reference=answer,
        task=task,
        choices=choices,
        meta={key: value for key, value in (meta or {}).items() if value is not None},
    )


def list_options(question: str, choices: Sequence[str]) -> str:
    """A question with its options, in the form of the released code: A–D, and a request for the option's content."""
    lines = [f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices)]
    return "\n".join([question, *lines, "(Answer with the option content)"])


def draw(pool: Sequence[str], key: str) -> str:
    """One of a pool, the same for the same key on every machine."""
    return pool[int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % len(pool)]
