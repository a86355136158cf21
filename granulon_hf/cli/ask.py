"""`granulon ask`: a question about images, answered by a Granulon model."""

import io
import json
import os
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from granulon_hf.cli.common import Device, quiet, reports_bad_input
from granulon_hf.errors import GranulonError

if TYPE_CHECKING:
    from PIL import Image


def is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://", "data:"))


def open_image(source: str) -> "Image.Image":
    """Open an image, a path, a URL, or base64 text; raise GranulonError where it cannot be used."""
    from PIL import Image

    from granulon_hf.modeling.images_granulon import open_rgb

    path = source if is_url(source) else os.path.expanduser(source)
    shown = source if len(source) < 200 else f"{source[:200]}…"
    if os.path.isdir(path):
        raise GranulonError(f"{shown!r} is a folder, not an image.")
    try:
        return open_rgb(path)
    except ValueError as error:
        if not is_url(source) and not os.path.exists(path):
            raise GranulonError(
                f"There is no image {shown!r}; give paths or URLs of images, then the question, in quotes."
            ) from error
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise GranulonError(f"The image {shown!r} is unreasonably large when unpacked; make it smaller first.") from error
        raise GranulonError(f"Cannot read the image {shown!r}: {str(error).removeprefix('unusable image: ')}.") from error


def split_arguments(arguments: list[str]) -> tuple[list[str], str]:
    """Split off the question, which comes last, from the images; raise GranulonError if it is missing."""
    from PIL import Image

    *images, question = arguments
    image_name = Path(question).suffix.lower() in Image.registered_extensions() and not any(c in question for c in " ?")
    if is_url(question) or image_name or os.path.isfile(os.path.expanduser(question)):
        example = f'granulon ask {" ".join(arguments)} "…?"'
        raise GranulonError(f"The last argument is the question, but {question!r} is a file or URL; say {example}.")
    if not question.strip():
        raise GranulonError("The question is empty.")
    return images, question


def check_overlay(path: Path, images: list[str]) -> None:
    """Raise GranulonError where an overlay could not be drawn or written."""
    from PIL import Image

    if not images:
        raise GranulonError("--overlay needs an image to draw on.")
    if path.is_dir() or not path.parent.is_dir():
        raise GranulonError(f"--overlay takes an image file to write; {str(path)!r} is a folder, or its own does not exist.")
    files = [file for file in map(os.path.expanduser, images) if os.path.exists(file)]
    if path.exists() and any(path.samefile(file) for file in files):
        raise GranulonError(f"The overlay {str(path)!r} would overwrite the image itself; choose another name.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise GranulonError(f"The overlay {str(path)!r} cannot be written; check the permissions.")
    try:  # some formats cannot be written at all, others not in color
        Image.new("RGB", (8, 8)).save(io.BytesIO(), format=Image.registered_extensions()[path.suffix.lower()])
    except Exception:
        raise GranulonError(f"Cannot write an overlay as {path.name!r}; give it the ending .png or .jpg.") from None


@reports_bad_input
def ask(
    ctx: typer.Context,
    arguments: Annotated[
        list[str], typer.Argument(metavar='IMAGE… "QUESTION"', help="Images (paths or URLs), then a question.")
    ],
    model: Annotated[str | None, typer.Option(help="Hub id or folder; by default the embedded demo model.")] = None,
    granularity: Annotated[str | None, typer.Option(help="Force a level by its name; by default the question decides.")] = None,
    visual_tokens: Annotated[
        int | None, typer.Option(help="Semantic tokens of every image, instead of a level.", show_default=False)
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="Of a visual token, for a controller that was trained at prices.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16; auto is the checkpoint's own.")] = "auto",
    overlay: Annotated[Path | None, typer.Option(help="Draw the kept clusters on the image and write them here.")] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON object and nothing else; seconds are those of the whole command, answer_seconds of answering.",
        ),
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is being made.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")] = False,
) -> None:
    """Ask a question about one or more images, and see at which granularity the model looked."""
    started = ctx.obj or time.time()
    if as_json and stream:
        raise GranulonError("--json and --stream exclude each other.")
    if max_new_tokens < 1:
        raise GranulonError(f"--max-new-tokens must be at least 1; got {max_new_tokens}.")
    import torch
    from transformers import TextStreamer

    from granulon_hf import overlay as drawing
    from granulon_hf.evaluation.answer import look
    from granulon_hf.loading import check_choice, check_models, pick_device, read_config, read_model

    sources, question = split_arguments(arguments)
    images = [open_image(source) for source in sources]
    if overlay is not None:
        check_overlay(overlay, sources)
    quiet(debug)
    if not debug:
        warnings.simplefilter("ignore")
    source = model or "demo"
    check_models([source], device, dtype)
    config = read_config(source)
    check_choice(config, granularity, visual_tokens, price)
    if overlay and not config.granularity_levels:
        raise GranulonError("This model has no granularity levels, so that --overlay cannot be used with it.")

    network, processor, _ = read_model(source, dtype)
    network = network.to(pick_device(device))
    loaded = time.monotonic()
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    with torch.inference_mode():
        seen = look(
            network,
            processor,
            [[{"role": "user", "content": content}]],
            granularity,
            room_for=max_new_tokens,
            visual_tokens=visual_tokens,
            price=price,
        )
        tokens = network.generate(**seen.inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    probs = seen.probs[0]
    result = {
        "answer": processor.decode(tokens[0, seen.inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip(),
        "granularity": seen.levels[0],
        "granularity_probs": probs and {name: round(value, 4) for name, value in probs.items()},
        "pixel_tokens": seen.pixel_tokens,
        "semantic_tokens": seen.semantic_tokens,
        "overlay": overlay and str(overlay),
        "answer_seconds": round(time.monotonic() - loaded, 2),
        "model": model or "granulon-demo",
        "images": sources,
    }
    if overlay is not None:
        title = f"{question.strip()} · {result['granularity'] or f'{visual_tokens} tokens'}"
        views = [drawing.model_view(processor.image_processor, *pair) for pair in zip(images, seen.pixel_values, strict=True)]
        pictures = [drawing.draw_clusters(view, seen.images.aggregation, i, title=title) for i, view in enumerate(views)]
        drawing.side_by_side(pictures).save(overlay)
    result["seconds"] = round(time.time() - started, 2)
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        show(result, streamed=stream)


def show(result: dict[str, Any], streamed: bool) -> None:
    """Print what `ask` found, for people."""
    console = Console(highlight=False)
    if not streamed:
        # Text, and no wrapping: what the model says is neither markup nor to be broken into lines for a pipe.
        console.print(Text(result["answer"] or "(an empty answer)", "bold"), soft_wrap=True)
    if result["granularity"] is not None:
        table = Table.grid(padding=(0, 2))
        for name, probability in result["granularity_probs"].items():
            used = name == result["granularity"]
            bar = "█" * max(1, round(probability * 24))
            style = "bold green" if used else "dim"
            table.add_row(escape(name), f"{bar:<24}", f"{probability:6.1%}", "◀ used" if used else "", style=style)
        console.print()
        console.print(table)
    console.print()
    tokens = f"{result['pixel_tokens']} pixel + {result['semantic_tokens']} semantic tokens"
    times = f"answered in {result['answer_seconds']:.1f} s, {result['seconds']:.1f} s with starting and loading"
    console.print(f"{tokens} · {escape(result['model'])} · {times}", style="dim", soft_wrap=True)
    if result["overlay"]:
        console.print(f"Overlay written to {escape(result['overlay'])}", style="dim", soft_wrap=True)
