"""Replies of the judge: the one JSON object in them that is read without doubt, and their rows in the store."""

import json
import re
import time
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import pydantic

from .prompts import SCORES

NoBoolean = pydantic.BeforeValidator(lambda value: None if isinstance(value, bool) else value)
WRITTEN = re.compile(r"\s*\d{1,3}(?:\.0+)?\s*")
Written = pydantic.BeforeValidator(lambda value: None if isinstance(value, str) and not WRITTEN.fullmatch(value) else value)
# Pydantic reads 85, 85.0, "85" and "85.0" as the integer 85, but also true as 1 and "8_5" as 85. "85%" and "85/100" are not
# read: they may be of another scale than what was asked for, and a repair tells.
Score = Annotated[int, pydantic.Field(ge=0, le=100), NoBoolean, Written]


class Scores(pydantic.BaseModel):
    """What the judge says of a text; other names in its object are passed over."""

    accuracy_score: Score
    hallucination_score: Score


READ = pydantic.TypeAdapter(Scores)
# What a model thinks before it answers, between the tags of many models: <think>, [THINK], <seed:think>, <|START_THINKING|>,
# <|begin_of_thought|>, ◁think▷, and the channels of gpt-oss. Some chat templates write the first tag into the prompt.
THOUGHT = r"[\w:.-]{0,20}(?:think|thought|reason|analysis|reflection|rationale|scratchpad)[\w:.-]{0,20}\|?[>▷]"
OPENS = rf"(?:[<◁]\|?{THOUGHT}|\[THINK\]|<\|channel\|>(?:analysis|commentary))"
CLOSES = rf"(?:[<◁](?:/|\|end_){THOUGHT}|\[/THINK\]|<\|channel\|>final)"
TAGS = re.compile(f"{OPENS}|{CLOSES}", flags=re.IGNORECASE)
# The innermost, which some models begin twice.
THOUGHTS = re.compile(rf"(?:{OPENS}\s*)+(?:(?!{OPENS}|{CLOSES}).)*{CLOSES}", flags=re.DOTALL | re.IGNORECASE)
LOOSE = re.compile(rf"^(?:(?!{OPENS}).)*{CLOSES}|{OPENS}.*", flags=re.DOTALL | re.IGNORECASE)


def without_reasoning(text: str) -> str:
    """Take out what a model thought; of thoughts within thoughts the innermost first."""
    while (less := THOUGHTS.sub("", text)) != text:
        text = less
    return LOOSE.sub("", text)


def is_same(one: Any, other: Any) -> bool:
    """Compare values of JSON: 1 and 1.0 are one number; true is none, though Python takes it for 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of pairs, unless a name has two values."""
    made = dict(pairs)
    if not all(is_same(made[name], value) for name, value in pairs):
        raise ValueError("a name has two values")
    return made


# Lines may break inside of a text, as models write them.
DECODER = json.JSONDecoder(object_pairs_hook=unambiguous, strict=False)


def find_objects(text: str, wanted: set[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield start, end and value of each JSON object with one of these names; others are looked into."""
    at = 0
    while (at := text.find("{", at)) >= 0:
        try:
            value, end = DECODER.raw_decode(text, at)
        except RecursionError:
            return
        except ValueError:
            value, end = {}, at
        if wanted & value.keys():
            yield at, end, value
            at = end
        else:
            at += 1


def find_inside(value: Any, wanted: set[str]) -> Iterator[dict[str, Any]]:
    """Yield what an object, or one anywhere inside of it, holds under these names."""
    if isinstance(value, dict) and wanted & value.keys():
        yield {name: value[name] for name in wanted & value.keys()}
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from find_inside(one, wanted)


def find_texts(value: Any, wanted: set[str]) -> Iterator[str]:
    """Yield the texts in an object and, as texts, what it holds under these names in other letters (Accuracy_Score)."""
    if isinstance(value, str):
        yield value
    if isinstance(value, dict):
        folded = {name.casefold() for name in wanted}
        yield from (f"{name}: {one}" for name, one in value.items() if name not in wanted and name.casefold() in folded)
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from find_texts(one, wanted)


def read_object(content: str, names: Iterable[str], numbers: pydantic.TypeAdapter) -> dict[str, Any]:
    """Return the numbers by these names in the one JSON object of a reply that has them.

    Reasoning, prose, code fences, other objects and other names are passed over. The numbers may be there twice, in an object
    or in words, if they are the same both times. `numbers` is what they have to be, as the adapter of a model or a `dict`; a
    ValueError says what is wrong.
    """
    wanted, shown = set(names), repr(content.strip()[-80:])
    text = re.sub(r",(\s*[}\]])", r"\1", content)  # a comma behind the last entry
    spans = [(start, end) for start, end, _ in find_objects(text, wanted)]
    if any(not any(start <= tag.start() < end for start, end in spans) for tag in TAGS.finditer(text)):
        text = without_reasoning(text)  # else the tags are words of a text inside of the object
    objects = list(find_objects(text, wanted))
    if not objects:
        raise ValueError(f"no JSON object, or a broken one: {shown}")
    try:
        inside = [one for _, _, value in objects for one in find_inside(value, wanted)]
        read = [numbers.dump_python(numbers.validate_python(one)) for one in inside]
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][0]}: {first['msg']}: {shown}") from None
    if any(one != read[0] or one.keys() != wanted for one in read):
        raise ValueError(f"not one object with {' and '.join(sorted(wanted))}: {shown}")
    for start, end, _ in reversed(objects):
        text = text[:start] + text[end:]
    # What is left of a broken object, or is said in words, may be something else; what echoes the form says nothing.
    text = "\n".join([text, *find_texts([value for _, _, value in objects], wanted)])
    scale = r"0\s*(?:-|–|to)\s*100"
    verb = r"(?:[:=→]|->|\b(?:is|of|should be|becomes)\b)"
    said = rf"""\W{{0,20}}(?:\({scale}\)\s*)?{verb}\s*["'\\“”‘’]*(?!{scale})(-?\d+(?:\.\d+)?)"""
    for name, number in read[0].items():
        if any(float(other) != number for other in re.findall(re.escape(name) + said, text, flags=re.IGNORECASE)):
            raise ValueError(f"other numbers beside the object: {shown}")
    return read[0]


def parse(content: str) -> tuple[int, int]:
    """Return accuracy and hallucination of a reply, integers from 0 to 100; raise ValueError with what is wrong."""
    scores = read_object(content, SCORES, READ)
    return scores["accuracy_score"], scores["hallucination_score"]


def to_row(body: Any, estimated: int = 0, **fields: Any) -> dict:
    """Return the row of a chat completion; where the server does not count prompt tokens, the estimated ones stand in."""
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
