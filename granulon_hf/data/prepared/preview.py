"""`contact_sheet`: show samples at a glance, as one HTML file that needs nothing else."""

import base64
import io
import json
from html import escape
from itertools import islice

from granulon_hf.data.sample import Sample
from granulon_hf.data.samples import Samples, none_usable
from granulon_hf.modeling.images_granulon import open_rgb

THUMBNAIL = 256  # longer side, pixels
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1400px; padding: 0 1rem; }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); align-items: start; }
article { border: 1px solid #8886; border-radius: 8px; padding: .8rem; overflow-wrap: anywhere; }
img { max-width: 100%; border-radius: 4px; margin-right: .3rem; }
p { margin: .4rem 0; white-space: pre-wrap; }
.question { font-weight: 600; }
.answer { max-height: 16rem; overflow: auto; }
.note, summary { color: #777; font-size: .85rem; }
"""


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
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n<main>\n" + "\n".join(cards) + "\n</main></body></html>\n"
    )
