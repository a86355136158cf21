"""Image files of every kind as upright RGB."""

import io
import os
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# An image processor keeps proportions: it would blow a thread of pixels up to many gigabytes, and the machine with it (ours).
LONGEST_ASPECT = 50
ORIENTATION = 0x0112  # the EXIF tag


def open_rgb(image: dict[str, Any] | str | os.PathLike | Image.Image, at_least: int | None = None) -> Image.Image:
    """Open an image: upright RGB, transparency over white, 16 bits scaled to 8, the first frame of an animation.

    Args:
        image (`dict`, `str` or `PIL.Image.Image`): `{"bytes", "path"}` as `datasets.Image(decode=False)` gives it, a path, or
            an image.
        at_least (`int`, *optional*): a JPEG file may be decoded at 1/2, 1/4 or 1/8 of its size, as long as no side falls below
            so many pixels: several times faster where the image is to be made small anyway.

    Returns:
        `PIL.Image.Image`: in RGB, decoded.

    Raises:
        ValueError: it is missing, broken, cut off, unreasonably large when unpacked, or more than 50 times as long as wide.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what can be read all the same
            if isinstance(image, Image.Image):
                return checked(to_rgb(image))
            if isinstance(image, dict):
                image = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image.get("path")  # type: ignore[assignment]
            if not image:
                raise ValueError("it has neither bytes nor a path")
            with Image.open(image) as opened:  # type: ignore[arg-type]
                checked(opened)
                if at_least is not None:
                    opened.draft(None, (at_least, at_least))
                return to_rgb(opened)
    except UnidentifiedImageError:
        raise ValueError("unusable image: it is damaged, or in no format that Pillow knows") from None
    except Exception as error:  # Pillow raises what its many decoders raise
        raise ValueError(f"unusable image: {' '.join(str(error).split()) or type(error).__name__}") from error


def checked(image: Image.Image) -> Image.Image:
    if max(image.size) > LONGEST_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels are too long and thin")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB of an image of any mode. Pillow alone would clip 16 bits to white and show what transparency hides."""
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 255 if values.max(initial=0) > 1 else 1
        image = Image.fromarray((np.clip(values / top, 0, 1) * 255).round().astype(np.uint8))
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
