"""What a run is told: the options of the judge, the texts that it scores, and what that costs.

A *sample* is one prediction about one image; a *unit* is one text to be scored: a sample, or a segment of one.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .images import encode_image, prepare_image
from .prompts import PROMPTS, REPAIR, RESPONSE_FORMATS, render, segments_of
from .replies import parse
from .store import Store

# Tokens that a judge takes, prompt and answer together; those of another model are not known.
CONTEXTS = {"gpt-4o": 128_000, "gpt-4.1": 1_047_576}
# USD per million tokens, (prompt, completion); the Batch API costs half. `prices=` overrides. Compared on PRICES_DATE with the
# table in litellm 1.109.1.
PRICES_DATE = "2026-11-23"
PRICES = {
    "gpt-4o": (2.5, 10.0),
    "gpt-4o-2024-05-13": (5.0, 15.0),
    "gpt-4o-mini": (0.15, 0.6),
    "gpt-4.1": (2.0, 8.0),
    "gpt-4.1-mini": (0.4, 1.6),
    "gpt-4.1-nano": (0.1, 0.4),
}


@dataclass
class Unit:
    """One text to be scored; `segment` is None for a whole prediction."""

    sample: int
    segment: int | None
    prediction: str
    image: dict
    question: str
    reference: str


@dataclass
class Options:
    """The arguments of `Judge.compute`, which explains them.

    The transport knows units only through the methods below: a subclass that overrides them asks something else with the same
    store and budget.
    """

    # What a subclass asks for instead; `nothing` is what an answer says that says nothing, `repair` the user's turn after it.
    tasks: ClassVar[tuple[str, ...]] = tuple(PROMPTS)
    nothing: ClassVar[dict[str, None]] = {"accuracy": None, "hallucination": None}
    repair = REPAIR
    formats = RESPONSE_FORMATS

    task: str = "reasoning"
    model: str = "gpt-4o"
    store: str | os.PathLike | None = "scores.jsonl"
    hardened: bool = True
    segments: int | None = None
    backend: str = "chat"
    detail: str = "high"
    max_tokens: int = 100
    temperature: float = 0.0
    seed: int | None = 0
    response_format: str = "auto"
    base_url: str | None = None
    api_key: str | None = None
    organization: str | None = None
    azure_endpoint: str | None = None
    api_version: str | None = None
    concurrency: int = 64
    rpm: float | None = None
    tpm: float | None = None
    timeout: float = 120.0
    max_retries: int = 6
    max_wait: float = 600.0
    max_cost: float | None = None
    prices: dict | None = None
    retry_unscored: bool = False
    poll_seconds: float = 30.0
    n_resamples: int = 2000
    on_result: Callable[[dict], None] | None = None
    _prepared: tuple = field(default=(None, None), init=False, repr=False, compare=False)

    def __post_init__(self):
        choices = {
            "task": self.tasks,
            "backend": ("chat", "batch"),
            "detail": ("low", "high"),
            "response_format": ("auto", *self.formats),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(repr, allowed))}.")
        for name in ("concurrency", "rpm", "tpm", "timeout", "max_tokens", "segments", "poll_seconds", "n_resamples"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)!r}.")
        if self.backend == "batch" and self.store is None:
            raise ValueError("The batch backend needs a store=, which remembers what was submitted.")
        if self.max_cost is not None and not 0 <= self.max_cost < math.inf:
            raise ValueError(f"max_cost must be an amount in USD, not {self.max_cost!r}.")
        if self.max_cost is not None and price_of(self.model, self.prices, self.backend) is None:
            raise ValueError(
                f"max_cost needs to know what {self.model!r} costs; say "
                f"prices={{{self.model!r}: (USD per million prompt tokens, completion tokens)}}."
            )

    def prepare(self, unit: Unit) -> tuple[str, str, int]:
        """Return a unit's key in the store, its image's data URL, and its prompt tokens, about; raise where it cannot be sent.

        The key is of what the judge is shown, and how; not of the fence's mark, the server or the API key.
        """
        image, prepared = self._prepared  # segments of a sample share its image
        if image is not unit.image:
            prepared = prepare_image(unit.image, self.detail, self.model)
            self._prepared = unit.image, prepared
        digest, url, image_tokens = prepared
        parameters = [self.temperature, self.max_tokens, self.seed, self.detail, self.response_format]
        prompt = self.prompt(unit, "" if self.hardened else None)
        key = digest_of([digest, *prompt, unit.prediction, self.model, parameters, self.hardened])
        return key, url, image_tokens + self.tokens(unit)

    def prompt(self, unit: Unit, mark: str | None) -> tuple[str | None, str]:
        """Return system message (None without hardening) and text; `mark` is that of the fence, None without hardening."""
        return render(self.task, unit.prediction, unit.question, unit.reference, mark)

    def read(self, content: str) -> dict:
        """Return what the content of an answer says, by the names of `nothing`; raise ValueError where that is in doubt."""
        return dict(zip(self.nothing, parse(content), strict=True))

    def outcome(self, row: dict | None) -> tuple[dict, bool]:
        """Return what an answer says (None: there is none), with the "reason" where it says nothing, and whether a repair
        request is worth it."""
        found, reason, repairable = dict(self.nothing), None, False
        if row is None:
            pass
        elif row.get("refusal"):
            reason = f"refused: {str(row['refusal'])[:200]}"
        elif row.get("finish_reason") == "length":
            reason = "truncated: the answer reached the limit of its tokens"
        elif row.get("finish_reason") == "content_filter":
            reason = "content filter: the server withheld the answer"
        else:
            try:
                found = self.read(row.get("content") or "")
            except ValueError as error:
                reason, repairable = f"unparsable: {error}", True
        return {**found, "reason": reason}, repairable

    def is_final(self, rows: list[dict]) -> bool:
        """Return whether the answers to a unit decide it: the first does unless it is worth a repair, the second does."""
        return len(rows) == 2 or (len(rows) == 1 and not self.outcome(rows[0])[1])

    def settled(self, rows: list[dict]) -> bool:
        """Return whether stored answers are to be used as they are."""
        return self.is_final(rows) and not (self.retry_unscored and self.outcome(rows[-1])[0]["reason"] is not None)

    def messages(self, unit: Unit, image_url: str, bad: str | None) -> list[dict]:
        """Return the conversation; with the `bad` answer it is a repair. Without hardening that is the printed prompt again."""
        system, text = self.prompt(unit, secrets.token_hex(16) if self.hardened else None)
        picture = {"type": "image_url", "image_url": {"url": image_url, "detail": self.detail}}
        user = {"role": "user", "content": [{"type": "text", "text": text}, picture] if image_url else text}
        if system is None:
            return [user]
        repair = [{"role": "assistant", "content": bad or "(nothing)"}, {"role": "user", "content": self.repair}]
        return [{"role": "system", "content": system}, user, *(repair if bad is not None else [])]

    def tokens(self, unit: Unit) -> int:
        """Estimate the tokens of a prompt's words: four bytes of UTF-8 each (rather too many for English)."""
        system, text = self.prompt(unit, "0" * 32 if self.hardened else None)
        return math.ceil(len(((system or "") + text).encode()) / 4) + 60  # the schema and the chat's frame

    @property
    def context(self) -> int | None:
        """Tokens that the model takes, None where that is not known."""
        return next((tokens for family, tokens in CONTEXTS.items() if self.model.startswith(family)), None)

    def too_long(self, tokens: int) -> str | None:
        """Return why a request with so many prompt tokens is not sent, None where it is."""
        if self.context is None or tokens + self.max_tokens <= self.context:
            return None
        return f"too long: about {tokens:,} prompt tokens; {self.model} takes {self.context:,}, its answer included"


def price_of(model: str, prices: dict | None, backend: str) -> tuple[float, float] | None:
    """Return USD per prompt and per completion token, a dated snapshot's as its family's; None for an unknown model."""
    table = {**PRICES, **(prices or {})}
    pair = table.get(model) or table.get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model))
    scale = 1e-6 * (0.5 if backend == "batch" else 1)
    return (pair[0] * scale, pair[1] * scale) if pair else None


def cost_of(rows: Iterable[dict], requested: str, prices: dict | None) -> float | None:
    """Return USD of some rows, by the model that was asked for; None where its price is unknown."""
    total = 0.0
    for row in rows:
        price = price_of(requested, prices, row.get("backend", "chat"))
        if price is None:
            return None
        total += price[0] * row.get("prompt_tokens", 0) + price[1] * row.get("completion_tokens", 0)
    return total


def digest_of(parts: list) -> str:
    """Return a key of the store for all that a request depends on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:48]


def columns_of(predictions: Any, images: Any, references: Any, questions: Any) -> dict[str, list]:
    """Return the inputs as columns of one length, "" for what is not given; raise ValueError for what cannot be an input."""
    if predictions is None or images is None:
        raise ValueError("Give predictions= and images=, one image for every prediction.")
    columns = {"predictions": list(predictions), "images": [encode_image(image) for image in images]}
    for name, column in (("references", references), ("questions", questions)):
        columns[name] = [""] * len(columns["predictions"]) if column is None else ["" if x is None else x for x in column]
    for name, column in columns.items():
        if len(column) != len(columns["predictions"]):
            raise ValueError(f"There are {len(columns['predictions'])} predictions but {len(column)} {name}.")
    for name in ("predictions", "references", "questions"):
        for i, text in enumerate(columns[name]):
            if not isinstance(text, str):
                raise ValueError(f"{name}[{i}] is {text!r}, not a text (an empty answer is '').")
            columns[name][i] = text.encode("utf-8", "replace").decode()  # lone surrogates cannot be sent
    return columns


def units_of(columns: dict[str, list], options: Options) -> list[Unit]:
    """Return what has to be scored: every prediction that is not empty and, with `segments`, its segments that are not."""
    units = []
    rows = zip(*(columns[name] for name in ("predictions", "images", "references", "questions")), strict=True)
    for i, (prediction, image, reference, question) in enumerate(rows):
        if options.task == "vqa" and not (question.strip() or reference.strip()):
            raise ValueError(f"Task 'vqa' needs a question or a reference; sample {i} has neither.")
        parts = segments_of(prediction, options.segments) if options.segments else []
        texts = [(None, prediction), *enumerate(parts)]
        units += [Unit(i, segment, text, image, question, reference) for segment, text in texts if text.strip()]
    return units


def foresee(units: list[Unit], options: Options) -> dict:
    """Count what a run would ask and cost; send nothing, and write nothing. Repairs are not foreseen.

    `n_stored` counts units that the store already has, `too_long` lists samples with a text beyond the judge's context, which
    is not sent; `cost_usd` is None for an unknown model, `prices_date` where `prices=` tells them.
    """
    exists = options.store is not None and os.path.exists(options.store)
    keys, prompts, too_long = set(), [], set()
    n_unreadable = n_stored = 0
    with contextlib.closing(Store(options.store if exists else None)) as store:
        for unit in units:
            try:
                key, _, tokens = options.prepare(unit)
            except Exception:
                n_unreadable += unit.segment is None
                continue
            if key in keys:
                continue
            keys.add(key)
            if options.settled(store.answers(key)):
                n_stored += 1
            elif options.too_long(tokens):
                too_long.add(unit.sample)
            else:
                prompts.append(tokens)
    price = price_of(options.model, options.prices, options.backend)
    return {
        "n_unreadable": n_unreadable,
        "n_stored": n_stored,
        "too_long": sorted(too_long),
        "n_requests": len(prompts),
        "prompt_tokens": sum(prompts),
        "completion_tokens": 20 * len(prompts),
        "cost_usd": price and price[0] * sum(prompts) + price[1] * 20 * len(prompts),
        "prices_date": None if options.model in (options.prices or {}) else PRICES_DATE,
    }


def estimate(predictions: Any, images: Any, references: Any = None, questions: Any = None, **options: Any) -> dict:
    """Count what `compute` with these arguments would ask and cost: `n`, `n_empty`, and what `foresee` says; send nothing."""
    chosen = Options(**options)
    columns = columns_of(predictions, images, references, questions)
    n_empty = sum(not text.strip() for text in columns["predictions"])
    return {"n": len(columns["predictions"]), "n_empty": n_empty, **foresee(units_of(columns, chosen), chosen)}
