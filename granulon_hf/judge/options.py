"""What a run is told: the options of the judge, the texts that it scores, and what that costs.

A *sample* is one prediction about one image; a *unit* is one text to be scored: a sample, or a segment of one.
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import urlsplit

from .images import encode_image, prepare_image
from .models import PRICES_DATE, JudgeModel, choices, family_of, find_model, given_fields, is_own
from .prompts import PROMPTS, REPAIR, RESPONSE_FORMATS, render, segments_of
from .replies import parse
from .store import Store

# Tokens of an answer at most, and those that it is expected to have: of a judge that answers at once, and of one that reasons.
MAX_TOKENS = {False: 100, True: 4_000}
USUAL_TOKENS = {False: 20, True: 600}
# After an answer that reached the limit, the limit is this times as high, and at least so high.
LARGER, LARGER_AT_LEAST = 4, 4_096
TOKENS_A_SECOND = 10  # that are waited for beyond the first
SEEDS = 100  # between the seeds of two samples; those of repairs are in between


@dataclass
class Unit:
    """One text to be scored; `segment` is None for a whole prediction, `draw` counts the times that it is scored."""

    sample: int
    segment: int | None
    prediction: str
    image: dict
    question: str
    reference: str
    draw: int = 0


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
    samples: int = 1
    backend: str = "chat"
    detail: str = "high"
    max_tokens: int | None = None
    temperature: float | None = 0.0
    reasoning_effort: str | None = None
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
    judge_models: Mapping[str, Any] | None = None
    retry_unscored: bool = False
    poll_seconds: float = 30.0
    n_resamples: int = 2000
    on_result: Callable[[dict], None] | None = None
    # What is known of the model; nothing for one that only its server knows.
    known: JudgeModel = field(init=False, repr=False, compare=False)
    # What requests that are sent again have in common: their store or, without one, their run.
    home: str = field(init=False, repr=False, compare=False)
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
        for name in (
            "concurrency",
            "rpm",
            "tpm",
            "timeout",
            "max_tokens",
            "segments",
            "samples",
            "poll_seconds",
            "n_resamples",
        ):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)!r}.")
        if self.backend == "batch" and self.store is None:
            raise ValueError("The batch backend needs a store=, which remembers what was submitted.")
        if self.max_cost is not None and not 0 <= self.max_cost < math.inf:
            raise ValueError(f"max_cost must be an amount in USD, not {self.max_cost!r}.")
        self.home = secrets.token_hex(16) if self.store is None else os.path.abspath(self.store)
        self.known = find_model(self.model, self.judge_models) or JudgeModel()
        if self.known.reasons:  # such models refuse a temperature
            self.temperature = None
            self.reasoning_effort = self.reasoning_effort or "low"
        self.max_tokens = self.max_tokens or min(MAX_TOKENS[self.known.reasons], self.known.output or math.inf)
        if self.max_cost is not None and not self.is_priced:
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
            prepared = prepare_image(unit.image, self.detail, self.known.image.model_dump())
            self._prepared = unit.image, prepared
        digest, url, image_tokens = prepared
        parameters = [self.temperature, self.max_tokens, self.seed, self.detail, self.response_format]
        # What is not there in most requests is not in their keys, so that stores of before are still read.
        parameters += [self.reasoning_effort] if self.reasoning_effort else []
        drawn = [unit.draw] if unit.draw else []
        prompt = self.prompt(unit, "" if self.hardened else None)
        key = digest_of([digest, *prompt, unit.prediction, self.model, parameters, self.hardened, *drawn])
        return key, url, image_tokens + self.tokens(unit)

    def prompt(self, unit: Unit, mark: str | None) -> tuple[str | None, str]:
        """Return system message (None without hardening) and text; `mark` is that of the fence, None without hardening."""
        return render(self.task, unit.prediction, unit.question, unit.reference, mark)

    def read(self, content: str) -> dict:
        """Return what the content of an answer says, by the names of `nothing`; raise ValueError where that is in doubt."""
        return dict(zip(self.nothing, parse(content), strict=True))

    def outcome(self, row: dict | None) -> tuple[dict, str | None]:
        """Return what an answer says (None: there is none), with the "reason" where it says nothing, and what to do about
        that: "repair" asks for the object that was asked for, "larger" once more with more tokens, None leaves it."""
        found, reason, remedy = dict(self.nothing), None, None
        if row is None:
            pass
        elif row.get("refusal"):
            reason = f"refused: {str(row['refusal'])[:200]}"
        elif row.get("finish_reason") == "length":
            reason, remedy = "truncated: the answer reached the limit of its tokens", "larger"
        elif row.get("finish_reason") == "content_filter":
            reason = "content filter: the server withheld the answer"
        else:
            try:
                found = self.read(row.get("content") or "")
            except ValueError as error:
                reason, remedy = f"unparsable: {error}", "repair"
        return {**found, "reason": reason}, remedy

    def remedies(self, rows: list[dict]) -> list[str]:
        """Return what the answers after the first were or are to be asked for; each remedy is tried once."""
        found: list[str] = []
        for row in rows:
            remedy = self.outcome(row)[1]
            if remedy is None or remedy in found:
                break
            found.append(remedy)
        return found

    def is_final(self, rows: list[dict]) -> bool:
        """Return whether the answers to a unit decide it: one does that needs no remedy, or none that was not tried."""
        return len(self.remedies(rows)) < len(rows)

    def limit(self, rows: list[dict]) -> int:
        """Return the tokens of the next answer at most."""
        assert self.max_tokens is not None
        if "larger" not in self.remedies(rows):
            return self.max_tokens
        larger = max(LARGER * self.max_tokens, LARGER_AT_LEAST)
        return max(self.max_tokens, min(larger, self.known.output or larger))

    def patience(self, rows: list[dict]) -> float:
        """Return the seconds that the next answer may take: longer ones get more than the `timeout`."""
        return self.timeout + max(0, self.limit(rows) - MAX_TOKENS[False]) / TOKENS_A_SECOND

    def settled(self, rows: list[dict]) -> bool:
        """Return whether stored answers are to be used as they are."""
        return self.is_final(rows) and not (self.retry_unscored and self.outcome(rows[-1])[0]["reason"] is not None)

    def messages(self, unit: Unit, image_url: str, bad: str | None) -> list[dict]:
        """Return the conversation; with the `bad` answer it is a repair. Without hardening that is the printed prompt again."""
        # Nobody can write a text that holds its own digest; and a request that is sent again is the same, letter by letter.
        mark = digest_of([self.home, *self.prompt(unit, ""), unit.draw, bad])[:32]
        system, text = self.prompt(unit, mark if self.hardened else None)
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

    def too_long(self, tokens: int, limit: int | None = None) -> str | None:
        """Return why a request with so many prompt tokens is not sent, None where it is."""
        context = self.known.context
        if context is None or tokens + (limit or self.limit([])) <= context:
            return None
        return f"too long: about {tokens:,} prompt tokens; {self.model} takes {context:,}, its answer included"

    @property
    def address(self) -> str | None:
        """The server's address as somebody said it: the judge's entry, the user, or OpenAI's variable."""
        return self.known.base_url or self.base_url or os.environ.get("OPENAI_BASE_URL")

    @property
    def is_azure(self) -> bool:
        said = self.address or self.api_key or os.environ.get("OPENAI_API_KEY")
        return bool(self.azure_endpoint or (os.environ.get("AZURE_OPENAI_ENDPOINT") and not said))

    @property
    def is_openai(self) -> bool:
        return not self.is_azure and (self.address is None or urlsplit(self.address).hostname == "api.openai.com")

    @property
    def is_priced(self) -> bool:
        """Whether somebody said what the model costs: the user, or the table."""
        return self.told_price is not None or self.known.prompt is not None

    @property
    def priced_by(self) -> str | None:
        """Say whose price it is: that of `prices`, of `judge_models` or of the "table"; None where nobody says one."""
        if self.told_price is not None:
            return "prices"
        if self.known.prompt is None:
            return None
        return "judge_models" if "prompt" in (given_fields(self.model, self.judge_models) or {}) else "table"

    @property
    def prices_date(self) -> str | None:
        """Return the date of the table's price; None where it is another's."""
        return PRICES_DATE if self.priced_by == "table" else None

    @property
    def told_price(self) -> tuple[float, float] | None:
        prices = self.prices or {}
        return prices.get(self.model) or prices.get(family_of(self.model))

    def price(self, backend: str | None = None) -> tuple[float, float] | None:
        """Return USD per prompt and per completion token: as told, as in the table, nothing on one's own server; else None."""
        pair = self.told_price or (self.known.prompt, self.known.completion)
        if pair[0] is None or pair[1] is None:
            return (0.0, 0.0) if self.address and is_own(self.address) else None
        scale = 1e-6 * (0.5 if (backend or self.backend) == "batch" else 1)
        return pair[0] * scale, pair[1] * scale

    def cost(self, rows: Iterable[dict]) -> float | None:
        """Return USD of some rows, None where the price is unknown."""
        total = 0.0
        for row in rows:
            price = self.price(row.get("backend", "chat"))
            if price is None:
                return None
            total += price[0] * row.get("prompt_tokens", 0) + price[1] * row.get("completion_tokens", 0)
        return total

    def refusal(self) -> str | None:
        """Return why this judge cannot be asked: its key is not set, or OpenAI does not serve what nobody vouches for."""
        variable = self.known.api_key_env
        if variable and not os.environ.get(variable):
            return f"The judge {self.model!r} needs the API key that judge_models= says is in {variable}; set {variable}."
        if not self.is_openai or self.told_price is not None:
            return None
        names = ", ".join(choices(self.judge_models))
        if find_model(self.model, self.judge_models) is None:
            what = f"The judge {self.model!r} is not known (table of {PRICES_DATE})"
        elif self.known.is_retired:
            follows = f"; its maker names {self.known.successor} instead" if self.known.successor else ""
            what = f"The judge {self.model!r} is retired since {self.known.retires} (table of {PRICES_DATE}){follows}"
        else:
            return None
        return f"{what}: choose one of {names}; or name it in judge_models=, or its server in base_url=."


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
        for draw in range(options.samples):
            units += [Unit(i, segment, text, image, question, reference, draw) for segment, text in texts if text.strip()]
    return units


def foresee(units: list[Unit], options: Options) -> dict:
    """Count what a run would ask and cost; send nothing, and write nothing. Repairs are not foreseen.

    `n_stored` counts units that the store already has, `too_long` lists samples with a text beyond the judge's context, which
    is not sent; `cost_usd` is None for an unknown model, `priced_by` says whose prices they are (see `Options.priced_by`; a
    list), and `prices_date` is None where they are not of the table.
    """
    exists = options.store is not None and os.path.exists(options.store)
    keys, prompts, too_long = set(), [], set()
    n_unreadable = n_stored = 0
    with contextlib.closing(Store(options.store if exists else None)) as store:
        for unit in units:
            try:
                key, _, tokens = options.prepare(unit)
            except Exception:
                n_unreadable += unit.segment is None and unit.draw == 0
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
    price, usual = options.price(), USUAL_TOKENS[options.known.reasons]
    return {
        "n_unreadable": n_unreadable,
        "n_stored": n_stored,
        "too_long": sorted(too_long),
        "n_requests": len(prompts),
        "prompt_tokens": sum(prompts),
        "completion_tokens": usual * len(prompts),
        "cost_usd": price and price[0] * sum(prompts) + price[1] * usual * len(prompts),
        "own_server": not options.is_priced and price is not None,
        "priced_by": [options.priced_by] if options.priced_by else [],
        "prices_date": options.prices_date,
    }


def panel_of(model: str | Sequence[str] = "gpt-4o", **options: Any) -> list[Options]:
    """Return the options of each judge of a panel; a name alone is a panel of one."""
    names = [model] if isinstance(model, str) else list(model)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"model must be one name or different ones, not {', '.join(names)}; samples=2 asks a judge twice.")
    return [Options(model=name, **options) for name in names]


def estimate(predictions: Any, images: Any, references: Any = None, questions: Any = None, **options: Any) -> dict:
    """Count what `compute` with these arguments would ask and cost: `n`, `n_empty`, and what `foresee` says; send nothing."""
    panel = panel_of(**options)
    columns = columns_of(predictions, images, references, questions)
    n_empty = sum(not text.strip() for text in columns["predictions"])
    found = [foresee(units_of(columns, one), one) for one in panel]
    costs = [one["cost_usd"] for one in found]
    total = {
        **found[0],
        **{name: sum(one[name] for one in found) for name in ("n_stored", "n_requests", "prompt_tokens", "completion_tokens")},
        "too_long": sorted({sample for one in found for sample in one["too_long"]}),
        "cost_usd": None if None in costs else sum(costs),
        "own_server": all(one["own_server"] for one in found),
        "priced_by": sorted({source for one in found for source in one["priced_by"]}),
        "prices_date": next((one["prices_date"] for one in found if one["prices_date"]), None),
    }
    return {"n": len(columns["predictions"]), "n_empty": n_empty, **total}
