"""Batched greedy answers to samples, kept as they come: a run that was killed goes on, on any number of processes."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

import granulon_hf
from granulon_hf.data.collator import conversation, encode_prompts
from granulon_hf.data.sample import Sample
from granulon_hf.errors import GranulonError, one_line
from granulon_hf.evaluation.batching import make_batches
from granulon_hf.evaluation.tables import write_rows
from granulon_hf.io import Journal, batches, replacing, write_text
from granulon_hf.judge.images import image_id
from granulon_hf.modeling.configuration_granulon import DEFAULT_GRANULARITY_LEVELS
from granulon_hf.training.feature_cache import fingerprint

# What of a generation changes no answer.
BATCHES = ("batch_size", "max_tokens_per_batch")


@dataclass
class Generation:
    """How answers are made; part of what a run is.

    Args:
        max_new_tokens (`int`): longest answer.
        granularity (`str`, *optional*): forces a level; by default the controller chooses.
        visual_stream (`str`, *optional*): "pixel" or "semantic" hides the other stream.
        batch_size (`int`, *optional*): samples at once, at most; by default 64 where their tokens are bounded, and else 8.
            Answers do not depend on it.
        extra (`dict`): further arguments of `generate`.
        visual_tokens (`int`, *optional*): semantic tokens of every image, instead of a level.
        price (`float`, *optional*): of a visual token, for a controller that was trained at prices.
        max_tokens_per_batch (`int`, *optional*): tokens of the prompts and longest answers of a batch, with padding; by default
            what the free memory of a GPU holds, and any number on other devices. Answers do not depend on it.
    """

    max_new_tokens: int = 64
    granularity: str | None = None
    visual_stream: str | None = None
    batch_size: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    visual_tokens: int | None = None
    price: float | None = None
    max_tokens_per_batch: int | None = None

    def settings(self) -> dict[str, Any]:
        """What the answers depend on."""
        # Left out where they are not given: answers of before they existed are found again.
        idle = {name for name in ("visual_tokens", "price") if getattr(self, name) is None}
        return {name: value for name, value in vars(self).items() if name not in {*BATCHES, *idle}}

    def choice(self) -> dict[str, Any]:
        """Return what says how many tokens an image gets, as arguments of [`look`]."""
        return {"granularity": self.granularity, "visual_tokens": self.visual_tokens, "price": self.price}


@dataclass
class View:
    """How a model looks at conversations before it answers: vision tower and controller have run, once."""

    inputs: dict[str, Any]  # arguments of `generate`
    levels: list[str | None]  # of each conversation; None where there is none, nothing is shown, or a number was asked for
    probs: list[dict[str, float] | None]  # what the controller prefers, by level
    images: Any = None  # `GranulonImageFeatures` with the clusters; None without levels or images
    pixel_values: Any = None  # of all images
    pixel_tokens: int = 0  # what the language model sees of all images
    semantic_tokens: int = 0
    same_image: bool = False  # there are several conversations, each about this one image


@torch.inference_mode()
def look(
    model: Any,
    processor: Any,
    conversations: Sequence[Any],
    granularity: str | None = None,
    room_for: int = 0,
    *,
    visual_tokens: int | None = None,
    price: float | None = None,
) -> View:
    """Encode conversations with their images, and let each question choose its level.

    Args:
        conversations (`list`): messages with their images, without the answer.
        granularity (`str`, *optional*): forces a level.
        room_for (`int`): tokens of an answer that must still fit behind the prompt; 0 does not look.
        visual_tokens (`int`, *optional*): semantic tokens of every image, instead of a level.
        price (`float`, *optional*): of a visual token, for a controller that was trained at prices.

    Raises:
        ValueError: an image that cannot be used, a level, number of tokens or price that the model does not have, or a prompt
            that is too long.
    """
    inputs = encode_prompts(processor, conversations, visual_tokens=visual_tokens, price=price).to(model.device)
    length, room = inputs["input_ids"].shape[1], getattr(model.config.text_config, "max_position_embeddings", None)
    if room_for and room and length + room_for > room:
        raise GranulonError(
            f"Question and images take {length} of the model's {room} tokens, which leaves no room for {room_for} more; ask a "
            "shorter question, or about fewer images."
        )
    pixels, nothing = inputs.get("pixel_values"), [None] * len(conversations)
    slots = int((inputs["input_ids"] == model.config.image_token_id).sum())
    if pixels is None or not model.config.granularity_levels:
        return View(dict(inputs), [*nothing], [*nothing], pixel_values=pixels, pixel_tokens=slots)
    same = len(pixels) == len(conversations) > 1 and bool((pixels == pixels[:1]).all())
    if same:
        features = model.model.reusable_features(pixels[:1])
        inputs["pixel_values"] = features.expand(len(pixels), *features.shape[1:])
    images, names = model.encode_images(**inputs, granularity=granularity), model.config.level_names
    shown = [bool(row.any()) for row in inputs["input_ids"] == model.config.image_token_id]
    indices = images.granularity.tolist()  # -1 where a number of tokens was asked for
    levels = [names[index] if seen and index >= 0 else None for index, seen in zip(indices, shown, strict=True)]
    rows = images.granularity_probs.tolist()
    probs = [dict(zip(names, row, strict=True)) if seen else None for row, seen in zip(rows, shown, strict=True)]
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return View(
        inputs={**words, "mm_encoder_outputs": {"image": images}},
        levels=levels,
        probs=probs,
        images=images,
        pixel_values=pixels,
        pixel_tokens=0 if model.config.compact else slots - len(pixels) * model.config.num_semantic_slots,
        semantic_tokens=int(images.aggregation.keep.sum()),
        same_image=same,
    )


def count_visual_tokens(model: Any, inputs: dict[str, Any], visual_stream: str | None = None) -> list[int]:
    """Count what the language model sees of the images of each conversation in a [`View`]: image slots that are not empty."""
    slots = inputs["input_ids"] == model.config.image_token_id
    if images := inputs.get("mm_encoder_outputs"):
        slots &= ~model.model.find_empty_slots(images["image"], slots, visual_stream)
    return slots.sum(1).tolist()


@torch.inference_mode()
def answer_batch(model: Any, processor: Any, samples: Sequence[Sample], generation: Generation) -> list[dict[str, Any]]:
    """Answer a batch of samples, of which the last assistant turn is not shown.

    Returns:
        `list[dict]`: prediction, granularity, granularity_probs, prompt_tokens (image slots included), visual_tokens (of all
        images, those that the language model sees), new_tokens.

    Raises:
        GranulonError: an image that cannot be used.
    """
    conversations = [conversation(sample.prompt, sample.images) for sample in samples]
    seen = look(model, processor, conversations, **generation.choice())
    counts = count_visual_tokens(model, seen.inputs, generation.visual_stream)
    options = {"max_new_tokens": generation.max_new_tokens, "do_sample": False, **generation.extra}
    if generation.visual_stream is not None:
        options["visual_stream"] = generation.visual_stream
    inputs = seen.inputs
    if seen.same_image and not model.config.compact and generation.visual_stream is None and not generation.extra:
        inputs = share_prefix(model, processor, inputs) or inputs
    output = model.generate(**inputs, **options)
    length, ends = inputs["input_ids"].shape[1], model.generation_config.eos_token_id
    stop = {*(ends if isinstance(ends, list) else [ends]), processor.tokenizer.pad_token_id}
    results = []
    for i, tokens in enumerate(output[:, length:].tolist()):
        count = next((n for n, token in enumerate(tokens) if token in stop), len(tokens))
        probs = seen.probs[i]
        answer = {
            "prediction": processor.decode(tokens[:count], skip_special_tokens=True).strip(),
            "granularity": seen.levels[i],
            "granularity_probs": probs and {name: round(value, 6) for name, value in probs.items()},
            "prompt_tokens": int(seen.inputs["attention_mask"][i].sum()),
            "visual_tokens": counts[i],
            "new_tokens": count,
        }
        results.append(answer)
    return results


@torch.inference_mode()
def prefill_shared_image(model: Any, processor: Any, image: Any, questions: Sequence[str]) -> dict[str, Any]:
    """What `generate` needs to answer many questions about one image, with everything up to the pixel tokens computed once.

    [`answer_batch`] does the same where all its samples show one image. In the compact form there are no pixel tokens to share,
    and with a reducer that looks at more than features the tower runs for every question.

    Args:
        image (`PIL.Image.Image`): in RGB.
        questions (`list[str]`): Q questions.

    Returns:
        `dict`: `input_ids` [Q x L], `attention_mask`, `cache`, `mm_encoder_outputs`, for `model.generate(**…)`.

    Raises:
        GranulonError: the model has no levels, or its chat template puts something before the image that depends on the
            question.
    """
    if not model.config.granularity_levels:
        raise GranulonError("This model has no levels: what it sees does not depend on the question.")
    content = [[{"type": "image", "image": image}, {"type": "text", "text": question}] for question in questions]
    seen = look(model, processor, [[{"role": "user", "content": parts}] for parts in content])
    inputs = share_prefix(model, processor, seen.inputs)
    if inputs is None:
        raise GranulonError("The prompts differ before the pixel tokens: they cannot be shared.")
    return inputs


def share_prefix(model: Any, processor: Any, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Run the decoder once on what Q prompts about one image have in common: up to the last pixel slot.

    Pixel tokens do not depend on the question, so that their keys and values are shared; each question then adds its own
    semantic tokens and words.

    Args:
        inputs (`dict`): `input_ids` [Q x L], `attention_mask` and `mm_encoder_outputs`, of a [`View`].

    Returns:
        `dict`: the same, with a `cache`; `None` where the prompts differ before the last pixel slot.
    """
    ids, mask, images = inputs["input_ids"], inputs["attention_mask"], inputs["mm_encoder_outputs"]["image"]
    count, rows = len(ids), [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    slots = (rows[0] == model.config.image_token_id).nonzero().flatten()
    length = int(slots[0]) + len(slots) - model.config.num_semantic_slots  # of the prefix, pixel slots included
    if any(not torch.equal(row[:length], rows[0][:length]) for row in rows):
        return None
    encoded = torch.stack(list(images.pooler_output))
    pixels = encoded.shape[1] - model.config.num_semantic_slots
    prefix = rows[0][:length].unsqueeze(0)
    embeds = model.get_input_embeddings()(prefix)
    embeds = embeds.masked_scatter((prefix == model.config.image_token_id).unsqueeze(-1), encoded[:1, :pixels].to(embeds))
    cache = DynamicCache(config=model.config.get_text_config())
    model.model.language_model(inputs_embeds=embeds, cache=cache, use_cache=True)
    cache.batch_repeat_interleave(count)

    # Prefix, padding, then what belongs to each question; slots that its level leaves empty are hidden like padding.
    longest = max(map(len, rows))
    new_ids = ids.new_full((count, longest), processor.tokenizer.pad_token_id)
    new_mask = mask.new_zeros(count, longest)
    for i, row in enumerate(rows):
        start = longest - (len(row) - length)
        new_ids[i, :length], new_mask[i, :length] = row[:length], 1
        new_ids[i, start:], new_mask[i, start:] = row[length:], 1
        new_mask[i, start : start + encoded.shape[1] - pixels] = images.slot_mask[i, pixels:].to(new_mask)
    semantic = {"image": BaseModelOutputWithPooling(pooler_output=encoded[:, pixels:])}
    return {"input_ids": new_ids, "attention_mask": new_mask, "cache": cache, "mm_encoder_outputs": semantic}


def describe_model(source: str, model: Any) -> dict[str, Any]:
    """What identifies a model: where it came from, its commit where it has one, and a fingerprint of its weights."""
    found = {"source": source, "revision": getattr(model.config, "_commit_hash", None), "weights": fingerprint(model)[:16]}
    return {**found, "dtype": str(model.dtype).removeprefix("torch.")}


def process_state(device: torch.device) -> PartialState:
    """This process among those that were launched together, of which each runs its model on such a device."""
    # Without `cpu=True` accelerate takes processes for single ones that have no accelerator with collectives of its own.
    # Processes wait for the slowest of them, which may have far more to do than the half hour that torch allows.
    return PartialState(cpu=device.type in ("cpu", "mps"), timeout=timedelta(days=7))


def read_description(path: Path) -> dict[str, Any]:
    """Content of a `run.json`. Raises ValueError where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        reason = "" if isinstance(found, dict) else "it must be a mapping"
    except ValueError as error:
        reason = one_line(error)
    if reason:
        raise GranulonError(
            f"{str(path)!r} is damaged ({reason}): nobody knows what is beside it; remove the folder "
            f"{str(path.parent)!r}, so that it is made again."
        )
    return found


class OtherPredictions(GranulonError):
    """The folder holds answers of another model, to other data, or made in another way."""


def open_folder(folder: Path, description: dict[str, Any], before: dict[str, Any] | None, holds: str) -> dict[str, Any]:
    """Make the folder of a run, or refuse it where the run `before`, that it `holds`, is another; returns the description."""
    description = json.loads(json.dumps(description, default=str))
    before = description if before is None else before
    names = sorted(description.keys() | before.keys())
    if changed := " and ".join(name for name in names if description.get(name) != before.get(name)):
        raise OtherPredictions(f"{str(folder)!r} {holds} another {changed}; name another folder, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    return description


def one_by_one(function: Callable[[Sequence[Sample]], list[dict[str, Any]]], batch: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return a row per sample, with an `error` where it cannot be used: one bad sample must not cost the others their rows.

    A batch that does not fit the memory of a GPU is answered in halves.
    """
    try:
        return function(batch)
    except ValueError as error:
        if len(batch) == 1:
            return [{"error": one_line(error)}]
        size = 1
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
        size = (len(batch) + 1) // 2
    # Beyond the handlers, which keep what the batch had computed.
    return [row for part in batches(batch, size) for row in one_by_one(function, part)]


class PredictionRun:
    """Predictions of one model on one data set, in a folder.

    `predictions.jsonl` holds one line per sample (id, question, reference, task, choices, meta, images, prediction, level,
    probabilities, tokens), `run.json` everything that the answers depend on, `images/` the encoded images, which the judge and
    the gallery need. Each process appends to a file of its own; the first puts them together at the end.

    Args:
        folder (`Path`): of the run.
        description (`dict`, *optional*): model, data and generation; another one in the same folder is refused. By default that
            of the run which is there.
        copy_images (`bool`): keep the encoded images beside the answers.

    Raises:
        OtherPredictions: the folder holds a run of something else.
    """

    def __init__(self, folder: str | os.PathLike, description: dict[str, Any] | None = None, copy_images: bool = True):
        self.folder, self.copy_images = Path(folder), copy_images
        path = self.folder / "run.json"
        before = read_description(path).get("description") or {} if path.exists() else None
        description = (before or {}) if description is None else description
        self.description = open_folder(self.folder, description, before, "holds predictions of")

    def parts(self) -> list[Path]:
        return [*self.folder.glob("predictions.jsonl"), *sorted(self.folder.glob("part-*.jsonl"))]

    def rows(self) -> dict[str, dict[str, Any]]:
        """Return what is there, by sample id."""
        found: dict[str, dict[str, Any]] = {}
        for part in self.parts():
            for row in Journal(part):
                found.setdefault(row["id"], row)
        return found

    def run(
        self,
        model: Any,
        processor: Any,
        samples: Iterable[Sample],
        generation: Generation,
        *,
        state: Any = None,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> list[dict[str, Any]]:
        """Answer what is missing, and return all rows in the order of the samples.

        Args:
            state (`accelerate.PartialState`, *optional*): shares the samples between processes.
            on_progress (`callable`): called with the number of samples that this process answered or found.
        """
        index, count = (state.process_index, state.num_processes) if state is not None else (0, 1)
        wait = state.wait_for_everyone if state is not None else lambda: None
        order, missing, done = [], [], self.rows()
        wait()  # all have seen the same, and none has written
        for sample in samples:
            order.append(sample.id)
            if sample.id not in done:
                missing.append(sample)
        if len(set(order)) < len(order):
            raise GranulonError("Samples have the same id; predictions could not be told apart.")
        if index == 0:
            versions = {"granulon_hf": granulon_hf.__version__, "torch": torch.__version__}
            content = {"description": self.description, "versions": versions, "processes": count}
            write_text(self.folder / "run.json", json.dumps(content, indent=1) + "\n")
        on_progress((len(order) - len(missing)) // count)
        journal = Journal(self.folder / f"part-{index:03}.jsonl")
        for batch in make_batches(model, processor, missing[index::count], generation):
            journal.append(self.answer(model, processor, batch, generation))
            on_progress(len(batch))
        wait()
        if index == 0:
            rows = self.rows()
            lines = (json.dumps(rows[name], ensure_ascii=False) for name in order if name in rows)
            write_text(self.folder / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
            for part in self.folder.glob("part-*.jsonl"):
                part.unlink()
        wait()  # the parts are gone before others look
        rows = self.rows()
        return [rows[name] for name in order if name in rows]

    def answer(self, model, processor, batch, generation) -> Iterator[dict[str, Any]]:
        started = time.perf_counter()
        answers = one_by_one(lambda samples: answer_batch(model, processor, samples, generation), batch)
        seconds = (time.perf_counter() - started) / len(batch)
        for sample, answer in zip(batch, answers, strict=True):
            yield {
                "id": sample.id,
                "question": sample.question,
                "reference": sample.reference,
                "task": sample.task,
                "choices": sample.choices,
                "meta": {k: v for k, v in sample.meta.items() if isinstance(v, str | int | float | bool | None)},
                "images": [self.keep(image) for image in sample.images],
                "prediction": "",
                **answer,
                "seconds": round(seconds, 4),
            }

    def keep(self, image: dict[str, Any]) -> str:
        """Copy an encoded image into `images/`; its path there."""
        if not self.copy_images:
            return image.get("path") or ""
        data = encoded(image)
        name = f"images/{hashlib.sha256(data).hexdigest()[:24]}{suffix(data, image.get('path'))}"
        if not (self.folder / name).exists():
            (self.folder / "images").mkdir(exist_ok=True)
            with replacing(self.folder / name) as part:
                part.write_bytes(data)
        return name


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], *, model: str, data: str, generation: Generation) -> None:
    """Rows of a run as a table; tables of several runs have the same columns, and can be read as one.

    As in `predictions.jsonl`, with model, data set and generation in every row. What can hold anything (`meta`, and `extra` of
    the generation) is JSON; images are paths below the folder of the run.
    """
    import pyarrow as pa

    text, whole = pa.string(), pa.int64()
    # Models without levels have the columns of the others, and nothing in them.
    found = dict.fromkeys(name for row in rows for name in row.get("granularity_probs") or ())
    names = list(found) or [level["name"] for level in DEFAULT_GRANULARITY_LEVELS]
    strings = ("model", "data", "id", "question", "reference", "task", "meta", "prediction", "error", "granularity")
    columns: dict[str, Any] = dict.fromkeys(strings, text)
    columns |= {"choices": pa.list_(text), "images": pa.list_(text)}
    columns |= dict.fromkeys(("prompt_tokens", "visual_tokens", "new_tokens"), whole)
    columns |= {"seconds": pa.float64(), "granularity_probs": pa.struct(dict.fromkeys(names, pa.float64()))}
    fields = {"max_new_tokens": whole, "granularity": text, "visual_stream": text, "extra": text}
    columns["generation"] = pa.struct({**fields, "visual_tokens": whole, "price": pa.float64()})
    settings = generation.settings()
    settings["extra"] = json.dumps(settings["extra"], default=str)
    own = {"model": model, "data": data, "generation": settings}
    write_rows(path, [{**row, **own, "meta": json.dumps(row["meta"], ensure_ascii=False)} for row in rows], columns)


def cluster_keys(sample: Sample) -> list[str]:
    """What a sample may share with others that is answered well or badly as a whole: its images, and a group that it names."""
    group = sample.meta.get("group")
    return [*filter(None, map(image_id, sample.images)), *([] if group is None else [f"={group}"])]


def encoded(image: dict[str, Any]) -> bytes:
    """The bytes of a sample's image, which may be in a file."""
    return image["bytes"] if image.get("bytes") is not None else Path(image["path"]).read_bytes()


def suffix(data: bytes, path: str | None) -> str:
    if path:
        return Path(path).suffix.lower() or ".bin"
    signatures = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"GIF8", ".gif"), (b"RIFF", ".webp"))
    return next((end for start, end in signatures if data.startswith(start)), ".bin")
