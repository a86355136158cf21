"""Shared fixtures: toy models with the real architectures, and pictures that need no download."""

import base64
import copy
import functools
import io
import json
import os
import signal
import subprocess

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import set_seed

from granulon_hf import variants

# A shell lets what it starts behind `&` ignore interrupts, and so would every command that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(max(1, (os.cpu_count() or 2) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "study_folder" in getattr(item, "fixturenames", ()):  # half a minute to set up
            item.add_marker(pytest.mark.slow)


def make_picture(seed: int, size: tuple[int, int] = (120, 96)) -> Image.Image:
    """A few flat rectangles on a gradient: something that clusters, unlike noise."""
    random = np.random.default_rng(seed)
    width, height = size
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 / height, columns * 255 / width, np.full((height, width), 90.0)], axis=-1)
    for _ in range(4):
        top, left = random.integers(0, height // 2), random.integers(0, width // 2)
        pixels[top : top + height // 3, left : left + width // 3] = random.integers(0, 255, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def data_url(picture: Image.Image | bytes) -> str:
    """A picture, or the bytes of its file, as requests carry it."""
    if isinstance(picture, Image.Image):
        file = io.BytesIO()
        picture.save(file, "PNG")
        picture = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def end(process: subprocess.Popen) -> None:
    """Ask a server to end, and make it."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()


@pytest.fixture
def picture():
    return make_picture(0)


@functools.cache
def _build_once(name: str, options: str, parts: str):
    return variants.build(name, tiny=True, **json.loads(options))


def build_tiny(name="granulon-qwen2.5", **options):
    """`variants.build(name, tiny=True)`, a copy of what is built once: to learn the tower's grid takes longer than all else."""
    parts = repr(variants.parse(name))  # a test may have changed the table
    model, processor = copy.deepcopy(_build_once(name, json.dumps(options, sort_keys=True), parts))
    set_seed(options.get("seed", 0))  # as building it does
    return model, processor


@pytest.fixture
def build():
    """A toy variant with a controller that does not always say the same."""

    def build(name="granulon-qwen2.5", *, trained=True, **kwargs):
        model, processor = build_tiny(name, **kwargs)
        if trained and model.config.granularity_levels:
            controller, random = model.model.controller, torch.Generator().manual_seed(3)
            with torch.no_grad():
                controller.in_proj.weight.normal_(std=100, generator=random)
                controller.in_proj.weight -= controller.in_proj.weight.mean(1, keepdim=True)  # sigmoid(0) cancels
                controller.fc2.weight.normal_(std=0.5, generator=random)
                controller.fc2.bias.zero_()
        return model, processor

    return build


def make_conversation(question: str, images=(), answer: str | None = None) -> list[dict]:
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def make_inputs(processor, conversations, *, side="left", generate=True, **kwargs):
    processor.tokenizer.padding_side = side
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=generate,
        processor_kwargs={"padding": True, **kwargs},
    )


def make_talkative(model, processor):
    """Give a toy model weights by which it says something, and not the same of every sample."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.4)
    model.generation_config.suppress_tokens = sorted(processor.tokenizer.added_tokens_decoder)
    return model, processor
