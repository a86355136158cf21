# Copyright 2026 The Granulon team. Licensed under the Apache License, Version 2.0.
"""Adapter form: a checkpoint that holds what was trained and names its frozen backbones (ours)."""

import os
import re
from typing import Any

from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, resolve_revision

ADAPTER_WEIGHTS = "adapter.safetensors"
LORA_SCALE = "lora_scale"  # in the file's metadata: what the product of the two low-rank factors is multiplied with
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")


def name_backbone(name: str, loading: dict[str, Any]) -> dict[str, str] | None:
    """What a config keeps of a backbone: enough to read the same weights again.

    Args:
        name (`str`): Hub id or folder.
        loading (`dict`): the arguments of `from_pretrained` that it was read with.

    Returns:
        `dict`: `name`, and of a Hub repository the commit as `revision`; `None` for a GGUF file, which is not read again.
    """
    if loading.get("gguf_file"):
        return None
    if os.path.isdir(name):  # absolute: a relative name would be looked for on the Hub where the folder is not
        return {"name": os.path.abspath(name)} | ({"subfolder": loading["subfolder"]} if loading.get("subfolder") else {})
    options = {key: loading[key] for key in ("token", "cache_dir", "local_files_only") if key in loading}
    resolved = resolve_revision(name, loading.get("revision"), **options)
    kept = {"name": str(name), "revision": getattr(resolved, "resolved", resolved), "subfolder": loading.get("subfolder")}
    return {key: value for key, value in kept.items() if value}


def find_file(name: str | os.PathLike, file: str, **options) -> str | None:
    """Path of a file of a folder or Hub repository, or `None` where there is none."""
    quiet = [f"_raise_exceptions_for_{what}" for what in ("gated_repo", "missing_entries", "connection_errors")]
    return cached_file(name, file, **options, **dict.fromkeys(quiet, False))


def find_adapter(name: str | os.PathLike, **options) -> str | None:
    """Path of the adapter's weights, or `None` where there are none or all weights beside them."""
    adapter = find_file(name, ADAPTER_WEIGHTS, **options)
    whole = adapter and any(find_file(name, file, **options) for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    return None if whole else adapter


def load_whole(load, name: str | os.PathLike, *args, ignore_mismatched_sizes: bool = False, **options):
    """Load a model, and refuse what transformers only warns of: weights that are missing (they would be random), of another
    shape, or left out though they belong to modules of the model.

    What a checkpoint has beside the model (another tower, a classifier) is left out without a word; pooling heads, which are
    not used, may be missing; and places that are new here (`slot_position`) tell nothing before they are trained.

    Args:
        load (`callable`): `from_pretrained` of a class.
        name (`str`): Hub id or folder.
        *args, ignore_mismatched_sizes, **options: of `from_pretrained`.

    Raises:
        ValueError: the checkpoint is of another architecture or another size; the message names a weight.
    """
    model, info = load(name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **options)

    def kind(key: str) -> str:  # all layers are alike
        return re.sub(r"\.\d+(?=\.|$)", ".#", key)

    modules = {kind(key) for key, _ in model.named_modules() if key}
    unused = re.compile(r"(^|\.)(pooler|head)\b|multi_modal_projector\.position$")
    buffers = re.compile(r"(^|\.)(position_ids|inv_freq)$")
    left_out = [key for key in info["unexpected_keys"] if kind(key).rpartition(".")[0] in modules and not buffers.search(key)]
    for problem, found in (
        ("lacks", info["missing_keys"]),
        ("has another shape of", [key for key, *_ in info["mismatched_keys"] if not ignore_mismatched_sizes]),
        ("has more than the model:", left_out),
    ):
        if keys := sorted(key for key in found if not unused.search(key)):
            others = f" and {len(keys) - 1} more weights" if len(keys) > 1 else ""
            raise ValueError(
                f"{name} does not fit {type(model).__name__}: it {problem} {keys[0]}{others}. Give the weights that belong to "
                "this config; nothing is filled with random numbers."
            )
    return model


def assemble(config, adapter: str, *, dtype, use_safetensors: bool | None, **options):
    """All weights of a model: those of the frozen backbones, and over them those of the adapter.

    Args:
        config ([`GranulonConfig`]): of the adapter, with `backbones`.
        adapter (`str`): path of its weights, named as below `model.`. Low-rank factors are merged into what they adapt.
        dtype (`str` or `torch.dtype`): of the backbones.
        use_safetensors (`bool`, *optional*): as in `from_pretrained`, for the backbones.
        **options: of the Hub client (`token`, `cache_dir`, …).

    Returns:
        `tuple`: weights by the names of [`GranulonForConditionalGeneration`], and the `GenerationConfig` of the decoder.

    Raises:
        ValueError: the adapter has weights that the model lacks, or of another shape; a backbone is of another architecture.
        OSError: a backbone cannot be read.
    """
    weights: dict[str, Any] = {}
    for auto, part, sub_config in (
        (AutoModel, "vision", config.vision_config),
        (AutoModelForCausalLM, "text", config.text_config),
    ):
        source = dict(config.backbones[part])
        name = source.pop("name")
        model = load_whole(
            auto.from_pretrained, name, config=sub_config, dtype=dtype, use_safetensors=use_safetensors, **source, **options
        )
        if part == "vision":
            weights |= {f"model.vision_tower.{key}": value for key, value in model.state_dict().items()}
        else:
            decoder = {f"model.language_model.{key}": value for key, value in model.get_decoder().state_dict().items()}
            generation_config = model.generation_config
            weights |= decoder | {"lm_head.weight": model.get_output_embeddings().weight.detach()}
    with safe_open(adapter, "pt") as file:
        metadata = (file.metadata() or {}).get(LORA_SCALE, "1")
        trained = {f"{'' if key.startswith('lm_head.') else 'model.'}{key}": file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    try:
        scale = float(metadata)
    except ValueError:
        raise ValueError(f"The adapter {adapter} is damaged: its {LORA_SCALE} is {metadata!r}, not a number.") from None
    factors = {key: trained.pop(key) for key in list(trained) if ".lora_" in key}
    for key in [key for key in factors if ".lora_A." in key]:
        base = f"{key.partition('.lora_A.')[0]}.weight"
        if base not in weights:
            raise ValueError(f"The adapter {adapter} adapts {base}, which its backbones lack.")
        change = scale * factors[key.replace(".lora_A.", ".lora_B.")].float() @ factors[key].float()
        weights[base] = (weights[base].float() + change).to(weights[base].dtype)
        config.backbones = None  # merged, they are no longer the ones that are named
    for key, value in trained.items():
        if key in weights and weights[key].shape != value.shape:
            raise ValueError(
                f"The adapter {adapter} has {key} as {tuple(value.shape)}, its backbone as {tuple(weights[key].shape)}."
            )
    return weights | trained, generation_config
