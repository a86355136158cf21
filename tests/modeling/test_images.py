"""The one opener of images: every form of the same picture gives the same pixels."""

import base64
import http.server
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from granulon_hf.modeling.images_granulon import open_images, open_rgb
from tests.conftest import build_tiny, make_picture

PICTURE = np.array(make_picture(0, (12, 8)))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(PICTURE).save(path)
    return path


@pytest.mark.parametrize(
    "form",
    [
        lambda path: path,
        lambda path: str(path),
        lambda path: path.read_bytes(),
        lambda path: memoryview(path.read_bytes()),
        lambda path: io.BytesIO(path.read_bytes()),
        lambda path: {"bytes": path.read_bytes(), "path": None},
        lambda path: {"bytes": None, "path": str(path)},
        lambda path: base64.b64encode(path.read_bytes()).decode(),
        lambda path: "data:image/png;base64," + base64.encodebytes(path.read_bytes()).decode(),
        lambda path: Image.open(path),
        lambda path: PICTURE,
        lambda path: PICTURE.transpose(2, 0, 1),
        lambda path: PICTURE / 255,
        lambda path: PICTURE.astype(np.float32),
        lambda path: PICTURE.astype(np.int64),
        lambda path: PICTURE.astype(np.uint16) * 257,
        lambda path: np.dstack([PICTURE, np.full(PICTURE.shape[:2], 255, np.uint8)]),
        lambda path: torch.tensor(PICTURE),
        lambda path: torch.tensor(PICTURE.transpose(2, 0, 1) / 255),
        lambda path: torch.tensor(PICTURE.transpose(2, 0, 1)).to(torch.bfloat16),
    ],
)
def test_all_forms_of_a_picture_are_the_same(file, form):
    assert np.array_equal(np.asarray(open_rgb(form(file))), PICTURE)


def test_a_url(file):
    handler = lambda *args: http.server.SimpleHTTPRequestHandler(*args, directory=file.parent)  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        assert np.array_equal(np.asarray(open_rgb(f"{base}/picture.png")), PICTURE)
        with pytest.raises(ValueError, match="404"):
            open_rgb(f"{base}/other.png")
        server.shutdown()


def disc(mode: str) -> Image.Image:
    """A black disc on nothing."""
    alpha = Image.fromarray(((np.hypot(*np.mgrid[-8:8, -8:8]) < 6) * 255).astype(np.uint8))
    if mode == "P":
        picture = alpha.point(lambda value: value // 255).convert("P")
        picture.putpalette([0, 0, 0, 0, 0, 0])
        picture.info["transparency"] = 0
        return picture
    return Image.merge(mode, [Image.new("L", (16, 16), 0)] * (len(mode) - 1) + [alpha])


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "TIFF"), ("P", "GIF")],
)
def test_what_is_transparent_is_white(mode, kind):
    options = {"transparency": 0} if mode == "P" else {}
    pixels = np.asarray(open_rgb(encoded(disc(mode), kind, **options)))
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    assert tuple(pixels[8, 8]) == (0, 0, 0)
    assert np.array_equal(pixels, np.asarray(open_rgb(disc(mode))))


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "palette"])
def test_rare_modes_of_transparency(mode):
    if mode == "palette":  # with transparent colors
        picture = disc("P")
        picture.apply_transparency()
    else:
        picture = disc("LA" if mode == "La" else "RGBA").convert(mode)
    assert open_rgb(picture).getpixel((0, 0)) == (255, 255, 255)
    assert open_rgb(picture).getpixel((8, 8)) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = (values / 65535 * 255).round().astype(np.uint8)
    for image in (Image.fromarray(values), encoded(Image.fromarray(values), kind), values, values.astype(np.int32)):
        assert np.array_equal(np.asarray(open_rgb(image))[..., 0], expected)
    dark = np.full((4, 4), 200, np.uint16)  # darker than any 8 bits, and stays so
    assert np.asarray(open_rgb(encoded(Image.fromarray(dark), kind))).max() == 1


def test_sixteen_bits_with_a_transparent_value():
    values = np.full((4, 4), 20000, np.uint16)
    values[0, 0] = 7
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG", transparency=7)
    opened = open_rgb(file.getvalue())
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((1, 0)) == (78, 78, 78)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_pictures_are_upright(orientation, opened, kind):
    """What is stored turned or mirrored comes out as it was taken, from a file as from an opened image."""
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = Image.fromarray(PICTURE)
    stored = upright.transpose(turn[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    file = io.BytesIO(encoded(stored, kind, exif=exif, **options))
    pixels = np.asarray(open_rgb(Image.open(file) if opened else file.getvalue()), dtype=int)
    assert pixels.shape == PICTURE.shape
    assert np.abs(pixels - PICTURE).mean() < (4 if kind == "JPEG" else 1e-9)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM"])
def test_formats(kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    frames = {"save_all": True, "append_images": [Image.new("RGB", (12, 8), "red")]} if kind in ("GIF", "WEBP") else {}
    opened = open_rgb(encoded(Image.new("RGB", (12, 8), "blue"), kind, **frames))
    assert opened.mode == "RGB"
    assert opened.size == (12, 8)
    assert np.abs(np.array(opened.getpixel((5, 5))) - (0, 0, 255)).max() < 8


@pytest.mark.parametrize(
    "bad",
    [
        None,
        "",
        "no/such/file.png",
        b"no picture",
        {"bytes": None, "path": None},
        {"bytes": encoded(Image.fromarray(PICTURE))[:60], "path": None},
        np.zeros((2, 8, 8, 3)),
        np.zeros((8, 8, 7)),
        np.zeros((0, 8, 3)),
        np.full((8, 8, 3), np.nan),
        torch.randn(3, 8, 8) - 1,
        Image.new("RGB", (1000, 2)),
        7,
    ],
)
def test_what_is_no_image_is_refused(bad):
    with pytest.raises(ValueError, match="unusable image"):
        open_rgb(bad)


def test_a_text_file_that_is_called_jpg(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="unusable image"):
        open_rgb(tmp_path / "page.jpg")


def test_lists_and_batches_are_flat():
    batch = np.stack([PICTURE, PICTURE])
    assert len(open_images(batch)) == len(open_images([[PICTURE], [], [PICTURE]])) == 2
    assert len(open_images(PICTURE)) == 1


def forms(path):
    """The same picture as the ecosystem writes it into a message."""
    yield {"type": "image", "path": str(path)}
    yield {"type": "image", "url": str(path)}
    yield {"type": "image", "image": path}
    yield {"type": "image", "image": Image.open(path)}
    yield {"type": "image", "image": {"bytes": path.read_bytes(), "path": None}}
    yield {"type": "image", "base64": base64.b64encode(path.read_bytes()).decode()}
    yield {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()}}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_the_processor_opens_every_form_alike(mode, tmp_path):
    processor = build_tiny()[1]
    path = tmp_path / "picture.png"
    picture = Image.fromarray(np.full((16, 16), 30000, np.uint16)) if mode == "I;16" else disc(mode)
    picture.save(path, **({"transparency": 0} if mode == "P" else {}))
    expected = processor.image_processor(open_rgb(path), return_tensors="pt")["pixel_values"]
    for part in forms(path):
        message = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
        inputs = processor.apply_chat_template([message], tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected), part
    for image in (path, str(path), Image.open(path), path.read_bytes(), [[Image.open(path)]]):
        assert torch.equal(processor(images=image, return_tensors="pt")["pixel_values"], expected)
        inputs = processor(images=image, text=processor.image_token, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected)
