"""The Batch API: half the price, up to a day, and no batch is submitted twice."""

import asyncio
import contextlib
import json
import secrets
from collections.abc import Iterator
from typing import Any

import openai

from .client import Run, Stopped
from .options import Unit
from .server import JudgeError, headers_of, triage
from .store import ATTEMPTS, Ledger

# Limits of the Batch API: 50,000 requests and 200 MB.
BATCH_REQUESTS = 50_000
BATCH_BYTES = 190 * 10**6


class BatchRun(Run):
    """All requests of one `compute`, in batches."""

    ledger: Ledger

    async def resolve(self, key: str, unit: Unit, url: str, tokens: int) -> dict:
        """Return the rows that the batches brought; raise Stopped where there are none."""
        rows = self.store.answers(key)
        if self.options.is_final(rows):
            return {"rows": rows, "cached": True}
        if key in self.refused:
            raise Stopped(self.over_budget)
        raise Stopped(self.pending.get(key) or "the batch gave no answer; run again to submit it again")

    async def prepare(self) -> None:
        """Collect what is under way, then submit, poll and collect what is missing, then what has to be asked again."""
        self.ledger = Ledger(self.options.store)
        with contextlib.closing(self.ledger), self.ledger.lock:  # a second process waits, and finds the answers in the store
            self.ledger.refresh()
            try:
                for intent in self.ledger.unfinished():
                    # What another judge of a panel was asked, its own run collects.
                    if intent.get("model", self.options.model) == self.options.model:
                        await self.collect(intent)
                for attempt in range(ATTEMPTS):
                    self.reserved = 0.0
                    batches = self.make_batches(attempt)
                    intents = []
                    while batch := await asyncio.to_thread(next, batches, None):
                        intents.append(await self.submit(batch))
                    for intent in intents:
                        await self.collect(intent)
            except openai.OpenAIError as error:
                kind, message = triage(error)
                told = message if kind == "fatal" else f"The Batch API failed ({message}); run again to go on."
                raise JudgeError(told) from None
        self.reserved = 0.0

    def make_batches(self, attempt: int) -> Iterator[dict[str, bytes]]:
        """Yield input files with the requests of all units that lack this answer: lines by their custom ids."""
        seen: set[str] = set()
        lines: dict[str, bytes] = {}
        size = 0
        for unit in self.units:
            try:
                key, url, tokens = self.options.prepare(unit)
            except Exception:  # told by `one`
                continue
            rows = self.store.answers(key)
            if attempt == 0 and self.options.is_final(rows) and not self.options.settled(rows):
                rows = []  # to be asked again
            if key in seen or key in self.refused or self.options.is_final(rows) or len(rows) != attempt:
                continue
            seen.add(key)
            try:
                self.reserve(tokens, self.options.limit(rows))
            except Stopped as error:
                self.pending[key] = str(error)
                continue
            name = f"{key}-{attempt}"
            body = self.request(unit, url, rows, self.formats[0], self.extras)
            line = json.dumps({"custom_id": name, "method": "POST", "url": self.endpoint, "body": body}).encode() + b"\n"
            if lines and (len(lines) >= BATCH_REQUESTS or size + len(line) > BATCH_BYTES):
                yield lines
                lines, size = {}, 0
            lines[name] = line
            size += len(line)
        if lines:
            yield lines

    @property
    def endpoint(self) -> str:
        """The API that answers the requests in a batch; Azure has its own name for it."""
        return "/chat/completions" if isinstance(self.client, openai.AsyncAzureOpenAI) else "/v1/chat/completions"

    async def submit(self, lines: dict[str, bytes]) -> dict:
        """Upload and create one batch.

        The intent is on disk before, and named in the batch's metadata: whatever happens in between, the next run finds the
        batch by that name instead of submitting again.
        """
        file = await self.client.files.create(file=("requests.jsonl", b"".join(lines.values())), purpose="batch")
        intent: dict[str, Any] = {
            "intent": secrets.token_hex(16),
            "names": list(lines),
            "batch": None,
            "model": self.options.model,
        }
        self.ledger.append(intent)
        intent["batch"] = (await self.create(file.id, intent["intent"])).id
        self.n_requests += len(lines)
        self.ledger.append({"intent": intent["intent"], "batch": intent["batch"]})
        return intent

    async def create(self, file_id: str, name: str) -> Any:
        """Create a batch; where that fails, look whether it was made all the same before it is tried again."""
        tries = 0
        while True:
            try:
                return await self.client.with_options(max_retries=0).batches.create(
                    input_file_id=file_id,
                    endpoint=self.endpoint,  # type: ignore[arg-type]
                    completion_window="24h",
                    metadata={"granulon": name},
                )
            except openai.OpenAIError as error:
                kind, _ = triage(error)
                if kind in ("fatal", "bad") or tries == self.options.max_retries:
                    raise
                await self.sleep(min(self.delay(headers_of(error) or {}, tries, kind), self.options.max_wait))
                if (found := await self.find(name)) is not None:
                    return found
                tries += 1

    async def find(self, name: str) -> Any:
        """Return the batch with this name in its metadata, or None."""
        async for batch in self.client.batches.list(limit=100):
            if (batch.metadata or {}).get("granulon") == name:
                return batch
        return None

    async def collect(self, intent: dict) -> None:
        """Poll a batch to its end and store its answers; raise JudgeError where it failed as a whole."""
        if intent["batch"] is None:
            found = await self.find(intent["intent"])
            if found is None:  # killed before it was created
                self.ledger.append({"intent": intent["intent"], "done": "never created"})
                return
            intent["batch"] = found.id
            self.ledger.append({"intent": intent["intent"], "batch": found.id})
        while True:
            batch = await self.client.batches.retrieve(intent["batch"])
            if batch.status in ("completed", "failed", "expired", "cancelled"):
                break
            await asyncio.sleep(self.options.poll_seconds)
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id:
                content = await self.client.files.content(file_id)
                for line in content.text.split("\n"):  # splitlines would cut at characters inside of strings
                    self.collect_line(line, set(intent["names"]))
        self.ledger.append({"intent": intent["intent"], "done": batch.status})
        if batch.status == "failed":
            messages = "; ".join(str(error.message) for error in (batch.errors.data if batch.errors else None) or [])
            raise JudgeError(f"Batch {batch.id} failed ({messages or 'without a reason'}); nothing of it was judged.")

    def collect_line(self, line: str, names: set[str]) -> None:
        try:
            reply = json.loads(line)
            name, response = reply["custom_id"], reply.get("response") or {}
            key, _, attempt = name.rpartition("-")
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        if name not in names or int(attempt) in self.store.rows.get(key, {}):
            return
        try:
            if response.get("status_code") != 200:
                error = reply.get("error") or (response.get("body") or {}).get("error") or {}
                raise ValueError(f"batch: {error.get('message') or error.get('code') or response.get('status_code')}")
            self.keep(response.get("body"), key=key, attempt=int(attempt), response_format=self.formats[0])
        except ValueError as error:
            self.pending[key] = str(error)
