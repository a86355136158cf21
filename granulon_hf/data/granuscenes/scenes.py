"""GranuScenes: scenes of tagged cut-outs on photographs, with questions at three levels; generated, never downloaded.

A scene holds 3 to 10 cut-outs at free positions. Each carries two tags: a letter on a coloured disc. The seven questions
of a scene need it as a whole (coarse), single objects (middle) or single tags (fine). Which scene it is depends on seed,
split, index and the pictures alone. What is where, how large and with which tags is drawn before, and independently of, what
it shows: no answer can be guessed from its question, and every answer of a type is equally likely.
"""

import functools
import io
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from granulon_hf.data.datasets.base import Adapter, Row, encoded, single_turn
from granulon_hf.data.datasets.custom import by_group
from granulon_hf.data.granuscenes.cutouts import ALIKE, DRAWN, VERSION, Picture, Pictures
from granulon_hf.data.readers import Source
from granulon_hf.data.sample import Sample
from granulon_hf.errors import GranulonError

SIDE = 192  # pixels; lengths below are in pixels of such a scene, and scale with others
SCENES = 2000
SPLITS = ("train", "validation", "test", "test_heldout")
AMOUNTS = {"few": (3, 4), "some": (5, 7), "many": (8, 10)}  # least and most objects
LETTERS = tuple("ACEHLSTX")  # that a small picture keeps apart
COLOURS = {
    "red": (214, 30, 36),
    "orange": (255, 138, 0),
    "yellow": (255, 228, 30),
    "green": (22, 140, 50),
    "blue": (30, 80, 220),
    "purple": (142, 50, 190),
    "white": (250, 250, 250),
    "black": (16, 16, 16),
}
TAG = 20  # a tag's diameter: about one and a half cells of a 14 × 14 grid, so that most of it falls into one
SMALLEST = 42  # sides of the square that a cut-out gets for itself and its tags
LARGEST = 90
LEAD = 1.5  # how much larger the largest one's square is; a picture that is thin in its box may show fewer pixels all the same
FILL = 0.77  # of the square's side: the side of a square picture; others have the same area, unless too long for it
MARGIN = 6  # from the middle lines to the centre of any object

LEVELS = {
    "coarse": ("amount", "majority", "presence"),
    "middle": ("where", "relation", "largest"),
    "fine": ("letter", "colour", "bearer", "largest_letter"),
}
ASKED = {"coarse": 2, "middle": 2, "fine": 3}
QUESTIONS = sum(ASKED.values())
# The last two of a type are asked in test_heldout alone.
PHRASINGS = {
    "amount": (
        "Are there few (up to 4), some (5 to 7) or many (8 or more) tagged objects?",
        "How many tagged objects does the picture show: few (up to 4), some (5 to 7) or many (8 or more)?",
        "Would you say few (up to 4), some (5 to 7) or many (8 or more) tagged objects are here?",
        "Few (up to 4), some (5 to 7) or many (8 or more): how many tagged objects can be seen?",
        "Does this scene contain few (up to 4), some (5 to 7) or many (8 or more) items with tags?",
        "Is the number of items with tags few (up to 4), some (5 to 7) or many (8 or more)?",
    ),
    "majority": (
        "Of which kind are there most tagged objects?",
        "Which kind of tagged object is the most frequent?",
        "Of which kind does the picture show the most tagged objects?",
        "What kind are most of the tagged objects, compared with any other kind?",
        "Which category occurs most often among the items with tags?",
        "Name the most common category of the items with tags.",
    ),
    "presence": (
        "Is there any {category} with tags in the picture?",
        "Does the picture show any {category} with tags?",
        "Is one of the tagged objects {a_category}?",
        "Is any of the tagged objects {a_category}?",
        "Do the items with tags include {a_category}?",
        "Would you find {a_category} among the items with tags?",
    ),
    "where": (
        "In which quarter of the picture is the {name}?",
        "Where is the {name}: top-left, top-right, bottom-left or bottom-right?",
        "Which quarter shows the {name}?",
        "The {name} is in which quarter of the picture?",
        "Which corner of the scene is the {name} nearest to?",
        "Find the {name}: in what part of the image does it lie?",
    ),
    "relation": (
        "Is the {name} to the left or to the right of the {other}?",
        "Left or right: where is the {name}, seen from the {other}?",
        "On which side of the {other} is the {name}, left or right?",
        "Does the {name} lie left or right of the {other}?",
        "Compared with the {other}, is the {name} further left or further right?",
        "Going from the {other} to the {name}, does one move left or right?",
    ),
    "largest": (
        "What kind of thing is the largest tagged object?",
        "Which kind of tagged object is shown largest?",
        "The largest tagged object is of what kind?",
        "What kind is the tagged object that takes up the most room?",
        "To which category does the biggest item with tags belong?",
        "Name the category of the item with tags that looks biggest.",
    ),
    "letter": (
        "Which letter is on the {colour} tag of the {name}?",
        "What letter does the {colour} tag of the {name} show?",
        "The {name} has a {colour} tag: with which letter?",
        "On the {name}, which letter is on the {colour} tag?",
        "Read the {colour} disc attached to the {name}.",
        "Look at the {name}: what is written on its {colour} disc?",
    ),
    "colour": (
        "What colour is the tag with the letter {letter} on the {name}?",
        "Which colour has the tag {letter} on the {name}?",
        "The {name} has a tag with the letter {letter}: of what colour?",
        "What is the colour of the tag {letter} of the {name}?",
        "Look at the {name}: the disc marked {letter} has what colour?",
        "Name the colour of the {letter} disc attached to the {name}.",
    ),
    "bearer": (
        "What kind of thing has the {colour} tag with the letter {letter}?",
        "Which kind of thing carries the letter {letter} on a {colour} tag?",
        "The {colour} tag {letter} is on what kind of thing?",
        "On what kind of thing is the {colour} tag with the letter {letter}?",
        "Find the {colour} disc marked {letter}: to which category does its item belong?",
        "Name the category of the item marked {letter} on {colour}.",
    ),
    "largest_letter": (
        "Which letter is on the {colour} tag of the largest object?",
        "What letter does the {colour} tag of the largest object show?",
        "The largest object has a {colour} tag: with which letter?",
        "What is the letter on the largest object's {colour} tag?",
        "Read the {colour} disc attached to the biggest item.",
        "Look at the item that appears biggest: what is written on its {colour} disc?",
    ),
}
HELD_PHRASINGS = 2
QUARTERS = ("top-left", "top-right", "bottom-left", "bottom-right")

# --- scenes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tag:
    """A letter on a coloured disc; `centre` in pixels."""

    letter: str
    colour: str
    centre: tuple[float, float]


@dataclass(frozen=True)
class Thing:
    """A cut-out in a scene; `box` is (left, top, right, bottom) in pixels."""

    name: str
    category: str
    picture: Picture
    box: tuple[int, int, int, int]
    tags: tuple[Tag, Tag]

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Args:
        text, answer (`str`): the answer is one of `choices`.
        type (`str`): one of the ten of `LEVELS`.
        level (`str`): "coarse", "middle" or "fine".
        phrasing (`str`): which of the type's `PHRASINGS`, as "type/number".
        choices (`tuple[str, ...]`): all answers of the type; each is equally likely, whatever the question's words.
    """

    text: str
    answer: str
    type: str
    level: str
    phrasing: str
    choices: tuple[str, ...]

    @property
    def chance(self) -> float:
        return 1 / len(self.choices)


@dataclass(frozen=True)
class Scene:
    """All about a scene but its pixels; the first of its `things` is the largest.

    `crop` is the background's square: how far left and top as shares of the room there is, and its side as a share of the
    picture's shorter one.
    """

    id: str
    split: str
    seed: int
    index: int
    things: tuple[Thing, ...]
    background: Picture
    crop: tuple[float, float, float]
    flip: bool
    questions: tuple[Question, ...]


class Dice:
    """Choices from the uniform numbers of a generator, which are drawn many at a time for speed."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self._numbers = rng, [0.0][:0]

    def share(self) -> float:
        if not self._numbers:
            self._numbers = self.rng.random(128).tolist()
        return self._numbers.pop()

    def below(self, count: int) -> int:
        return int(self.share() * count)

    def pick(self, items: Sequence[Any]) -> Any:
        return items[int(self.share() * len(items))]

    def take(self, items: Iterable[Any], count: int | None = None) -> list[Any]:
        """Some of the items, all by default, in random order."""
        pool = list(items)
        return [pool.pop(int(self.share() * len(pool))) for _ in range(len(pool) if count is None else count)]


class GranuScenes(Sequence[Scene]):
    """A sequence of scenes with their questions, made when they are asked for.

        scenes = GranuScenes("train", scenes=7000, pictures="pictures")
        for scene in scenes:
            image = scenes.render(scene)       # once for its seven questions
            for question in scene.questions:
                question.text, question.answer, question.level

    Scene number i is the same whatever their number, whoever asks, and in whichever process.

    Args:
        split (`str`): "train"; "validation" and "test": other scenes of the same things, backgrounds and phrasings; or
            "test_heldout": other pictures of known things, other backgrounds and other phrasings.
        scenes (`int`): how many.
        pictures ([`Pictures`], `str` or `Path`, *optional*): what is shown, or the folder with `objects/` and `backgrounds/`;
            by default drawn things.
        seed (`int`): other seeds give other scenes of the same pictures, in the same splits.
        side (`int`): of the square image, pixels. The scenes are the same for all.

    Raises:
        GranulonError: there is no such split, a number is too small, or the pictures are too few.
    """

    def __init__(
        self,
        split: str = "train",
        scenes: int = SCENES,
        pictures: Pictures | str | Path | None = None,
        *,
        seed: int = 0,
        side: int = SIDE,
    ):
        if split not in SPLITS:
            raise GranulonError(f"granuscenes has no split {split!r}; it has {', '.join(map(repr, SPLITS))}.")
        for value, what, least in ((scenes, "scenes", 1), (seed, "seed", 0), (side, "side", 96)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise GranulonError(f"{what} must be a whole number of at least {least}; got {value!r}.")
        if not isinstance(pictures, Pictures):
            pictures = Pictures() if pictures is None or str(pictures) == DRAWN else Pictures(folder=pictures)
        self.split, self.scenes, self.seed, self.side, self.pictures = split, int(scenes), int(seed), int(side), pictures
        self.heldout = split == "test_heldout"
        pictures.check(self.heldout)
        self._pool = {
            category: [(name, pictures.pools[self.heldout][category][name]) for name in pictures.pools[self.heldout][category]]
            for category in pictures.categories
        }

    def __len__(self) -> int:
        return self.scenes

    def __repr__(self) -> str:
        return f"GranuScenes({self.split!r}, {self.location!r})"

    @property
    def location(self) -> str:
        """What `load` takes as its source to make the same scenes again, and manifests keep."""
        objects, backgrounds = self.pictures.objects_folder, self.pictures.backgrounds_folder
        settings: dict[str, Any] = {"scenes": self.scenes, "seed": self.seed, "side": self.side, "version": VERSION}
        if objects is None and backgrounds is None:
            place = DRAWN
        elif objects and backgrounds and (objects.name, backgrounds.name) == ("objects", "backgrounds"):
            place = str(objects.parent) if objects.parent == backgrounds.parent else ""
        else:
            place = ""
        if not place:
            settings |= {"objects": str(objects or DRAWN), "backgrounds": str(backgrounds or DRAWN)}
        return f"{place}?{urlencode(settings)}"

    @property
    def phrasings(self) -> list[str]:
        """Those that are asked in this split, as "type/number"."""
        return [f"{kind}/{number}" for kind in PHRASINGS for number in self._numbers(kind)]

    def _numbers(self, kind: str) -> range:
        count = len(PHRASINGS[kind])
        return range(count - HELD_PHRASINGS, count) if self.heldout else range(count - HELD_PHRASINGS)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        return self.scene(int(index) % len(self))

    def scene(self, index: int) -> Scene:
        """Scene number `index`, also beyond the length; nothing is rendered.

        Raises:
            GranulonError: a negative number.
        """
        if index < 0:
            raise GranulonError(f"Scenes count from 0; there is no scene {index}.")
        rng = np.random.default_rng([VERSION, self.seed, SPLITS.index(self.split), index])
        dice = Dice(rng)
        amount = dice.pick(tuple(AMOUNTS))
        least, most = AMOUNTS[amount]
        count = least + dice.below(most - least + 1)
        # Where and how large, blind to what: nothing about a place or size can tell what is there.
        sides, centres = arrange(dice, count)
        categories = self._categories(dice, count)
        main = categories[0]
        cast = self._cast(dice, dice.take(categories))
        things = tuple(
            self._thing(dice, name, category, picture, side, centre)
            for (category, name, picture), side, centre in zip(cast, sides, centres, strict=True)
        )
        background = dice.pick(self.pictures.scenery[self.heldout])
        crop = (dice.share(), dice.share(), 0.45 + 0.5 * dice.share())
        flip = dice.share() < 0.5
        questions = self._ask(dice, things, amount, main)
        name = f"{self.split}-{self.seed}-{index}"
        return Scene(name, self.split, self.seed, index, things, background, crop, flip, questions)

    def _categories(self, dice: Dice, count: int) -> list[str]:
        """The categories of all things: one of them has the most, and at least one has none."""
        main, *others = dice.take(self.pictures.categories)
        others = others[:-1]
        least = next(m for m in range(2, count) if count - m <= len(others) * (m - 1))
        most = least + dice.below(min(3, count - least))
        rest: list[str] = []
        while len(rest) < count - most:
            rest.append(dice.pick([other for other in others if rest.count(other) < most - 1]))
        return [main] * most + rest

    def _cast(self, dice: Dice, categories: list[str]) -> list[tuple[str, str, Picture]]:
        """Names and pictures: different ones as far as there are, and one at least that a question can name."""
        counts = Counter(categories)
        for _ in range(1000):
            names = {
                category: dice.take(pool, number)
                if len(pool := self._pool[category]) >= number
                else [dice.pick(pool) for _ in range(number)]
                for category, number in counts.items()
            }
            if nameable([name for chosen in names.values() for name, _ in chosen]):
                break
        else:
            raise GranulonError(
                f"The cut-outs of {str(self.pictures.objects_folder or DRAWN)!r} show too few different things: add pictures."
            )
        chosen = []
        for category in categories:
            name, pictures = names[category].pop()
            chosen.append((category, name, dice.pick(pictures)))
        return chosen

    def _thing(self, dice, name: str, category: str, picture: Picture, side: float, centre: tuple[float, float]) -> Thing:
        scale = self.side / SIDE
        ratio = min(picture.size) / max(picture.size)
        long = min(1.0, FILL / math.sqrt(ratio)) * side
        width, height = (long, long * ratio) if picture.size[0] >= picture.size[1] else (long * ratio, long)
        # At two opposite ends of what is shown, and within the square, where nothing else is.
        room, first = (side - TAG) / 2, 2 * dice.below(2)
        corners = tuple((x * 0.43, y * 0.43) for x, y in ((-1, -1), (1, 1)))
        for pair in (picture.ends[first : first + 2], picture.ends[2 - first : 4 - first], corners):
            offsets = [(max(-room, min(room, x * width)), max(-room, min(room, y * height))) for x, y in pair]
            if math.dist(*offsets) > TAG:
                break
        places = [(centre[0] + x, centre[1] + y) for x, y in offsets]
        letters, colours = dice.take(LETTERS, 2), dice.take(COLOURS, 2)
        tags = tuple(
            Tag(letter, colour, (round(place[0] * scale, 2), round(place[1] * scale, 2)))
            for letter, colour, place in zip(letters, colours, places, strict=True)
        )
        wide, high = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = round(centre[0] * scale - wide / 2), round(centre[1] * scale - high / 2)
        box = (left, top, left + wide, top + high)
        return Thing(name, category, picture, box, (tags[0], tags[1]))

    def _ask(self, dice: Dice, things: Sequence[Thing], amount: str, main: str) -> tuple[Question, ...]:
        questions = []
        named = nameable([thing.name for thing in things])
        for level, kinds in LEVELS.items():
            left = ASKED[level]
            for kind in dice.take(kinds):
                found = self._question(dice, kind, things, [things[i] for i in named], amount, main) if left else None
                if found is not None:
                    answer, words = found
                    number = dice.pick(self._numbers(kind))
                    text = PHRASINGS[kind][number].format(**words)
                    questions.append(Question(text, answer, kind, level, f"{kind}/{number}", self.choices(kind)))
                    left -= 1
        return tuple(questions)

    def choices(self, kind: str) -> tuple[str, ...]:
        """The answers that questions of a type can have."""
        if kind in ("majority", "largest", "bearer"):
            return self.pictures.categories
        fixed: dict[str, tuple[str, ...]] = {
            "amount": tuple(AMOUNTS),
            "presence": ("yes", "no"),
            "where": QUARTERS,
            "relation": ("left", "right"),
            "colour": tuple(COLOURS),
        }
        return fixed.get(kind, LETTERS)

    def _question(
        self, dice: Dice, kind: str, things: Sequence[Thing], named: list[Thing], amount: str, main: str
    ) -> tuple[str, dict[str, str]] | None:
        """An answer, and the words that its question needs; `None` where the scene does not allow such a question."""
        if kind == "amount":
            return amount, {}
        if kind == "majority":
            return main, {}
        if kind == "presence":
            there = {thing.category for thing in things}
            answer = dice.pick(("yes", "no"))
            asked = dice.pick([name for name in self.pictures.categories if (name in there) == (answer == "yes")])
            return answer, {"category": asked, "a_category": with_article(asked)}
        if kind == "where":
            thing = dice.pick(named)
            x, y = thing.centre
            return QUARTERS[2 * (y > self.side / 2) + (x > self.side / 2)], {"name": thing.name}
        if kind == "relation":
            apart = 0.12 * self.side
            pairs = [(a, b) for a in named for b in named if abs(a.centre[0] - b.centre[0]) >= apart]
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
            return thing.category, {"letter": tag.letter, "colour": tag.colour}
        thing = things[0] if kind == "largest_letter" else dice.pick(named)
        tag = dice.pick(thing.tags)
        words = {"name": thing.name, "letter": tag.letter, "colour": tag.colour}
        return tag.colour if kind == "colour" else tag.letter, words

    def render(self, scene: Scene) -> Image.Image:
        """The scene's picture, RGB, `side` × `side` pixels.

        Raises:
            GranulonError: a picture's file cannot be read any more.
        """
        image = self.pictures.background(scene.background, scene.crop, scene.flip, self.side).copy()
        for thing in scene.things:
            left, top, right, bottom = thing.box
            cutout = self.pictures.cutout(thing.picture, right - left, bottom - top)
            image.paste(cutout, (left, top), cutout)
        diameter = round(TAG * self.side / SIDE)
        for tag in (tag for thing in scene.things for tag in thing.tags):
            sprite = draw_tag(tag.letter, tag.colour, diameter)
            image.paste(sprite, (round(tag.centre[0] - diameter / 2), round(tag.centre[1] - diameter / 2)), sprite)
        return image

    def encode(self, scene: Scene) -> bytes:
        """The scene's picture as PNG."""
        buffer = io.BytesIO()
        self.render(scene).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def samples(self, index: int) -> list[Sample]:
        """The questions of scene number `index` as [`Sample`]s, which share one image."""
        scene = self.scene(index)
        image = self.encode(scene)
        return [to_sample(question_row(scene, number) | {"image": image}) for number in range(QUESTIONS)]

    def row(self, index: int) -> dict[str, Any]:
        """Scene number `index` as a row of [`granuscenes`]."""
        scene = self.scene(index)
        return {
            "id": scene.id,
            "image": {"bytes": self.encode(scene), "path": None},
            "questions": [
                {
                    "question": question.text,
                    "answer": question.answer,
                    "type": question.type,
                    "level": question.level,
                    "phrasing": question.phrasing,
                    "choices": list(question.choices),
                }
                for question in scene.questions
            ],
            "objects": [
                {
                    "name": thing.name,
                    "category": thing.category,
                    "picture": thing.picture.path,
                    "box": list(thing.box),
                    "tags": [asdict(tag) | {"centre": list(tag.centre)} for tag in thing.tags],
                }
                for thing in scene.things
            ],
            "background": scene.background.path,
        }


def arrange(dice: Dice, count: int) -> tuple[list[float], list[tuple[float, float]]]:
    """Squares that do not overlap, the largest first: sides, and centres in a scene of `SIDE` pixels."""
    # With fewer things there is room for larger ones; two fifths of the picture can always be covered.
    top = min(LARGEST / LEAD, 1.12 * math.sqrt(0.42 * SIDE**2 / (count + LEAD**2 - 1)))
    others = sorted((SMALLEST + dice.share() * max(0.0, top - SMALLEST) for _ in range(count - 1)), reverse=True)
    sides = np.array([others[0] * LEAD, *others])
    while True:
        for _ in range(8):
            centres = scatter(dice.rng, sides)
            if centres is not None:
                return sides.tolist(), [(x, y) for x, y in centres.tolist()]
        sides = sides * 0.96


def scatter(rng: np.random.Generator, sides: np.ndarray) -> np.ndarray | None:
    """Random centres, one after the other; `None` where the last ones found no room."""
    centres = np.empty((len(sides), 2))
    for i, side in enumerate(sides):
        tried = side / 2 + rng.random((48, 2)) * (SIDE - side)
        free = (np.abs(tried - SIDE / 2) >= MARGIN).all(1)
        distance = np.abs(tried[:, None] - centres[None, :i]).max(2)
        free &= (distance >= (side + sides[:i]) / 2).all(1)
        first = int(free.argmax())
        if not free[first]:
            return None
        centres[i] = tried[first]
    return centres


def nameable(names: Sequence[str]) -> list[int]:
    """Which of the things no other can be mistaken for, by name."""
    counts = Counter(names)
    return [
        i
        for i, name in enumerate(names)
        if counts[name] == 1 and not any(name in alike and sum(counts[other] for other in alike) > 1 for alike in ALIKE)
    ]


def with_article(noun: str) -> str:
    if noun in ("food", "clothing"):
        return f"{noun}"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@functools.cache
def draw_tag(letter: str, colour: str, diameter: int) -> Image.Image:
    """A disc with a letter, RGBA; drawn eight times as large and made small."""
    fill = COLOURS[colour]
    ink = (255, 255, 255) if sum(np.multiply(fill, (0.3, 0.59, 0.11))) < 150 else (0, 0, 0)
    size = 8 * diameter
    image = Image.new("RGBA", (size, size), (*ink, 0))
    draw = ImageDraw.Draw(image)
    draw.ellipse((0, 0, size - 1, size - 1), (*ink, 255))
    rim = round(0.05 * size)
    draw.ellipse((rim, rim, size - 1 - rim, size - 1 - rim), (*fill, 255))
    font = ImageFont.load_default(0.86 * size)
    draw.text(
        (size / 2, size / 2), letter, (*ink, 255), font, anchor="mm", stroke_width=round(0.022 * size), stroke_fill=(*ink, 255)
    )
    return image.resize((diameter, diameter), Image.Resampling.LANCZOS)


# --- data sets ----------------------------------------------------------------------------------------------------------


def features():
    """The columns of [`granuscenes`]: one row is a scene."""
    from datasets import Features, Image, List, Value

    string = Value("string")
    question = dict.fromkeys(("question", "answer", "type", "level", "phrasing"), string) | {"choices": List(string)}
    tag = {"letter": string, "colour": string, "centre": List(Value("float32"), length=2)}
    thing = {"name": string, "category": string, "picture": string, "box": List(Value("int32"), length=4), "tags": List(tag)}
    return Features({"id": string, "image": Image(), "questions": List(question), "objects": List(thing), "background": string})


def _rows(scenes: GranuScenes, starts: list[int], step: int) -> Iterator[dict[str, Any]]:
    for start in starts:
        for index in range(start, min(start + step, len(scenes))):
            yield scenes.row(index)


def granuscenes(
    split: str = "train",
    scenes: int = SCENES,
    pictures: Pictures | str | Path | None = None,
    *,
    seed: int = 0,
    side: int = SIDE,
    streaming: bool = False,
    num_proc: int | None = None,
):
    """GranuScenes as `datasets` has it: a row is a scene with its image, questions and objects.

    Args:
        split, scenes, pictures, seed, side: as for [`GranuScenes`].
        streaming (`bool`): make scenes while iterating instead of once for the cache.
        num_proc (`int`, *optional*): processes that make them for the cache.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` when streaming (in shards of 100 scenes, for several workers).

    Raises:
        GranulonError: as [`GranuScenes`].
    """
    from datasets import Dataset, IterableDataset

    made = GranuScenes(split, scenes, pictures, seed=seed, side=side)
    step = 100
    given = {"scenes": made, "starts": list(range(0, len(made), step)), "step": step}
    if streaming:
        return IterableDataset.from_generator(_rows, features=features(), gen_kwargs=given)
    return Dataset.from_generator(_rows, features=features(), gen_kwargs=given, num_proc=num_proc)


def question_row(scene: Scene, number: int) -> dict[str, Any]:
    question = scene.questions[number]
    return {
        "id": f"{scene.id}-{number}",
        "scene": scene.id,
        "question": question.text,
        "answer": question.answer,
        "type": question.type,
        "level": question.level,
        "phrasing": question.phrasing,
        "choices": list(question.choices),
    }


def to_sample(row: Row) -> Sample:
    """One question about a scene. The choices are not listed in it: every answer is one word (or letter) of a small set."""
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


COLUMNS = ("id", "scene", "image", "question", "answer", "type", "level", "phrasing", "choices")


class SceneSource(Source):
    """The questions of [`GranuScenes`] as rows, seven for each scene; nothing is made before it is asked for."""

    def __init__(self, scenes: GranuScenes):
        self.scenes, self.location, self.parts, self.roots = scenes, scenes.location, ["scenes"], []
        self.split = scenes.split
        self._last: tuple[int, Scene, bytes | None] | None = None

    def __getstate__(self):
        return self.__dict__ | {"_last": None}

    def columns(self, part: str) -> list[str]:
        return list(COLUMNS)

    def count(self, part: str) -> int:
        return len(self.scenes) * QUESTIONS

    def rows(self, part, wanted, columns):
        for row in map(int, wanted):
            index, number = divmod(row, QUESTIONS)
            if set(columns) <= {"id", "scene"}:
                scene = f"{self.scenes.split}-{self.scenes.seed}-{index}"
                yield row, {"id": f"{scene}-{number}", "scene": scene}
                continue
            if self._last is None or self._last[0] != index:
                self._last = (index, self.scenes.scene(index), None)
            if "image" in columns and self._last[2] is None:
                self._last = (*self._last[:2], self.scenes.encode(self._last[1]))
            yield row, question_row(self._last[1], number) | {"image": self._last[2]}

    def fingerprint(self, part: str) -> str | None:
        return f"{VERSION}-{self.scenes.pictures.digest}"


def open_scenes(source: Any, split: str) -> SceneSource:
    """What a user calls a source of granuscenes.

    Args:
        source: [`GranuScenes`]; a folder with `objects/` and `backgrounds/`, "drawn" or `None`; with settings, if others than
            the defaults are wanted: `"pictures?scenes=500&seed=7&side=224"`.
        split (`str`): one of `SPLITS`; of "holdout" the scenes are those of train.

    Raises:
        GranulonError: a setting is not known, the scenes are another version's, or as [`GranuScenes`].
    """
    split = "train" if split == "holdout" else split
    if isinstance(source, GranuScenes):
        if source.split != split:
            raise GranulonError(f"These scenes are of split {source.split!r}, not {split!r}.")
        return SceneSource(source)
    place, _, query = str(source or "").partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    numbers, folders = ("scenes", "seed", "side", "version"), ("objects", "backgrounds")
    for name, value in given.items():
        if name not in numbers + folders or (name in numbers and not value.isdecimal()):
            raise GranulonError(
                f"{str(source)!r}: {name}={value} is no setting; there are {', '.join(numbers)} (whole numbers)."
            )
    if (version := int(given.pop("version", VERSION))) != VERSION:
        raise GranulonError(f"These scenes were made by version {version} of granuscenes; this is version {VERSION}.")
    parts = {name: given.pop(name) for name in folders if name in given}
    if place and parts:
        raise GranulonError(f"{str(source)!r}: give a folder, or objects= and backgrounds=.")
    pictures: Pictures | str = place or DRAWN
    if parts:
        pictures = Pictures(**{name: None if value == DRAWN else value for name, value in parts.items()})
    scenes, seed, side = (int(given.get(name, value)) for name, value in (("scenes", SCENES), ("seed", 0), ("side", SIDE)))
    return SceneSource(GranuScenes(split, scenes, pictures, seed=seed, side=side))


ADAPTER = Adapter(
    name="granuscenes", to_sample=to_sample, columns=COLUMNS, group=("scene", by_group), eval_split="test", opener=open_scenes
)


# --- controls -----------------------------------------------------------------------------------------------------------


def shared(one: GranuScenes, other: GranuScenes) -> dict[str, list[str]]:
    """What two splits have in common: groups and files of cut-outs and of backgrounds, and phrasings (ids and texts)."""

    def parts(scenes: GranuScenes) -> dict[str, set[str]]:
        pool = scenes.pictures.pools[scenes.heldout]
        cutouts = [picture for names in pool.values() for pictures in names.values() for picture in pictures]
        found = {"objects": {text for picture in cutouts for text in (picture.group, picture.path, picture.digest)}}
        scenery = scenes.pictures.scenery[scenes.heldout]
        found["backgrounds"] = {text for picture in scenery for text in (picture.group, picture.path, picture.digest)}
        texts = {PHRASINGS[name.split("/")[0]][int(name.split("/")[1])] for name in scenes.phrasings}
        return found | {"phrasings": {*scenes.phrasings, *texts}}

    first, second = parts(one), parts(other)
    return {what: sorted((first[what] & second[what]) - {DRAWN}) for what in first}


def baselines(train: Iterable[Scene], test: Iterable[Scene]) -> dict[str, dict[str, float]]:
    """What can be scored without looking, by type of question.

    Args:
        train, test (`Iterable[Scene]`): with which the classifiers are fitted, and scored. No pixels are needed.

    Returns:
        `dict`: for each type `questions`, and the accuracies `chance` (one over the number of answers), `majority` (the most
        frequent answer in training), `blind` (a logistic regression on the words and pairs of words of the question) and
        `shuffled` (the right answer to the next scene's question of that type: what perfect sight of a wrong image gives).

    Raises:
        GranulonError: scikit-learn is missing, or there is a type without questions.
    """
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ModuleNotFoundError:
        raise GranulonError("The blind baseline needs scikit-learn: pip install scikit-learn.") from None
    seen, asked = by_type(train), by_type(test)
    result = {}
    for kind in PHRASINGS:
        if not seen.get(kind) or len(asked.get(kind, ())) < 2:
            raise GranulonError(f"There are no questions of type {kind!r}: take more scenes.")
        texts, answers = [q.text for q in asked[kind]], np.array([q.answer for q in asked[kind]])
        known = [q.answer for q in seen[kind]]
        blind = make_pipeline(CountVectorizer(ngram_range=(1, 2), token_pattern=r"[\w-]+"), LogisticRegression(max_iter=200))
        guessed = blind.fit([q.text for q in seen[kind]], known).predict(texts) if len(set(known)) > 1 else known[0]
        result[kind] = {
            "questions": len(answers),
            "chance": asked[kind][0].chance,
            "majority": float(np.mean(answers == Counter(known).most_common(1)[0][0])),
            "blind": float(np.mean(answers == guessed)),
            "shuffled": float(np.mean(answers == np.roll(answers, 1))),
        }
    return result


def by_type(scenes: Iterable[Scene]) -> Mapping[str, list[Question]]:
    questions: dict[str, list[Question]] = defaultdict(list)
    for scene in scenes:
        for question in scene.questions:
            questions[question.type].append(question)
    return questions
