"""Build any cell of the paper's encoder × LLM table, which is `variants.yaml`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, CLIPImageProcessor, PreTrainedTokenizerFast, set_seed

from granulon_hf.errors import GranulonError
from granulon_hf.modeling.configuration_granulon import GranulonConfig
from granulon_hf.modeling.modeling_granulon import GranulonForConditionalGeneration
from granulon_hf.modeling.processing_granulon import GranulonProcessor
from granulon_hf.overrides import replace_fields


@dataclass(frozen=True)
class Encoder:
    """A vision tower of the paper."""

    hub_id: str
    tiny: dict[str, Any]  # the same architecture at toy size, as a config
    config: dict[str, Any] = field(default_factory=lambda: {"granularity_levels": []})  # what its variants share
    gated: bool = False  # whether the Hub asks for a license first
    open_id: str | None = None  # the same weights without a gate


@dataclass(frozen=True)
class Decoder:
    """A language model of the paper."""

    hub_id: str
    tiny: dict[str, Any]
    special_tokens: Sequence[str]  # of its toy tokenizer: start of text, end of turn, others
    gated: bool = False


_TABLES = yaml.safe_load(files(__package__).joinpath("variants.yaml").read_text(encoding="utf-8"))
ENCODERS = {name: Encoder(**fields) for name, fields in _TABLES["encoders"].items()}
DECODERS = {name: Decoder(**fields) for name, fields in _TABLES["decoders"].items()}
NAMES: tuple[str, ...] = tuple(f"{encoder}-{decoder}" for encoder in ENCODERS for decoder in DECODERS)


def parse(name: str) -> tuple[Encoder, Decoder]:
    """Look up a variant such as `granulon-qwen2.5`; raise GranulonError for an unknown one."""
    encoder, _, decoder = name.rpartition("-")
    if encoder not in ENCODERS or decoder not in DECODERS:
        raise GranulonError(f"Unknown variant {name!r}; the variants are {', '.join(NAMES)}.")
    return ENCODERS[encoder], DECODERS[decoder]


def build(
    name: str, *, tiny: bool = False, open_weights: bool = False, seed: int = 0, **kwargs
) -> tuple[GranulonForConditionalGeneration, GranulonProcessor]:
    """Assemble a variant of the paper: two pretrained backbones, a fresh projector and controller.

    Args:
        name (`str`): one of [`NAMES`], `"<encoder>-<llm>"`.
        tiny (`bool`, defaults to `False`): the same architectures at toy size with random weights and a small real
            tokenizer; nothing is downloaded.
        open_weights (`bool`, defaults to `False`): read a gated vision tower from the repository that holds the same
            weights without a gate (DINOv3 from timm); needs timm.
        seed (`int`, defaults to 0): of the random weights.
        **kwargs: fields of [`GranulonConfig`], and with `tiny=False` arguments of
            [`GranulonForConditionalGeneration.from_vision_text_pretrained`].

    Returns:
        `tuple`: model in eval mode, and processor.

    Raises:
        ValueError: an unknown variant.
        OSError: a checkpoint cannot be read; two of the backbones are gated on the Hub.
    """
    encoder, decoder = parse(name)
    kwargs = replace_fields(encoder.config, kwargs)
    set_seed(seed)
    if tiny:
        return _build_tiny(encoder, decoder, **kwargs)
    vision = (open_weights and encoder.open_id) or encoder.hub_id
    model = GranulonForConditionalGeneration.from_vision_text_pretrained(vision, decoder.hub_id, **kwargs)
    loading = {key: kwargs[key] for key in ("vision_kwargs", "text_kwargs") if key in kwargs}
    processor = GranulonProcessor.from_vision_text_pretrained(
        vision,
        decoder.hub_id,
        **model.config.slot_options,
        **loading,
    )
    return model, processor


def _build_tiny(encoder: Encoder, decoder: Decoder, **kwargs):
    tokenizer = tiny_tokenizer(decoder)
    vision_config = AutoConfig.for_model(**encoder.tiny)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text_config = AutoConfig.for_model(**decoder.tiny, vocab_size=len(tokenizer), **ids)
    side = vision_config.image_size
    image_processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    config = GranulonConfig(vision_config=vision_config, text_config=text_config, **kwargs)
    processor = GranulonProcessor.from_parts(
        image_processor,
        tokenizer,
        vision_config,
        **config.slot_options,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )
    config.image_token_id = processor.image_token_id
    config.image_seq_length = (side // processor.patch_size) ** 2
    model = GranulonForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor


def tiny_tokenizer(decoder: Decoder, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Train a small byte-level BPE tokenizer with the decoder's special tokens; it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = list(decoder.special_tokens), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_TABLES["tiny_corpus"], trainer)
    start, end, *others = special
    padding = next((token for token in others if "pad_id" in token), start)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=padding, additional_special_tokens=others
    )
