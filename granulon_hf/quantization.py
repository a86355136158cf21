"""Quantized exports: the language model in 4 or 8 bits, and a config that says so, which `from_pretrained` reads by itself."""

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, TorchAoConfig

from granulon_hf.errors import GranulonError
from granulon_hf.loading import is_quantized
from granulon_hf.modeling.configuration_granulon import GranulonConfig

# The library for each, which runs on a CPU as well. torchao has no 4 bits there; bitsandbytes' 8 bits round activations too.
LIBRARIES = {"4bit": "bitsandbytes", "8bit": "torchao"}
# What stays as it is. The controller reads the first block of the language model: levels are chosen as before.
KEPT = ("vision_tower", "multi_modal_projector", "controller", "reducer", "language_model.layers.0")
BLOCK, ROWS = 64, 32  # bitsandbytes scales blocks of 64 weights, and its CPU kernels take 32 rows at a time


def quantization_config(quantize: str, config: GranulonConfig) -> Any:
    """Return the config of transformers that quantizes the language model alone, but for its first block and its head.

    Raises:
        GranulonError: an unknown kind, a library that is missing, a model that is quantized already, or one whose layers do not
            fit.
    """
    if quantize not in LIBRARIES:
        raise GranulonError(f"--quantize must be {' or '.join(LIBRARIES)}; got {quantize!r}.")
    if is_quantized(config):
        raise GranulonError("The model is quantized already: leave out --quantize, or name the whole one.")
    library = LIBRARIES[quantize]
    if importlib.util.find_spec(library) is None:
        raise GranulonError(f"--quantize {quantize} needs the package {library}; run: pip install {library}")
    skipped = ["lm_head", *(f"{prefix}{name}" for prefix in ("model.", "") for name in KEPT)]
    if quantize == "8bit":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped)
    with torch.device("meta"):
        language = AutoModel.from_config(config.text_config)
    for name, layer in language.named_modules():
        if isinstance(layer, nn.Linear) and (layer.in_features % BLOCK or layer.out_features % ROWS):
            raise GranulonError(
                f"--quantize 4bit takes layers whose inputs are a multiple of {BLOCK} and outputs one of {ROWS}; {name} has "
                f"{layer.in_features} and {layer.out_features}. Use --quantize 8bit."
            )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=config.dtype or torch.float32,
        llm_int8_skip_modules=skipped,
    )
