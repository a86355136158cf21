# Copyright 2026 The Granulon team. Licensed under the Apache License, Version 2.0.
"""Processor of Granulon: image processor, tokenizer, image placeholders and the question mask."""

import re
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPImageProcessor
from transformers.image_utils import PILImageResampling, get_image_size, to_numpy_array
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .vision_granulon import probe_vision_tower

# Unicode noncharacters, reserved for use inside a program: they mark the question while the chat template is rendered.
QUESTION_START, QUESTION_END = "\ufdd0", "\ufdd1"

# Tokens that are free to stand for an image, by what tokenizers call them; the first that a tokenizer has is used.
IMAGE_TOKENS = (
    "<|image_pad|>",  # Qwen
    "<image>",
    "<|image|>",
    "<|reserved_special_token_0|>",  # Llama 3
    "<empty_output>",  # SmolLM2, StarCoder
    "<unused0>",  # Gemma
    "<|extra_0|>",
)
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|endoftext|>", "<pad>")

# Llama 3's template writes today's date into the prompt unless it is told one.
DATE_STRING = "26 Jul 2024"


def find_image_token(tokenizer) -> str:
    """A token that the tokenizer already has and text never uses, to stand for an image: no embedding table is resized.

    Raises:
        ValueError: no known one; the message says how to name one.
    """
    vocabulary = tokenizer.get_vocab()
    for token in IMAGE_TOKENS:
        if token in vocabulary and tokenizer.encode(token, add_special_tokens=False) == [vocabulary[token]]:
            return token
    raise ValueError(
        f"{type(tokenizer).__name__} ({tokenizer.name_or_path}) has none of the tokens {', '.join(IMAGE_TOKENS)} to stand for "
        "an image; name a special token that it has and that text never uses: image_token='…' for the processor, "
        "image_token_id=… for the model."
    )


class GranulonProcessor(ProcessorMixin):
    r"""
    Turns conversations and images into model inputs; every image gets N pixel slots and K semantic slots.

    Args:
        image_processor: image processor of the vision tower.
        tokenizer: tokenizer of the language model.
        patch_size (`int`): side in pixels of what one patch token stands for.
        num_semantic_tokens (`int`, defaults to 0): K, semantic slots per image; 0 for a model without levels.
        num_additional_image_tokens (`int`, defaults to 0): CLS and register tokens, which count for
            `vision_feature_select_strategy="full"` only.
        vision_feature_select_strategy (`str`, defaults to `"default"`): as in the model's config.
        image_token (`str`, *optional*): placeholder of an image; found in the tokenizer by default.
        chat_template (`str`, *optional*): Jinja template.

    `apply_chat_template(..., tokenize=True, return_dict=True)` also returns `question_mask` [B x L]: 1 on the tokens of the
    last user turn's own words, which is what the granularity controller reads.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size: int | None = None,
        num_semantic_tokens: int = 0,
        num_additional_image_tokens: int = 0,
        vision_feature_select_strategy: str = "default",
        image_token: str | None = None,
        chat_template: str | None = None,
        **kwargs,
    ):
        self.patch_size = patch_size
        self.num_semantic_tokens = num_semantic_tokens
        self.num_additional_image_tokens = num_additional_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token = image_token or find_image_token(tokenizer)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if tokenizer.encode(self.image_token, add_special_tokens=False) != [self.image_token_id]:
            raise ValueError(f"image_token={self.image_token!r} is not a single token of the tokenizer.")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str,
        text: str,
        *,
        num_semantic_tokens: int = 20,
        vision_kwargs: dict | None = None,
        text_kwargs: dict | None = None,
        **kwargs,
    ) -> "GranulonProcessor":
        """Assemble a processor from those of two backbones.

        Args:
            vision (`str`): Hub id or folder of the vision tower.
            text (`str`): Hub id or folder of the decoder.
            num_semantic_tokens (`int`, defaults to 20): K of the model's config; 0 for a model without levels.
            vision_kwargs, text_kwargs (`dict`, *optional*): passed to `from_pretrained` of the backbone.
            **kwargs: other arguments of [`GranulonProcessor`].

        Raises:
            ValueError: the vision tower has no patch features, or no spare token can stand for an image.
        """
        vision_config = AutoConfig.from_pretrained(vision, **(vision_kwargs or {}))
        return cls.from_parts(
            AutoImageProcessor.from_pretrained(vision, **(vision_kwargs or {})),
            AutoTokenizer.from_pretrained(text, **(text_kwargs or {})),
            getattr(vision_config, "vision_config", vision_config),
            num_semantic_tokens=num_semantic_tokens,
            **kwargs,
        )

    @classmethod
    def from_parts(cls, image_processor, tokenizer, vision_config, **kwargs) -> "GranulonProcessor":
        """Assemble a processor from loaded parts; patch size and prefix tokens come from the vision tower itself.

        Args:
            image_processor: image processor of the vision tower.
            tokenizer: tokenizer of the language model.
            vision_config (`PreTrainedConfig`): configuration of the vision tower.
            **kwargs: other arguments of [`GranulonProcessor`].
        """
        grid = probe_vision_tower(vision_config)
        kwargs["image_token"] = kwargs.get("image_token") or find_image_token(tokenizer)
        if tokenizer.pad_token is None:
            vocabulary = tokenizer.get_vocab()
            tokenizer.pad_token = next((token for token in PAD_TOKENS if token in vocabulary), tokenizer.eos_token)
        # What batched generation needs; only what is in init_kwargs is saved. Training may set either side.
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        kwargs.setdefault("chat_template", make_chat_template(tokenizer, kwargs["image_token"]))
        return cls(
            to_serializable(image_processor),
            tokenizer,
            patch_size=grid.patch_size,
            num_additional_image_tokens=grid.prefix_tokens,
            **kwargs,
        )

    def _slots_per_image(self, height: int, width: int) -> int:
        slots = (height // self.patch_size) * (width // self.patch_size) + self.num_semantic_tokens
        return slots + (self.num_additional_image_tokens if self.vision_feature_select_strategy == "full" else 0)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        height, width = get_image_size(to_numpy_array(image_inputs["pixel_values"][image_idx]))
        return self.image_token * self._slots_per_image(height, width)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        crops = getattr(self.image_processor, "do_center_crop", False)
        size = self.image_processor.crop_size if crops else self.image_processor.size
        slots = self._slots_per_image(size["height"], size["width"])
        return MultiModalData(num_image_tokens=[slots] * len(image_sizes), num_image_patches=[1] * len(image_sizes))

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "question_mask"]

    def apply_chat_template(self, conversation, chat_template: str | None = None, *, granularity: str | None = None, **kwargs):
        """As in transformers; with `tokenize=True, return_dict=True` the result also holds `question_mask` [B x L].

        Args:
            granularity (`str`, *optional*): a level by its name, handed on to the model as it is: it is used instead of the
                one that the question would choose. A server's clients reach it as `chat_template_kwargs`.
        """
        if "date_string" in str(chat_template or self.chat_template):
            kwargs.setdefault("date_string", DATE_STRING)
        if kwargs.get("tokenize"):
            # Rendered a second time with marks around the question: right for any template, and for repeated words.
            batched = isinstance(conversation[0], list | tuple) or hasattr(conversation[0], "content")
            marked = [mark_question(one) for one in conversation] if batched else mark_question(conversation)
            text_only = {"tokenize": False, "return_dict": False, "return_assistant_tokens_mask": False}
            rendered = super().apply_chat_template(marked, chat_template, **{**kwargs, **text_only})
            spans = [marked_spans(one) for one in ([rendered] if isinstance(rendered, str) else rendered)]
            kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), "question_spans": spans}
        inputs = super().apply_chat_template(conversation, chat_template, **kwargs)
        if granularity is not None and kwargs.get("tokenize") and kwargs.get("return_dict"):
            inputs["granularity"] = granularity
        return inputs

    def __call__(self, images=None, text=None, *, question_spans: list[list[tuple[int, int]]] | None = None, **kwargs):
        """As in transformers.

        Args:
            question_spans (`list[list[tuple[int, int]]]`, *optional*): for each text, the (start, end) characters of the
                question before placeholders are expanded. The result then also holds `question_mask` [B x L].
        """
        if question_spans is None:
            return super().__call__(images=images, text=text, **kwargs)
        keep_offsets = kwargs.get("return_offsets_mapping") or kwargs.get("text_kwargs", {}).get("return_offsets_mapping")
        keep_replacements = kwargs.get("return_text_replacement_offsets")
        kwargs |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        out = super().__call__(images=images, text=text, **kwargs)
        mask = [
            question_tokens(offsets, spans, replacements)
            for offsets, spans, replacements in zip(
                out["offset_mapping"], question_spans, out["text_replacement_offsets"], strict=True
            )
        ]
        if torch.is_tensor(out["input_ids"]):
            mask = torch.tensor(mask)
        elif isinstance(out["input_ids"], np.ndarray):
            mask = np.array(mask)
        out["question_mask"] = mask
        if not keep_offsets:
            out.pop("offset_mapping")
        if not keep_replacements:
            out.pop("text_replacement_offsets")
        return out


def make_chat_template(tokenizer, image_token: str) -> str:
    """The language model's own chat template, preceded by lines that turn image parts into placeholders, images first."""
    folder = Path(__file__).parent
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if own is None:
        vocabulary = tokenizer.get_vocab()
        marks = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3"}
        name = next((name for token, name in marks.items() if token in vocabulary), "plain")
        own = (folder / f"{name}.jinja").read_text()
    return (folder / "images_first.jinja").read_text().replace("IMAGE_TOKEN", image_token) + own


def to_serializable(image_processor):
    """A timm image processor cannot be saved with a processor: give the same steps as one of transformers' own.

    Args:
        image_processor: any image processor.

    Returns:
        The same, or for timm a `CLIPImageProcessor` with its size, crop, interpolation, mean and deviation.
    """
    data = getattr(image_processor, "data_config", None)
    if data is None:
        return image_processor
    _, height, width = data["input_size"]
    if data["crop_mode"] == "center":
        resized = {"shortest_edge": int(min(height, width) / data["crop_pct"])}
    elif data["crop_mode"] == "squash":
        resized = {"height": int(height / data["crop_pct"]), "width": int(width / data["crop_pct"])}
    else:
        raise ValueError(f"timm's crop mode {data['crop_mode']!r} has no like in transformers; use 'center' or 'squash'.")
    return CLIPImageProcessor(
        size=resized,
        crop_size={"height": height, "width": width},
        resample=PILImageResampling[data["interpolation"].upper()],
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
    )


def mark_question(conversation: list[dict]) -> list[dict]:
    """Copy a conversation with the text of its last user turn between the two marks; white space around it stays outside."""

    def mark(text: str) -> str:
        words = text.strip()
        return text.replace(words, QUESTION_START + words + QUESTION_END) if words else text

    conversation = [dict(message) for message in conversation]
    for message in reversed(conversation):
        if message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str):
                message["content"] = mark(content)
            elif content:
                message["content"] = [
                    {**part, "text": mark(part["text"])} if isinstance(part.get("text"), str) else part for part in content
                ]
            break
    return conversation


def marked_spans(text: str) -> list[tuple[int, int]]:
    """The (start, end) characters that the marks enclose, counted as if the marks were not there."""
    spans, plain, start = [], 0, 0
    for piece in re.split(f"([{QUESTION_START}{QUESTION_END}])", text):
        if piece == QUESTION_START:
            start = plain
        elif piece == QUESTION_END:
            spans.append((start, plain))
        else:
            plain += len(piece)
    return spans


def question_tokens(offsets, spans: list[tuple[int, int]], replacements: list[dict]) -> list[int]:
    """1 for each token that overlaps a span of the prompt as it was before image placeholders were expanded."""

    def expanded(char: int) -> int:
        return char + sum(len(r["replacement"]) - len(r["text"]) for r in replacements if r["span"][1] <= char)

    spans = [(expanded(start), expanded(end)) for start, end in spans]
    offsets = offsets.tolist() if hasattr(offsets, "tolist") else offsets
    return [int(any(start < stop and end > first for first, stop in spans)) for start, end in offsets]


__all__ = ["GranulonProcessor"]
