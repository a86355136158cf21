"""The pictures that scenes show: cut-outs and backgrounds, drawn or of a folder, split without shared ones."""

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from granulon_hf.data.granuscenes import drawn
from granulon_hf.data.granuscenes.cutouts import Picture, find_backgrounds, find_cutouts, open_cutout, open_picture
from granulon_hf.data.granuscenes.drawn import DRAWN, SCENERY_SIDE
from granulon_hf.data.granuscenes.scaling import scale, shrink
from granulon_hf.errors import GranulonError

MASTER = 128  # longer side of the cut-outs that are kept in memory


class Pictures:
    """Captioned cut-outs and backgrounds, split into seen and held-out ones.

    The cut-outs are `<category>/**/<file>.png` with an alpha channel; a `.txt` of the same name holds the caption, English
    first, whose last noun names the thing ("A brown hen." is a "hen"); without one the file's name does. A folder of Tux
    Paint's stamps is recognized and gets the names and categories of `TUXPAINT`. Left out are mirrored, drawn ("cartoon"),
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
        self, objects: str | Path | None = None, backgrounds: str | Path | None = None, *, folder: str | Path | None = None
    ):
        if folder is not None:
            if objects is not None or backgrounds is not None:
                raise GranulonError("Give objects= and backgrounds=, or the folder= that holds both.")
            objects, backgrounds = Path(folder, "objects"), Path(folder, "backgrounds")
        self.objects_folder = None if objects is None else existing(objects)
        self.backgrounds_folder = None if backgrounds is None else existing(backgrounds)
        self.drawn = ("objects",) * (objects is None) + ("backgrounds",) * (backgrounds is None)
        cutouts = drawn.list_cutouts() if self.objects_folder is None else find_cutouts(self.objects_folder)
        scenery = drawn.list_backgrounds() if self.backgrounds_folder is None else find_backgrounds(self.backgrounds_folder)
        text = "\n".join(repr(asdict(picture)) for picture in (*cutouts, *scenery))
        self.digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self.categories = tuple(sorted({picture.category for picture in cutouts}))
        if len(self.categories) < 3:
            raise GranulonError(
                f"{str(self.objects_folder)!r} has cut-outs of {len(self.categories)} categories, and a scene needs at least "
                "3: put them into one folder for each."
            )
        names = {picture.name for picture in cutouts}
        held = set().union(*(hold_out(picture.group for picture in cutouts if picture.name == name) for name in names))
        held_scenery = hold_out(picture.group for picture in scenery)
        # Held out or not -> category -> name -> pictures
        self.pools: dict[bool, dict[str, dict[str, list[Picture]]]] = {
            heldout: {category: {} for category in self.categories} for heldout in (False, True)
        }
        for picture in cutouts:
            self.pools[picture.group in held][picture.category].setdefault(picture.name, []).append(picture)
        self.scenery = {held: [p for p in scenery if (p.group in held_scenery) == held] for held in (False, True)}

    def check(self, heldout: bool) -> None:
        """Refuse pictures, held out or not, that are too few to make scenes of."""
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
        """Return a cut-out in RGBA, resized."""
        return resize_cutout(self.objects_folder, picture, width, height)

    def background(self, picture: Picture, crop: tuple[float, float, float], flip: bool, side: int) -> Image.Image:
        """Return a square of a background in RGB."""
        image = read_background(self.backgrounds_folder, picture)
        size = crop[2] * min(image.size)
        left, top = crop[0] * (image.width - size), crop[1] * (image.height - size)
        box = (left, top, min(left + size, image.width), min(top + size, image.height))
        part = scale(image, (side, side), box)
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part


# What these keep is kept for speed, outside of `Pictures`, which `datasets` pickles to tell whether a set is in its cache. A
# `Picture` has its file's digest: a file that has changed is another one.


@functools.lru_cache(8000)
def resize_cutout(folder: Path | None, picture: Picture, width: int, height: int) -> Image.Image:
    return scale(read_cutout(folder, picture), (width, height))


@functools.cache
def read_cutout(folder: Path | None, picture: Picture) -> Image.Image:
    image = drawn.draw_thing(picture) if folder is None else open_cutout(folder / picture.path)
    if image is None:
        raise GranulonError(f"The picture {picture.path!r} of {str(folder)!r} is no cut-out any more.")
    return shrink(image, MASTER)


@functools.cache
def read_background(folder: Path | None, picture: Picture) -> Image.Image:
    image = drawn.draw_background(picture) if folder is None else open_picture(folder / picture.path, "RGB")
    least = min(image.size)
    if least <= SCENERY_SIDE:
        return image
    wide, high = ((2 * length * SCENERY_SIDE + least) // (2 * least) for length in image.size)
    return scale(image, (wide, high))


def existing(folder: str | Path) -> Path:
    """Return the absolute path of a folder that must exist."""
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise GranulonError(
            f"There is no folder {str(folder)!r}: a source of granuscenes has objects/ and backgrounds/ "
            "(examples/fetch_pictures.sh makes one), or is left out for drawn scenes."
        )
    return path


def hold_out(groups: Iterable[str]) -> set[str]:
    """Choose about a quarter of the groups by hash, at least one if there are two."""
    ranked = sorted(set(groups), key=lambda group: hashlib.sha256(group.encode("utf-8", "surrogateescape")).digest())
    return set(ranked[: max(1, round(len(ranked) / 4))]) if len(ranked) > 1 else set()
