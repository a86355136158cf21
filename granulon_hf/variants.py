"""The paper's encoder × LLM table as data, and `build`, which assembles any cell of it.

Sources: supplement, section 1 (encoders, all 0.3–0.4 B); the Hub ids are ours.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, CLIPImageProcessor, PreTrainedTokenizerFast, set_seed

from granulon_hf.errors import GranulonError
from granulon_hf.modeling.configuration_granulon import GranulonConfig
from granulon_hf.modeling.modeling_granulon import GranulonForConditionalGeneration
from granulon_hf.modeling.processing_granulon import GranulonProcessor


@dataclass(frozen=True)
class Encoder:
    """A vision tower of the paper.

    Args:
        hub_id (`str`): its checkpoint.
        tiny (`dict`): the same architecture at toy size, as a config.
        config (`dict`): fields of [`GranulonConfig`] that make the variant.
        gated (`bool`): whether the Hub asks for a licence first.
        open_id (`str`, *optional*): the same weights without a gate.
    """

    hub_id: str
    tiny: dict[str, Any]
    config: dict[str, Any] = field(default_factory=lambda: {"granularity_levels": []})
    gated: bool = False
    open_id: str | None = None


@dataclass(frozen=True)
class Decoder:
    """A language model of the paper.

    Args:
        hub_id (`str`): its checkpoint.
        tiny (`dict`): the same architecture at toy size, as a config.
        special_tokens (`list[str]`): of its tokenizer, for the toy one: start of text first, end of turn second.
        gated (`bool`): whether the Hub asks for a licence first.
    """

    hub_id: str
    tiny: dict[str, Any]
    special_tokens: tuple[str, ...]
    gated: bool = False


_TINY_VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_DINOV3 = Encoder(
    "facebook/dinov3-vitl16-pretrain-lvd1689m",
    {"model_type": "dinov3_vit", "image_size": 96, "patch_size": 16, "num_register_tokens": 4, **_TINY_VIT},
    gated=True,
    open_id="timm/vit_large_patch16_dinov3.lvd1689m",
)
ENCODERS: dict[str, Encoder] = {
    "clip": Encoder(
        "openai/clip-vit-large-patch14-336",
        {"model_type": "clip_vision_model", "image_size": 84, "patch_size": 14, **_TINY_VIT},
    ),
    "siglip": Encoder(
        "google/siglip-large-patch16-384",
        {"model_type": "siglip_vision_model", "image_size": 96, "patch_size": 16, **_TINY_VIT},
    ),
    "dinov2": Encoder(
        "facebook/dinov2-large",
        {"model_type": "dinov2", "image_size": 84, "patch_size": 14, "mlp_ratio": 2, **_TINY_VIT},
    ),
    "dinov3": _DINOV3,
    "granulon": Encoder(_DINOV3.hub_id, _DINOV3.tiny, config={}, gated=_DINOV3.gated, open_id=_DINOV3.open_id),
    # Ours: the language model sees the semantic tokens alone.
    "granulon-compact": replace(_DINOV3, config={"visual_tokens": "semantic"}),
}

_TINY_LM = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
DECODERS: dict[str, Decoder] = {
    "qwen2.5": Decoder(
        "Qwen/Qwen2.5-1.5B-Instruct",
        {"model_type": "qwen2", "tie_word_embeddings": True, **_TINY_LM},
        ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|image_pad|>"),
    ),
    "llama3.2": Decoder(
        "meta-llama/Llama-3.2-3B-Instruct",
        {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 8, **_TINY_LM},
        (
            "<|begin_of_text|>",
            "<|eot_id|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|finetune_right_pad_id|>",
            "<|reserved_special_token_0|>",
        ),
        gated=True,
    ),
}

NAMES: tuple[str, ...] = tuple(f"{encoder}-{decoder}" for encoder in ENCODERS for decoder in DECODERS)

# What the toy tokenizer learns its merges from: words of the kind that users ask.
_TINY_CORPUS = (
    "What is in the picture? Describe the image in detail. Is there an animal in this photograph?",
    "How many objects are there? Which colour is the small car in the top left corner? Where is the cat?",
    "a dog, a cup of coffee, a rocket, a flower, two people on a beach, red, green, blue, yellow, left, right, top, bottom",
    "The photograph shows a large house in front of snow-covered mountains. There are three trees next to the road.",
)


def parse(name: str) -> tuple[Encoder, Decoder]:
    """Look up a variant such as `granulon-qwen2.5`.

    Raises:
        GranulonError: an unknown name; the message lists all.
    """
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
    kwargs = {**encoder.config, **kwargs}
    set_seed(seed)
    if tiny:
        return _build_tiny(encoder, decoder, **kwargs)
    vision = (open_weights and encoder.open_id) or encoder.hub_id
    model = GranulonForConditionalGeneration.from_vision_text_pretrained(vision, decoder.hub_id, **kwargs)
    loading = {key: kwargs[key] for key in ("vision_kwargs", "text_kwargs") if key in kwargs}
    processor = GranulonProcessor.from_vision_text_pretrained(
        vision,
        decoder.hub_id,
        num_semantic_tokens=model.config.num_semantic_slots,
        visual_tokens=model.config.visual_tokens,
        **loading,
    )
    return model, processor


def _build_tiny(encoder: Encoder, decoder: Decoder, **kwargs):
    tokenizer = tiny_tokenizer(decoder)
    vision_config = AutoConfig.for_model(**encoder.tiny)
    text_config = AutoConfig.for_model(
        **decoder.tiny,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    side = vision_config.image_size
    image_processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    config = GranulonConfig(vision_config=vision_config, text_config=text_config, **kwargs)
    processor = GranulonProcessor.from_parts(
        image_processor,
        tokenizer,
        vision_config,
        num_semantic_tokens=config.num_semantic_slots,
        visual_tokens=config.visual_tokens,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )
    config.image_token_id = processor.image_token_id
    config.image_seq_length = (side // processor.patch_size) ** 2
    model = GranulonForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor


def tiny_tokenizer(decoder: Decoder, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer, trained on the spot, with the special tokens of the decoder's own.

    Args:
        decoder ([`Decoder`]): whose special tokens it has.
        vocab_size (`int`, defaults to 512): with the 256 bytes, so that any text can be encoded.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(decoder.special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TINY_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=decoder.special_tokens[0],
        eos_token=decoder.special_tokens[1],
        pad_token=decoder.special_tokens[4 if "<|finetune_right_pad_id|>" in decoder.special_tokens else 0],
        additional_special_tokens=list(decoder.special_tokens[2:]),
    )
