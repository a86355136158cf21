"""Images as they are sent: upright, RGB, shrunk to what the server would shrink them to."""

import base64
import contextlib
import hashlib
import io
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb


def open_image(image: dict) -> Image.Image:
    """Open the image of a `{"bytes", "path"}` dict without decoding it; refuse one that is unreasonably large when unpacked."""
    opened = Image.open(io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"])
    if opened.width * opened.height > MAX_PIXELS:
        raise ValueError(f"{opened.width}x{opened.height} pixels are unreasonably many")
    return opened


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to upright RGB: transparency goes over white, 16 bits and floats are scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float32)
        top = 65535 if values.max(initial=0) > 255 else 255 if values.max(initial=0) > 1 else 1
        image = Image.fromarray((np.clip(values / top, 0, 1) * 255).round().astype(np.uint8))
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(width: int, height: int, detail: str) -> tuple[int, int]:
    """Shrink as OpenAI's servers do: "low" to 512 x 512; "high" to 2048 x 2048, then a short side of at most 768."""
    scale = min(1, (512 if detail == "low" else 2048) / max(width, height))
    if detail == "high":
        scale = min(scale, 768 / min(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def count_tokens(width: int, height: int, detail: str, rule: dict) -> int:
    """Return the prompt tokens of an image by tiles of 512 pixels, `base` and `tile` each, or by patches of 32, `patch` each.

    `fit` keeps an image within the 1,536 patches that are counted at most.
    """
    width, height = fit(width, height, detail)
    if rule["patch"] is not None:
        return math.ceil(math.ceil(width / 32) * math.ceil(height / 32) * rule["patch"])
    tiles = math.ceil(width / 512) * math.ceil(height / 512) if detail == "high" else 0
    return math.ceil(rule["base"] + rule["tile"] * tiles)


def prepare_image(image: dict, detail: str, rule: dict) -> tuple[str, str, int]:
    """Return the digest of the pixels before resizing (the same for a path and its bytes), data URL as sent, and tokens."""
    rgb = to_rgb(open_image(image))
    digest = hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()
    tokens = count_tokens(*rgb.size, detail, rule)
    size = fit(*rgb.size, detail)
    buffer = io.BytesIO()
    (rgb if size == rgb.size else rgb.resize(size, Image.Resampling.LANCZOS)).save(buffer, "JPEG", quality=90)
    return digest, "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), tokens


def image_id(image: dict) -> str | None:
    """Return which image a `{"bytes", "path"}` dict is: the digest of its bytes, whatever it is called or where it lies.

    Of a file that is not there it is the path, and None where there is no image at all.
    """
    data = image.get("bytes")
    if data is None:
        try:
            data = Path(image["path"]).read_bytes()
        except (OSError, ValueError):
            return image["path"]
    return hashlib.sha256(data).hexdigest() if data else None


def refuse_address(image: Any) -> None:
    """Raise ValueError where an image is given by its address (http://…, data:…), which nobody fetches."""
    path = image.get("path") if isinstance(image, dict) and image.get("bytes") is None else image
    if isinstance(path, str) and re.match(r"[a-zA-Z][\w+.-]+://|data:", path):
        told = path if len(path) <= 100 else f"{path[:100]}…"
        raise ValueError(
            f"The image {told!r} is an address, which the judge does not fetch; give a path, or the image's bytes."
        )


def encode_image(image: Any) -> dict:
    """Turn a path, PIL image, array or `{"bytes", "path"}` into such a dict; what cannot be read, the sample says later."""
    refuse_address(image)
    if isinstance(image, dict):
        found = {"bytes": image.get("bytes"), "path": image.get("path")}
        return found if found != {"bytes": None, "path": None} else {"bytes": b"", "path": None}
    if isinstance(image, str | os.PathLike):
        return {"bytes": None, "path": os.path.abspath(os.path.expanduser(os.fspath(image)))}
    buffer = io.BytesIO()
    with contextlib.suppress(Exception):  # no image at all, or a file that Pillow opened lazily, and that is cut off
        opened = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        to_rgb(opened).save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}
