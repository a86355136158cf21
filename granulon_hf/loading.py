"""Find, check and load models: a Hub id, a folder in either form, "tiny:<variant>" or "demo".

A "tiny:" model is a variant of the paper at toy size with random weights; "demo" is the embedded demo model, which is assembled
at first use.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig

from granulon_hf import variants
from granulon_hf.errors import GranulonError, first_sentence, one_line
from granulon_hf.modeling.configuration_granulon import GranulonConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
TINY, DEMO = "tiny:", "demo"


def check_models(sources: Sequence[str], device: str = "auto", dtype: str = "auto") -> None:
    """Raise GranulonError for what can be seen to be wrong before weights are read."""
    if dtype not in DTYPES:
        raise GranulonError(f"Unknown dtype {dtype!r}; the choices are {', '.join(DTYPES)}.")
    pick_device(device)
    for source in sources:
        if source.startswith(TINY):
            variants.parse(source.removeprefix(TINY))
        else:
            read_config(source)


def load_model(source: str, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any, str]:
    """Load a Granulon model in eval mode, its processor, and a name for tables.

    Args:
        source (`str`): folder or Hub id, "demo", or "tiny:<variant>".
        device (`str`): "cpu", "cuda", "cuda:1", "mps", or "auto".
        dtype (`str`): "auto" is the checkpoint's own on an accelerator and float32 on a CPU, where batches of another size
            would otherwise round differently, and now and then choose another word. A quantized model takes its own alone.

    Raises:
        GranulonError: an unknown device, dtype or variant, a folder without a Granulon model, or weights that are missing.
    """
    check_models([source], device, dtype)
    place = pick_device(device)
    if is_quantized(config := read_config(source)):
        saved = str(config.dtype).removeprefix("torch.")
        if dtype not in ("auto", saved):
            raise GranulonError(f"{source!r} is quantized and runs in {saved}, as it was saved: leave out --dtype {dtype}.")
    elif dtype == "auto" and place.type == "cpu":
        dtype = "float32"
    model, processor, name = read_model(source, dtype)
    return model.to(place), processor, name


def is_quantized(config: PreTrainedConfig) -> bool:
    return getattr(config, "quantization_config", None) is not None


def read_model(source: str, dtype: str = "auto", **options: Any) -> tuple[Any, Any, str]:
    """Load as [`load_model`] does, but onto the CPU and in the checkpoint's own dtype; `options` are of `from_pretrained`."""
    model: Any
    if source.startswith(TINY):
        model, processor = variants.build(source.removeprefix(TINY), tiny=True)
        return model if dtype == "auto" else model.to(getattr(torch, dtype)), processor, source
    place = find_source(source)
    try:
        processor = AutoProcessor.from_pretrained(place)
        model = AutoModelForImageTextToText.from_pretrained(place, dtype=dtype, **options)
    except ImportError as error:  # of a quantized model, whose library is not there
        raise GranulonError(f"The model {source!r} needs another package: {first_sentence(error)}.") from error
    except Exception as error:  # whatever the readers raise
        reason = f"{type(error).__name__}: {first_sentence(error)}"
        raise GranulonError(f"The model {source!r} is incomplete or damaged ({reason}).") from error
    name = "granulon-demo" if source == DEMO else Path(place).name if os.path.isdir(place) else source
    return model.eval(), processor, name


def find_source(source: str) -> str:
    """Return the folder or Hub id that `from_pretrained` takes for a source; the demo model is assembled if need be."""
    if source != DEMO:
        return os.path.expanduser(source)
    from granulon_hf.demo_model import demo_folder  # timm and what else only this model needs

    return str(demo_folder())


def read_config(source: str) -> GranulonConfig:
    """Read the configuration of a Granulon model; raise GranulonError if there is none, or it is another kind of model."""
    if source.startswith(TINY):
        return variants.build(source.removeprefix(TINY), tiny=True)[0].config
    place = find_source(source)
    if os.path.isfile(place):
        raise GranulonError(f"{source!r} is a file; give the folder that it is in.")
    if os.path.isdir(place) and not (Path(place) / "config.json").is_file():
        raise GranulonError(f"The folder {source!r} holds no model: it has no config.json.")
    try:
        # First as a plain dictionary: another model's config may want to run code of its own, and ask on stdout whether it may.
        model_type = PreTrainedConfig.get_config_dict(place)[0].get("model_type")
    except Exception as error:
        what = f"Cannot find the model {source!r}: neither a folder nor reachable on the Hub"
        if os.path.isdir(place):
            what = f"The config.json of {source!r} cannot be read"
        raise GranulonError(f"{what} ({first_sentence(error)}).") from error
    if model_type != GranulonConfig.model_type:
        raise GranulonError(f"{source!r} is a {model_type or 'nameless'} model, not a Granulon model.")
    try:
        return AutoConfig.from_pretrained(place)
    except Exception as error:
        raise GranulonError(f"The config.json of {source!r} is not valid: {one_line(error)}") from error


def check_choice(
    config: GranulonConfig,
    granularity: str | None = None,
    visual_tokens: int | None = None,
    price: float | None = None,
    name: str | None = None,
) -> None:
    """Raise GranulonError for a level, a number of visual tokens or a price that a model does not take."""
    given = {"granularity": granularity, "visual_tokens": visual_tokens, "price": price}
    asked = [f"`{option}`" for option, value in given.items() if value is not None]
    levels, slots, prices = config.level_names, config.num_semantic_slots, config.controller_prices or []
    if asked and not levels:
        who = name or "This model"
        raise GranulonError(f"{who} has no granularity levels, only pixel tokens, so that {asked[0]} cannot be used with it.")
    if len(asked) > 1:
        raise GranulonError(f"{' and '.join(asked)} each say how many tokens an image gets; give one of them.")
    if granularity is not None and granularity not in levels:
        known = f"the levels of {name}" if name else "this model's levels"
        raise GranulonError(f"Unknown granularity {granularity!r}; {known} are {', '.join(levels)}.")
    name = name or "this model"
    if visual_tokens is not None and not 1 <= visual_tokens <= slots:
        raise GranulonError(f"`visual_tokens` must lie between 1 and {slots} for {name}; got {visual_tokens}.")
    if price is not None and price not in prices:
        known = f"at the prices {', '.join(map(str, prices))}" if prices else "without prices"
        raise GranulonError(f"`price` {price} cannot be used: the controller of {name} was trained {known}.")


def pick_device(name: str) -> torch.device:
    """Return a device that works, or raise GranulonError."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # "meta" has no numbers to give
    except Exception:
        raise GranulonError(f"There is no usable device {name!r} here; try --device cpu.") from None
    return device
