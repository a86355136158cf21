"""LLaVA conversations: `chat.json` or `.jsonl` and a folder `images/` (what the released code reads)."""

import json
from pathlib import Path
from typing import Any

from granulon_hf.data.datasets.base import BadRow, Row, by_image, define, encoded_list, plain, text
from granulon_hf.data.sample import Sample

MARKER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def parse_turn(turn: Any) -> dict[str, Any]:
    """Read `{"from", "value"}` as a message; every `<image>` in the value becomes an image part where it stands."""
    if not isinstance(turn, dict) or turn.get("from") not in list(ROLES):
        shown = json.dumps(turn, ensure_ascii=False, default=str)[:60]
        raise BadRow(f"a turn is not from {', '.join(map(repr, ROLES))}: {shown}")
    role, value = ROLES[turn["from"]], text(turn.get("value"), "answer" if ROLES[turn["from"]] == "assistant" else "turn")
    if MARKER in value and role != "user":
        raise BadRow(f"{MARKER} stands in a turn of the {role}, not in a question")
    content: list[dict[str, Any]] = []
    for i, piece in enumerate(value.split(MARKER)):
        content += [{"type": "image"}] if i else []
        content += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
    return {"role": role, "content": content}


def to_sample(row: Row, task: str = "reasoning") -> Sample:
    """Make a sample of all turns; the last one, the assistant's, is the reference."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRow("there is no conversation")
    messages = [parse_turn(turn) for turn in turns]
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise BadRow(f"the turns are {', '.join(roles)}; questions and answers must alternate and end with an answer")
    image = row.get("image")
    images = [] if image is None or image == [] or image == "" else encoded_list(image)
    markers = sum(part["type"] == "image" for message in messages for part in message["content"])
    if markers != len(images):
        raise BadRow(f"there are {markers} {MARKER} markers for {len(images)} images")
    return Sample(plain(row.get("id"), "id"), images, messages, messages[-1]["content"][0]["text"], task)


ADAPTER = define("llava", to_sample, group=("image", by_image))


def is_chat(name: str | Path) -> bool:
    """Tell whether a set is named by a file of LLaVA's conversations, or a folder with a `chat.json`."""
    path = Path(name)
    return path.suffix.lower() in (".json", ".jsonl") or (path / "chat.json").is_file()
