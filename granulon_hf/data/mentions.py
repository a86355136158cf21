"""Objects that a caption mentions, found by the words for them."""

import re
from collections.abc import Iterable, Mapping

WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
IRREGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose"}
IRREGULAR |= {"feet": "foot", "teeth": "tooth", "leaves": "leaf", "knives": "knife", "loaves": "loaf", "wolves": "wolf"}
PLURALS = (("ies", "y"), ("ves", "f"), ("es", ""), ("s", ""))


def phrase_of(text: str) -> str:
    """Write a word or phrase as captions are looked through: small letters, without hyphens."""
    return " ".join(token.removesuffix("'s") for token in WORD.findall(text.lower()))


def singulars(word: str) -> Iterable[str]:
    """Give what a word may be the plural of, and itself first."""
    yield word
    if word in IRREGULAR:
        yield IRREGULAR[word]
    for end, instead in PLURALS:
        if word.endswith(end):
            yield word.removesuffix(end) + instead


def named_objects(caption: str, words: Mapping[str, str]) -> list[str]:
    """Return the names of the objects that a caption mentions, each as often as it does.

    Args:
        caption (`str`): of any length.
        words (`Mapping[str, str]`): the name of the object for each word or phrase, as [`phrase_of`] writes it, that means one;
            an empty name for phrases that mean none, such as "home plate". Of phrases that begin alike the longest counts: a
            hot dog is no dog.
    """
    found = []
    tokens = phrase_of(caption).split()
    longest = max((phrase.count(" ") + 1 for phrase in words), default=1)
    start = 0
    while start < len(tokens):
        for length in range(min(longest, len(tokens) - start), 0, -1):
            *head, last = tokens[start : start + length]
            phrase = next((p for p in (" ".join([*head, form]) for form in singulars(last)) if p in words), None)
            if phrase is not None:
                found.append(words[phrase])
                break
        start += length
    return [name for name in found if name]
