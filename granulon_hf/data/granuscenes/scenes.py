"""GranuScenes: scenes of tagged cut-outs on photographs, with questions at three levels; generated, never downloaded.

A scene holds 3 to 10 cut-outs at free positions. Each carries two tags: a letter on a colored disc. The seven questions
of a scene need it as a whole (coarse), single objects (middle) or single tags (fine). Which scene it is depends on seed,
split, index and the pictures alone. What is where, how large and with which tags is drawn before, and independently of, what
it shows: no answer can be guessed from its question, and every answer of a type is equally likely.
"""

import functools
import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from granulon_hf.data.granuscenes.cutouts import VERSION, Picture
from granulon_hf.data.granuscenes.drawn import DRAWN
from granulon_hf.data.granuscenes.pictures import Pictures
from granulon_hf.data.granuscenes.questions import AMOUNTS, CHOICES, COLOURS, LETTERS, Question, ask, nameable
from granulon_hf.data.granuscenes.scaling import scale
from granulon_hf.errors import GranulonError

SIDE = 192  # pixels; lengths below are in pixels of such a scene, and scale with others
SCENES = 2000
SPLITS = ("train", "validation", "test", "test_heldout")
TAG = 20  # a tag's diameter: about one and a half cells of a 14 × 14 grid, so that most of it falls into one
SMALLEST = 42  # sides of the square that a cut-out gets for itself and its tags
LARGEST = 90
LEAD = 1.5  # how much larger the largest one's square is; a picture that is thin in its box may show fewer pixels all the same
FILL = 0.77  # of the square's side: the side of a square picture; others have the same area, unless too long for it
MARGIN = 6  # from the middle lines to the center of any object


@dataclass(frozen=True)
class Tag:
    """A letter on a colored disc; `centre` in pixels."""

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
class Scene:
    """Everything about a scene but its pixels."""

    id: str
    split: str
    seed: int
    index: int
    things: tuple[Thing, ...]  # the largest first
    background: Picture
    crop: tuple[float, float, float]  # left and top as shares of the room there is, side as a share of the shorter side
    flip: bool
    questions: tuple[Question, ...]


class Dice:
    """Choices from the uniform numbers of a generator, which are drawn many at a time for speed."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self._numbers: list[float] = []

    def share(self) -> float:
        if not self._numbers:
            self._numbers = self.rng.random(128).tolist()
        return self._numbers.pop()

    def below(self, count: int) -> int:
        return int(self.share() * count)

    def pick(self, items: Sequence[Any]) -> Any:
        return items[self.below(len(items))]

    def take(self, items: Iterable[Any], count: int | None = None) -> list[Any]:
        """Take some of the items, all by default, in random order."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(len(pool) if count is None else count)]


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
            pictures = Pictures(folder=None if str(pictures or DRAWN) == DRAWN else pictures)
        self.split, self.scenes, self.seed, self.side, self.pictures = split, int(scenes), int(seed), int(side), pictures
        self.heldout = split == "test_heldout"
        pictures.check(self.heldout)

    def __len__(self) -> int:
        return self.scenes

    def __repr__(self) -> str:
        return f"GranuScenes({self.split!r}, {self.location!r})"

    @property
    def location(self) -> str:
        """What `load` takes as its source to make the same scenes again, and manifests keep."""
        objects, backgrounds = self.pictures.objects_folder, self.pictures.backgrounds_folder
        settings: dict[str, Any] = {"scenes": self.scenes, "seed": self.seed, "side": self.side, "version": VERSION}
        place = DRAWN if objects is None else str(objects.parent)
        if (objects, backgrounds) not in ((None, None), (Path(place, "objects"), Path(place, "backgrounds"))):
            place = ""
            settings |= {"objects": str(objects or DRAWN), "backgrounds": str(backgrounds or DRAWN)}
        return f"{place}?{urlencode(settings)}"

    def choices(self, kind: str) -> tuple[str, ...]:
        """Return the answers that questions of a type can have."""
        return CHOICES.get(kind, self.pictures.categories)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        return self.scene(int(index) % len(self))

    def scene(self, index: int) -> Scene:
        """Make scene number `index`, also beyond the length; nothing is rendered."""
        if index < 0:
            raise GranulonError(f"Scenes count from 0; there is no scene {index}.")
        rng = np.random.default_rng([VERSION, self.seed, SPLITS.index(self.split), index])
        dice = Dice(rng)
        least, most = AMOUNTS[dice.pick(tuple(AMOUNTS))]
        count = least + dice.below(most - least + 1)
        # Where and how large, blind to what: nothing about a place or size can tell what is there.
        places = arrange(dice, count)
        cast = self._cast(dice, dice.take(self._categories(dice, count)))
        things = tuple(self._thing(dice, *shown, *place) for shown, place in zip(cast, places, strict=True))
        background = dice.pick(self.pictures.scenery[self.heldout])
        crop = (dice.share(), dice.share(), 0.45 + 0.5 * dice.share())
        flip = dice.share() < 0.5
        questions = ask(dice, things, self.pictures.categories, self.side, self.heldout)
        name = f"{self.split}-{self.seed}-{index}"
        return Scene(name, self.split, self.seed, index, things, background, crop, flip, questions)

    def _categories(self, dice: Dice, count: int) -> list[str]:
        """Draw the categories of all things: one of them has the most, and at least one has none."""
        main, *others = dice.take(self.pictures.categories)
        others = others[:-1]
        least = next(m for m in range(2, count) if count - m <= len(others) * (m - 1))
        most = least + dice.below(min(3, count - least))
        rest: list[str] = []
        while len(rest) < count - most:
            rest.append(dice.pick([other for other in others if rest.count(other) < most - 1]))
        return [main] * most + rest

    def _cast(self, dice: Dice, categories: list[str]) -> list[tuple[str, str, Picture]]:
        """Draw names and pictures: different ones as far as there are, and at least one that a question can name."""
        pools = self.pictures.pools[self.heldout]
        for _ in range(1000):
            names = {}
            for category, number in Counter(categories).items():
                pool = list(pools[category])
                enough = len(pool) >= number
                names[category] = dice.take(pool, number) if enough else [dice.pick(pool) for _ in range(number)]
            if nameable([name for chosen in names.values() for name in chosen]):
                shown = [(names[category].pop(), category) for category in categories]
                return [(name, category, dice.pick(pools[category][name])) for name, category in shown]
        folder = str(self.pictures.objects_folder)
        raise GranulonError(f"The cut-outs of {folder!r} show too few different things: add pictures.")

    def _thing(self, dice, name: str, category: str, picture: Picture, side: float, centre: tuple[float, float]) -> Thing:
        scale = self.side / SIDE
        ratio = min(picture.size) / max(picture.size)
        long = min(1.0, FILL / math.sqrt(ratio)) * side
        width, height = (long, long * ratio) if picture.size[0] >= picture.size[1] else (long * ratio, long)
        # At two opposite ends of what is shown, and within the square, where nothing else is.
        room = (side - TAG) / 2
        diagonals = [picture.ends[:2], picture.ends[2:]]
        if dice.below(2):
            diagonals.reverse()
        for pair in (*diagonals, ((-0.43, -0.43), (0.43, 0.43))):
            offsets = [(max(-room, min(room, x * width)), max(-room, min(room, y * height))) for x, y in pair]
            if math.dist(*offsets) > TAG:
                break
        places = [(round((centre[0] + x) * scale, 2), round((centre[1] + y) * scale, 2)) for x, y in offsets]
        first, second = map(Tag, dice.take(LETTERS, 2), dice.take(COLOURS, 2), places)
        wide, high = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = round(centre[0] * scale - wide / 2), round(centre[1] * scale - high / 2)
        return Thing(name, category, picture, (left, top, left + wide, top + high), (first, second))

    def render(self, scene: Scene) -> Image.Image:
        """Draw the scene: RGB, `side` × `side` pixels."""
        image = self.pictures.background(scene.background, scene.crop, scene.flip, self.side)
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
        """Draw the scene and store it as PNG."""
        buffer = io.BytesIO()
        self.render(scene).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def question_rows(self, index: int) -> list[dict[str, Any]]:
        """Make a row for each question of scene number `index`, with the image."""
        scene = self.scene(index)
        image = self.encode(scene)
        rows = enumerate(question.to_row() for question in scene.questions)
        return [{"id": f"{scene.id}-{number}", "scene": scene.id, **row, "image": image} for number, row in rows]

    def row(self, index: int) -> dict[str, Any]:
        """Make scene number `index` into a row of [`granuscenes`]."""
        scene = self.scene(index)
        return {
            "id": scene.id,
            "image": {"bytes": self.encode(scene), "path": None},
            "questions": [question.to_row() for question in scene.questions],
            "objects": [asdict(thing) | {"picture": thing.picture.path} for thing in scene.things],
            "background": scene.background.path,
        }


def arrange(dice: Dice, count: int) -> list[tuple[float, tuple[float, float]]]:
    """Draw squares that do not overlap, the largest first: each one's side, and its center in a scene of `SIDE` pixels."""
    # With fewer things there is room for larger ones; two fifths of the picture can always be covered.
    top = min(LARGEST / LEAD, 1.12 * math.sqrt(0.42 * SIDE**2 / (count + LEAD**2 - 1)))
    others = sorted((SMALLEST + dice.share() * max(0.0, top - SMALLEST) for _ in range(count - 1)), reverse=True)
    sides = np.array([others[0] * LEAD, *others])
    while True:
        for _ in range(8):
            centers = scatter(dice.rng, sides)
            if centers is not None:
                return list(zip(sides.tolist(), centers.tolist(), strict=True))
        sides = sides * 0.96


def scatter(rng: np.random.Generator, sides: np.ndarray) -> np.ndarray | None:
    """Draw centers one after the other; `None` if the last ones found no room."""
    centers = np.empty((len(sides), 2))
    for i, side in enumerate(sides):
        tried = side / 2 + rng.random((48, 2)) * (SIDE - side)
        free = (np.abs(tried - SIDE / 2) >= MARGIN).all(1)
        distance = np.abs(tried[:, None] - centers[None, :i]).max(2)
        free &= (distance >= (side + sides[:i]) / 2).all(1)
        first = int(free.argmax())
        if not free[first]:
            return None
        centers[i] = tried[first]
    return centers


@functools.cache
def draw_tag(letter: str, colour: str, diameter: int) -> Image.Image:
    """Draw a disc with a letter, RGBA: eight times as large, then made small."""
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
    return scale(image, (diameter, diameter))
