"""How results are written: scores with their intervals, tables in Markdown and Parquet, pages from templates, figures."""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from granulon_hf.io import replacing, write_text


def score_text(found: dict[str, Any], digits: int = 3, scale: float = 1.0) -> str:
    """Write what [`~granulon_hf.stats.estimate`] found: "0.500 [0.400, 0.600]"."""
    if found["score"] is None:
        return "undefined"
    return f"{scale * found['score']:.{digits}f} {interval_text(found['low'], found['high'], f'.{digits}f', scale)}"


def difference_text(found: dict[str, Any], digits: int = 3, scale: float = 1.0) -> str:
    """Write the paired difference: "+0.100 [+0.050, +0.150], p = 0.010"; nothing where there is none."""
    if "difference" not in found:
        return ""
    if found["difference"] is None:
        return "undefined"
    interval = interval_text(found["difference_low"], found["difference_high"], f"+.{digits}f", scale)
    return f"{scale * found['difference']:+.{digits}f} {interval}, p = {found['p']:.3f}"


def interval_text(low: float | None, high: float | None, form: str, scale: float = 1.0) -> str:
    """Write an interval; of a single cluster, such as one image, there is none."""
    return "[no interval]" if low is None or high is None else f"[{scale * low:{form}}, {scale * high:{form}}]"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], rule: str = " --- ") -> str:
    """Return a table in Markdown, each row on one line whatever its cells hold."""
    escape = str.maketrans({"|": "\\|", "\n": " "})
    first, *others = (f"| {' | '.join(cell.translate(escape) for cell in row)} |" for row in (head, *rows))
    return "\n".join([first, f"|{'|'.join([rule] * len(head))}|", *others])


def write_page(path: Path, template: str, *, trim: bool = False, **values: Any) -> None:
    """Write an HTML page from a template beside this file; everything that comes from data is escaped.

    `trim` leaves out the lines of the template that hold nothing but its own statements.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    options: dict[str, Any] = {"trim_blocks": trim, "lstrip_blocks": trim, "undefined": jinja2.StrictUndefined}
    page = jinja2.Environment(loader=loader, autoescape=True, **options).get_template(template).render(**values)
    # Models make lone surrogates, which cannot be written.
    write_text(path, page, errors="replace")


def empty_figure(width: float, height: float) -> Any:
    """Return a `matplotlib.figure.Figure`, which needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def data_url(data: bytes) -> str:
    """Put a JPEG into the address of an image, so that a page needs no other file."""
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def write_rows(path: Path, rows: Iterable[dict[str, Any]], columns: dict[str, Any] | None = None) -> None:
    """Write rows as a Parquet file, of these types of columns or, by default, those of the first row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with replacing(path) as part:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=columns and pa.schema(columns)), part)
