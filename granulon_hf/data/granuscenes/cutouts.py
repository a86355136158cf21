"""Captioned cut-outs and backgrounds of a folder: Tux Paint's stamps or any others."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from granulon_hf.data.datasets.base import one_line
from granulon_hf.data.granuscenes.scaling import shrink
from granulon_hf.data.pictures import IMAGE_ENDINGS
from granulon_hf.errors import GranulonError

VERSION = 3  # of cut-outs and scenes: other scenes for the same seed are another version
MIN_RATIO = 0.4  # shorter to longer side of a usable cut-out
MIN_LENGTH = 45  # pixels of its longer side
SKIPPED = ("mirror", "cartoon", "abstract", "traditional")  # what a path says that is no photograph of its own


def read_table(name: str) -> Any:
    """Read a YAML file of this folder: wording, names and colors are data."""
    return yaml.safe_load(files(__package__).joinpath(name).read_text(encoding="utf-8"))


_TABLES = read_table("tuxpaint.yaml")
TUXPAINT: dict[str, dict[str, str]] = _TABLES["stamps"]
NOT_THINGS: list[str] = _TABLES["not_things"]
ALIKE = tuple(frozenset(names.split()) for names in _TABLES["alike"])


@dataclass(frozen=True)
class Picture:
    """A cut-out, or a background, which has no `name`, `category` and `ends`."""

    path: str  # below its folder, or what is drawn
    size: tuple[int, int]  # width and height, pixels; of a cut-out without its transparent border
    name: str = ""  # what a question calls it
    category: str = ""
    group: str = ""  # near-duplicates share it, and are held out together
    digest: str = ""  # of the file
    # Where tags are attached: the points furthest to the top left, bottom right, top right and bottom left, as shares of width
    # and height, from the center.
    ends: tuple[tuple[float, float], ...] = ()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the picture in a [`GranulonError`] if it cannot be read."""
    try:
        yield
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise GranulonError(f"The picture {str(path)!r} cannot be read ({one_line(error)}): mend or remove it.") from None


def open_picture(path: Path, mode: str) -> Image.Image:
    """Read a picture and convert it to a mode."""
    with naming(path), Image.open(path) as image:
        return image.convert(mode)


def digest_of(path: Path) -> str:
    with naming(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def open_cutout(path: Path) -> Image.Image | None:
    """Open a cut-out and crop its transparent border; `None` if nothing in the picture is transparent, or everything."""
    image = open_picture(path, "RGBA")
    mask = image.getchannel("A").point(lambda alpha: 255 * (alpha > 40))
    return image.crop(mask.getbbox()) if mask.getextrema() == (0, 255) else None


def find_ends(cutout: Image.Image) -> tuple[tuple[float, float], ...]:
    """Find the points where tags are attached; see [`Picture`]."""
    small = shrink(cutout.getchannel("A"), 64)
    y, x = np.nonzero(np.asarray(small) > 128)
    if not len(x):
        return ((-0.4, -0.4), (0.4, 0.4), (0.4, -0.4), (-0.4, 0.4))
    across, down = (x + 0.5) / small.width - 0.5, (y + 0.5) / small.height - 0.5
    best = (int(np.argmax(right * across + low * down)) for right, low in ((-1, -1), (1, 1), (1, -1), (-1, 1)))
    return tuple((round(float(across[i]), 3), round(float(down[i]), 3)) for i in best)


def list_files(folder: Path, endings: Sequence[str]) -> list[str]:
    """List the relative paths of files, sorted, without those whose path has one of the `SKIPPED` words."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())
    paths = (path.relative_to(folder).as_posix() for path in files)
    return sorted(path for path in paths if not any(word in path.lower() for word in SKIPPED))


def find_cutouts(folder: Path) -> list[Picture]:
    """List the usable cut-outs of a folder, sorted; see [`Pictures`]."""
    paths = [path for path in list_files(folder, (".png", ".webp")) if "/" in path]
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
        joined = {groups[key] for key in keys if key in groups}
        group = min(joined, default=keys[0])
        groups |= {key: group for key, value in groups.items() if value in joined} | dict.fromkeys(keys, group)
        found.append(Picture(path, (width, height), name, category, keys[0], digest, find_ends(image)))
    if not found:
        raise GranulonError(
            f"{str(folder)!r} holds no cut-outs: they are PNG files with transparency, at least {MIN_LENGTH} pixels long, in a "
            "folder for each category."
        )
    return [replace(picture, group=groups[picture.group]) for picture in found]


def tuxpaint_names(stems: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return category and name of each of Tux Paint's stamps, or nothing if these are other pictures."""
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
    """Return the caption's noun phrase in lower case, without its article; empty if there is no caption."""
    if not path.is_file():
        return ""
    line = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    phrase = re.split(r"[.,;:!?(]|\b(?:of|with|in|on|from|for|that|at)\b", line.strip())[0].lower()
    return re.sub(r"^(a|an|the|some)\s+", "", " ".join(re.findall(r"[\w'’-]+", phrase)))


def find_backgrounds(folder: Path) -> list[Picture]:
    """List the usable backgrounds of a folder, sorted; see [`Pictures`]."""
    found, digests = [], set()
    for path in list_files(folder, (".jpg", ".jpeg")) or list_files(folder, IMAGE_ENDINGS):
        digest = digest_of(folder / path)
        with naming(folder / path), Image.open(folder / path) as image:
            size = image.size
        if min(size) >= 256 and digest not in digests:
            digests.add(digest)
            group = re.sub(r"[-_ ]*\d+(x\d+)?$", "", Path(path).stem.lower()) or path
            found.append(Picture(path, size, group=group, digest=digest))
    if not found:
        raise GranulonError(f"{str(folder)!r} holds no backgrounds: it needs pictures of at least 256 pixels.")
    return found
