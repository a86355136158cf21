"""Requests and tokens per minute: what the user gives, or what the server's headers say."""

import asyncio
import contextlib
import email.utils
import math
import re
import time
from collections.abc import Callable
from typing import Any


def seconds(text: str | None) -> float | None:
    """Read a Retry-After (seconds or HTTP date) or x-ratelimit-reset header ("6m0s", "12ms") as seconds, None if unreadable."""
    if not text:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(text)) if math.isfinite(float(text)) else None
    parts = re.findall(r"([\d.]+)(ms|s|m|h|d)", text)
    if parts and "".join(a + b for a, b in parts) == text.strip():
        with contextlib.suppress(ValueError):
            return sum(float(a) * {"ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86400}[b] for a, b in parts)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


class Bucket:
    """A budget per minute as a token bucket.

    Given by the user it is spent evenly (a second's worth at once). Else it is learnt from the server's headers, which also say
    how much may be spent at once.
    """

    def __init__(self, per_minute: float | None):
        self.given, self.spent, self.time = per_minute is not None, 0.0, time.monotonic()
        self.rate = per_minute / 60 * 0.995 if per_minute else math.inf  # 0.5 % off: a window never sees one too many
        self.cap = max(1.0, self.rate)
        self.level = 1.0

    def wait(self, cost: float) -> float:
        """Return the seconds until `cost` may be spent; a cost above the bucket waits for a full one and leaves a debt."""
        if self.rate == math.inf:
            return 0.0
        now = time.monotonic()
        self.level, self.time = min(self.cap, self.level + (now - self.time) * self.rate), now
        return max(0.0, (min(cost, self.cap) - self.level) / self.rate)

    def spend(self, cost: float) -> float:
        """Take `cost` out, and return the total spent so far."""
        self.level -= cost
        self.spent += cost
        return self.spent

    def sync(self, limit: str | None, remaining: str | None, sent: float, spent: float) -> None:
        """Take over what the headers say. `remaining` is as of when the request was `sent`, after `spent` in all; since then
        the bucket has been refilled, and others were sent."""
        try:
            allowed, left = float(limit or ""), float(remaining or "")
        except ValueError:
            return
        if not (math.isfinite(allowed) and math.isfinite(left) and allowed >= 1):
            return
        left = max(0.0, left)
        now, rate = time.monotonic(), allowed / 60
        left += (now - sent) * rate - (self.spent - spent)
        if self.given:
            self.rate, self.level = min(self.rate, rate), min(self.level, left)
        else:
            self.rate, self.cap, self.level, self.time = rate, allowed, min(allowed, left), now


class Limiter:
    """Requests and tokens per minute, and pauses that the server asks for; shared by all requests of a run."""

    def __init__(self, rpm: float | None, tpm: float | None):
        self.requests, self.tokens, self.paused, self.lock = Bucket(rpm), Bucket(tpm), 0.0, asyncio.Lock()

    async def take(self, tokens: float, stopped: Callable[[], Any]) -> tuple[float, float, float]:
        """Wait for one's turn; return the time, and all requests and tokens spent by then."""
        async with self.lock:
            while not stopped():
                wait = max(self.requests.wait(1), self.tokens.wait(tokens), self.paused - time.monotonic())
                if wait <= 0:
                    break
                await asyncio.sleep(min(wait, 0.5))  # headers may change it meanwhile
            return time.monotonic(), self.requests.spend(1), self.tokens.spend(tokens)

    def learn(self, ticket: tuple[float, float, float], headers: Any) -> None:
        """Take over what the headers of an answer say; `ticket` is what `take` returned for it."""
        for name, bucket, spent in (("requests", self.requests, ticket[1]), ("tokens", self.tokens, ticket[2])):
            limit, remaining = (headers.get(f"x-ratelimit-{what}-{name}") for what in ("limit", "remaining"))
            bucket.sync(limit, remaining, ticket[0], spent)

    def pause(self, delay: float) -> None:
        self.paused = max(self.paused, time.monotonic() + delay)
