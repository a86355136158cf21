"""Requests to the judge: all of one run, with retries, one repair each, a budget, and a store that other processes share."""

import asyncio
import contextlib
import functools
import json
import os
import random
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import openai

from .options import SEEDS, Options, Unit, digest_of
from .rate import Limiter, seconds
from .replies import to_row
from .server import JudgeError, connect, has_answered, headers_of, may_be_paid, message_of, triage, unserved
from .store import Ledger, Store

UNSUPPORTED = ("unsupported", "not supported", "unrecognized", "unknown", "not permitted", "extra")


class Stopped(Exception):
    """A unit is not sent because the run stops; the message is the reason."""


class Run:
    """All requests to one judge: `results` has one dict per unit, in order.

    `panel` are the runs of all judges, this one among them, which share the budget and stop together; see `panel.Panel`.
    """

    def __init__(self, options: Options, units: list[Unit], store: Store, panel: "list[Run]"):
        self.panel = panel
        self.options = options
        self.units = units
        self.store = store
        self.results: list[dict] = [{}] * len(units)
        self.asked: dict[str, asyncio.Future] = {}
        # Why a request is not sent: it is in a batch that was not collected, or a batch had no answer to it.
        self.pending: dict[str, str] = {}
        # What is reserved for first requests since their answer's panel fits into the budget; those whose panel does not.
        self.granted: dict[str, float] = {}
        self.refused: set[str] = set()
        self.limiter = Limiter(options.rpm, options.tpm)
        self.formats = list(options.formats) if options.response_format == "auto" else [options.response_format]
        limit = "max_completion_tokens" if options.known.reasons else "max_tokens"
        self.extras: dict = {"temperature": options.temperature, limit: options.max_tokens, "seed": options.seed}
        if options.reasoning_effort:
            self.extras["reasoning_effort"] = options.reasoning_effort
        self.price = options.price()
        # Until a first request has succeeded, they go out one at a time.
        self.probe = asyncio.Lock()
        self.proven = False
        self.proven_before = False
        # Real prompt tokens over estimated ones, the largest so far.
        self.excess = 1.0
        # Why no more is sent, and what the panel will raise.
        self.stop = ""
        self.error: Exception | None = None
        self.failures = 0
        self.done = 0
        self.n_requests = 0
        self.spent = 0.0
        self.reserved = 0.0
        # Reserved for good: requests whose answers were lost on the way. The server may have charged for them.
        self.lost = 0.0

    @functools.cached_property
    def client(self) -> openai.AsyncOpenAI:
        """Made when the first request is: a run that finds all answers in the store needs no key."""
        return connect(self.options)

    def fail(self, error: Exception) -> None:
        """Send nothing more; what is under way is still awaited and stored."""
        for run in self.panel:
            run.error = run.error or error
            run.stop = run.stop or str(error)

    def refuse_if_stopped(self) -> None:
        if self.stop:
            raise Stopped(f"not sent: {self.stop}")

    async def prepare(self) -> None:
        """Find out what is in batches under way, which is not to be paid for again."""
        if self.options.store is None or not os.path.exists(f"{self.options.store}.batches.jsonl"):
            return
        with contextlib.closing(Ledger(self.options.store)) as ledger:
            for intent in ledger.unfinished():
                reason = f"it is in the unfinished batch {intent['batch']}; collect it with the batch backend"
                self.pending |= {name[:-2]: reason for name in intent["names"]}

    def finish(self, index: int, rows: Sequence[dict] = (), reason: str | None = None, **more: Any) -> None:
        outcome, remedy = self.options.outcome(rows[-1] if rows else None)
        reason = outcome["reason"] or reason
        if remedy:
            told = {"repair": "one repair request", "larger": "one request with a higher limit"}
            reason = f"{reason} (after {' and '.join(told[one] for one in self.options.remedies(list(rows)))})"
        result = {**outcome, "reason": reason, "rows": list(rows), "cached": False, "key": None, **more}
        self.results[index] = result
        self.done += 1
        if self.options.on_result is not None:
            unit = self.units[index]
            progress = {
                "model": self.options.model,
                "sample": unit.sample,
                "segment": unit.segment,
                "done": sum(run.done for run in self.panel),
                "total": sum(len(run.units) for run in self.panel),
            }
            spent = sum(run.spent for run in self.panel)
            self.options.on_result({**progress, **result, "spent_usd": spent if self.price else None})

    async def one(self, index: int, prepared: tuple[str, str, int] | None = None) -> None:
        """Finish a unit; `prepared` is what the options' `prepare` returned for it, where that is known already."""
        unit = self.units[index]
        try:
            if prepared is None:
                prepared = await asyncio.to_thread(self.options.prepare, unit)
            key, url, tokens = prepared
        except Exception as error:  # Pillow raises what its many decoders raise
            self.finish(index, reason=f"image: {' '.join(str(error).split()) or type(error).__name__}")
            return
        first = key not in self.asked
        if first:
            self.asked[key] = asyncio.ensure_future(self.resolve(key, unit, url, tokens))
        try:
            outcome = await self.asked[key]
        except Stopped as error:
            outcome = {"reason": str(error)}
        self.finish(index, key=key, **(outcome if first else {**outcome, "cached": True}))

    async def resolve(self, key: str, unit: Unit, url: str, tokens: int) -> dict:
        """Return the rows of a key, from the store or the judge; raise Stopped where they are not to be had."""
        claimed = False
        try:
            while True:
                rows = self.store.answers(key)
                if self.options.settled(rows):
                    self.proven_before = True
                    return {"rows": rows, "cached": True}
                if key in self.pending:
                    raise Stopped(self.pending[key])
                if key in self.refused:
                    raise Stopped(self.over_budget)
                if claimed:
                    break
                claimed = self.store.claim(key)
                if not claimed:  # another process is asking
                    await asyncio.sleep(0.1)
                    self.refuse_if_stopped()
            rows = [] if self.options.is_final(rows) else rows  # final but to be asked again
            while not self.options.is_final(rows):
                await self.ask(key, unit, url, tokens, rows)
                rows = self.store.answers(key)
            return {"rows": rows}
        finally:
            if claimed:
                self.store.release(key)

    def request(self, unit: Unit, url: str, rows: list[dict], form: str, extras: dict) -> dict:
        """Return the arguments of a chat completion in one of the `formats`, after the answers in `rows`."""
        body = {"model": self.options.model, "messages": self.options.messages(unit, url, self.bad(rows)), **extras}
        limit = "max_tokens" if body.get("max_tokens") is not None else "max_completion_tokens"
        body[limit] = self.options.limit(rows)
        if body["seed"] is not None:
            body["seed"] += len(rows) + SEEDS * unit.draw
        body["response_format"] = self.options.formats[form]
        return {name: value for name, value in body.items() if value is not None}

    def bad(self, rows: list[dict]) -> str | None:
        """Return the answer that a repair is about, None where the next request is none."""
        if "repair" not in self.options.remedies(rows):
            return None
        return next(row.get("content") or "" for row in rows if self.options.outcome(row)[1] == "repair")

    @property
    def over_budget(self) -> str:
        return f"not sent: max_cost of {self.options.max_cost} USD reached"

    def most(self, tokens: int, limit: int) -> float:
        """Return the cost of a request with so many prompt tokens, if its answer has as many as `limit`."""
        return 0.0 if self.price is None else self.price[0] * tokens * self.excess + self.price[1] * limit

    def fits(self, cost: float) -> bool:
        """Return whether the panel's budget has so much left, but for errors of rounding."""
        taken = sum(run.spent + run.reserved for run in self.panel)
        return self.options.max_cost is None or taken + cost <= self.options.max_cost * (1 + 1e-9)

    def reserve(self, tokens: int, limit: int) -> float:
        """Take the cost of a request with so many prompt tokens off the budget, and return it; `limit` is that of its answer.

        Raises:
            Stopped: it is beyond the budget, or beyond the judge's context.
        """
        if reason := self.options.too_long(tokens, limit):
            raise Stopped(reason)
        cost = self.most(tokens, limit)
        if not self.fits(cost):
            raise Stopped(self.over_budget)
        self.reserved += cost
        return cost

    async def ask(self, key: str, unit: Unit, url: str, tokens: int, rows: list[dict]) -> None:
        """Put one more answer than `rows` into the store; raise Stopped where none is to be had."""
        async with contextlib.AsyncExitStack() as stack:
            if not self.proven:
                await stack.enter_async_context(self.probe)
                if self.proven:
                    await stack.aclose()
            self.refuse_if_stopped()
            if (bad := self.bad(rows)) is not None:
                tokens += len((bad + self.options.repair).encode()) // 4
            self.reserved -= self.granted.pop(key, 0.0)
            cost = self.reserve(tokens, self.options.limit(rows))
            try:
                await self.ask_until(key, unit, url, tokens, rows, cost)
            finally:
                self.reserved -= cost

    async def ask_until(self, key: str, unit: Unit, url: str, tokens: int, rows: list[dict], cost: float) -> None:
        tries, waited, answered = 0, 0.0, 0
        asked_before = [row.get("time") for row in self.store.answers(key)]
        trial: tuple[list, dict] | None = None  # simpler requests: for the whole run once one of them has worked
        while True:
            ticket = await self.limiter.take(tokens, lambda: self.stop)
            headers: Any = {}
            formats, extras = trial or (self.formats, self.extras)
            try:
                self.refuse_if_stopped()
                self.n_requests += 1
                request = self.request(unit, url, rows, formats[0], extras)
                # The client's own timeout is for each read: a server that sends a byte now and then would never meet it.
                patience = self.options.patience(rows)
                # A server that knows this header answers what it was asked before, by a run that was killed, from its memory.
                once = digest_of([self.options.home, key, asked_before, formats[0], extras, answered])
                create = self.client.chat.completions.with_raw_response.create
                reply = create(**request, timeout=patience, extra_headers={"Idempotency-Key": once})
                raw = await asyncio.wait_for(reply, patience)
                headers = raw.headers
                row = self.keep(json.loads(raw.content), tokens, key=key, attempt=len(rows), response_format=formats[0])
                self.proven = True
                self.failures = 0
                self.excess = max(self.excess, row["prompt_tokens"] / max(1, tokens))
                self.formats, self.extras = trial or (self.formats, self.extras)
                return
            except JudgeError as error:
                self.give_up(str(error), fatal=True)
            except (openai.OpenAIError, ValueError, RecursionError, asyncio.TimeoutError) as error:
                headers = headers_of(error) or headers
                kind, message = triage(error)
                if kind == "bad" and trial is None and (formats, extras) != (self.formats, self.extras):
                    continue  # another request has found out meanwhile
                if kind == "bad" and (simpler := self.simplify(error, formats, extras)) is not None:
                    trial = simpler
                    continue
                if (unknown := await unserved(self.client, self.options, error)) is not None:
                    self.give_up(unknown, fatal=True)
                if kind in ("fatal", "bad"):
                    self.give_up(message, fatal=kind == "fatal", refused=kind == "bad")
                if may_be_paid(error):
                    self.reserved += cost
                    self.lost += cost
                delay = self.delay(headers, tries, kind)
                if kind == "limit":
                    self.limiter.pause(delay)
                    waited += delay
                if max(waited, delay) > self.options.max_wait:
                    self.give_up(f"The server makes requests wait for too long; run again later ({message}).", fatal=True)
                nobody = not isinstance(error, openai.APIStatusError | openai.APITimeoutError)
                if nobody and not self.proven and tries >= 3:
                    unreachable = isinstance(error, openai.APIConnectionError)
                    problem = "The judge's server cannot be reached" if unreachable else "This is no judge's server"
                    self.give_up(f"{problem}; check base_url= and the network ({message}).", fatal=True)
                if kind == "retry" and tries >= self.options.max_retries:
                    self.give_up(f"{message} (after {tries} retries)")
                # Another try is another request, for which as much is still reserved.
                if not self.fits(0.0):
                    raise Stopped(f"{message}; {self.over_budget}") from None
                answered += has_answered(error)
            finally:
                self.limiter.learn(ticket, headers)
            tries += 1
            await self.sleep(delay)

    def keep(self, body: Any, estimated: int = 0, **fields: Any) -> dict:
        """Put a chat completion into the store, with how it came about and what it says, and count what it cost."""
        told = {name: getattr(self.options, name) for name in ("task", "hardened", "backend")}
        row = to_row(body, estimated, **fields, **told)
        row |= self.options.outcome(row)[0]
        self.store.append(row)
        self.spent += self.options.cost([row]) or 0.0
        return row

    def give_up(self, message: str, fatal: bool = False, refused: bool = False) -> NoReturn:
        """Raise Stopped; what is fatal, and many failures in a row, stop the whole run."""
        if fatal:
            self.fail(JudgeError(message))
            raise Stopped(f"not sent: {message}")
        works = self.proven or self.proven_before
        self.failures += not (refused and works)  # what one request is refused for says nothing about the next
        if self.failures >= (max(10, 2 * self.options.concurrency) if works else 10 if refused else 3):
            self.fail(JudgeError(f"{self.failures} requests failed in a row, the last with {message}; run again to go on."))
        raise Stopped(message)

    async def sleep(self, delay: float) -> None:
        end = time.monotonic() + delay
        while not self.stop and (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.5))

    def delay(self, headers: Any, tries: int, kind: str) -> float:
        """Return the seconds to wait: what the server says, else exponential with jitter, at most 30."""
        milliseconds = seconds(headers.get("retry-after-ms"))
        asked = milliseconds / 1000 if milliseconds is not None else seconds(headers.get("retry-after"))
        if asked is None and kind == "limit":
            used_up = [name for name in ("requests", "tokens") if headers.get(f"x-ratelimit-remaining-{name}") in ("0", None)]
            asked = max((seconds(headers.get(f"x-ratelimit-reset-{name}")) or 0.0 for name in used_up), default=None)
        backoff = min(30.0, 0.5 * 2**tries) * random.uniform(0.5, 1)
        return asked + random.uniform(0, 0.05) if asked else backoff

    def simplify(self, error: Exception, formats: list, extras: dict) -> tuple[list, dict] | None:
        """Return formats and parameters to try after a 400, without what the server does not take; None if nothing is left.

        A server that says nothing of use is tried without response_format only while nothing has worked yet. The limit of the
        answer's length may get its other name, but is never left out.
        """
        if not isinstance(error, openai.APIStatusError) or error.status_code not in (400, 415, 422):
            return None
        clue = f"{error.param} {message_of(error)}".lower()
        told = "use 'max_completion_tokens'" in clue or any(word in clue for word in UNSUPPORTED)
        for parameter, value in extras.items():
            meant = error.param == parameter or (parameter in clue and told)
            if value is None or parameter == "max_completion_tokens" or not meant:
                continue
            if parameter == "max_tokens" and "context length" in clue:
                return None
            new = {"max_completion_tokens": value} if parameter == "max_tokens" else {}
            return formats, {**extras, parameter: None, **new}
        about = any(word in clue for word in ("response_format", "json_schema", "json_object", "structured", "guided"))
        if len(formats) > 1 and (about or not (self.proven or self.proven_before)) and "image" not in clue:
            return formats[1:], extras
        return None
