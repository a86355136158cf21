"""The Batch API: half the price, up to a day, and no batch is submitted twice."""

import asyncio
import contextlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai

from .client import JudgeError, Run, Stopped, triage
from .options import Unit
from .store import Ledger

# Limits of the Batch API: 50,000 requests and 200 MB.
BATCH_REQUESTS = 50_000
BATCH_BYTES = 190 * 10**6


class BatchRun(Run):
    """All requests of one `compute`, in batches."""

    ledger: Ledger

    async def resolve(self, key: str, unit: Unit, url: str, tokens: int) -> dict:
        """Return the rows that the batches brought.

        Raises:
            Stopped: there are none.
        """
        rows = self.store.answers(key)
        if self.options.is_final(rows):
            return {"rows": rows, "cached": True}
        raise Stopped(self.pending.get(key) or "the batch gave no answer; run again to submit it again")

    async def prepare(self) -> None:
        """Collect what is under way, then submit, poll and collect what is missing, then the same for repairs."""
        self.ledger = Ledger(self.options.store, create=True)
        with contextlib.closing(self.ledger), self.ledger.lock:  # a second process waits, and finds the answers in the store
            self.ledger.refresh()
            for intent in self.ledger.unfinished():
                await self.collect(intent)
            for attempt in (0, 1):
                self.reserved = 0.0
                files = await asyncio.to_thread(lambda a=attempt: list(self.write_batches(a)))  # type: ignore[misc]
                intents = []
                for path, names in files:
                    try:
                        intents.append(await self.submit(path, names))
                    finally:
                        os.unlink(path)
                for intent in intents:
                    await self.collect(intent)
        self.stop = ""  # of max_cost: `resolve` tells it unit by unit

    async def call(self, function: Callable[[], Any], recover: Callable[[], Any] | None = None) -> Any:
        """Return the result of an API call that may be repeated.

        Args:
            recover: finds what a failed try may have made all the same.

        Raises:
            JudgeError: it failed for good.
        """
        tries = 0
        while True:
            try:
                return await function()
            except openai.OpenAIError as error:
                kind, message = triage(error)
                if kind == "fatal":
                    raise JudgeError(message) from None
                if kind == "bad" or tries == self.options.max_retries:
                    raise JudgeError(f"The Batch API failed ({message}); run again to go on.") from None
                headers = getattr(getattr(error, "response", None), "headers", None) or {}
                await self.sleep(min(self.delay(headers, tries, kind), self.options.max_wait))
                if recover is not None and (found := await recover()) is not None:
                    return found
                tries += 1

    def write_batches(self, attempt: int) -> Iterator[tuple[str, list[str]]]:
        """Write input files for all units that lack this answer, split to the limits.

        Yields:
            A file, and the custom ids in it.
        """
        seen: set[str] = set()
        lines: list[bytes] = []
        names: list[str] = []
        size = 0

        def flush() -> tuple[str, list[str]]:
            with tempfile.NamedTemporaryFile(suffix=".jsonl", delete=False) as file:
                file.writelines(lines)
            return file.name, list(names)

        for unit in self.units:
            try:
                digest, url, tokens = self.options.prepare(unit)
            except Exception:  # told by `one`
                continue
            key = self.options.key(digest, unit)
            self.store.refresh()
            rows = self.store.answers(key)
            if attempt == 0 and self.options.is_final(rows) and not self.options.settled(rows):
                rows = []  # to be asked again
            if key in seen or self.options.is_final(rows) or len(rows) != attempt:
                continue
            seen.add(key)
            try:
                self.reserve(self.options.tokens(unit, tokens))
            except Stopped as error:
                self.pending[key] = str(error)
                continue
            bad = (rows[0].get("content") or "") if rows else None
            body = self.request(unit, url, bad, attempt, self.formats[0], self.extras)
            name = f"{key}-{attempt}"
            data = json.dumps({"custom_id": name, "method": "POST", "url": self.endpoint, "body": body}).encode() + b"\n"
            if lines and (len(lines) >= BATCH_REQUESTS or size + len(data) > BATCH_BYTES):
                yield flush()
                lines, names, size = [], [], 0
            lines.append(data)
            names.append(name)
            size += len(data)
        if lines:
            yield flush()

    @property
    def endpoint(self) -> str:
        """The API that answers the requests in a batch; Azure has its own name for it."""
        return "/chat/completions" if isinstance(self.client, openai.AsyncAzureOpenAI) else "/v1/chat/completions"

    async def submit(self, path: str, names: list[str]) -> dict:
        """Upload and create one batch.

        The intent is on disk before, and named in the batch's metadata: whatever happens in between, the next run finds the
        batch by that name instead of submitting again.
        """
        file = await self.call(lambda: self.client.files.create(file=Path(path), purpose="batch"))
        token = secrets.token_hex(16)
        intent: dict[str, Any] = {"intent": token, "names": names, "batch": None}
        self.ledger.append(intent)
        create = self.client.batches.create
        batch = await self.call(
            lambda: create(
                input_file_id=file.id,
                endpoint=self.endpoint,  # type: ignore[arg-type]
                completion_window="24h",
                metadata={"granulon": token},
            ),
            lambda: self.find(token),
        )
        self.n_requests += len(names)
        self.ledger.append({"intent": token, "batch": batch.id})
        return {**intent, "batch": batch.id}

    async def find(self, name: str) -> Any:
        """Return the batch with this name in its metadata, or None."""

        async def search() -> Any:
            async for batch in self.client.batches.list(limit=100):
                if (batch.metadata or {}).get("granulon") == name:
                    return batch
            return None

        return await self.call(search)

    async def collect(self, intent: dict) -> None:
        """Poll a batch to its end and store its answers.

        Raises:
            JudgeError: it failed as a whole.
        """
        if intent["batch"] is None:
            found = await self.find(intent["intent"])
            if found is None:  # killed before it was created
                self.ledger.append({"intent": intent["intent"], "done": "never created"})
                return
            intent["batch"] = found.id
            self.ledger.append({"intent": intent["intent"], "batch": found.id})
        while True:
            batch = await self.call(lambda: self.client.batches.retrieve(intent["batch"]))
            if batch.status in ("completed", "failed", "expired", "cancelled"):
                break
            await asyncio.sleep(self.options.poll_seconds)
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id:
                content = await self.call(lambda id=file_id: self.client.files.content(id))  # type: ignore[misc]
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
