# Copyright 2026 The Granulon team. Licensed under the Apache License, Version 2.0.
"""Adapter form: a checkpoint that holds what was trained and names its frozen backbones (ours)."""

import os
import re
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, resolve_revision

ADAPTER_WEIGHTS = "adapter.safetensors"
LORA_SCALE = "lora_scale"  # in the file's metadata: what the product of the two low-rank factors is multiplied with
# Fields of a backbone's config that change what weights of the same names and shapes compute.
MEANING = (
    "model_type",
    "hidden_act",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
    "rms_norm_eps",
    "layer_norm_eps",
    "sliding_window",
    "patch_size",
    "architecture",
)
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")


def name_backbone(name: str, loading: dict[str, Any]) -> dict[str, str] | None:
    """Return what a config keeps of a backbone to read the same weights again, given the arguments that it was loaded with.

    That is its `name`, and of a Hub repository the commit as `revision`; `None` for a GGUF file, which is not read again.
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
    """Return the path of a file of a folder or Hub repository, or `None` where there is none."""
    quiet = [f"_raise_exceptions_for_{what}" for what in ("gated_repo", "missing_entries", "connection_errors")]
    return cached_file(name, file, **options, **dict.fromkeys(quiet, False))


def find_adapter(name: str | os.PathLike, **options) -> str | None:
    """Return the path of the adapter's weights, or `None` where there are none or all weights beside them."""
    adapter = find_file(name, ADAPTER_WEIGHTS, **options)
    whole = adapter and any(find_file(name, file, **options) for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    return None if whole else adapter


def load_whole(load, name: str | os.PathLike, *args, ignore_mismatched_sizes: bool = False, **options):
    """Load a model by a class's `from_pretrained`, and refuse what transformers only warns of: weights that are missing (they
    would be random), of another shape, or left out though they belong to modules of the model.

    What a checkpoint has beside the model (another tower, a classifier) is left out without a word; pooling heads, which are
    not used, may be missing; and places that are new here (`slot_position`) tell nothing before they are trained.

    Raises:
        ValueError: the checkpoint is of another architecture or another size; the message names a weight.
    """
    model, info = load(name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **options)

    # A weight that is left out belongs to the model if the part that it stands in does: a layer, an attention …
    parts = {name.partition(".")[0] for name, _ in model.named_modules() if name}
    unused = re.compile(r"(^|\.)(pooler|head)\b|multi_modal_projector\.position$")
    spare = re.compile(rf"{unused.pattern}|(^|\.)(position_ids|inv_freq)$|(^|\.)controller\.")  # or levels that are taken away
    for problem, found, accepted in (
        ("lacks", info["missing_keys"], unused),
        ("has another shape of", [key for key, *_ in info["mismatched_keys"] if not ignore_mismatched_sizes], unused),
        ("has more than the model:", [key for key in info["unexpected_keys"] if key.partition(".")[0] in parts], spare),
    ):
        if keys := sorted(key for key in found if not accepted.search(key)):
            others = f" and {len(keys) - 1} more weights" if len(keys) > 1 else ""
            raise ValueError(
                f"{name} does not fit {type(model).__name__}: it {problem} {keys[0]}{others}. Give the weights that belong to "
                "this config; nothing is filled with random numbers."
            )
    return model


def check_config(name: str, own, expected) -> None:
    """Refuse a backbone by whose own config the same weights mean something else than by the one that an adapter holds."""
    own, expected = own.to_dict(), expected.to_dict()
    for field in MEANING:
        if own.get(field) != expected.get(field):
            raise ValueError(
                f"{name} is not the backbone that the adapter was trained with: its {field} is {own.get(field)!r}, not "
                f"{expected.get(field)!r}."
            )


def assemble(config, adapter: str, *, dtype, use_safetensors: bool | None, **options):
    """Return all weights of a model by their names, those of the adapter over those of the backbones that its config names, and
    the decoder's `GenerationConfig`. Low-rank factors are merged into what they adapt.

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
        own = AutoConfig.from_pretrained(name, **source, **options)
        check_config(name, getattr(own, "vision_config", own) if part == "vision" else own, sub_config)
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
