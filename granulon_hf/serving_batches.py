"""Generation of transformers' server for requests that come at the same time: those that fit together share a batch.

transformers' own [`GenerateManager`] answers one request after the other, and goes on for a client that is gone.
"""

import asyncio
import contextlib
import copy
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cli.serving.utils import DirectStreamer, GenerateManager, _GenerationCancelled, _StreamError
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from granulon_hf.serving import abandoned
from granulon_hf.serving_metrics import Metrics

# What a generation config may say so that a row's answer does not depend on what else is in its batch.
SHARED = {
    *("_from_model_config", "bos_token_id", "do_sample", "eos_token_id", "max_length", "max_new_tokens", "output_attentions"),
    *("output_hidden_states", "pad_token_id", "repetition_penalty", "stop_strings", "suppress_tokens", "temperature", "top_k"),
    *("top_p", "transformers_version", "use_cache"),
}


class Collector:
    """Takes the tokens of an answer that is not streamed, as a streamer takes those of one that is."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.tokens: list[int] = []
        self.future: asyncio.Future[list[int]] = loop.create_future()

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.tolist()

    def end(self) -> None:
        self._tell(self.future.set_result, self.tokens)

    def fail(self, error: Exception) -> None:
        self._tell(self.future.set_exception, error)

    def _tell(self, how: Callable[[Any], None], what: Any) -> None:
        # A future of a client that is gone was cancelled.
        self.loop.call_soon_threadsafe(lambda: None if self.future.done() else how(what))


@dataclass(eq=False)
class Row:
    """A request that waits for its batch, or is a row of it."""

    model: Any
    processor: Any
    inputs: dict[str, Any]
    config: Any
    streamer: DirectStreamer | Collector
    fail: Callable[[Exception], None]
    abandoned: threading.Event  # set where nobody waits for the answer any more
    count: int = 0
    done: bool = False
    key: Any = field(init=False)  # equal for rows that may share a batch

    def __post_init__(self) -> None:
        given = self.config.to_diff_dict()
        ends = given.get("eos_token_id")
        self.ends = set(ends if isinstance(ends, list) else [ends])
        if given.keys() - SHARED or ends is None or not given.pop("max_new_tokens", None):
            self.key = object()
            return
        kinds = {
            name: (value.ndim, value.dtype, value.shape[1:] if value.ndim > 2 else None) if torch.is_tensor(value) else value
            for name, value in self.inputs.items()
        }
        self.key = (id(self.model), kinds, json.dumps(given, sort_keys=True, default=str))

    def add(self, token: int) -> None:
        """Take the next token of the batch, which is padding behind the end of a row."""
        if self.done:
            return
        if self.abandoned.is_set():
            self.done = True
            return
        if self.config.stop_strings and token == self.config.pad_token_id:
            self.finish()
            return
        self.count += 1
        # A streamer that is cancelled just now must not end the other rows.
        with contextlib.suppress(_GenerationCancelled):
            self.streamer.put(torch.tensor([token]))
        if token in self.ends or self.count == self.config.max_new_tokens:
            self.finish()

    def finish(self) -> None:
        if not self.done:
            self.done = True
            self.streamer.end()


class Rows(BaseStreamer):
    """Deals the tokens of a batch out to its rows, and ends the generation when no row needs more."""

    # `generate` of the compact form then takes empty slots out of the prompt.
    skip_prompt = True

    def __init__(self, rows: Sequence[Row], metrics: Metrics):
        self.rows = rows
        self.metrics = metrics
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt:
            self.prompt = False
            return
        self.metrics.tokens += sum(not row.done for row in self.rows)
        for row, token in zip(self.rows, value.tolist(), strict=True):
            row.add(token)
        if all(row.done for row in self.rows):
            raise _GenerationCancelled

    def end(self) -> None:
        """Do nothing: every row ends for itself."""


class BatchManager(GenerateManager):
    """Lets requests wait in their order, and answers those that fit to the first one together with it.

    Args:
        max_batch (`int`): requests that are answered together at most.
        metrics ([`Metrics`]): which count queue, batches and tokens.
    """

    def __init__(self, max_batch: int, metrics: Metrics):
        super().__init__()
        self.max_batch = max_batch
        self.metrics = metrics
        self.waiting: list[Row] = []
        self.lock = threading.Lock()

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        """Start an answer that is streamed; see transformers' own."""
        bound(model, inputs, gen_config)
        if not is_simple(model, gen_config):
            return super().generate_streaming(model, processor, inputs, gen_config, request_id, response_parser)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        tokenizer = getattr(processor, "tokenizer", processor)._tokenizer
        streamer = DirectStreamer(tokenizer, loop, queue, response_parser=response_parser)
        # It takes the first tokens for the prompt.
        streamer.put(inputs["input_ids"])

        def fail(error: Exception) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, _StreamError(str(error)))

        self._add(Row(model, processor, dict(inputs), gen_config, streamer, fail, abandoned.get()))
        return queue, streamer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        """Return a whole answer; see transformers' own."""
        bound(model, inputs, gen_config)
        if not is_simple(model, gen_config):
            # Such a generation goes on when its client is gone; nobody takes its answer then.
            return await asyncio.shield(super().generate_non_streaming(model, processor, inputs, gen_config, request_id))
        taken = Collector(asyncio.get_running_loop())
        self._add(Row(model, processor, dict(inputs), gen_config, taken, taken.fail, abandoned.get()))
        tokens = await taken.future
        return processor.decode(tokens, skip_special_tokens=True), inputs["input_ids"].shape[-1], tokens

    def _add(self, row: Row) -> None:
        with self.lock:
            self.waiting.append(row)
            self.metrics.queued = len(self.waiting)
        # Once for every request: no call finds nothing but where an earlier one took more than one.
        self.submit(self._answer_next)

    def _answer_next(self) -> None:
        with self.lock:
            rows = [row for row in self.waiting if not row.abandoned.is_set()]
            batch = [row for row in rows if row.key == rows[0].key][: self.max_batch]
            self.waiting = [row for row in rows if row not in batch]
            self.metrics.queued = len(self.waiting)
        if batch:
            self._answer(batch)

    def _answer(self, rows: list[Row]) -> None:
        """Answer rows together; where that fails, each that has no token yet alone, so that one bad request is one error."""
        first = rows[0]
        self.metrics.batches += 1
        try:
            config = first.config
            if len(rows) > 1:
                config = copy.deepcopy(config)
                config.max_new_tokens = max(row.config.max_new_tokens for row in rows)
            inputs = merge([row.inputs for row in rows], first.model.config.image_token_id)
            streamer = Rows(rows, self.metrics)
            first.model.generate(**inputs, generation_config=config, tokenizer=first.processor, streamer=streamer)
        except _GenerationCancelled:
            pass
        except Exception as error:  # whatever it is, its clients are told, and the next ones answered
            for row in rows:
                if len(rows) > 1 and not row.count and not row.done:
                    self._answer([row])
                elif not row.done:
                    row.fail(error)
            return
        for row in rows:
            row.finish()


def bound(model: Any, inputs: Any, config: Any) -> None:
    """Let no answer be longer than what the model has room for; raise ValueError if the prompt is."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = inputs["input_ids"].shape[-1]
    if room and length >= room:
        raise ValueError(f"The request has {length} tokens, its pictures' included; this model has room for {room}.")
    if room and config.max_new_tokens:
        config.max_new_tokens = min(config.max_new_tokens, room - length)


def is_simple(model: Any, config: Any) -> bool:
    """Say whether a request is one row of tokens that come one by one."""
    mode = config.get_generation_mode()
    return model.config.model_type == "granulon" and mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def merge(inputs: Sequence[dict[str, Any]], image_token_id: int) -> dict[str, Any]:
    """Make one batch, padded on the left, of the inputs of several prompts."""
    if len(inputs) == 1:
        return inputs[0]
    length = max(one["input_ids"].shape[1] for one in inputs)
    merged = dict(inputs[0])
    for name, value in inputs[0].items():
        if torch.is_tensor(value):
            rows = [one[name] for one in inputs]
            if value.ndim == 2:
                fills = [0] * len(rows)
                if name == "input_ids":
                    # A word that is there already: padding then changes nothing for a repetition penalty.
                    fills = [int(row[row != image_token_id][0]) for row in rows]
                rows = [pad(row, (length - row.shape[1], 0), value=fill) for row, fill in zip(rows, fills, strict=True)]
            merged[name] = torch.cat(rows)
    return merged
