"""Drawn cut-outs and backgrounds, for scenes that need no downloaded pictures."""

import functools

import numpy as np
from PIL import Image, ImageDraw

from granulon_hf.data.granuscenes.cutouts import VERSION, Picture, find_ends
from granulon_hf.data.granuscenes.tables import read_table

GLYPHS: dict[str, dict[str, str]] = read_table("glyphs.yaml")
DRAWN = "drawn"
SCENERY_SIDE = 384  # shorter side of the backgrounds that are kept in memory
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


def list_cutouts() -> list[Picture]:
    """List every drawn thing in every color."""
    return [
        Picture(f"{category}/{name}/{colour}", shape[0], name, category, f"{name}: {colour} {name}", DRAWN, shape[1])
        for category, names in GLYPHS.items()
        for name in names
        for shape in [drawn_shape(category, name)]
        for colour in MAIN
    ]


@functools.cache
def drawn_shape(category: str, name: str) -> tuple[tuple[int, int], tuple[tuple[float, float], ...]]:
    """Return size and ends of a thing, which are the same in all colors."""
    image = draw_thing(Picture(f"{category}/{name}/red", (0, 0)))
    return image.size, find_ends(image)


def draw_thing(picture: Picture) -> Image.Image:
    """Draw a thing with a dark contour, which keeps it apart from any background."""
    category, name, colour = picture.path.split("/")
    main = np.array(MAIN[colour])
    shades = {"0": main, "1": main * 0.6, "2": main * 0.45 + 140}
    shades |= {name: np.array(shade) for name, shade in FIXED.items()}
    image = Image.new("RGBA", (432, 432))
    draw = ImageDraw.Draw(image)
    for grow, outline in ((9, (40, 40, 44, 255)), (0, None)):
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


def list_backgrounds() -> list[Picture]:
    """List the drawn backgrounds."""
    return [
        Picture(f"background/{i}", (SCENERY_SIDE, SCENERY_SIDE), group=f"background {i}", digest=DRAWN) for i in range(SCENERY)
    ]


def draw_background(picture: Picture) -> Image.Image:
    """Draw a gradient of two colors with bands, waves or spots, and some noise."""
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
