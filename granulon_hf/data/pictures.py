"""Encoded images: where they are, and whether they can be used."""

import warnings
from pathlib import Path
from typing import Any

from PIL import Image

from granulon_hf.data.datasets.base import BadRow, one_line
from granulon_hf.modeling.images_granulon import checked, find_source, open_rgb

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def locate(image: dict[str, Any], roots: list[Path]) -> dict[str, Any]:
    """Find the file of an image that is only a path relative to one of the folders, or raise [`BadRow`]."""
    if image["bytes"]:
        return image
    for root in roots:
        if (root / image["path"]).is_file():
            return {"bytes": None, "path": str(root / image["path"])}
    raise BadRow(f"the image {image['path']!r} is missing")


def verify(image: dict[str, Any], decode: bool) -> None:
    """Refuse an image ([`BadRow`]) that cannot be opened, is too large or thin, or (with `decode`) is damaged or cut off."""
    try:
        if decode:
            open_rgb(image, at_least=1)  # of a JPEG all bytes are read, but few pixels made
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(find_source(image)) as opened:
                checked(opened)
    except Exception as error:  # Pillow raises what its many decoders raise
        reason = one_line(error).split(" <_io")[0].removeprefix("unusable image: ")
        raise BadRow(f"the image cannot be used: {reason}") from None
