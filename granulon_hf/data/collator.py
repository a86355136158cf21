"""From samples to training batches: labels on the answers, padded or packed.

With `Trainer` (`remove_unused_columns=False`) or TRL's `SFTTrainer`: `data_collator=GranulonCollator(processor, packing=True)`
(examples/sft_trl.py); with TRL's `DPOTrainer`: `data_collator=GranulonPreferenceCollator(processor)` (examples/dpo_trl.py).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from granulon_hf.data.sample import Sample, conversation
from granulon_hf.io import batches
from granulon_hf.modeling.images_granulon import open_rgb
from granulon_hf.modeling.processing_granulon import GranulonProcessor
from granulon_hf.modeling.prompt_granulon import Prompt, tokens_in

logger = logging.getLogger(__name__)


@dataclass
class GranulonCollator:
    """Turns samples into a batch for [`GranulonForConditionalGeneration`].

    Labels are on every assistant turn and its end-of-turn token, for any chat template; questions, system prompts, markup and
    image slots carry -100. A sample that cannot be used (broken image, no answer, prompt beyond `max_length`) is left out of
    its batch and noted in `problems`. A batch of which nothing is left repeats the last good sample (or, before there was one,
    is a single token without label), since `Trainer`, gradient accumulation and the other processes all wait for a batch; to
    leave such samples out beforehand, keep those of which `encode` does not give `None`.

    Args:
        processor ([`GranulonProcessor`]): of the model.
        max_length (`int`, *optional*): tokens per sample, image slots included. A longer sample loses the end of its last
            answer, but no image slot; where the prompt leaves no room for one token of the answer, it is left out.
        padding_side (`str`, defaults to `"right"`): `"left"` or `"right"`.
        packing (`bool`, defaults to `False`): no padding: the samples follow each other in one row, told apart by `seq_idx`.
        pad_to_multiple_of (`int`, *optional*): make the row length a multiple; not with `packing`.
        last_answer_only (`bool`, defaults to `False`): labels on the last assistant turn only.
        jpeg_reduction (`float`, *optional*, defaults to 2.0): a JPEG file is decoded at a half, quarter or eighth of its size
            where that is still this many times the size that the image processor wants (what that changes:
            examples/benchmarks/data_loading.py); `None` always decodes it in full.
        image_features (`callable`, *optional*): gives the tower's features [N x D] of an encoded image, computed before
            ([`~granulon_hf.training.feature_cache.FeatureCache`]); `pixel_values` then are [I x N x D], and no image is opened.
        image_clusters (`callable`, *optional*): gives AdaTA's clusters [n x 2 x N] of an encoded image at each level, found
            before; they are the batch's `clusters`.
        stand_in (`dict`, *optional*): what `encode` gave of a sample, instead of the last good one, which is another in each
            worker of a DataLoader.
        warn (`bool`, defaults to `True`): log the first problem.

    Attributes:
        problems (`list[dict]`): `{"id", "reason"}` of each sample that was left out, once. With `num_workers` in a DataLoader
            every worker has a collator, and a list, of its own ([`GranulonTrainer`] puts them together).

    Raises:
        ValueError: an unknown padding side, or `packing` with `pad_to_multiple_of`.
    """

    processor: GranulonProcessor
    max_length: int | None = None
    padding_side: str = "right"
    packing: bool = False
    pad_to_multiple_of: int | None = None
    last_answer_only: bool = False
    jpeg_reduction: float | None = 2.0
    image_features: Callable[[Any], torch.Tensor] | None = None
    image_clusters: Callable[[Any], torch.Tensor] | None = None
    stand_in: Any = None
    warn: bool = True
    problems: list[dict[str, str]] = field(default_factory=list, init=False, repr=False)
    _last: Any = field(init=False, repr=False)

    def __post_init__(self):
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right'; got {self.padding_side!r}.")
        if self.packing and self.pad_to_multiple_of:
            raise ValueError("A packed batch has no padding: leave out pad_to_multiple_of, or packing.")
        tokens = self.processor.tokenizer.added_tokens_decoder.items()
        self._end_tokens = {index for index, token in tokens if token.special} - {self.processor.image_token_id}
        # One token without a label: a worker's first batch may be its only bad one, and an epoch must not end there.
        token = torch.tensor([self.processor.tokenizer.pad_token_id or 0])
        self._last = {"input_ids": token, "labels": torch.full_like(token, -100), "question_mask": torch.zeros_like(token)}

    def __call__(self, samples: Sequence[Sample | Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of [`Sample`]s, or of dictionaries with `messages` and `images`.

        Returns:
            `dict`: `input_ids`, `labels`, `question_mask` [B x L] and, where there are images, `pixel_values`
            [I x channels x height x width]; padded also `attention_mask` [B x L], packed (B = 1) also `seq_idx` and
            `position_ids` [1 x L].
        """
        features = self._or_last(self._usable(samples))
        return self._packed(features) if self.packing else self._padded(features)

    def encode(self, sample: Sample | Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
        """Return one sample's `input_ids`, `labels`, `question_mask` [L] and, with images, `pixel_values` [I x channels x
        height x width]; `None`, and a note in `problems`, where it cannot be used."""
        return next(iter(self._usable([sample])), None)

    def _usable(self, samples):
        """Encode samples together, since each call of the processor has its price; if some are bad, find out which."""
        try:
            return self._encode(samples)
        except Exception as error:  # one bad sample must not end an epoch
            if len(samples) != 1:
                return [feature for sample in samples for feature in self._usable([sample])]
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            problem = {"id": str(as_row(samples[0]).get("id")), "reason": reason}
            if self.warn and not self.problems:
                logger.warning("Sample %(id)s is left out: %(reason)s. Others will be listed in `problems` only.", problem)
            if problem not in self.problems:
                self.problems.append(problem)
            return []

    def _or_last(self, features):
        self._last = (features or [self._last])[-1]
        return features or [self._last if self.stand_in is None else self.stand_in]

    def _packed(self, features):
        batch = {name: torch.cat([feature[name] for feature in features])[None] for name in FILL}
        lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
        batch["seq_idx"] = torch.arange(len(features)).repeat_interleave(lengths)[None]
        # The model counts positions itself; trainers take these for a sign of packing, and count tokens with them.
        batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
        return batch | stacked_images(features)

    def _padded(self, features):
        fill = {**FILL, "input_ids": self.processor.tokenizer.pad_token_id, "attention_mask": 0}
        features = [{**feature, "attention_mask": torch.ones_like(feature["input_ids"])} for feature in features]
        batch = {}
        for name, value in fill.items():
            rows = pad_sequence([feature[name] for feature in features], True, value, self.padding_side)
            over = -rows.shape[1] % (self.pad_to_multiple_of or 1)
            batch[name] = pad(rows, (over, 0) if self.padding_side == "left" else (0, over), value=value)
        return batch | stacked_images(features)

    def _encode(self, samples):
        rows = [as_row(sample) for sample in samples]
        opened = [[self._open(image) for image in row["images"]] for row in rows]
        dialogues = [conversation(row["messages"], row["images"]) for row in rows]
        prompts = self.processor.apply_chat_template(dialogues)
        inputs = self.processor(
            images=opened, prompts=prompts, return_offsets_mapping=True, return_text_replacement_offsets=True
        )
        pixels = iter(inputs.get("pixel_values", ()))
        if self.image_features is not None:
            pixels = (self.image_features(image) for row in rows for image in row["images"])
        features = []
        for i, row in enumerate(rows):
            prompt = prompts[i].expand([(one["span"], one["replacement"]) for one in inputs["text_replacement_offsets"][i]])
            tokens = (inputs[name][i] for name in ("input_ids", "question_mask", "offset_mapping"))
            features.append(self._labelled(*tokens, *self._answer_spans(dialogues[i], prompt)))
            if row["images"]:
                features[-1]["pixel_values"] = torch.stack([torch.as_tensor(next(pixels)) for _ in row["images"]])
                if self.image_clusters is not None:
                    features[-1]["clusters"] = torch.stack([self.image_clusters(image) for image in row["images"]])
        return features

    def _open(self, image):
        if self.image_features is not None:  # the processor counts slots by the picture that it is given
            return Image.new("RGB", (self._decoded_side() or 8,) * 2)
        return open_rgb(image, self._decoded_side())

    def _answer_spans(self, dialogue, prompt: Prompt):
        """Return the characters of every answer, or of the last one, and of the last one."""
        answers = [message["content"] for message in dialogue if message["role"] == "assistant"]
        counts = [sum(bool(part.get("text", "").strip()) for part in content) for content in answers]
        if not sum(counts):
            raise ValueError("it has no answer")
        if len(prompt.answers) != sum(counts):
            raise ValueError("the chat template does not show every answer, so that they cannot be found")
        last = prompt.answers[-next(count for count in reversed(counts) if count) :]
        return last if self.last_answer_only else prompt.answers, last

    def _labelled(self, ids, question, offsets, spans, last):
        ids, answer = torch.tensor(ids), torch.tensor(tokens_in(offsets, spans)).bool()
        self._add_ends(ids, answer)
        answer &= ids != self.processor.image_token_id
        labels = ids.masked_fill(~answer, -100)
        labels[0] = -100  # nothing comes before it, or, in a pack, another sample
        features = {"input_ids": ids, "labels": labels, "question_mask": torch.tensor(question)}
        if self.max_length is not None and len(ids) > self.max_length:
            prompt = tokens_in(offsets, last).index(1)
            if prompt >= self.max_length or (ids[self.max_length :] == self.processor.image_token_id).any():
                counts = f"{len(ids)} tokens, {prompt} of them before the last answer"
                raise ValueError(f"{counts}, do not fit max_length={self.max_length}")
            features = {name: value[: self.max_length] for name, value in features.items()}
        if (features["labels"] == -100).all():
            raise ValueError("no token of it carries a label")
        return features

    def _add_ends(self, ids, answer):
        """An answer goes on to the special token that ends it, if only white space lies between."""
        for end in (answer[:-1] & ~answer[1:]).nonzero().flatten().tolist():
            for stop in range(end + 1, len(ids)):
                if ids[stop].item() in self._end_tokens:
                    answer[end : stop + 1] = True
                    break
                if self.processor.tokenizer.decode([ids[stop].item()]).strip():
                    break

    def _decoded_side(self) -> int | None:
        """Pixels that a decoded side must have so that nothing is lost when the image processor resizes it."""
        processor = self.processor.image_processor
        side = max(processor.size.get(name) or 0 for name in ("shortest_edge", "height", "width"))
        if self.jpeg_reduction is None or not getattr(processor, "do_resize", False) or not side:
            return None
        return int(self.jpeg_reduction * side)

    def lengths(self, samples: Sequence[Sample | Mapping[str, Any]]) -> list[int]:
        """Count the tokens of the sample at each index, image slots included, without opening an image: for
        `LengthGroupedSampler` and [`~granulon_hf.data.packing.PackSampler`]. A sample that the chat template refuses has none.
        """
        (slots,) = self.processor._get_num_multimodal_tokens(image_sizes=[(1, 1)]).num_image_tokens or [1]
        counts: list[int] = []
        for numbers in batches(range(len(samples)), 1000):
            # By index, as a sampler asks for them: what iterates may leave bad rows out.
            rows = [as_row(samples[i]) for i in numbers]
            tokens = self.processor._tokenize([self._prompt(row) for row in rows], return_attention_mask=False)["input_ids"]
            counts += [len(ids) + len(row["images"]) * (slots - 1) for ids, row in zip(tokens, rows, strict=True)]
        return [min(count, self.max_length or count) for count in counts]

    def _prompt(self, row) -> Prompt:
        try:
            prompt = self.processor.apply_chat_template(conversation(row["messages"]))
            prompt.encode()  # lone surrogates cannot be tokenized
            return prompt
        except Exception:  # `encode` will say what is wrong with it
            return Prompt("")


class GranulonPreferenceCollator(GranulonCollator):
    """Turns preference pairs into a batch for TRL's `DPOTrainer`; it takes what [`GranulonCollator`] does, but no `packing`.

    TRL's own collator has no `question_mask`: the controller would read the answers, and could choose another level for the
    rejected one than for the chosen one.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.packing:
            raise ValueError("DPOTrainer compares rows: preference pairs cannot be packed.")
        self.last_answer_only = True
        self._last = [self._last, self._last]

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """Make a batch of rows with `images`, `prompt`, `chosen` and `rejected`, the last three lists of messages.

        Returns:
            `dict`: `input_ids`, `attention_mask`, `question_mask`, `completion_mask` [2 B x L] and, where there are images,
            `pixel_values`: first what was chosen, then what was rejected.
        """
        names = ("chosen", "rejected")
        pairs = [[self.encode({**row, "messages": [*row["prompt"], *row[name]]}) for name in names] for row in samples]
        chosen, rejected = zip(*self._or_last([pair for pair in pairs if None not in pair]), strict=True)
        batch = self._padded([*chosen, *rejected])
        return batch | {"completion_mask": (batch.pop("labels") != -100).long()}


# What every sample gives, and what fills a row (the padding token comes from the tokenizer).
FILL = {"input_ids": 0, "labels": -100, "question_mask": 0}


def as_row(sample: Sample | Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample as a dictionary with `messages` and `images`; TRL's rows also come as prompt and completion."""
    row = dict(vars(sample) if isinstance(sample, Sample) else sample)
    if "completion" in row:
        row["messages"] = [*row["prompt"], *row["completion"]]
    return row | {"images": row.get("images") or []}


def stacked_images(features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    found = {name: [feature[name] for feature in features if name in feature] for name in ("pixel_values", "clusters")}
    return {name: torch.cat(images) for name, images in found.items() if images}


def encode_prompts(processor: Any, conversations: Sequence[Any], **options: Any) -> Any:
    """Return inputs of `generate` for conversations with their images, padded on the left.

    `options` are of the processor's `apply_chat_template`, such as `visual_tokens`.
    """
    processor.tokenizer.padding_side = "left"
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
        **options,
    )
