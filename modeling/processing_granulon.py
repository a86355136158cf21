# Copyright 2026 The Granulon team. Licensed under the Apache License, Version 2.0.
"""Processor of Granulon: image processor, tokenizer, image placeholders and the question mask."""

import functools
import itertools
import re
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPImageProcessor
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import PILImageResampling, get_image_size, to_numpy_array
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin

from .images_granulon import open_images
from .prompt_granulon import (
    Prompt,
    Span,
    any_of,
    common_end,
    encode_typed,
    map_text,
    mark_conversation,
    mark_typed,
    move_spans,
    remove_marks,
    strip_span,
    tokens_in,
)
from .reducers_granulon import REDUCERS
from .vision_granulon import probe_vision_tower

# Words of a conversation that is rendered only to see what the chat template writes around them.
FIRST, ANSWER, SECOND = "\ufdd6", "\ufdd7", "\ufdd8"

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
    """Find a token that the tokenizer already has and text never uses, to stand for an image: no embedding table is resized.

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


class GranulonImagesKwargs(ImagesKwargs, total=False):
    """Arguments of a call that say how many slots its images get."""

    granularity: str | None
    visual_tokens: int | None


class GranulonProcessorKwargs(ProcessingKwargs, total=False):
    """All arguments of a call, by which serving engines know them."""

    images_kwargs: GranulonImagesKwargs  # type: ignore[misc]
    # transformers before 5.24 looks for it.
    _defaults = {}  # type: ignore[misc]


class GranulonProcessor(ProcessorMixin):
    r"""
    Turns conversations and images into model inputs; every image gets N pixel slots and K semantic slots, in the compact form K
    alone.

    Args:
        image_processor, tokenizer: of the vision tower and of the language model.
        patch_size (`int`): side in pixels of what one patch token stands for.
        num_semantic_tokens (`int`, defaults to 0): K, semantic slots per image; 0 for a model without levels.
        visual_tokens (`str`, defaults to `"pixel+semantic"`): as in the model's config.
        num_additional_image_tokens (`int`, defaults to 0): CLS and register tokens, which count for
            `vision_feature_select_strategy="full"` only.
        vision_feature_select_strategy (`str`, defaults to `"default"`): as in the model's config.
        image_token (`str`, *optional*): placeholder of an image; found in the tokenizer by default.
        granularity_levels, default_granularity, reducer (*optional*): as in the model's config. Only engines that cannot hide
            empty slots, such as vLLM, need them.
        chat_template (`str`, *optional*): Jinja template.

    The result of a call, or of `apply_chat_template(..., tokenize=True, return_dict=True)`, also holds `question_mask` [B x L]:
    1 on the tokens of the last user turn's own words, which is what the granularity controller reads.
    """

    valid_processor_kwargs = GranulonProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size: int | None = None,
        num_semantic_tokens: int = 0,
        visual_tokens: str = "pixel+semantic",
        num_additional_image_tokens: int = 0,
        vision_feature_select_strategy: str = "default",
        image_token: str | None = None,
        granularity_levels: list[dict[str, Any]] | None = None,
        default_granularity: str | None = None,
        reducer: str = "adata",
        chat_template: str | None = None,
        **kwargs,
    ):
        self.patch_size = patch_size
        self.granularity_levels = granularity_levels
        self.default_granularity = default_granularity
        self.reducer = reducer
        self.num_semantic_tokens = num_semantic_tokens
        self.visual_tokens = visual_tokens
        self.num_additional_image_tokens = num_additional_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token = image_token or find_image_token(tokenizer)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if tokenizer.encode(self.image_token, add_special_tokens=False) != [self.image_token_id]:
            raise ValueError(f"image_token={self.image_token!r} is not a single token of the tokenizer.")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> "GranulonProcessor":
        # vLLM loads the processor with the arguments of a request, of which this one has the name of an option of ours.
        if isinstance(kwargs.get("visual_tokens"), int):
            del kwargs["visual_tokens"]
        return super().from_pretrained(*args, **kwargs)

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
        """Assemble a processor from those of two backbones, as a model is by its own `from_vision_text_pretrained`.

        Args:
            vision, text (`str`): Hub id or folder of the vision tower and of the decoder.
            num_semantic_tokens (`int`, defaults to 20): as in the model's config; 0 for a model without levels.
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

        `kwargs` are other arguments of [`GranulonProcessor`].
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

    def _slots_per_image(self, height: int, width: int, semantic: int | None = None) -> int:
        """Count the slots of an image of this size in pixels, with K semantic ones unless it is said how many."""
        semantic = self.num_semantic_tokens if semantic is None else semantic
        if self.visual_tokens == "semantic":
            return semantic
        slots = (height // self.patch_size) * (width // self.patch_size) + semantic
        return slots + (self.num_additional_image_tokens if self.vision_feature_select_strategy == "full" else 0)

    def _filled_slots(self, height: int, width: int, granularity: str | None, visual_tokens: int | None) -> int:
        """Count the slots that a level, or a number of visual tokens, fills of an image of this size in pixels.

        Raises:
            ValueError: there is no such level, or the number depends on more than the size.
        """
        semantic = 0
        if self.num_semantic_tokens:
            fills = REDUCERS[self.reducer].fills
            if fills is None:
                raise ValueError(
                    f"How many tokens reducer={self.reducer!r} makes, or which, depends on the image or the question, so that "
                    "an engine which counts them before it runs the model cannot serve it; use `granulon serve`."
                )
            level = {"alpha": 1, "beta": visual_tokens} if visual_tokens else self.granularity_levels[self._level(granularity)]
            grid = height // self.patch_size, width // self.patch_size
            semantic = fills(min(level["beta"], self.num_semantic_tokens), level["alpha"], grid)
        return self._slots_per_image(height, width, semantic)

    def _level(self, granularity: str | None) -> int:
        """Return the index of a level, by default that of the default level."""
        names = [level["name"] for level in self.granularity_levels or []]
        if not names:
            raise ValueError(
                "This processor does not know the levels of its model, which are needed to count filled slots; export the "
                "model again with `granulon push`."
            )
        name = granularity or self.default_granularity
        if name not in names:
            raise ValueError(f"Unknown granularity {name!r}; this model's levels are {', '.join(names)}.")
        return names.index(name)

    def _check_choice(self, granularity: str | None, visual_tokens: int | None):
        most = self.num_semantic_tokens
        if granularity is not None and not most:
            raise ValueError(f"Unknown granularity {granularity!r}; this model has no granularity levels.")
        if visual_tokens is None:
            return
        if granularity is not None:
            raise ValueError("granularity and visual_tokens both say how many tokens an image gets; give one of them.")
        if not most:
            raise ValueError(f"visual_tokens={visual_tokens!r} was given, but this model shows all pixel tokens and no others.")
        if type(visual_tokens) is not int or not 1 <= visual_tokens <= most:
            raise ValueError(
                f"visual_tokens must be an integer from 1 to {most}, the slots of an image; got {visual_tokens!r:.80}."
            )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        height, width = get_image_size(to_numpy_array(image_inputs["pixel_values"][image_idx]))
        return self.image_token * self._slots_per_image(height, width)

    def _get_num_multimodal_tokens(
        self, image_sizes=None, granularity: str | None = None, visual_tokens: int | None = None, **kwargs
    ) -> MultiModalData:
        """Count the slots of images: those that the level or the number fills, or without either all that an image may get."""
        if image_sizes is None:
            return MultiModalData()
        self._check_choice(granularity, visual_tokens)
        crops = getattr(self.image_processor, "do_center_crop", False)
        size = self.image_processor.crop_size if crops else self.image_processor.size
        if granularity is None and visual_tokens is None:
            slots = self._slots_per_image(size["height"], size["width"])
        else:
            slots = self._filled_slots(size["height"], size["width"], granularity, visual_tokens)
        return MultiModalData(num_image_tokens=[slots] * len(image_sizes), num_image_patches=[1] * len(image_sizes))

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "question_mask"]

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        *,
        granularity: str | None = None,
        visual_tokens: int | None = None,
        price: float | None = None,
        **kwargs,
    ):
        """As in transformers, and text is always text: a control token or image placeholder that somebody typed into a message
        stays the characters that it is, since only the template writes control tokens (ours).

        Without `tokenize=True` a rendered conversation is a [`Prompt`]: a `str` that remembers what was typed.

        Args:
            granularity (`str`, *optional*): a level by its name, handed on to the model as it is: it is used instead of the
                one that the question would choose. A server's clients reach it as `chat_template_kwargs`.
            visual_tokens (`int`, *optional*): semantic tokens per image instead of a level, handed on likewise.
            price (`float`, *optional*): of a visual token, handed on likewise.
        """
        template = self._resolve_chat_template(chat_template)
        if "date_string" in template:
            kwargs.setdefault("date_string", DATE_STRING)
        conversations, batched = self._normalize_conversations(conversation)
        pattern = self._control_pattern(template)
        marked = [mark_conversation(one, pattern) for one in conversations]
        # Tools, documents and other variables of the template are text, too.
        others = {name: map_text(value, functools.partial(mark_typed, control=pattern)) for name, value in kwargs.items()}
        others |= {"tokenize": False, "return_dict": False, "return_assistant_tokens_mask": False}
        prompts = [Prompt.read(one) for one in super().apply_chat_template(marked, template, **others)]
        if not kwargs.get("tokenize"):
            return prompts if batched else prompts[0]
        conversations = [map_text(one, remove_marks) for one in conversations]
        given = {"prompts": prompts} | ({} if visual_tokens is None else {"visual_tokens": visual_tokens})
        kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), **given}
        inputs = super().apply_chat_template(conversations if batched else conversations[0], template, **kwargs)
        if kwargs.get("return_dict"):
            inputs |= {name: value for name, value in (("granularity", granularity), ("price", price)) if value is not None}
        return inputs

    def __call__(
        self,
        images=None,
        text=None,
        videos=None,
        audio=None,
        *,
        prompts: list[Prompt] | None = None,
        granularity: str | None = None,
        visual_tokens: int | None = None,
        **kwargs,
    ):
        """As in transformers; the result also holds `question_mask` [B x L].

        An engine that asks for `return_text_replacement_offsets` (vLLM), or is SGLang, cannot hide slots that a level leaves
        empty, nor let the question choose the level. For it every image gets as many slots as are filled, at the default level
        unless another one or a number is given, and the result holds `num_image_slots` and the level or the number of each
        image, for `get_image_features`.

        Args:
            images: one image, or (nested) lists of them, each a path, URL, bytes, base64 text, `PIL.Image.Image`, array or
                tensor.
            text (`str` or `list[str]`): with one placeholder (`processor.image_token`) per image. In a string that
                [`~GranulonProcessor.apply_chat_template`] did not make, control tokens count as such, and the question is what
                stands in its last user turn, or all of it where it has none of this chat template's turns.
            prompts (`list[Prompt]`, *optional*): used instead of `text`.
            granularity (`str`, *optional*): a level by its name, handed on to the model.
            visual_tokens (`int`, *optional*): semantic tokens per image, from 1 to K, handed on to the model; in the compact
                form an image then gets as many slots.

        Raises:
            ValueError: an image cannot be used, or the text has more or fewer placeholders than there are images.
        """
        if text is None and prompts is None:
            return super().__call__(images=None if images is None else open_images(images), **kwargs)
        options = self._merge_kwargs(self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        image_options, text_options = options["images_kwargs"], options["text_kwargs"]
        asked = ("return_mm_token_type_ids", "return_text_replacement_offsets")
        kinds, offsets = (text_options.pop(name, options.get(name)) for name in asked)
        # With character offsets it is transformers itself that asks, to find assistants' tokens in what is trained on.
        filled = offsets and not text_options.get("return_offsets_mapping")
        filled = filled or "sglang.srt" in sys.modules  # which asks in no way of its own
        if prompts is None:
            texts = [text] if isinstance(text, str) else text
            if not isinstance(texts, list | tuple) or not all(isinstance(one, str) for one in texts):
                raise ValueError(f"`text` must be a string or a list of strings; got {text!r:.80}.")
            # An engine's text is placeholders alone: there is no question in it.
            read = Prompt if filled else self._read_plain
            prompts = [one if isinstance(one, Prompt) else read(one) for one in texts]
        places = [prompt.find_all(self.image_token) for prompt in prompts]
        # Lists of images, one for each text, must fit text by text; other images are dealt out in order.
        by_text = isinstance(images, list | tuple) and len(images) == len(prompts)
        by_text = by_text and all(isinstance(one, list | tuple) for one in images)
        groups = [open_images(one) for one in (images if by_text else [[] if images is None else images])]
        counts = [len(spans) for spans in places] if by_text else [sum(map(len, places))]
        for count, group in zip(counts, groups, strict=True):
            if count != len(group):
                raise ValueError(
                    f"A text has {count} image placeholders for {len(group)} images; give every image one: a part "
                    '{"type": "image"} of a message for apply_chat_template, or processor.image_token in a plain text.'
                )
        opened = list(itertools.chain(*groups))
        granularity = image_options.pop("granularity", granularity)
        visual_tokens = image_options.pop("visual_tokens", visual_tokens)
        self._check_choice(granularity, visual_tokens)
        choice = {"granularity": granularity, "visual_tokens": visual_tokens}
        pixels, slots = self._process_images(opened, **image_options) if opened else ({}, [])
        if filled:
            sizes = [get_image_size(to_numpy_array(one)) for one in pixels.get("pixel_values", ())]
            filled_slots = [self._filled_slots(*size, **choice) for size in sizes]
            slots = [self.image_token * count for count in filled_slots]
        elif visual_tokens is not None and self.visual_tokens == "semantic":
            slots = [self.image_token * visual_tokens for _ in slots]
        rest = iter(slots)
        replaced = [[(span, next(rest)) for span in spans] for spans in places]
        expanded = [prompt.expand(edits) for prompt, edits in zip(prompts, replaced, strict=True)]

        tensors = text_options.pop("return_tensors", None)
        data = self._tokenize(expanded, **text_options)
        for ids, edits in zip(data["input_ids"], replaced, strict=True):
            if ids.count(self.image_token_id) != sum(len(new) for _, new in edits) // len(self.image_token):
                raise ValueError("The images' slots do not fit: leave out truncation, or raise max_length.")
        if kinds:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if offsets:
            data["text_replacement_offsets"] = [self._describe(edits) for edits in replaced]
        if filled:
            del data["question_mask"]
            if self.num_semantic_tokens:
                name, value = ("visual_tokens", visual_tokens) if visual_tokens else ("granularity", self._level(granularity))
                data |= {"num_image_slots": filled_slots, name: [value] * len(filled_slots)}
            choice = {}
        inputs = BatchFeature(data | pixels, tensor_type=tensors, skip_tensor_conversion=self.skip_tensor_conversion)
        return BatchFeature({**inputs, **{name: value for name, value in choice.items() if value is not None}})

    def _describe(self, edits: list[tuple[Span, str]]) -> list[dict[str, Any]]:
        """Describe the placeholders that were replaced as transformers' processors do."""
        moved = move_spans([span for span, _ in edits], edits)
        return [
            {"type": "image", "span": span, "new_span": new_span, "text": self.image_token, "replacement": new}
            for (span, new), new_span in zip(edits, moved, strict=True)
        ]

    def _tokenize(self, prompts: list[Prompt], return_offsets_mapping: bool = False, **options) -> dict[str, Any]:
        """Return the tokens of prompts with their image slots, and the question mask."""
        if self.tokenizer.bos_token is not None and any(prompt.startswith(self.tokenizer.bos_token) for prompt in prompts):
            options.setdefault("add_special_tokens", False)  # the template has written it
        if any(prompt.typed for prompt in prompts):
            data = encode_typed(self.tokenizer, prompts, **options)
        else:
            data = dict(self.tokenizer([str(prompt) for prompt in prompts], return_offsets_mapping=True, **options))
        offsets = data["offset_mapping"] if return_offsets_mapping else data.pop("offset_mapping")
        data["question_mask"] = [tokens_in(*pair) for pair in zip(offsets, (one.question for one in prompts), strict=True)]
        return data

    def _control_pattern(self, template: str) -> re.Pattern:
        """Return a pattern of all tokens that are no text: special ones, and others that the chat template writes."""
        tokens = self.tokenizer.added_tokens_decoder.values()
        control = {one.content for one in tokens if one.special or (one.content in template and not one.content.isspace())}
        return any_of(frozenset(control | {self.image_token}))

    def _read_plain(self, text: str) -> Prompt:
        """Look for the question in a prompt of which nothing is known but its text."""
        template = self._resolve_chat_template(None) if self.chat_template else ""
        start, end = self._find_user_turn(text) if template else (0, len(text))
        control = (found.span() for found in self._control_pattern(template).finditer(text, start, end))
        edges = [start, *itertools.chain(*control), end]
        words = [strip_span(text, *span) for span in zip(edges[::2], edges[1::2], strict=True)]
        return Prompt(text, question=[(first, last) for first, last in words if first < last])

    def _find_user_turn(self, text: str) -> Span:
        """Find the last user turn in a text that looks as the chat template writes it; else it is all of the text."""

        def written(**roles: str) -> list[str]:
            """Return what the template writes around the words of these roles."""
            turns = [{"role": role.rstrip("_"), "content": [{"type": "text", "text": word}]} for role, word in roles.items()]
            return re.split("[" + "".join(roles.values()) + "]", str(self.apply_chat_template(turns)))

        before, to_answer, to_user, after = written(user=FIRST, assistant=ANSWER, user_=SECOND)
        control = self._control_pattern(self._resolve_chat_template(None))
        # What begins a user's turn, whatever comes before it, but no half of a control token …
        start = len(before) - common_end(before, to_user)
        start = next((mark.end() for mark in control.finditer(before) if mark.start() < start < mark.end()), start)
        begin = before[start:]
        # … down to where it differs from what begins an answer, and back to the beginning of that line or control token.
        differs = len(begin) - common_end(begin, to_answer) - 1
        marks = [found.start() for found in control.finditer(begin) if found.start() <= differs]
        begin = begin[max([0, begin.rfind("\n", 0, differs) + 1, *marks]) :]
        place = text.rfind(begin) if differs >= 0 else -1
        if place < 0:
            return 0, len(text)
        start = place + len(begin)
        try:  # some templates write the system prompt into the user's turn
            _, between, _ = written(system=ANSWER, user=FIRST)
        except Exception:  # this one knows no system prompt
            between = begin
        if not between.endswith(begin) and (found := text.find(between, start)) >= 0:
            start = found + len(between)
        ends = [text.find(to_answer.rstrip(), start), text.find(after.rstrip(), start) if after.strip() else -1]
        return start, min((end for end in ends if end >= 0), default=len(text))


def make_chat_template(tokenizer, image_token: str) -> str:
    """Put lines before the language model's own chat template that turn image parts into placeholders, images first."""
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
    """Return timm's image processor as a `CLIPImageProcessor`, which can be saved with a processor, and any other as it is."""
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


__all__ = ["GranulonProcessor"]
