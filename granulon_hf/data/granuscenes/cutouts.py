"""Captioned cut-outs and backgrounds: Tux Paint's stamps, any folder, or drawn ones; split without shared pictures."""

import functools
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from granulon_hf.data.readers import IMAGE_ENDINGS
from granulon_hf.errors import GranulonError

VERSION = 2  # of cut-outs and scenes: other scenes for the same seed are another version

DRAWN = "drawn"
SCENERY_SIDE = 384  # shorter side of the backgrounds that are kept in memory
MASTER = 128  # longer side of the cut-outs that are kept in memory
MIN_RATIO = 0.4  # shorter to longer side of a usable cut-out
MIN_LENGTH = 45  # pixels of its longer side
SKIPPED = ("mirror", "cartoon", "abstract", "traditional")  # what a path says that is no photograph of its own


# category: {name: pictures} of Debian's tuxpaint-stamps-default. Names are basic ones ("bird", not "silver gull"), so that a
# held-out picture can have a name that was seen. A trailing `/*` takes the folder; the first name that matches has the picture.
TUXPAINT: dict[str, dict[str, str]] = {
    "animal": {
        "frog": "animals/amphibians/*",
        "chicken": "animals/birds/chicken_profile animals/birds/hen animals/birds/rooster",
        "duck": "animals/birds/duck animals/birds/drake animals/birds/gander",
        "penguin": "animals/birds/little-penguin animals/birds/magellanic_penguin animals/birds/penguin",
        "ostrich": "animals/birds/ostrich animals/birds/nandou",
        "bird": "animals/birds/*",
        "lobster": "animals/fish/lobster animals/fish/shrimp",
        "seahorse": "animals/fish/seahorse",
        "fish": "animals/fish/*",
        "snail": "animals/insects/Brown_slug",
        "insect": "animals/insects/*",
        "lizard": "animals/lizards/iguana",
        "elephant": "animals/mammals/elephant",
        "giraffe": "animals/mammals/giraffe",
        "rhino": "animals/mammals/rhino_black",
        "hedgehog": "animals/mammals/hedgehog",
        "pig": "animals/mammals/pig animals/mammals/pig_golden animals/mammals/pig_golden2 animals/mammals/wildboar",
        "rabbit": "animals/mammals/rabbit_little animals/mammals/rodents/rabbit animals/mammals/rodents/rabbit-2",
        "monkey": "animals/mammals/apes/*",
        "bear": "animals/mammals/bears/bear animals/mammals/bears/european-bear",
        "antelope": "animals/mammals/bovines/gnu-baby-stand animals/mammals/bovines/gnu-baby "
        "animals/mammals/bovines/gnu-sitting animals/mammals/bovines/gnu-stand animals/mammals/bovines/indian_blackbuck",
        "goat": "animals/mammals/bovines/goat animals/mammals/bovines/mountaingoat",
        "sheep": "animals/mammals/bovines/ram animals/mammals/bovines/sheep animals/mammals/bovines/sheep_lamb",
        "cow": "animals/mammals/bovines/*",
        "camel": "animals/mammals/camel/*",
        "lion": "animals/mammals/cats/lion animals/mammals/cats/lion-2",
        "tiger": "animals/mammals/cats/tiger animals/mammals/cats/tiger_sumatran",
        "deer": "animals/mammals/deer/*",
        "fox": "animals/mammals/dogs/fox",
        "dog": "animals/mammals/dogs/*",
        "horse": "animals/mammals/equines/horse",
        "zebra": "animals/mammals/equines/zebra",
        "donkey": "animals/mammals/equines/*",
        "mouse": "animals/mammals/rodents/mouse animals/mammals/rodents/rat",
        "squirrel": "animals/mammals/rodents/squirrel",
        "kangaroo": "animals/marsupials/kangaroo",
        "koala": "animals/marsupials/koala",
    },
    "food": {
        "apple": "food/fruit/apple_fuji food/fruit/apple_granny_smith food/fruit/apple_green food/fruit/apple_red "
        "food/fruit/apple_sierra_beauty",
        "apricot": "food/fruit/apricot food/fruit/Apricot_whole",
        "orange": "food/fruit/orange food/fruit/orange_seville food/fruit/mandarine food/fruit/sliced_orange",
        "strawberry": "food/fruit/strawberry food/fruit/Strawberry2",
        "cherry": "food/fruit/Cherry_Stella",
        "lemon": "food/fruit/lemon",
        "banana": "food/fruit/banana",
        "pear": "food/fruit/pear",
        "pineapple": "food/fruit/pineapple",
        "kiwi": "food/fruit/kiwi",
        "avocado": "food/fruit/avocado",
        "nut": "food/nuts/*",
        "garlic": "food/vegetables/garlic food/vegetables/garlics",
        "lettuce": "food/vegetables/lettuce food/vegetables/redlettuce",
        "pepper": "food/vegetables/pepper food/vegetables/yellowpepper food/vegetables/chilepepper",
        "onion": "food/vegetables/onion",
        "potato": "food/vegetables/potato food/vegetables/yam",
        "carrot": "food/vegetables/carrot",
        "mushroom": "food/vegetables/mushroom plants/mushrooms/*",
        "pizza": "food/pizza",
    },
    "plant": {
        "flower": "plants/flowers/*",
        "tree": "plants/trees/birch plants/trees/holm_oak plants/trees/liberia-palm plants/trees/tree336 "
        "seasonal/christmas/Christmas_Tree_photo",
    },
    "vehicle": {
        "car": "vehicles/auto/beetle vehicles/auto/sedan vehicles/auto/sportscar2 vehicles/race/indycar",
        "truck": "vehicles/auto/truck vehicles/garbagetruck vehicles/construction/dumper vehicles/emergency/firetruck",
        "bus": "vehicles/masstransit/green_korean_bus",
        "plane": "vehicles/flight/planes/747 military/vehicles/f22_raptor",
        "boat": "vehicles/ship/chineseJunk vehicles/ship/walnutBoat",
        "tank": "military/vehicles/bradley military/vehicles/infantry-stryker",
        "balloon": "vehicles/flight/balloon360",
        "tricycle": "vehicles/cycle/pink_tricycle",
    },
    "clothing": {
        "shirt": "clothes/t_shirt clothes/t_poloshirt clothes/t_tshirt",
        "hat": "clothes/hats/* clothes/t_baseballcap",
        "jacket": "clothes/t_jacket",
        "sock": "clothes/t_sock",
        "glove": "clothes/t_glove",
    },
    "sign": {
        "road sign": "town/roadsigns/*",
    },
    "tool": {
        "hammer": "household/tools/hammer household/tools/mallet_metal",
        "wrench": "household/tools/wrench household/tools/wrench_adjustable household/tools/wrench_plumbers",
        "scissors": "household/arttools/scissors_small_closed household/arttools/scissors_small_open",
        "saw": "household/tools/saw",
        "toolbox": "household/tools/toolbox",
        "measuring tape": "household/tools/measuring_tape",
    },
}
NOT_THINGS = ("town/roadsigns/traffic_cone", "town/roadsigns/arrow", "animals/insects/spiderweb")
# Names that a small picture may not tell apart: a question names none of them where another is in the scene.
ALIKE = tuple(
    frozenset(names.split())
    for names in (
        "bird chicken duck penguin ostrich",
        "fish seahorse",
        "snail insect",
        "frog lizard",
        "cow antelope deer goat sheep",
        "horse donkey zebra camel",
        "mouse squirrel hedgehog rabbit kangaroo koala",
        "lion tiger dog fox bear",
        "elephant rhino pig",
        "car truck bus tank",
        "apple apricot orange cherry lemon pear kiwi onion potato nut garlic mushroom",
        "shirt jacket",
        "banana carrot pepper",
    )
)


# --- pictures -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A cut-out or a background: where it is, what it shows, and with which others it is held out.

    Args:
        path (`str`): below its folder, or what is drawn.
        size (`tuple[int, int]`): width and height, pixels; of a cut-out without its transparent border.
        name (`str`): of a cut-out: what a question calls it.
        category (`str`): of a cut-out.
        group (`str`): near-duplicates share it.
        digest (`str`): of the file.
        ends (`tuple`): of a cut-out: its points furthest to the top left, bottom right, top right and bottom left, as shares of
            width and height, from the centre: where tags are attached.
    """

    path: str
    size: tuple[int, int]
    name: str = ""
    category: str = ""
    group: str = ""
    digest: str = ""
    ends: tuple[tuple[float, float], ...] = ()


class Pictures:
    """Captioned cut-outs and backgrounds, split into seen and held-out ones.

    The cut-outs are `<category>/**/<file>.png` with an alpha channel; a `.txt` of the same name holds the caption, English
    first, whose last noun names the thing ("A brown hen." is a "hen"); without one the file's name does. A folder of Tux
    Paint's stamps is recognised and gets the names and categories of `TUXPAINT`. Left out are mirrored, drawn ("cartoon"),
    very small and very long ones. Backgrounds are the JPEG files of a folder (any pictures, if there are none) of at least 256
    pixels. About a quarter of the groups of each name (at least one of two) and of the backgrounds is held out, by hash.

    Args:
        objects (`str` or `Path`, *optional*): the folder of cut-outs; by default 24 drawn things in six categories.
        backgrounds (`str` or `Path`, *optional*): the folder of backgrounds; by default drawn ones.
        folder (`str` or `Path`, *optional*): a folder with `objects/` and `backgrounds/`, instead of both.

    Attributes:
        drawn (`tuple[str, ...]`): which of "objects" and "backgrounds" are drawn.
        categories (`tuple[str, ...]`): sorted.
        digest (`str`): of all pictures that are used: the same pictures give the same scenes.

    Raises:
        GranulonError: a folder is missing or holds too few usable pictures, or one cannot be read.
    """

    def __init__(
        self,
        objects: str | Path | None = None,
        backgrounds: str | Path | None = None,
        *,
        folder: str | Path | None = None,
    ):
        if folder is not None:
            if objects is not None or backgrounds is not None:
                raise GranulonError("Give objects= and backgrounds=, or the folder= that holds both.")
            objects, backgrounds = Path(folder).expanduser() / "objects", Path(folder).expanduser() / "backgrounds"
        self.objects_folder = None if objects is None else existing(objects)
        self.backgrounds_folder = None if backgrounds is None else existing(backgrounds)
        pairs = (("objects", objects), ("backgrounds", backgrounds))
        self.drawn = tuple(what for what, where in pairs if where is None)
        cutouts = drawn_cutouts() if self.objects_folder is None else find_cutouts(self.objects_folder)
        scenery = drawn_backgrounds() if self.backgrounds_folder is None else find_backgrounds(self.backgrounds_folder)
        text = "\n".join(repr(asdict(picture)) for picture in (*cutouts, *scenery))
        self.digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self.categories = tuple(sorted({picture.category for picture in cutouts}))
        self._split(cutouts, scenery)
        self._reset()

    def _reset(self) -> None:
        self._masters: dict[str, Image.Image] = {}
        self._sizes: dict[tuple[str, int, int], Image.Image] = {}
        self._scenery: dict[str, Image.Image] = {}

    def __getstate__(self):  # what is only kept for speed is no part of it: `datasets` caches by the rest
        return {name: value for name, value in self.__dict__.items() if name not in ("_masters", "_sizes", "_scenery")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._reset()

    def _split(self, cutouts: list[Picture], scenery: list[Picture]) -> None:
        names = sorted({picture.name for picture in cutouts})
        held = set().union(*(hold_out(picture.group for picture in cutouts if picture.name == name) for name in names))
        held_scenery = hold_out(picture.group for picture in scenery)
        place = self.objects_folder or DRAWN
        if len(self.categories) < 3:
            raise GranulonError(
                f"{str(place)!r} has cut-outs of {len(self.categories)} categories, and a scene needs at least 3: "
                "put them into one folder for each."
            )
        # Held out or not -> category -> name -> pictures
        self.pools: dict[bool, dict[str, dict[str, list[Picture]]]] = {}
        self.scenery: dict[bool, list[Picture]] = {}
        for heldout in (False, True):
            pool: dict[str, dict[str, list[Picture]]] = {category: {} for category in self.categories}
            for picture in cutouts:
                if (picture.group in held) == heldout:
                    pool[picture.category].setdefault(picture.name, []).append(picture)
            self.pools[heldout] = pool
            self.scenery[heldout] = [picture for picture in scenery if (picture.group in held_scenery) == heldout]

    def check(self, heldout: bool) -> None:
        """Raises GranulonError where scenes cannot be made of the pictures that are held out, or of the others."""
        which = "held-out" if heldout else "seen"
        place, pool = str(self.objects_folder or DRAWN), self.pools[heldout]
        few = [category for category in self.categories if len(pool[category]) < 2]
        if len(few) > 1 or any(not pool[category] for category in few):
            raise GranulonError(
                f"The {which} cut-outs of {place!r} show too few different things of {' and '.join(map(repr, few))}: every "
                "category needs 2 (one of them may have 1), each in at least 2 pictures with different captions; add some, or "
                "take a category away."
            )
        if not self.scenery[heldout]:
            raise GranulonError(f"There are no {which} backgrounds in {str(self.backgrounds_folder)!r}: it needs at least 2.")

    def cutout(self, picture: Picture, width: int, height: int) -> Image.Image:
        """A cut-out in RGBA and in a size; resized ones are kept.

        Raises:
            GranulonError: its file cannot be read any more.
        """
        key = (picture.path, width, height)
        if key not in self._sizes:
            if len(self._sizes) > 8000:
                self._sizes.clear()
            if picture.path not in self._masters:
                master = draw_thing(picture) if self.objects_folder is None else open_cutout(self.objects_folder / picture.path)
                if master is None:
                    raise GranulonError(f"The picture {picture.path!r} of {str(self.objects_folder)!r} is no cut-out any more.")
                master.thumbnail((MASTER, MASTER), Image.Resampling.LANCZOS)
                self._masters[picture.path] = master
            self._sizes[key] = self._masters[picture.path].resize((width, height), Image.Resampling.BICUBIC)
        return self._sizes[key]

    def background(self, picture: Picture, crop: tuple[float, float, float], flip: bool, side: int) -> Image.Image:
        """A square of a background in RGB.

        Raises:
            GranulonError: its file cannot be read any more.
        """
        if picture.path not in self._scenery:
            if self.backgrounds_folder is None:
                image = draw_background(picture)
            else:
                image = opened(self.backgrounds_folder / picture.path, "RGB")
            shrink = SCENERY_SIDE / min(image.size)
            if shrink < 1:
                wide, high = (round(shrink * length) for length in image.size)
                image = image.resize((wide, high), Image.Resampling.BOX, reducing_gap=2.0)
            self._scenery[picture.path] = image
        image = self._scenery[picture.path]
        size = crop[2] * min(image.size)
        left, top = crop[0] * (image.width - size), crop[1] * (image.height - size)
        box = (left, top, min(left + size, image.width), min(top + size, image.height))
        part = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part


def existing(folder: str | Path) -> Path:
    """Raises GranulonError where there is no such folder."""
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise GranulonError(
            f"There is no folder {str(folder)!r}: a source of granuscenes has objects/ and backgrounds/ "
            "(examples/fetch_pictures.sh makes one), or is left out for drawn scenes."
        )
    return path


def hold_out(groups: Iterable[str]) -> set[str]:
    """About a quarter of the groups, at least one where there are two; which ones, their hashes say."""
    ranked = sorted(set(groups), key=lambda group: hashlib.sha256(group.encode("utf-8", "surrogateescape")).digest())
    return set(ranked[: max(1, round(len(ranked) / 4))]) if len(ranked) > 1 else set()


def unreadable(path: Path, error: Exception) -> GranulonError:
    reason = " ".join(str(error).split())
    return GranulonError(f"The picture {str(path)!r} cannot be read ({reason}): mend it, or take it away.")


def digest_of(path: Path) -> str:
    """Raises GranulonError that names a file which cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise unreadable(path, error) from None


def opened(path: Path, mode: str) -> Image.Image:
    """Raises GranulonError that names a picture which cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise unreadable(path, error) from None


def open_cutout(path: Path) -> Image.Image | None:
    """A cut-out without its transparent border, or `None` for a picture that has nothing transparent, or nothing else."""
    image = opened(path, "RGBA")
    mask = image.getchannel("A").point(lambda alpha: 255 * (alpha > 40))
    return image.crop(mask.getbbox()) if mask.getextrema() == (0, 255) else None


def find_ends(cutout: Image.Image) -> tuple[tuple[float, float], ...]:
    """See [`Picture`]."""
    small = cutout.getchannel("A")
    small.thumbnail((64, 64))
    y, x = np.nonzero(np.asarray(small) > 128)
    if not len(x):
        return ((-0.4, -0.4), (0.4, 0.4), (0.4, -0.4), (-0.4, 0.4))
    across, down = (x + 0.5) / small.width - 0.5, (y + 0.5) / small.height - 0.5
    best = (int(np.argmax(right * across + low * down)) for right, low in ((-1, -1), (1, 1), (1, -1), (-1, 1)))
    return tuple((round(float(across[i]), 3), round(float(down[i]), 3)) for i in best)


def listed(folder: Path, endings: Sequence[str]) -> list[str]:
    """Relative paths, sorted, of the files that no word of their path tells to skip."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())
    paths = (path.relative_to(folder).as_posix() for path in files)
    return sorted(path for path in paths if not any(word in path.lower() for word in SKIPPED))


def find_cutouts(folder: Path) -> list[Picture]:
    """The usable cut-outs of a folder, sorted; see [`Pictures`].

    Raises:
        GranulonError: there are none, or one cannot be read.
    """
    paths = [path for path in listed(folder, (".png", ".webp")) if "/" in path]
    known = tuxpaint_names(path.rpartition(".")[0] for path in paths)
    found: list[Picture] = []
    digests: set[str] = set()
    groups: dict[str, str] = {}
    for path in paths:
        stem, _, _ = path.rpartition(".")
        words = caption(folder / f"{stem}.txt") or re.sub(r"[-_\d]+", " ", Path(stem).name).strip().lower()
        if known and stem not in known:
            continue
        category, name = known[stem] if known else (path.split("/")[0], words.split()[-1] if words else "")
        digest = digest_of(folder / path)
        image = open_cutout(folder / path)
        if image is None or not name or digest in digests:
            continue
        width, height = image.size
        if max(width, height) < MIN_LENGTH or min(width, height) < MIN_RATIO * max(width, height):
            continue
        digests.add(digest)
        # Photographs of one thing have the same caption, or the same file name but for a number.
        keys = [f"{name}: {words}", f"{name}: {re.sub(r'[-_ ]?[0-9]+$', '', stem)}"]
        known_groups = sorted({groups[key] for key in keys if key in groups})
        group = known_groups[0] if known_groups else keys[0]
        groups.update(dict.fromkeys(keys, group))
        if len(known_groups) > 1:  # it joins two groups
            groups.update({key: group for key, value in groups.items() if value in known_groups})
            found = [Picture(**asdict(p) | {"group": group}) if p.group in known_groups else p for p in found]
        found.append(Picture(path, (width, height), name, category, group, digest, find_ends(image)))
    if not found:
        raise GranulonError(
            f"{str(folder)!r} holds no cut-outs: they are PNG files with transparency, at least {MIN_LENGTH} pixels long, in a "
            "folder for each category."
        )
    return found


def tuxpaint_names(stems: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Category and name of each of Tux Paint's stamps; nothing where these are none."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for stem in stems:
        by_folder[stem.rpartition("/")[0]].append(stem)
    known: dict[str, tuple[str, str]] = {}
    for category, names in TUXPAINT.items():
        for name, patterns in names.items():
            for pattern in patterns.split():
                parent, _, last = pattern.rpartition("/")
                for stem in by_folder.get(parent, []):
                    if (last == "*" or stem == pattern) and stem not in NOT_THINGS:
                        known.setdefault(stem, (category, name))
    return known if len({category for category, _ in known.values()}) == len(TUXPAINT) else {}


def caption(path: Path) -> str:
    """The caption's noun phrase in lower case, without article and what follows it; empty where there is none."""
    if not path.is_file():
        return ""
    line = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    phrase = re.split(r"[.,;:!?(]|\b(?:of|with|in|on|from|for|that|at)\b", line.strip())[0].lower()
    return re.sub(r"^(a|an|the|some)\s+", "", " ".join(re.findall(r"[\w'’-]+", phrase)))


def find_backgrounds(folder: Path) -> list[Picture]:
    """The usable backgrounds of a folder, sorted; see [`Pictures`].

    Raises:
        GranulonError: there are none, or one cannot be read.
    """
    found, digests = [], set()
    paths = listed(folder, (".jpg", ".jpeg")) or listed(folder, IMAGE_ENDINGS)
    for path in paths:
        digest = digest_of(folder / path)
        try:
            with Image.open(folder / path) as image:
                size = image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            size = opened(folder / path, "RGB").size
        if min(size) >= 256 and digest not in digests:
            digests.add(digest)
            group = re.sub(r"[-_ ]*\d+(x\d+)?$", "", Path(path).stem.lower()) or path
            found.append(Picture(path, size, group=group, digest=digest))
    if not found:
        raise GranulonError(f"{str(folder)!r} holds no backgrounds: pictures of at least 256 pixels.")
    return found


# --- drawn pictures -----------------------------------------------------------------------------------------------------

# Shapes on a square of 100 by 100: e(llipse) and r(ectangle) with a box, p(olygon) with points, l(ine) with width and points.
# Second letter: the colour: 0 main, 1 darker, 2 lighter, k black, w white, g green, n brown.
GLYPHS: dict[str, dict[str, str]] = {
    "animal": {
        "fish": "p0 70 50 98 22 98 78; e0 2 22 80 78; p1 35 24 60 4 62 26; ew 14 36 28 50; ek 18 40 25 47",
        "snail": "p1 2 92 98 92 90 78 60 78 30 76 18 40 6 42 8 70; e0 28 18 92 84; e2 40 30 80 72; e0 50 42 70 62; "
        "l1 3 12 44 4 20",
        "cat": "p0 12 45 12 4 42 26 58 26 88 4 88 45; e0 8 20 92 96; ew 24 44 42 60; ew 58 44 76 60; ek 30 47 38 59; "
        "ek 62 47 70 59; p1 44 66 56 66 50 74; lk 2 50 74 38 84; lk 2 50 74 62 84",
        "bird": "p1 2 60 30 48 34 66; e0 18 34 84 88; e0 56 12 94 50; p2 90 28 100 34 90 40; ek 74 22 82 30; "
        "p1 30 54 66 50 46 78; "
        "ln 3 44 86 44 99; ln 3 58 86 58 99",
    },
    "food": {
        "apple": "e0 6 24 58 94; e0 42 24 94 94; r0 32 30 68 88; ln 5 50 32 54 6; pg 54 18 84 4 72 24",
        "banana": "p0 8 20 18 14 30 46 56 66 92 70 94 80 60 90 26 76 10 50; p1 8 20 18 14 17 4 9 6; "
        "p1 92 70 94 80 100 78 98 70",
        "cherry": "lg 4 28 62 58 6; lg 4 74 66 58 6; pg 58 6 94 4 78 24; e0 4 54 50 98; e0 52 54 98 98; e2 14 62 24 72; "
        "e2 62 62 72 72",
        "carrot": "p0 30 30 70 30 50 99; l1 2 38 50 52 50; l1 2 46 66 58 66; pg 50 32 20 4 36 2 50 24 50 0 60 24 80 4 84 12",
    },
    "plant": {
        "tree": "rn 42 60 58 99; e0 10 2 90 50; e0 2 26 56 74; e0 44 26 98 74",
        "flower": "lg 6 50 50 50 99; pg 50 88 84 66 74 90; e0 34 0 66 36; e0 34 38 66 74; e0 10 20 46 54; "
        "e0 54 20 90 54; e2 36 24 64 50",
        "cactus": "eg 36 2 64 40; rg 36 20 64 80; lg 14 10 34 10 58 42 58; lg 14 90 22 90 48 58 48; p0 22 76 78 76 68 99 32 99",
        "leaf": "pg 4 96 10 40 44 8 96 4 92 50 60 86; p0 16 84 22 44 50 18 84 14; lw 3 4 96 84 16; lw 2 40 62 38 30; "
        "lw 2 40 62 72 56",
    },
    "vehicle": {
        "car": "p0 2 70 4 46 22 42 36 20 70 20 84 44 98 50 98 70; p2 28 42 38 26 50 26 50 42; p2 55 42 55 26 67 26 76 42; "
        "ek 14 56 38 82; ek 62 56 86 82; ew 22 64 30 74; ew 70 64 78 74",
        "bus": "r0 2 14 98 80; r2 8 24 28 46; r2 34 24 54 46; r2 60 24 80 46; r1 84 24 94 78; r1 2 56 82 62; "
        "ek 12 68 36 92; ek 62 68 86 92",
        "boat": "p0 4 66 96 66 80 94 20 94; ln 4 48 66 48 4; pw 52 8 88 58 52 58; p2 44 18 44 58 16 58",
        "rocket": "p0 50 0 72 30 72 76 28 76 28 30; p1 28 50 8 84 28 78; p1 72 50 92 84 72 78; ew 38 30 62 54; e1 42 34 58 50; "
        "p2 38 78 62 78 50 99",
    },
    "clothing": {
        "shirt": "p0 30 8 70 8 98 30 86 50 76 42 76 96 24 96 24 42 14 50 2 30; e1 38 0 62 20; l1 2 50 20 50 96",
        "hat": "e0 0 66 100 94; r0 24 18 76 80; e2 24 8 76 28; r1 24 62 76 74",
        "sock": "p0 30 2 68 2 68 56 92 76 92 94 62 98 34 78; r2 30 2 68 16; p1 92 76 92 94 78 96 78 66",
        "trousers": "p0 20 2 80 2 92 98 60 98 50 40 40 98 8 98; r1 20 2 80 14",
    },
    "tool": {
        "hammer": "pn 44 26 56 26 60 99 40 99; p0 14 6 78 6 96 24 78 28 14 28; r1 6 2 24 32",
        "key": "e0 2 30 46 74; ew 14 42 34 62; r0 44 46 98 58; r0 70 58 78 74; r0 86 58 94 78",
        "brush": "p0 38 40 62 40 56 99 44 99; r1 30 30 70 44; p2 28 30 72 30 76 2 60 8 50 0 40 8 24 2",
        "saw": "p0 2 34 70 26 70 70 60 60 54 66 48 58 42 63 36 55 30 60 24 52 18 56 12 47 6 50; en 60 18 100 84; "
        "ew 72 36 88 66",
    },
}
MAIN = {
    "red": (206, 60, 60),
    "blue": (66, 110, 200),
    "teal": (50, 160, 150),
    "violet": (150, 96, 186),
    "ochre": (208, 156, 60),
    "grey": (130, 134, 144),
}
FIXED = {"k": (20, 20, 24), "w": (248, 248, 244), "g": (60, 150, 70), "n": (130, 84, 46)}
SCENERY = 24


def drawn_cutouts() -> list[Picture]:
    return [
        Picture(f"{category}/{name}/{colour}", shape[0], name, category, f"{name}: {colour} {name}", DRAWN, shape[1])
        for category, names in GLYPHS.items()
        for name in names
        for shape in [drawn_shape(category, name)]
        for colour in MAIN
    ]


@functools.cache
def drawn_shape(category: str, name: str) -> tuple[tuple[int, int], tuple[tuple[float, float], ...]]:
    """Size and ends, which are the same in all colours."""
    image = draw_thing(Picture(f"{category}/{name}/red", (0, 0)))
    return image.size, find_ends(image)


def draw_thing(picture: Picture) -> Image.Image:
    category, name, colour = picture.path.split("/")
    main = np.array(MAIN[colour])
    shades = {"0": main, "1": main * 0.6, "2": main * 0.45 + 140}
    shades |= {name: np.array(shade) for name, shade in FIXED.items()}
    image = Image.new("RGBA", (432, 432))
    draw = ImageDraw.Draw(image)
    for grow, outline in ((9, (40, 40, 44, 255)), (0, None)):  # a dark contour keeps things apart from any background
        for shape in GLYPHS[category][name].split(";"):
            what, *words = shape.split()
            numbers = [4 * float(word) for word in words]
            red, green, blue = (int(value) for value in shades[what[1]])
            fill = outline or (red, green, blue, 255)
            if what[0] == "l":
                points = [value + 16 for value in numbers[1:]]
                draw.line(points, fill, round(numbers[0] + 1.2 * grow), "curve")
                continue
            points = [value + 16 for value in numbers]
            if what[0] == "p":
                draw.polygon(points, fill, fill, width=2 * grow + 1)
                continue
            box = (points[0] - grow, points[1] - grow, points[2] + grow, points[3] + grow)
            (draw.ellipse if what[0] == "e" else draw.rectangle)(box, fill)
    return image.crop(image.getbbox())


def drawn_backgrounds() -> list[Picture]:
    return [
        Picture(f"background/{i}", (SCENERY_SIDE, SCENERY_SIDE), group=f"background {i}", digest=DRAWN) for i in range(SCENERY)
    ]


def draw_background(picture: Picture) -> Image.Image:
    """A gradient of two colours with bands, waves or spots, and some noise."""
    number = int(picture.path.rpartition("/")[2])
    rng = np.random.default_rng([VERSION, number])
    y, x = np.mgrid[0:SCENERY_SIDE, 0:SCENERY_SIDE] / SCENERY_SIDE
    first, second = rng.uniform(70, 235, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x
    pattern = (np.sin(25 * along), np.sin(20 * along + 3 * np.sin(9 * across)), np.sin(22 * x) * np.sin(22 * y))[number % 3]
    ramp = (along - along.min()) / np.ptp(along)
    values = first + (second - first) * ramp[..., None] + 12 * pattern[..., None] + rng.normal(0, 6, (*x.shape, 1))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))
