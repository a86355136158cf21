"""The ten types of questions about a scene, at three levels: their words, their answers and how they are chosen."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from granulon_hf.data.datasets.base import Row, encoded, single_turn
from granulon_hf.data.granuscenes.cutouts import ALIKE, read_table
from granulon_hf.data.sample import Sample

if TYPE_CHECKING:
    from granulon_hf.data.granuscenes.scenes import Dice, Thing

AMOUNTS = {"few": (3, 4), "some": (5, 7), "many": (8, 10)}  # least and most objects
LETTERS = tuple("ACEHLSTX")  # that a small picture keeps apart
QUARTERS = ("top-left", "top-right", "bottom-left", "bottom-right")

_TABLES = read_table("questions.yaml")
COLOURS: dict[str, list[int]] = _TABLES["colors"]
LEVELS = {level: tuple(phrasings) for level, phrasings in _TABLES["phrasings"].items()}
PHRASINGS: dict[str, list[str]] = {kind: texts for types in _TABLES["phrasings"].values() for kind, texts in types.items()}
ASKED: dict[str, int] = _TABLES["asked"]
QUESTIONS = sum(ASKED.values())
# Answers by type; those of other types are the categories of things.
CHOICES: dict[str, tuple[str, ...]] = {"amount": tuple(AMOUNTS), "presence": ("yes", "no"), "where": QUARTERS}
CHOICES |= {"relation": ("left", "right"), "letter": LETTERS, "colour": tuple(COLOURS), "largest_letter": LETTERS}
HELD_PHRASINGS = 2  # the last two of a type are asked in test_heldout alone


@dataclass(frozen=True)
class Question:
    """A question about a scene."""

    text: str
    answer: str  # one of `choices`
    type: str  # one of the ten of `LEVELS`
    level: str
    phrasing: str  # which of the type's `PHRASINGS`, as "type/number"
    choices: tuple[str, ...]  # all answers of the type; each is equally likely, whatever the question's words

    @property
    def chance(self) -> float:
        return 1 / len(self.choices)

    def to_row(self) -> dict[str, Any]:
        """Return the question's fields as columns of a data set."""
        fields = asdict(self)
        return {"question": fields.pop("text"), **fields, "choices": list(self.choices)}


def to_sample(row: Row) -> Sample:
    """Make a sample of one question. Its choices are not listed: every answer is one word (or letter) of a small set."""
    return single_turn(
        row,
        id_column="id",
        images=[encoded(row["image"])],
        question=row["question"],
        answer=row["answer"],
        task="vqa",
        choices=row["choices"],
        meta={name: row[name] for name in ("level", "type", "phrasing", "scene")},
    )


def numbers_of(kind: str, heldout: bool) -> range:
    """Return which phrasings of a type are asked: the held-out ones, or the others."""
    seen = len(PHRASINGS[kind]) - HELD_PHRASINGS
    return range(seen, seen + HELD_PHRASINGS) if heldout else range(seen)


def ask(dice: "Dice", things: Sequence["Thing"], categories: tuple[str, ...], side: int, heldout: bool) -> tuple[Question, ...]:
    """Draw the questions of a scene; the first of its things is the largest, and `categories` are all, in it or not."""
    questions: list[Question] = []
    named = [things[i] for i in nameable([thing.name for thing in things])]
    for level, kinds in LEVELS.items():
        left = ASKED[level]
        for kind in dice.take(kinds):
            if left and (found := find_answer(dice, kind, things, named, categories, side)):
                answer, words = found
                number = dice.pick(numbers_of(kind, heldout))
                text = PHRASINGS[kind][number].format(**words)
                questions.append(Question(text, answer, kind, level, f"{kind}/{number}", CHOICES.get(kind, categories)))
                left -= 1
    return tuple(questions)


def find_answer(
    dice: "Dice", kind: str, things: Sequence["Thing"], named: list["Thing"], categories: tuple[str, ...], side: int
) -> tuple[str, dict[str, Any]] | None:
    """Draw an answer and the words that its question needs; `None` if the scene does not allow such a question."""
    if kind == "amount":
        return next(name for name, (_, most) in AMOUNTS.items() if len(things) <= most), {}
    if kind == "majority":
        return Counter(thing.category for thing in things).most_common(1)[0][0], {}
    if kind == "presence":
        there = {thing.category for thing in things}
        answer = dice.pick(("yes", "no"))
        asked = dice.pick([name for name in categories if (name in there) == (answer == "yes")])
        article = "" if asked in ("food", "clothing") else "an " if asked[0] in "aeiou" else "a "
        return answer, {"category": asked, "a_category": article + asked}
    if kind == "where":
        thing = dice.pick(named)
        x, y = thing.centre
        return QUARTERS[2 * (y > side / 2) + (x > side / 2)], {"name": thing.name}
    if kind == "relation":
        pairs = [(a, b) for a in named for b in named if abs(a.centre[0] - b.centre[0]) >= 0.12 * side]
        if not pairs:
            return None
        thing, other = dice.pick(pairs)
        return "left" if thing.centre[0] < other.centre[0] else "right", {"name": thing.name, "other": other.name}
    if kind == "largest":
        return things[0].category, {}
    if kind == "bearer":
        marks = Counter((tag.letter, tag.colour) for thing in things for tag in thing.tags)
        unique = [(t, tag) for t in things for tag in t.tags if marks[tag.letter, tag.colour] == 1]
        if not unique:
            return None
        thing, tag = dice.pick(unique)
        return thing.category, vars(tag)
    thing = things[0] if kind == "largest_letter" else dice.pick(named)
    tag = dice.pick(thing.tags)
    return getattr(tag, "colour" if kind == "colour" else "letter"), {"name": thing.name, **vars(tag)}


def nameable(names: Sequence[str]) -> list[int]:
    """Return which of the things can be told from all others by name."""
    counts = Counter(names)
    return [
        i
        for i, name in enumerate(names)
        if counts[name] == 1 and not any(name in alike and sum(counts[other] for other in alike) > 1 for alike in ALIKE)
    ]
