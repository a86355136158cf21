"""`contact_sheet`: show samples at a glance, as one HTML file that needs nothing else."""

import base64
import io
import json
from html import escape
from importlib.resources import files
from itertools import islice
from string import Template

from granulon_hf.data.sample import Sample
from granulon_hf.data.samples import Samples, none_usable
from granulon_hf.modeling.images_granulon import open_rgb

THUMBNAIL = 256  # longer side, pixels
PAGE = Template(files("granulon_hf.data.prepared").joinpath("sheet.html").read_text(encoding="utf-8"))


def thumbnail(image: dict) -> str:
    """Make an `<img>` with the picture in it, or a note that it is broken."""
    try:
        picture = open_rgb(image)
    except ValueError as error:
        return f'<p class="note">{escape(str(error))}</p>'
    size = f"{picture.width} × {picture.height}"
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{size} pixels" title="{size}">'


def card(sample: Sample) -> str:
    """Render one sample; whatever it says is shown as text."""
    turns = []
    for message in sample.messages:
        words = "\n".join(part["text"] if part["type"] == "text" else "🖼" for part in message["content"])
        kind = "answer" if message["role"] == "assistant" else "question"
        turns.append(f'<p class="{kind}" dir="auto">{escape(words.removeprefix("🖼").strip())}</p>')
    meta = json.dumps(sample.meta, ensure_ascii=False, indent=1, default=str)
    summary = escape(f"{sample.id} · {sample.task}")
    details = f'<details><summary>{summary}</summary><p class="note">{escape(meta)}</p></details>'
    return f"<article>{''.join(map(thumbnail, sample.images))}{''.join(turns)}{details}</article>"


def contact_sheet(samples: Samples, limit: int) -> str:
    """Render the first `limit` samples as an HTML page."""
    cards = [card(sample) for sample in islice(samples, min(limit, len(samples)))]
    if not cards:
        raise none_usable(samples.source.location, len(samples), (problem.reason for problem in samples.problems))
    title = escape(f"{samples.source.location}, {samples.split}: {len(cards)} of {len(samples)} samples")
    return PAGE.substitute(title=title, cards="\n".join(cards))
