"""The one record that every data set becomes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

TASKS = ("reasoning", "vqa", "caption")


@dataclass
class Sample:
    """One conversation about images, with what is needed to train on it, to evaluate it and to find it again.

    Args:
        id (`str`): unique within its set.
        images (`list[dict]`): encoded images, `{"bytes": bytes | None, "path": str | None}` as `datasets.Image(decode=False)`
            gives them, in the order of the image parts; opened only when pixels are needed.
        messages (`list[dict]`): transformers' conversational form; every content is a list of parts, `{"type": "image"}` or
            `{"type": "text", "text": str}`. The last turn is the assistant's.
        reference (`str`): the answer that predictions are compared with; usually the last turn's text.
        task (`str`): "reasoning", "vqa" or "caption": how the judge scores it.
        choices (`list[str]`, *optional*): the options' contents, where there are options.
        meta (`dict`): whatever else the row says (category, question type, file and row).
    """

    id: str
    images: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    reference: str
    task: str
    choices: list[str] | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The text of the last user turn."""
        turn = next(message for message in reversed(self.messages) if message["role"] == "user")
        return "\n".join(part["text"] for part in turn["content"] if part["type"] == "text")

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The messages before the last answer: what a model is given in evaluation."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary of the fields: a row for `datasets.Dataset.from_list`."""
        return asdict(self)


def conversation(messages: Sequence[Mapping[str, Any]], images: Sequence[Any] | None = None) -> list[dict[str, Any]]:
    """Return messages with their contents as parts, the image parts filled with images in their order where these are given.

    Raises:
        ValueError: there are more or fewer images than image parts.
    """
    rest = iter(images or [])
    filled, parts = [], 0
    for message in messages:
        content = message["content"]
        # Without the empty fields that a table's rows have.
        given = [{"type": "text", "text": content}] if isinstance(content, str) else content
        new = [{name: value for name, value in part.items() if value is not None} for part in given]
        for i, part in enumerate(new):
            if part["type"] == "image":
                parts += 1
                new[i] = {"type": "image"} if images is None else {"type": "image", "image": next(rest, None)}
        filled.append({"role": message["role"], "content": new})
    if images is not None and parts != len(images):
        raise ValueError(f"{len(images)} images for {parts} image parts")
    return filled
