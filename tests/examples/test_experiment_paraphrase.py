"""Paraphrases keep what a question asks for."""

import random
import re

import pytest

from examples.experiment.paraphrase import FILLERS, FRAMES, paraphrase
from granulon_hf.data.granuscenes.questions import PHRASINGS

KNOWN = {word for texts in PHRASINGS.values() for text in texts for word in re.findall(r"\w+(?:-\w+)*", text)}


def words(text):
    return re.findall(r"\w+(?:-\w+)*", text)


@pytest.mark.parametrize("kind", PHRASINGS)
def test_only_known_words_are_put_in_and_only_fillers_left_out(kind):
    rng, different = random.Random(0), set()
    filling = {"name": "cat", "other": "dog", "letter": "S", "colour": "red", "category": "food", "a_category": "an animal"}
    for phrasing in PHRASINGS[kind]:
        text = phrasing.format(**filling)
        for _ in range(20):
            said = paraphrase(text, rng, KNOWN)
            different.add(said)
            assert set(words(said)) <= KNOWN | set(words(text))
            # Names, letters, colors and what the question turns on.
            kept = {"cat", "dog", "S", "red", "food", "animal", "few", "many", "most", "left", "right", "letter", "quarter"}
            assert kept & set(words(text)) == kept & set(words(said)) - set(words(" ".join(FRAMES)))
            alike = {"largest", "biggest"}
            assert bool(alike & set(words(text))) == bool(alike & set(words(said)))
    assert len(different) > 5 * len(PHRASINGS[kind])


def test_nothing_is_put_in_that_is_not_known_and_the_seed_decides():
    text = "Which letter is on the red tag of the cat?"
    kept = [word for word in words(text) if word not in FILLERS]
    for seed in range(30):
        assert [word for word in words(paraphrase(text, random.Random(seed), ())) if word not in FILLERS] == kept
    assert paraphrase(text, random.Random(3), KNOWN) == paraphrase(text, random.Random(3), KNOWN)
