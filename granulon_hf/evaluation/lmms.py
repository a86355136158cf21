"""Granulon in lmms-eval (≥ 0.7): its model `granulon`, found through the entry-point group `lmms_eval.models`.

    pip install "granulon-hf[lmms]"
    lmms-eval --model granulon --model_args pretrained=FOLDER_OR_HUB_ID --tasks mme --batch_size 8 --output_path results

Arguments in `--model_args`: pretrained, dtype ("auto", "float32", "bfloat16", "float16"), and one of granularity (a level for
all questions), visual_tokens (a number for all) and price; by default the controller chooses. `--batch_size` and `--device` are
options of lmms-eval itself. Several GPUs: `accelerate launch --num_processes 8 -m lmms_eval --model granulon …`.

Tasks of the type `multiple_choice` compare likelihoods. lmms-eval gives them to models of its "simple" kind only, so that they
need `--force_simple`; all others run in its "chat" kind. See `examples/lmms_eval.md`.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from granulon_hf.data.pictures import IMAGE_ENDINGS
from granulon_hf.data.sample import Sample
from granulon_hf.errors import GranulonError
from granulon_hf.evaluation.answer import Generation, answer_batch
from granulon_hf.io import batches
from granulon_hf.loading import check_choice, load_model

MAX_NEW_TOKENS = 1024  # of a task that names none; as lmms-eval's LLaVA
SAMPLING = ("temperature", "top_p", "top_k")
OPTIONS = (*SAMPLING, "num_beams", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "length_penalty")


def manifest() -> Any:
    """What the entry point gives lmms-eval."""
    # Here, not above: lmms_eval.models calls this while it is being imported itself.
    from lmms_eval.models.registry_v2 import ModelManifest

    here = "granulon_hf.evaluation.lmms"
    return ModelManifest("granulon", simple_class_path=f"{here}.Granulon", chat_class_path=f"{here}.GranulonChat")


class Granulon(lmms):
    """A Granulon model of lmms-eval's "simple" kind: a text and its images apart. Also scores given answers.

    Arguments are those of `--model_args`; of several processes, each has its own device.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        granularity: str | None = None,
        visual_tokens: int | None = None,
        price: float | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise GranulonError(f"--batch_size {batch_size} is not supported; give a number of at least 1.")
        self.accelerator = Accelerator()
        if self.accelerator.num_processes > 1:
            device = str(self.accelerator.device)
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        source = pretrained if pretrained.startswith("tiny:") else os.path.expanduser(pretrained)
        self.model, self.processor, _ = load_model(source, device or "auto", dtype)
        self.device, self.batch_size = self.model.device, int(batch_size)
        self.choice: dict[str, Any] = {"granularity": granularity, "visual_tokens": visual_tokens, "price": price}
        check_choice(self.model.config, **self.choice)

    def question(self, request: Instance) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The conversation of a request in lmms-eval's form (an image's content is its `url`), and its generation arguments."""
        context, arguments, *where = request.args
        return self.ask(context, *where), arguments

    def ask(self, context: str, doc_to_visual=None, doc_id=None, task=None, split=None) -> list[dict[str, Any]]:
        """One user turn: the images of a document, then the text."""
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else None
        content = [{"type": kind(visual), "url": visual} for visual in visuals or [] if visual is not None]
        return [{"role": "user", "content": [*content, {"type": "text", "text": context}]}]

    def sample(self, turns: list[dict[str, Any]], request: Instance) -> Sample:
        """A conversation in lmms-eval's form as a sample; no videos, no sound, and no last words of the assistant."""
        if turns[-1]["role"] == "assistant":
            raise GranulonError(
                f"Task {request.task_name!r} begins the answer itself, which Granulon's adapter does not support."
            )
        images, messages = [], []
        for turn in turns:
            parts: list[dict[str, str]] = []
            for part in turn["content"]:
                if part["type"] == "image":
                    images.append(part["url"])
                    parts.append({"type": "image"})
                elif part["type"] == "text":
                    # Some tasks write a place for LLaVA's images into the text; ours come first, in their own parts.
                    parts.append({"type": "text", "text": part["text"].replace("<image>", "")})
                else:
                    raise GranulonError(
                        f"Task {request.task_name!r} asks about {part['type']}; Granulon reads images and text only."
                    )
            messages.append({"role": turn["role"], "content": parts})
        return Sample(id=str(request.doc_id), images=images, messages=messages, reference="", task="vqa")

    def batches(self, requests: list[Instance], indices: list[int], title: str) -> Iterator[tuple[list[int], list[Instance]]]:
        """Short prompts beside short ones; images are read when their batch is."""
        indices = sorted(indices, key=lambda index: len(requests[index].args[0]))
        with tqdm(total=len(indices), desc=title, disable=self.rank != 0) as bar:
            for batch in batches(indices, self.batch_size):
                yield list(batch), [requests[index] for index in batch]
                bar.update(len(batch))

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers, greedy unless the task asks for sampling; cut before the first of the task's stop strings."""
        groups: dict[str, list[int]] = {}  # only questions with the same arguments share a batch
        for index, request in enumerate(requests):
            arguments = next(value for value in request.args[1:3] if isinstance(value, dict))
            groups.setdefault(json.dumps(arguments, sort_keys=True, default=str), []).append(index)
        results: list[Any] = [None] * len(requests)
        for indices in groups.values():
            for batch, chosen in self.batches(requests, indices, "Granulon answers"):
                questions = [self.question(request) for request in chosen]
                generation, until = make_generation(questions[0][1], **self.choice)
                stop = StopStrings(self.processor.tokenizer, until)
                if until and generation.extra.get("num_beams", 1) == 1:
                    generation.extra["stopping_criteria"] = StoppingCriteriaList([stop])
                samples = [self.sample(turns, request) for (turns, _), request in zip(questions, chosen, strict=True)]
                answers = answer_batch(self.model, self.processor, samples, generation)
                for row, (index, answer) in enumerate(zip(batch, answers, strict=True)):
                    counts = TokenCounts(input_tokens=answer["prompt_tokens"], output_tokens=answer["new_tokens"])
                    text = stop.found.get(row, cut(answer["prediction"], until)).strip()
                    results[index] = GenerationResult(text, counts)
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """How likely given answers are: per request the pair (loss, greedy) as a result's "text".

        As in lmms-eval's other models, and as its multiple-choice tasks expect, this is a *loss*: the mean over the answer's
        tokens of the negative log-likelihood (lower is better), and whether greedy decoding would give just these tokens.
        White space before the answer is left out: the chat template ends where the answer begins. lmms-eval documents a bare
        pair, but 0.7.3 turns that into a string before its multiple-choice tasks unpack it.
        """
        results: list[Any] = [None] * len(requests)
        for batch, chosen in self.batches(requests, list(range(len(requests))), "Granulon scores"):
            samples, answers = [], []
            for request in chosen:
                context, target, *where = request.args
                if callable(target):
                    _, doc_id, task, split = where
                    target = target(self.task_dict[task][split][doc_id])
                samples.append(self.sample(self.ask(context, *where), request))
                words = {"add_special_tokens": False, "split_special_tokens": True}
                answers.append(self.processor.tokenizer.encode(str(target).lstrip(), **words))
                if not answers[-1]:
                    raise GranulonError(f"Task {request.task_name!r} has an empty answer to score (document {request.doc_id}).")
            forced = ForcedAnswers(answers, self.processor.tokenizer.eos_token_id)
            # A checkpoint's generation config may hold a penalty, which would change the likelihoods.
            extra = {"logits_processor": LogitsProcessorList([forced]), "num_beams": 1, "repetition_penalty": 1.0}
            longest = max(len(answer) for answer in answers)
            generation = Generation(max_new_tokens=longest, extra=extra, **self.choice)
            answer_batch(self.model, self.processor, samples, generation)
            for index, scores, greedy in zip(batch, forced.log_probs, forced.greedy, strict=True):
                pair: Any = (-sum(scores) / len(scores), greedy)
                results[index] = GenerationResult(pair)
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused."""
        raise NotImplementedError(
            f"Task {requests[0].task_name!r} has several rounds, each asked after the last answer, which Granulon's adapter "
            "does not support; leave it out of --tasks."
        )


class GranulonChat(Granulon):
    """A Granulon model of lmms-eval's "chat" kind, its default: conversations with images in them."""

    is_simple = False

    def question(self, request: Instance) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        _, doc_to_messages, arguments, doc_id, task, split = request.args
        return doc_to_messages(self.task_dict[task][split][doc_id]), arguments


class StopStrings(StoppingCriteria):
    """Ends an answer at the first of some strings; `found` holds what stood before it, by row.

    Of transformers' own `stop_strings` it differs in that words of the prompt never count: "\\n\\n" would be found where the
    prompt ends in one line break and the answer begins with another.
    """

    def __init__(self, tokenizer: Any, until: list[str]):
        self.tokenizer, self.until = tokenizer, until
        self.found: dict[int, str] = {}
        self.start: int | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        if self.start is None:
            self.start = input_ids.shape[1] - 1  # called first after the first new token
        for row, tokens in enumerate(input_ids[:, self.start :]):
            if row not in self.found:
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                if (before := cut(text, self.until)) != text:
                    self.found[row] = before
        return torch.tensor([row in self.found for row in range(len(input_ids))], device=input_ids.device)


class ForcedAnswers(LogitsProcessor):
    """Has `generate` write given tokens, then `end`, and keeps how likely they were: on the very path of answers."""

    def __init__(self, answers: list[list[int]], end: int):
        self.answers, self.end, self.step = answers, end, 0
        self.log_probs: list[list[float]] = [[] for _ in answers]
        self.greedy = [True] * len(answers)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        log_probs, best = scores.float().log_softmax(-1), scores.argmax(-1)
        forced = torch.full_like(scores, -torch.inf)
        for row, answer in enumerate(self.answers):
            if self.step >= len(answer):
                forced[row, self.end] = 0
                continue
            token = answer[self.step]
            forced[row, token] = 0
            self.log_probs[row].append(log_probs[row, token].item())
            self.greedy[row] &= bool(best[row] == token)
        self.step += 1
        return forced  # type: ignore[return-value]


def make_generation(arguments: dict[str, Any], granularity: str | None, **choice: Any) -> tuple[Generation, list[str]]:
    """Generation arguments of an lmms-eval task as ours, and its stop strings.

    `temperature` 0 (or none, or `do_sample: false`) is greedy. What transformers' `generate` does not know is left out with a
    warning: tasks carry arguments that are meant for single other models.
    """
    arguments = {name: value for name, value in arguments.items() if value is not None}
    until = arguments.pop("until", [])
    # lmms-eval adds "\n\n", its delimiter of examples, to every task that names no stop string. It would cut any answer of two
    # paragraphs, and is left out in its other chat models as well.
    until = [stop for stop in ([until] if isinstance(until, str) else until) if stop and stop != "\n\n"]
    longest = int(arguments.pop("max_new_tokens", arguments.pop("max_gen_toks", MAX_NEW_TOKENS)))
    sample = bool(arguments.pop("do_sample", arguments.get("temperature", 0) > 0)) and arguments.get("temperature") != 0
    extra = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
    if not sample:
        extra = {name: value for name, value in extra.items() if name not in SAMPLING}
    if arguments:
        logger.warning(f"Generation arguments that Granulon does not know are left out: {', '.join(sorted(arguments))}")
    return Generation(longest, granularity, extra={**extra, "do_sample": sample}, **choice), until


def kind(visual: Any) -> str:
    """What a thing to look at is: lmms-eval's tasks give images, paths of files, or dictionaries of sound."""
    if isinstance(visual, str):
        return "image" if visual.lower().endswith(IMAGE_ENDINGS) else "video"
    return "audio or video" if isinstance(visual, dict) and not visual.keys() <= {"bytes", "path"} else "image"


def cut(text: str, until: list[str]) -> str:
    """The text before the first of the stop strings."""
    for stop in until:
        text = text.split(stop, 1)[0]
    return text
