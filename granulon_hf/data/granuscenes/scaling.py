"""Scaling in whole numbers: the same pixels wherever scenes are drawn, whatever version of Pillow reads the files.

Pillow 12 and 13 round differently, which moved outlines of cut-outs, and with them the scenes.
"""

import functools

import numpy as np
from PIL import Image

BITS = 12  # of a weight: those of a new pixel sum to 2**12
STEPS = 256  # per pixel, in which a box is placed


@functools.lru_cache(4096)
def make_filter(length: int, size: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which of `length` pixels each of `size` new ones is made of, and their weights, each [taps x size].

    The filter is a triangle: linear where a picture grows, and as wide as what a new pixel covers where it shrinks. `start` and
    `stop` are the box, in 1/256 pixels.
    """
    # In units of 1 / (2 · size · STEPS) pixels everything is whole.
    centers = 2 * size * start + (2 * np.arange(size, dtype=np.int64) + 1) * (stop - start)
    support = max(2 * (stop - start), 2 * size * STEPS)
    first = (centers - support) // (2 * size * STEPS)
    index = first + np.arange(support // (size * STEPS) + 3, dtype=np.int64)[:, None]
    weight = np.maximum(support - np.abs((2 * index + 1) * size * STEPS - centers), 0)
    weight[(index < 0) | (index >= length)] = 0
    total = weight.sum(0)
    whole = ((weight << (BITS + 1)) + total) // (2 * total)
    whole[whole.argmax(0), np.arange(size)] += (1 << BITS) - whole.sum(0)  # what rounding lost
    used = whole.any(1)
    return index[used].clip(0, length - 1), whole[used].astype(np.int32)


def scale_rows(pixels: np.ndarray, size: int, start: int, stop: int) -> np.ndarray:
    """Scale the first axis of [length x ...], in 32-bit integers, to `size`."""
    index, weight = make_filter(len(pixels), size, start, stop)
    total = np.full((size, *pixels.shape[1:]), 1 << (BITS - 1), np.int32)
    for rows, weights in zip(index, weight, strict=True):
        total += weights.reshape(-1, *[1] * (pixels.ndim - 1)) * pixels[rows]
    return total >> BITS


def scale(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Image.Image:
    """Return a picture (L, RGB or RGBA), or a box of it, at another width and height.

    What is transparent has no color, so that nothing of it shows at the edges.

    Args:
        image (`PIL.Image.Image`): to scale.
        size (`tuple[int, int]`): width and height, pixels.
        box (`tuple[float, float, float, float]`, *optional*): left, top, right and bottom, to 1/256 pixel; all by default.
    """
    left, top, right, bottom = box or (0, 0, *image.size)
    # What lies a pixel's reach beside the box is needed too.
    reach = max(1, (right - left) / size[0], (bottom - top) / size[1]) + 1
    corner = max(0, int(left - reach)), max(0, int(top - reach))
    image = image.crop((*corner, min(image.width, int(right + reach) + 1), min(image.height, int(bottom + reach) + 1)))
    left, top, right, bottom = (round(STEPS * (edge - corner[i % 2])) for i, edge in enumerate((left, top, right, bottom)))
    pixels = np.asarray(image, np.int32)
    if image.mode == "RGBA":  # 255² at most: sums have 28 bits
        pixels = np.concatenate([pixels[..., :3] * pixels[..., 3:], pixels[..., 3:] * 255], axis=2)
    rows = scale_rows(pixels, size[1], top, bottom).swapaxes(0, 1)
    found = scale_rows(np.ascontiguousarray(rows), size[0], left, right).swapaxes(0, 1)
    if image.mode == "RGBA":
        alpha = found[..., 3:]
        color = (255 * found[..., :3] + alpha // 2) // np.maximum(alpha, 1)
        found = np.concatenate([color, (alpha + 127) // 255], axis=2)
    return Image.fromarray(np.ascontiguousarray(found.clip(0, 255).astype(np.uint8)))


def shrink(image: Image.Image, side: int) -> Image.Image:
    """Return a picture whose longer side is at most so many pixels."""
    longest = max(image.size)
    if longest <= side:
        return image
    wide, high = (max(1, (2 * length * side + longest) // (2 * longest)) for length in image.size)
    return scale(image, (wide, high))
