"""Prices of judges, in USD."""

import re
from collections.abc import Iterable

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
