"""Draw the clusters that a question made of a photograph.

Notation: H×W the grid of patches, K semantic slots per image.
"""

import colorsys
import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageDraw, ImageFont

# Easy to tell apart, best ranks first; gray is kept free for what was not kept.
COLORS = (
    "#e6194b #3cb44b #ffe119 #4363d8 #f58231 #46f0f0 #f032e6 #bcf60c #9a6324 #fabebe "
    "#008080 #911eb4 #ffd8b1 #800000 #aaffc3 #808000 #e6beff #000075 #fffac8 #00a2ff"
).split()
FILL = 0.5  # opacity of a cluster's color
INK, PAPER = (20, 22, 26), (245, 245, 245)


def rank_color(rank: int) -> tuple[int, int, int]:
    """Return the RGB of the cluster with this rank (0 = best); beyond the table, hues a golden angle apart."""
    if rank < len(COLORS):
        red, green, blue = bytes.fromhex(COLORS[rank][1:])
    else:
        hue = int(rank * 0.618034 % 1 * 256)
        red, green, blue = (round(255 * value) for value in colorsys.hsv_to_rgb(hue / 255, 170 / 255, 230 / 255))
    return red, green, blue


def ranks(aggregation, index: int = 0) -> np.ndarray:
    """Return the rank of the kept cluster of each patch, 0 the best and -1 where its cluster was not kept; shape [H x W]."""
    assignment = np.array(aggregation.assignment[index].tolist())
    rank = np.full(assignment.shape, -1)
    for slot, cluster in enumerate(aggregation.kept_clusters[index].tolist()):
        if cluster >= 0:
            rank[assignment == cluster] = slot
    return rank


def draw_clusters(image: Image.Image, aggregation, index: int = 0, *, title: str | None = None, size: int = 896) -> Image.Image:
    """Draw the kept clusters over the photograph, each in its color with its rank (1 = best), in RGB; the rest is gray and dim.

    Of another reducer than AdaTA it draws the patches that went into each token, or that a token attends to most.

    Args:
        image (`PIL.Image.Image`): the picture that the grid covers: what the model saw ([`model_view`]), not the whole file.
        aggregation ([`GranulonAggregation`]): of the same image.
        index (`int`): which image of `aggregation`.
        title (`str`, *optional*): text of a slim bar above the picture, which also says how many clusters, or tokens of another
            reducer than AdaTA, were kept.
        size (`int`): long side of the picture in pixels, up to rounding to whole pixels per patch.
    """
    rank = ranks(aggregation, index)
    kept_slots = sum(cluster >= 0 for cluster in aggregation.kept_clusters[index].tolist())
    height, width = rank.shape
    scale = size / max(image.size)
    cell_width, cell_height = (max(1, round(a * scale / b)) for a, b in zip(image.size, (width, height), strict=True))
    cell = min(cell_width, cell_height)
    photo = image.convert("RGB").resize((width * cell_width, height * cell_height), Image.Resampling.LANCZOS)
    pixels = np.asarray(photo, dtype=np.float32)
    gray = np.asarray(photo.convert("L"), dtype=np.float32)[..., None]

    big = rank.repeat(cell_height, 0).repeat(cell_width, 1)
    palette = np.array([rank_color(i) for i in range(rank.max() + 1)] + [(0, 0, 0)], dtype=np.float32)  # -1 is the last row
    kept, paint = (big >= 0)[..., None], palette[big]
    # Half of the photograph's own colors are taken away, so that those of the clusters can be told.
    out = np.where(kept, (1 - FILL) * (pixels + gray) / 2 + FILL * paint, 0.3 * gray + 25)
    # An outline in the cluster's full color inside its edge, and a dark hairline between neighbours.
    hairline = max(1, cell // 48)
    out = np.where(kept & _near_edge(big, min(4 * hairline, cell // 3))[..., None], paint, out)
    out = np.where(_near_edge(big, hairline)[..., None], np.array(INK, dtype=np.float32), out)
    picture = Image.fromarray(out.clip(0, 255).astype(np.uint8))

    for slot in range(kept_slots):
        if (member := rank == slot).any():
            row, column = _label_cell(member)
        else:  # no patch went into this token first of all: its number stands at its place
            places = (aggregation.positions[index, slot].cpu().numpy() + 1) / 2 * (height - 1, width - 1)
            row, column = places.round().astype(int).tolist()
        badge = _badge(str(slot + 1), rank_color(slot), diameter=int(min(max(cell * 0.72, 18), 44)))
        corner = (int((column + 0.5) * cell_width - badge.width / 2), int((row + 0.5) * cell_height - badge.height / 2))
        picture.paste(badge, corner, badge)
    if title is None:
        return picture
    if aggregation.scores is None:
        return _with_title(picture, title, f"{kept_slots} tokens, numbered in their order")
    clusters = sum(score > -math.inf for score in aggregation.scores[index].tolist())
    return _with_title(picture, title, f"{kept_slots} of {clusters} clusters kept · 1 = best")


def _near_edge(big: np.ndarray, reach: int) -> np.ndarray:
    """Return where a pixel lies within `reach` pixels of a pixel of another cluster."""
    rows, columns = big.shape
    padded = np.pad(big, reach, mode="edge")
    shifts = [(y, x) for y in (0, reach, 2 * reach) for x in (0, reach, 2 * reach)]
    return np.any([padded[y : y + rows, x : x + columns] != big for y, x in shifts], axis=0)


def _label_cell(member: np.ndarray) -> tuple[int, int]:
    """Choose the cell for a cluster's number: the member nearest to the centroid, inner cells before those at an edge."""
    cells = np.argwhere(member)
    inner = sliding_window_view(np.pad(member, 1), (3, 3)).sum((2, 3))
    distance = np.square(cells - cells.mean(0)).sum(1) - 0.5 * inner[tuple(cells.T)]
    row, column = cells[distance.argmin()].tolist()
    return row, column


def _badge(text: str, fill: tuple[int, int, int], diameter: int) -> Image.Image:
    """Draw a round label, RGBA; drawn four times as large, since Pillow's shapes have hard edges."""
    large = diameter * 4
    badge = Image.new("RGBA", (large, large), (*INK, 0))
    draw = ImageDraw.Draw(badge)
    draw.ellipse((0, 0, large - 1, large - 1), fill=(*INK, 255))
    draw.ellipse((large // 14, large // 14, large - large // 14, large - large // 14), fill=(*fill, 255))
    ink = INK if 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 120 else PAPER
    font = ImageFont.load_default(large * 0.6)
    draw.text((large / 2, large / 2), text, ink, font, anchor="mm", stroke_width=large * 0.012, stroke_fill=ink)
    return badge.resize((diameter, diameter), Image.Resampling.LANCZOS)


def _with_title(picture: Image.Image, title: str, legend: str) -> Image.Image:
    bar = max(24, picture.width // 24)
    out = Image.new("RGB", (picture.width, picture.height + bar), INK)
    out.paste(picture, (0, bar))
    draw, font, gap = ImageDraw.Draw(out), ImageFont.load_default(bar * 0.5), bar // 2
    room = picture.width - 3 * gap - draw.textlength(legend, font)
    title = " ".join(title.split())
    if draw.textlength(title, font) > room:
        while title and draw.textlength(title + "…", font) > room:
            title = title[:-1]
        title += "…"
    draw.text((gap, bar / 2), title, fill=PAPER, font=font, anchor="lm")
    draw.text((picture.width - gap, bar / 2), legend, fill=(170, 175, 182), font=font, anchor="rm")
    return out


def model_view(image_processor, image: Image.Image, pixel_values, size: int = 896) -> Image.Image:
    """Return what the model saw of an image, in RGB, from the original at a resolution worth looking at.

    Where the whole image was only squeezed, that is the image itself, in its own proportions. Else the image processor itself
    is asked for the same resize and crop at a multiple of its size; where it does not scale that way, the pixel values are
    de-normalized.

    Args:
        image_processor: that of the model's processor.
        image (`PIL.Image.Image`): the original.
        pixel_values (`torch.Tensor`): what the processor made of it, shape [3 x height x width].
        size (`int`): the long side is at least this many pixels.
    """
    if not getattr(image_processor, "do_center_crop", None) and "height" in dict(image_processor.size):
        return image.convert("RGB")
    _, height, width = pixel_values.shape
    factor = math.ceil(size / max(height, width))
    sizes = {name: dict(getattr(image_processor, name, None) or {}) for name in ("size", "crop_size")}
    scaled = {name: {key: side * factor for key, side in sides.items() if side} for name, sides in sizes.items() if sides}
    seen = image_processor(image, do_rescale=False, do_normalize=False, return_tensors="pt", **scaled)["pixel_values"][0]
    if tuple(seen.shape) != (3, height * factor, width * factor):
        mean, std = (np.array(getattr(image_processor, name)).reshape(3, 1, 1) for name in ("image_mean", "image_std"))
        seen = (pixel_values.float().cpu().numpy() * std + mean) * 255
    return Image.fromarray(np.asarray(seen).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def side_by_side(pictures: list[Image.Image], gap: int = 16) -> Image.Image:
    """Paste pictures in one row, top-aligned."""
    row = Image.new("RGB", (sum(p.width + gap for p in pictures) - gap, max(p.height for p in pictures)), INK)
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row
