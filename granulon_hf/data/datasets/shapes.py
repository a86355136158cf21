"""Drawn scenes with questions at three levels: data for examples and tests that needs no download (ours).

A scene is a few colored shapes in the quarters of a plain background. It shows that a recipe runs and learns; it says nothing
about photographs.
"""

import io
import random

from PIL import Image, ImageDraw

from granulon_hf.data.datasets.base import single_turn
from granulon_hf.data.sample import Sample

SIDE = 224  # pixels
COLORS = {"red": "#d62728", "green": "#2ca02c", "blue": "#1f4fd8"}
COLORS |= {"yellow": "#f2c511", "purple": "#8a3ffc", "orange": "#ff7f0e"}
SHAPES = ("circle", "square", "triangle")
PLACES = ("top left", "top right", "bottom left", "bottom right")
LEVELS = ("coarse", "middle", "fine")


def draw_scene(seed: int) -> tuple[Image.Image, dict[str, tuple[str, str]]]:
    """Draw a picture and say what it shows: place -> (color, shape), one to four of them."""
    rng = random.Random(f"granulon shapes {seed}")
    image = Image.new("RGB", (SIDE, SIDE), tuple(rng.randint(200, 245) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    things = {}
    for place in sorted(rng.sample(PLACES, rng.randint(1, 4))):
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        left = SIDE // 2 * ("right" in place) + rng.randint(8, 28)
        top = SIDE // 2 * ("bottom" in place) + rng.randint(8, 28)
        box = (left, top, left + 68, top + 68)
        if shape == "circle":
            draw.ellipse(box, COLORS[color])
        elif shape == "square":
            draw.rectangle(box, COLORS[color])
        else:
            draw.polygon([(left, top + 68), (left + 34, top), (left + 68, top + 68)], COLORS[color])
        things[place] = (color, shape)
    return image, things


def question_and_answer(things: dict[str, tuple[str, str]], level: str, rng: random.Random) -> tuple[str, str]:
    """Draw a question of a level about a scene, and its answer."""
    if level == "coarse":
        if rng.random() < 0.5:
            return "Is there one thing in the picture, or are there several?", "one" if len(things) == 1 else "several"
        color = rng.choice([color for color, _ in things.values()] if rng.random() < 0.5 else list(COLORS))
        return f"Is anything {color}?", "yes" if any(color == seen for seen, _ in things.values()) else "no"
    if level == "middle":
        return "How many shapes are there?", ("one", "two", "three", "four")[len(things) - 1]
    place = rng.choice(sorted(things))
    color, shape = things[place]
    if rng.random() < 0.5:
        return f"What is in the {place} corner?", f"a {color} {shape}"
    return f"Which colour is the shape in the {place} corner?", color


def make_sample(index: int, seed: int = 0) -> Sample:
    """Make sample number `index`: scene, level and question depend on `index` and `seed` alone."""
    number = seed * 10_000_000 + index
    image, things = draw_scene(number)
    rng = random.Random(f"granulon question {number}")
    level = LEVELS[index % len(LEVELS)]
    question, answer = question_and_answer(things, level, rng)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    images = [{"bytes": buffer.getvalue(), "path": None}]
    row, meta = {"id": f"shapes-{seed}-{index}"}, {"level": level}
    return single_turn(row, id_column="id", images=images, question=question, answer=answer, task="vqa", meta=meta)


class Shapes:
    """A sequence of `length` drawn samples, made when they are asked for; other seeds give other scenes."""

    def __init__(self, length: int = 2000, seed: int = 0):
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not -self.length <= index < self.length:
            raise IndexError(index)
        return make_sample(index % self.length, self.seed)
