"""Drawn cut-outs and backgrounds, for scenes that need no downloaded pictures."""

import numpy as np
from PIL import Image, ImageDraw

from granulon_hf.data.granuscenes.cutouts import VERSION, Picture, find_ends, read_table

GLYPHS = read_table("glyphs.yaml")
DRAWN = "drawn"
SCENERY_SIDE = 384  # shorter side of the backgrounds that are kept in memory
SCENERY = 24


def list_cutouts() -> list[Picture]:
    """List every drawn thing in every color."""
    found = []
    for category, names in GLYPHS["things"].items():
        for name in names:
            image = draw_thing(Picture(f"{category}/{name}/red", (0, 0)))  # of the same shape in all colors
            shown = {"size": image.size, "ends": find_ends(image), "name": name, "category": category, "digest": DRAWN}
            found += [Picture(f"{category}/{name}/{c}", group=f"{name}: {c} {name}", **shown) for c in GLYPHS["main"]]
    return found


def draw_thing(picture: Picture) -> Image.Image:
    """Draw a thing with a dark contour, which keeps it apart from any background."""
    category, name, color = picture.path.split("/")
    main = np.array(GLYPHS["main"][color])
    shades = {"0": main, "1": main * 0.6, "2": main * 0.45 + 140, **GLYPHS["fixed"]}
    image = Image.new("RGBA", (432, 432))
    draw = ImageDraw.Draw(image)
    for grow, outline in ((9, (40, 40, 44, 255)), (0, None)):
        for shape in GLYPHS["things"][category][name].split(";"):
            (kind, shade), *words = shape.split()
            width = 4 * float(words.pop(0)) if kind == "l" else 0.0
            points = [4 * float(word) + 16 for word in words]
            fill = outline or (*map(int, shades[shade]), 255)
            if kind == "l":
                draw.line(points, fill, round(width + 1.2 * grow), "curve")
            elif kind == "p":
                draw.polygon(points, fill, fill, width=2 * grow + 1)
            else:
                box = (points[0] - grow, points[1] - grow, points[2] + grow, points[3] + grow)
                (draw.ellipse if kind == "e" else draw.rectangle)(box, fill)
    return image.crop(image.getbbox())


def list_backgrounds() -> list[Picture]:
    """List the drawn backgrounds."""
    size = (SCENERY_SIDE, SCENERY_SIDE)
    return [Picture(f"background/{i}", size, group=f"background {i}", digest=DRAWN) for i in range(SCENERY)]


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
