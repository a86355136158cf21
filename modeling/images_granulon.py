# Copyright 2026 The Granulon team. Licensed under the Apache License, Version 2.0.
"""The one opener of images: whatever a picture comes as, it becomes the same upright RGB (ours)."""

import base64
import binascii
import io
import os
import re
import urllib.request
import warnings
from typing import Any
from urllib.request import url2pathname

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

# An image processor keeps proportions: it would blow a thread of pixels up to many gigabytes, and the machine with it (ours).
LONGEST_ASPECT = 50
ORIENTATION = 0x0112  # the EXIF tag
DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


def open_rgb(image: Any, at_least: int | None = None) -> Image.Image:
    """Open and decode an image: upright RGB, transparency over white, 16 bits scaled to 8, the first frame of an animation.

    Args:
        image: a path, an http(s) or data URL, base64 text, bytes, an open file, `{"bytes", "path"}` as
            `datasets.Image(decode=False)` gives it, a `PIL.Image.Image`, or an array or tensor of one image
            [H x W], [H x W x C] or [C x H x W] with C of 1 to 4 (gray, gray and alpha, RGB, RGBA).
        at_least (`int`, *optional*): a JPEG file may be decoded at 1/2, 1/4 or 1/8 of its size, as long as no side falls below
            so many pixels: several times faster where the image is to be made small anyway.

    Raises:
        ValueError: it is missing, broken, cut off, unreasonably large when unpacked, more than 50 times as long as wide, or an
            array that is no image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what can be read all the same
            if isinstance(image, torch.Tensor | np.ndarray):
                return checked(array_to_rgb(image))
            if isinstance(image, Image.Image):
                return checked(to_rgb(image))
            with Image.open(find_source(image)) as opened:
                checked(opened)
                if at_least is not None:
                    opened.draft(None, (at_least, at_least))
                return to_rgb(opened)
    except UnidentifiedImageError:
        raise ValueError("unusable image: it is damaged, or in no format that Pillow knows") from None
    except Exception as error:  # Pillow raises what its many decoders raise
        raise ValueError(f"unusable image: {' '.join(str(error).split()) or type(error).__name__}") from error


def open_images(images: Any) -> list[Image.Image]:
    """Open an image, or all images of (nested) lists in their order, by [`open_rgb`]; an array [I x …] is I images."""
    if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
        return [opened for image in images for opened in open_images(image)]
    return [open_rgb(images)]


def find_source(image: Any) -> Any:
    """Return what Pillow opens, a path or an open file, for all but pixels."""
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, bytes | bytearray | memoryview):
        return io.BytesIO(image)
    if not image:
        raise ValueError("it has neither bytes nor a path")
    if isinstance(image, str) and image.startswith("file://"):
        image = url2pathname(image.removeprefix("file://"))
    if not isinstance(image, str) or os.path.exists(image):
        return image
    if image.startswith(("http://", "https://")):
        return download(image)
    try:
        return io.BytesIO(base64.b64decode("".join(DATA_URL.sub("", image, count=1).split()), validate=True))
    except binascii.Error:
        shown = image if len(image) < 200 else f"{image[:200]}…"
        raise ValueError(f"there is no file {shown!r}, and it is neither a URL nor base64") from None


def download(url: str) -> io.BytesIO:
    # Some servers of pictures refuse clients without a name.
    request = urllib.request.Request(url, headers={"User-Agent": "granulon"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return io.BytesIO(response.read())
    except OSError as error:  # address, connection, certificate, status
        raise ValueError(f"{url} cannot be downloaded ({error})") from error


def checked(image: Image.Image) -> Image.Image:
    if max(image.size) > LONGEST_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels are too long and thin")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return upright RGB of an image of any mode. Pillow alone would clip 16 bits to white and show what transparency hides."""
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        hidden = values == image.info["transparency"] if "transparency" in image.info else False
        values = to_bytes(values.astype(np.uint16) if image.mode.startswith("I;16") else values)
        image = Image.fromarray(np.where(hidden, np.uint8(255), values))
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # La knows no other way
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def array_to_rgb(array: np.ndarray | torch.Tensor) -> Image.Image:
    """Return RGB of an array or tensor [H x W], [H x W x C] or [C x H x W]."""
    if torch.is_tensor(array):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()  # NumPy has no bfloat16
    shape, channels = array.shape, (1, 2, 3, 4)
    # A picture of a few pixels may be read in two ways; like transformers, take the first dimension for the channels then.
    if array.ndim == 3 and shape[0] in channels and (shape[-1] not in channels or shape[0] in (1, 3)):
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or not array.size or (array.ndim == 3 and array.shape[-1] not in channels):
        raise ValueError(f"an array of the shape {shape} is no image; expected [H x W], [H x W x C] or [C x H x W], C up to 4")
    if not np.isfinite(array).all() or array.min() < 0:
        raise ValueError("its pixels are below 0 or no numbers; give the image itself, not what an image processor made of it")
    return to_rgb(Image.fromarray(to_bytes(array[..., 0] if array.shape[2:] == (1,) else array)))


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Return 8-bit brightness: integers up to 255, or up to 65,535 where they are larger or 16 bits wide; else from 0 to 1."""
    if values.dtype == np.uint8:
        return values
    largest = values.max(initial=0)
    whole = np.issubdtype(values.dtype, np.integer)
    top = 65535 if values.dtype == np.uint16 or largest > 255 else 255 if whole or largest > 1 else 1
    return (np.clip(values.astype(np.float64) / top, 0, 1) * 255).round().astype(np.uint8)


__all__ = ["open_images", "open_rgb"]
