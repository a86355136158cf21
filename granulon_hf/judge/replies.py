"""Replies of the judge: the one JSON object in them that is read without doubt, and their rows in the store."""

import json
import re
import time
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import pydantic

from .prompts import SCORES

# Pydantic reads 85, 85.0, "85" and "85.0" as the integer 85, but also true as 1.
NoBoolean = pydantic.BeforeValidator(lambda value: None if isinstance(value, bool) else value)
SCORE_NUMBERS = pydantic.TypeAdapter(dict[str, Annotated[int, pydantic.Field(ge=0, le=100), NoBoolean]])
# What a model thinks before it answers, between the tags of many models: <think>, [THINK], <seed:think>, <|START_THINKING|>,
# <|begin_of_thought|>, ◁think▷, and the channels of gpt-oss. Some chat templates write the first tag into the prompt.
THOUGHT = r"[\w:.-]{0,20}(?:think|thought|reason|analysis|reflection|rationale|scratchpad)[\w:.-]{0,20}\|?[>▷]"
OPENS = rf"(?:[<◁]\|?{THOUGHT}|\[THINK\]|<\|channel\|>(?:analysis|commentary))"
CLOSES = rf"(?:[<◁](?:/|\|end_){THOUGHT}|\[/THINK\]|<\|channel\|>final)"
REASONING = re.compile(rf"{OPENS}.*?{CLOSES}|^(?:(?!{OPENS}).)*{CLOSES}|{OPENS}.*", flags=re.DOTALL | re.IGNORECASE)


def unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of pairs, unless a name has two values."""
    made = dict(pairs)
    if any(made[name] != value for name, value in pairs):
        raise ValueError("a name has two values")
    return made


def read_object(content: str, names: Iterable[str], numbers: pydantic.TypeAdapter) -> dict[str, Any]:
    """Return the numbers by these names in the one JSON object of a reply that has them.

    Reasoning, prose, code fences, other objects and other names are passed over. An object may be there twice if it says the
    same both times.

    Args:
        numbers: what they have to be, as the adapter of a `dict`.

    Raises:
        ValueError: with what is wrong.
    """
    wanted, decoder = set(names), json.JSONDecoder(object_pairs_hook=unambiguous)
    found, text, at = [], REASONING.sub("", content), 0
    while (at := text.find("{", at)) >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except RecursionError:
            break
        except ValueError:
            value = {}
        if wanted & value.keys():
            found.append({name: value[name] for name in wanted & value.keys()})
            text = text[:at] + text[end:]
        else:
            at += 1  # it may be inside of this one
    shown = repr(content.strip()[-80:])
    # A number that is in no object read above is of a broken one, which may say something else.
    stray = rf"""["'](?:{"|".join(map(re.escape, wanted))})["']\s*:\s*["'\d-]"""
    if not found or re.search(stray, text):
        raise ValueError(f"no JSON object, or a broken one: {shown}")
    try:
        read = [numbers.validate_python(one) for one in found]
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][0]}: {first['msg']}: {shown}") from None
    if any(one != read[0] or one.keys() != wanted for one in read):
        raise ValueError(f"not one object with {' and '.join(sorted(wanted))}: {shown}")
    return read[0]


def parse(content: str) -> tuple[int, int]:
    """Return accuracy and hallucination of a reply, integers from 0 to 100.

    Raises:
        ValueError: with what is wrong.
    """
    scores = read_object(content, SCORES, SCORE_NUMBERS)
    return scores["accuracy_score"], scores["hallucination_score"]


def read_answer(row: dict, parse: Callable[[str], Any] = parse) -> tuple[Any, str | None, bool]:
    """Return what `parse` makes of a reply or None, the reason for None, and whether a repair request is worth it."""
    if row.get("refusal"):
        return None, f"refused: {str(row['refusal'])[:200]}", False
    if row.get("finish_reason") == "length":
        return None, "truncated: the answer reached the limit of its tokens", False
    if row.get("finish_reason") == "content_filter":
        return None, "content filter: the server withheld the answer", False
    try:
        return parse(row.get("content") or ""), None, False
    except ValueError as error:
        return None, f"unparsable: {error}", True


def to_row(body: Any, estimated: int = 0, **fields: Any) -> dict:
    """Return the row of a chat completion; where the server does not count prompt tokens, the estimated ones stand in.

    Raises:
        ValueError: the body is no chat completion.
    """
    try:
        choice = body["choices"][0]
        message, usage = choice["message"], body.get("usage") or {}
        content, refusal = message.get("content"), message.get("refusal")
        if isinstance(content, list):  # some servers send parts, of which some may be reasoning
            content = "".join(part["text"] for part in content if part.get("type", "text") in ("text", "output_text"))
        if not isinstance(content, str | None):
            raise TypeError
        return {
            **fields,
            "content": content,
            "refusal": refusal,
            "finish_reason": choice.get("finish_reason"),
            "model": body.get("model"),
            "prompt_tokens": max(0, int(usage.get("prompt_tokens") or 0)) or estimated,
            "completion_tokens": max(0, int(usage.get("completion_tokens") or 0)),
            "time": round(time.time(), 3),
        }
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
        raise ValueError(f"the server's reply is no chat completion: {str(body)[:80]!r}") from None
