"""Deterministic scenes for the demo model: photographic Tux Paint stamps on wallpapers, with questions at three levels.

The pictures are Debian's (see README.md in this folder) and never part of this repository.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from granulon_hf.data.granuscenes.cutouts import TUXPAINT

SIDE = 448

# kind: {name: stamps}, as in granuscenes, and some names that it leaves out because their pictures would be too few.
VOCABULARY: dict[str, dict[str, str]] = {
    "animal": TUXPAINT["animal"]
    | {
        "hippo": "animals/mammals/hippopotamus",
        "whale": "animals/mammals/aquatic/dolphin animals/mammals/aquatic/orca animals/mammals/aquatic/whale",
        "seal": "animals/mammals/aquatic/sea_lion",
        "beaver": "animals/mammals/rodents/beaver animals/mammals/rodents/marmot",
    },
    "food": TUXPAINT["food"]
    | {
        "mango": "food/fruit/mango",
        "pomegranate": "food/fruit/pomegranate",
        "raspberry": "food/fruit/raspberry",
        "tomato": "food/vegetables/tomato",
        "pumpkin": "food/vegetables/pumpkin_small",
    },
    "plant": TUXPAINT["plant"],
    "vehicle": {name: stamps for name, stamps in TUXPAINT["vehicle"].items() if name != "tricycle"},
    "piece of clothing": TUXPAINT["clothing"],
    "musical instrument": {
        "guitar": "hobbies/music/string/guitar2 hobbies/music/string/guitar_classical hobbies/music/string/guitar_electric "
        "hobbies/music/string/guitar_electric_bass",
        "violin": "hobbies/music/string/violin hobbies/music/string/cello",
        "drum": "hobbies/music/percussion/drum_tomtom_floor hobbies/music/percussion/drumkit",
        "trumpet": "hobbies/music/brass/trumpet",
    },
    "tool": {
        name: stamps for name, stamps in TUXPAINT["tool"].items() if name not in ("scissors", "toolbox", "measuring tape")
    },
    "ball": {
        "ball": "sports/basketball sports/soccer sports/cricketball sports/football sports/tennis_ball "
        "sports/australian_rules_football",
    },
    "sign": {"sign": "town/roadsigns/*"},
    "coin": {
        "coin": "symbols/money/canadian/coins/* symbols/money/euro/coins/* symbols/money/japanese/* symbols/money/us/coins/*",
    },
}
REGIONS = (("top left", "top", "top right"), ("left", "middle", "right"), ("bottom left", "bottom", "bottom right"))
NUMBERS = ("One", "Two", "Three")


@dataclass(frozen=True)
class Stamp:
    path: Path
    name: str
    kind: str


@dataclass(frozen=True)
class Thing:
    """A stamp in a scene; `box` is (left, top, right, bottom) in pixels."""

    name: str
    kind: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def region(self) -> str:
        x, y = self.centre
        return REGIONS[min(2, int(3 * y / SIDE))][min(2, int(3 * x / SIDE))]


@dataclass(frozen=True)
class Question:
    """A question about a scene; `topic` says how it was made, `level` is the granularity that it needs."""

    text: str
    answer: str
    level: str
    topic: str


@dataclass
class Scene:
    things: list[Thing]
    questions: list[Question] = field(default_factory=list)


def find_stamps(folder: Path) -> list[Stamp]:
    """The stamps of `VOCABULARY`, each once, in a fixed order; mirrored and very small ones are left out."""
    taken, stamps = set(), []
    for kind, names in VOCABULARY.items():
        for name, patterns in names.items():
            for pattern in patterns.split():
                for path in sorted(folder.glob(f"{pattern}.png")):
                    if path not in taken and "mirror" not in path.stem:
                        taken.add(path)
                        with Image.open(path) as image:
                            if max(image.size) >= 45:
                                stamps.append(Stamp(path, name, kind))
    return stamps


def split_stamps(stamps: list[Stamp], seed: int = 0) -> tuple[list[Stamp], list[Stamp]]:
    """Hold out about a quarter of the stamps of every name that has at least two; the rest trains."""
    held_out = []
    for name in dict.fromkeys(stamp.name for stamp in stamps):
        same = [stamp for stamp in stamps if stamp.name == name]
        if len(same) > 1:
            held_out += random.Random(f"{seed}{name}").sample(same, max(1, len(same) // 4))
    return [stamp for stamp in stamps if stamp not in held_out], held_out


def find_backgrounds(folder: Path) -> list[Path]:
    """The photographic wallpapers, in a fixed order."""
    paths = sorted(path for path in folder.rglob("*.jpg") if "abstract" not in path.parts and "Traditional" not in path.stem)
    by_size = {path.stat().st_size: path for path in reversed(paths)}  # packages repeat some of them
    return sorted(by_size.values())


def split_backgrounds(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """Every fourth wallpaper is held out."""
    return [path for i, path in enumerate(paths) if i % 4], paths[::4]


class SceneMaker:
    """Draws scenes from stamps and backgrounds; the same index gives the same scene.

    Args:
        stamps (`list[Stamp]`): what to paste.
        backgrounds (`list[Path]`): wallpapers to crop.
        phrasings (`dict`): topic: list of question templates.
        seed (`int`): of the sequence.
    """

    def __init__(self, stamps: list[Stamp], backgrounds: list[Path], phrasings: dict[str, list[str]], seed: int = 0):
        self.by_name: dict[str, list[Stamp]] = {}
        for stamp in stamps:
            self.by_name.setdefault(stamp.name, []).append(stamp)
        self.kind_of = {stamp.name: stamp.kind for stamp in stamps}
        # The square root keeps the forty animals from being most of what there is to see.
        sizes = {kind: sum(k == kind for k in self.kind_of.values()) for kind in set(self.kind_of.values())}
        self.names = sorted(self.kind_of)
        self.weights = [sizes[self.kind_of[name]] ** -0.5 for name in self.names]
        self.phrasings, self.seed = phrasings, seed
        self.wallpapers = [self._shrink(path) for path in backgrounds]
        self.cutouts: dict[Path, Image.Image] = {}

    @staticmethod
    def _shrink(path: Path) -> Image.Image:
        image = Image.open(path).convert("RGB")
        image.thumbnail((1400, 1400))
        return image

    def __call__(self, index: int) -> tuple[Image.Image, Scene]:
        rng = random.Random(f"{self.seed}-{index}")
        canvas = self._background(rng)
        count = rng.choices((1, 2, 3), (0.4, 0.35, 0.25))[0]
        names: list[str] = []
        while len(names) < count:
            name = rng.choices(self.names, self.weights)[0]
            if name not in names:
                names.append(name)
        things: list[Thing] = []
        for name in names:
            thing = self._paste(canvas, self._cutout(rng, rng.choice(self.by_name[name])), name, things, count, rng)
            if thing is not None:
                things.append(thing)
        scene = Scene(sorted(things, key=lambda thing: thing.centre[0]))
        scene.questions = ask(scene.things, self.phrasings, rng)
        return canvas, scene

    def _background(self, rng: random.Random) -> Image.Image:
        if rng.random() < 0.25:
            shades = np.array([[[rng.randrange(256) for _ in range(3)] for _ in range(2)] for _ in range(2)], np.uint8)
            if rng.random() < 0.5:
                shades[:] = shades[0, 0]
            return Image.fromarray(shades).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        wallpaper = rng.choice(self.wallpapers)
        side = rng.uniform(0.4, 1.0) * min(wallpaper.size)
        left, top = rng.uniform(0, wallpaper.width - side), rng.uniform(0, wallpaper.height - side)
        crop = wallpaper.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop

    def _cutout(self, rng: random.Random, stamp: Stamp) -> Image.Image:
        if stamp.path not in self.cutouts:
            image = Image.open(stamp.path).convert("RGBA")
            box = image.getchannel("A").point(lambda a: 255 * (a > 40)).getbbox()
            self.cutouts[stamp.path] = image.crop(box)
        image = self.cutouts[stamp.path]
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image

    def _paste(self, canvas, cutout, name, things, count, rng) -> Thing | None:
        for attempt in range(30):
            largest = rng.uniform(150, 420) if count == 1 else rng.uniform(120, 230) * (1 - attempt / 90)
            scale = min(largest / max(cutout.size), 4.0)
            width, height = (max(8, round(scale * side)) for side in cutout.size)
            left, top = rng.randint(0, SIDE - width), rng.randint(0, SIDE - height)
            box = (left, top, left + width, top + height)
            if all(box[2] < t.box[0] or t.box[2] < box[0] or box[3] < t.box[1] or t.box[3] < box[1] for t in things):
                small = cutout.resize((width, height), Image.Resampling.BICUBIC)
                canvas.paste(small, (left, top), small)
                return Thing(name, self.kind_of[name], box)
        return None


NAMES = sorted({name for names in VOCABULARY.values() for name in names})


def ask(
    things: list[Thing], phrasings: dict[str, list[str]], rng: random.Random, names: Sequence[str] = NAMES
) -> list[Question]:
    """Return at most nine questions: about three at the coarse level, two at the middle one, and four at the fine one.

    What is asked for and not there is one of `names`.
    """

    def question(topic: str, answer: str, level: str, **words) -> Question:
        return Question(rng.choice(phrasings[topic]).format(**words), answer, level, topic)

    kinds, shown = list(dict.fromkeys(thing.kind for thing in things)), [thing.name for thing in things]
    if None in kinds:
        kinds = []
    questions = [
        question("names", sentence(shown), "middle"),
        question("count", NUMBERS[len(things) - 1] + ".", "middle"),
    ]
    for there, known in ((kinds, VOCABULARY), (shown, names)):
        # A question of yes or no has an equal chance of either, whether it asks for a kind or for a name.
        present = rng.random() < 0.5
        if there:
            asked = rng.choice(there if present else [one for one in known if one not in there])
            questions.append(question("is_there", "Yes." if present else "No.", "coarse", kind=with_article(asked)))
    if kinds:
        questions.append(question("kind", sentence(kinds), "coarse"))
    fine = []
    regions = [thing.region for thing in things]
    for thing in things:
        fine.append(question("where", place(thing.region), "fine", name=thing.name))
        if regions.count(thing.region) == 1:
            fine.append(question("what_at", sentence([thing.name]), "fine", region=thing.region))
    for one, other in pairwise(things):
        if other.centre[0] - one.centre[0] > 60:
            fine.append(question("right_of", sentence([other.name]), "fine", name=one.name))
            fine.append(question("left_of", sentence([one.name]), "fine", name=other.name))
    return questions + rng.sample(fine, min(4, len(fine)))


def with_article(noun: str) -> str:
    if noun in ("food", "garlic", "lettuce"):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def sentence(nouns: list[str]) -> str:
    """`["frog", "apple"]` to `"A frog and an apple."`"""
    words = [with_article(noun) for noun in nouns]
    text = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return text[0].upper() + text[1:] + "."


def place(region: str) -> str:
    """`"top left"` to `"In the top left."`"""
    if " " in region or region == "middle":
        return f"In the {region}."
    return f"{'At' if region in ('top', 'bottom') else 'On'} the {region}."
