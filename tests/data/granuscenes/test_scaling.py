"""Scaling in whole numbers: against a plain float filter, and the same pixels everywhere."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from granulon_hf.data.granuscenes import GranuScenes, Pictures
from granulon_hf.data.granuscenes.scaling import scale, shrink


def triangle(length, size, start, stop):
    """Weights [size x length] of a triangle filter in floats."""
    step = (stop - start) / size
    centers = start + (np.arange(size) + 0.5) * step
    weights = np.clip(1 - np.abs(np.arange(length) + 0.5 - centers[:, None]) / max(step, 1), 0, None)
    return weights / weights.sum(1, keepdims=True)


def picture(mode, width, height, seed=0):
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    ("old", "new", "box"),
    [
        ((40, 30), (17, 9), None),
        ((40, 30), (90, 77), None),
        ((64, 50), (32, 32), (3.25, 7.5, 40.75, 45.0)),
        ((64, 50), (80, 20), (0, 0, 10.5, 50)),
        ((5, 300), (1, 2), None),
    ],
)
def test_a_picture_is_scaled_as_by_floats(mode, old, new, box):
    image = picture(mode, *old)
    left, top, right, bottom = box or (0, 0, *old)
    down, across = triangle(old[1], new[1], top, bottom), triangle(old[0], new[0], left, right)
    expected = np.einsum("hH,HWc,wW->hwc", down, np.atleast_3d(np.asarray(image, float)), across)
    found = scale(image, new, box)
    assert found.mode == mode and found.size == new
    assert np.abs(np.atleast_3d(np.asarray(found, float)) - expected).max() <= 1.5


def test_what_is_transparent_has_no_color():
    image = Image.new("RGBA", (64, 64), (0, 255, 0, 0))
    image.paste((200, 10, 30, 255), (16, 16, 48, 48))
    found = np.asarray(scale(image, (15, 15)))
    seen = found[found[..., 3] > 0]
    assert (np.abs(seen[:, :3].astype(int) - (200, 10, 30)) <= 3).all()
    assert {0, 255} < set(found[..., 3].flatten().tolist())


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_one_color_stays_and_the_same_size_changes_nothing(mode):
    image = picture(mode, 33, 21)
    if mode == "RGBA":
        image.putalpha(255)
    assert np.array_equal(np.asarray(scale(image, image.size)), np.asarray(image))
    for level in (0, 1, 127, 254, 255):
        flat = Image.new(mode, (50, 31), (level,) * (len(mode) - 1) + (255,) if mode == "RGBA" else (level,) * len(mode))
        for size in ((7, 90), (50, 3)):
            assert np.asarray(scale(flat, size)).min(axis=(0, 1)).tolist() == np.asarray(flat)[0, 0].tolist()


@pytest.mark.parametrize(
    ("old", "new"), [((300, 100), (128, 43)), ((100, 300), (43, 128)), ((128, 7), (128, 7)), ((9000, 1), (128, 1))]
)
def test_the_longer_side_is_cut(old, new):
    assert shrink(Image.new("L", old), 128).size == new


def test_scenes_are_the_same_with_every_pillow():
    """The digest was the same with Pillow 11.3, 12.3 and 13.0."""
    scenes, found = GranuScenes("train", 12, Pictures(), seed=5), hashlib.sha256()
    for scene in scenes:
        found.update(scenes.render(scene).tobytes())
    assert (scenes.pictures.digest, found.hexdigest()[:12]) == ("f528264c045484d5", "267a6f64b5e9")
