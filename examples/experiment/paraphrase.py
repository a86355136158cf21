"""Paraphrases by rule, for a controller that must read phrasings which it was never trained with (ours)."""

import random
import re
from collections.abc import Collection

ALIKE = [
    set(words.split())
    for words in (
        "picture image photo scene",
        "object item thing",
        "objects items things",
        "tag disc",
        "tags discs",
        "kind type sort category",
        "largest biggest",
        "Which What",
        "which what",
        "shows contains",
    )
]
FRAMES = ("Tell me: {}", "Look at the picture: {}", "Look at the image: {}", "Of the scene: {}")
# Nothing that a level depends on: without them a question asks for the same.
FILLERS = set("the a an of is does do in any with to that it there are me has have can be".split())
FRAMED, DROPPED, REPLACED = 0.3, 0.15, 0.5


def paraphrase(text: str, rng: random.Random, known: Collection[str]) -> str:
    """Say a question in other words: some replaced by their like, some fillers left out, and now and then a frame around it.

    Args:
        text (`str`): the question.
        rng (`random.Random`): what is drawn.
        known (`Collection[str]`): words that may be put in.
    """
    words = []
    for word in re.findall(r"\w+(?:-\w+)*|[^\w\s]", text):
        if word in FILLERS and rng.random() < DROPPED:
            continue
        like = sorted(other for group in ALIKE if word in group for other in group if other in known)
        words.append(rng.choice(like) if like and rng.random() < REPLACED else word)
    said = re.sub(r" (?=[?.,:;)'])|(?<=[('])\s", "", " ".join(words))
    frames = [frame for frame in FRAMES if all(word in known for word in re.findall(r"\w+", frame.format("")))]
    return rng.choice(frames).format(said) if frames and rng.random() < FRAMED else said
