"""Loading a model for evaluation, with one sentence for everything that is wrong."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, PreTrainedConfig

import granulon_hf
from granulon_hf import variants

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(source: str, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any, str]:
    """A Granulon model in eval mode, its processor, and a name for tables.

    Args:
        source (`str`): folder or Hub id, or "tiny:<variant>" for a variant at toy size with random weights.
        device (`str`): "cpu", "cuda", "cuda:1", "mps", or "auto".
        dtype (`str`): "auto" is the checkpoint's own on an accelerator and float32 on a CPU, where batches of another size
            would otherwise round differently, and now and then choose another word.

    Raises:
        ValueError: an unknown device, dtype or variant, a folder without a Granulon model, or weights that are missing.
    """
    if dtype not in DTYPES:
        raise ValueError(f"Unknown dtype {dtype!r}; the choices are {', '.join(DTYPES)}.")
    place = pick_device(device)
    if source.startswith("tiny:"):
        model: Any
        model, processor = variants.build(source.removeprefix("tiny:"), tiny=True)
        return model.to(place).eval(), processor, source
    check_config(source)
    model, processor, name = read_model(source, "float32" if dtype == "auto" and place.type == "cpu" else dtype)
    return model.to(place), processor, name


def read_model(source: str, dtype: str = "auto", **options: Any) -> tuple[Any, Any, str]:
    """As [`load_model`], on the CPU and in the checkpoint's own dtype; `options` are of `from_pretrained`.

    Raises:
        ValueError: something cannot be read, or weights are missing.
    """
    auto: Any = granulon_hf.AutoModelForVision2Seq
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        processor = AutoProcessor.from_pretrained(source)
        model = auto.from_pretrained(source, dtype=kind, **options)
    except Exception as error:  # whatever the readers raise
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(f"The model {source!r} is incomplete or damaged ({type(error).__name__}: {reason}).") from error
    return model.eval(), processor, Path(source).name if os.path.isdir(source) else source


def check_config(source: str) -> None:
    """Raises ValueError where there is no Granulon model, before any weight is read."""
    if os.path.isdir(source) and not (Path(source) / "config.json").is_file():
        raise ValueError(f"The folder {source!r} holds no model: it has no config.json.")
    try:
        model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(f"Cannot find the model {source!r}: neither a folder nor reachable on the Hub ({reason}).") from error
    if model_type != granulon_hf.GranulonConfig.model_type:
        raise ValueError(f"{source!r} is a {model_type or 'nameless'} model, not a Granulon model.")


def pick_device(name: str) -> torch.device:
    """Raises ValueError where there is no such device."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # "meta" has no numbers to give
    except Exception:
        raise ValueError(f"There is no usable device {name!r} here; try --device cpu.") from None
    return device
