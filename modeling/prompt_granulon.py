# Copyright 2026 The Granulon team. Licensed under the Apache License, Version 2.0.
"""Rendered conversations that remember what their characters are: question, answers, typed control tokens (ours)."""

import functools
import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

Span = tuple[int, int]
# Unicode noncharacters, reserved for use inside a program: while a chat template is rendered, pairs of them mark the question,
# every answer, and control tokens that somebody typed.
MARKS = {"question": "\ufdd0\ufdd1", "answers": "\ufdd2\ufdd3", "typed": "\ufdd4\ufdd5"}
ALL_MARKS = "".join(MARKS.values())
NO_MARKS = dict.fromkeys(map(ord, ALL_MARKS))


class Prompt(str):
    """A rendered conversation that remembers what its characters are (ours).

    Attributes:
        question (`list[tuple[int, int]]`): (start, end) characters of the last user turn's words.
        answers (`list[tuple[int, int]]`): of every text of the assistant's.
        typed (`list[tuple[int, int]]`): of control tokens that somebody typed, which are words like all others.
    """

    question: list[Span]
    answers: list[Span]
    typed: list[Span]

    def __new__(cls, text: str, question=(), answers=(), typed=()):
        prompt = super().__new__(cls, text)
        prompt.question, prompt.answers, prompt.typed = [], list(answers), list(typed)
        for start, end in question:
            # Texts that only white space parts are one question.
            if prompt.question and not text[prompt.question[-1][1] : start].strip():
                start = prompt.question.pop()[0]
            prompt.question.append((start, end))
        return prompt

    @classmethod
    def read(cls, marked: str) -> "Prompt":
        """Take the marks of [`mark_conversation`] out of a rendered conversation, and note where they were."""
        kinds = {mark: kind for kind, pair in MARKS.items() for mark in pair}
        spans: dict[str, list[Span]] = {kind: [] for kind in MARKS}
        text, started = "", {}
        for piece in re.split(f"([{ALL_MARKS}])", marked):
            if piece not in kinds:
                text += piece
            elif piece == MARKS[kinds[piece]][0]:
                started[kinds[piece]] = len(text)
            elif kinds[piece] in started:  # a template may have parted the two
                spans[kinds[piece]].append((started.pop(kinds[piece]), len(text)))
        return cls(text, **spans)

    def find_all(self, token: str) -> list[Span]:
        """Return where a control token stands that nobody typed."""
        found = [match.span() for match in re.finditer(re.escape(token), self)]
        return [span for span in found if span not in self.typed]

    def expand(self, edits: list[tuple[Span, str]]) -> "Prompt":
        """Replace the text of some spans, in their order, and move along all that the prompt remembers."""
        text = str(self)
        for (start, end), new in reversed(edits):
            text = text[:start] + new + text[end:]
        return Prompt(text, **{kind: move_spans(getattr(self, kind), edits) for kind in MARKS})


def map_text(value: Any, change: Callable[[str], str]) -> Any:
    """Copy a message, or whatever holds strings, with every string changed: any of them may be shown by a template."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {map_text(key, change): map_text(one, change) for key, one in value.items()}
    return [map_text(one, change) for one in value] if isinstance(value, list | tuple) else value


def remove_marks(text: str) -> str:
    return text.translate(NO_MARKS)


def mark_typed(text: str, control: re.Pattern) -> str:
    """Put marks around what would be control tokens in a text that somebody typed."""
    return control.sub(lambda found: found[0].join(MARKS["typed"]), remove_marks(text))


def mark_conversation(conversation: list[dict], control: re.Pattern) -> list[dict]:
    """Copy a conversation with the question, the answers and typed control tokens between marks; white space stays outside."""

    def enclose(text: str, kind: str) -> str:
        words = text.strip()  # `join` puts them between the two marks
        return text.replace(words, words.join(MARKS[kind])) if words else text

    marked = map_text(conversation, functools.partial(mark_typed, control=control))
    last = max((index for index, message in enumerate(conversation) if message.get("role") == "user"), default=None)
    for index, message in enumerate(marked):
        kind = "question" if index == last else "answers" if conversation[index].get("role") == "assistant" else None
        if kind is None or "content" not in message:
            continue
        if isinstance(message["content"], str):
            message["content"] = enclose(message["content"], kind)
            continue
        message["content"] = message["content"] or []
        for part in message["content"]:
            if isinstance(part.get("text"), str):
                part["text"] = enclose(part["text"], kind)
    return marked


def tokens_in(offsets: Iterable[Span], spans: list[Span]) -> list[int]:
    """Return 1 for each token, given by its characters, that overlaps one of the spans."""
    return [int(any(start < stop and end > first for first, stop in spans)) for start, end in offsets]


def move_spans(spans: list[Span], edits: list[tuple[Span, str]]) -> list[Span]:
    """Return where spans are after the text of others, all apart from them or the same, has been replaced."""

    def moved(place: int) -> int:
        return place + sum(len(new) - (end - start) for (start, end), new in edits if end <= place)

    return [(moved(start), moved(end)) for start, end in spans]


def encode_typed(
    tokenizer, prompts: list[Prompt], *, truncation=None, add_special_tokens: bool = True, **options
) -> dict[str, Any]:
    """Call a tokenizer on prompts with typed control tokens, which become the pieces of any other words.

    transformers' own `sanitize_control_tokens` gives no offsets, by which questions and answers are found.
    """
    rows = [encode_pieces(tokenizer, prompt, add_special_tokens) for prompt in prompts]
    if truncation not in (None, False, "do_not_truncate"):
        length = options.get("max_length") or tokenizer.model_max_length
        rows = [row[:length] if tokenizer.truncation_side == "right" else row[-length:] for row in rows]
    accepted = ("padding", "max_length", "pad_to_multiple_of", "padding_side", "return_attention_mask")
    padding = {"padding": False} | {name: options[name] for name in accepted if name in options}
    data = tokenizer.pad({"input_ids": [[token for token, _ in row] for row in rows]}, **padding)
    offsets = []
    for row, ids in zip(rows, data["input_ids"], strict=True):
        spans, fill = [span for _, span in row], [(0, 0)] * (len(ids) - len(row))
        offsets.append(fill + spans if (padding.get("padding_side") or tokenizer.padding_side) == "left" else spans + fill)
    return {**data, "offset_mapping": offsets}


def encode_pieces(tokenizer, prompt: Prompt, add_special_tokens: bool) -> list[tuple[int, Span]]:
    """Return the tokens of one prompt, each with its characters."""

    def encode(start: int, end: int, typed: bool, before: str = "") -> list[tuple[int, Span]]:
        found = tokenizer(
            before + prompt[start:end],
            add_special_tokens=add_special_tokens and start == 0,
            split_special_tokens=typed,
            return_offsets_mapping=True,
        )
        first = start - len(before)
        return [(token, (first + a, first + b)) for token, (a, b) in zip(found.input_ids, found.offset_mapping, strict=True)]

    def encode_inside(start: int, end: int, typed: bool) -> list[tuple[int, Span]]:
        # Behind a line break: some tokenizers put a space before what they take for the beginning of a text.
        found = encode(start, end, typed, before="\n") if start else []
        tokens = [(token, span) for token, span in found if span[0] >= start]
        clean = tokens and all(span[1] <= start for _, span in found[: len(found) - len(tokens)])
        return tokens if clean else encode(start, end, typed)

    row: list[tuple[int, Span]] = []
    edges = [0, *itertools.chain(*prompt.typed), len(prompt)]
    for index, (start, end) in enumerate(itertools.pairwise(edges)):
        if start == end:
            continue
        tokens = encode_inside(start, end, typed=index % 2 == 1)
        if index % 2 and len(tokens) == 1:  # a token that is not special is taken whole; in two parts it is not known
            tokens = encode_inside(start, start + 1, True) + encode_inside(start + 1, end, True)
        row += tokens
    return row


@functools.lru_cache(maxsize=8)
def any_of(tokens: frozenset[str]) -> re.Pattern:
    """Return a pattern that matches each of the tokens, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=lambda token: (-len(token), token)))))


def common_end(one: str, other: str) -> int:
    """Return how many characters at their ends two texts share."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def strip_span(text: str, start: int, end: int) -> Span:
    """Return the span without the white space at its ends."""
    words = text[start:end]
    start += len(words) - len(words.lstrip())
    return start, start + len(words.strip())


__all__ = ["Prompt"]
