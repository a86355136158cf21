"""Targets of the granularity controller by measured value: what an answer loses at each level, and what its tokens cost (ours).

Notation: Q questions, P prices, n number of granularity levels. The cost of a level is loss + price · tokens, in nats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from granulon_hf.stats import bootstrap_mean


@dataclass(frozen=True)
class ScoredQuestion:
    """A question with the loss of its answer and the visual tokens at each level by name, and whether it is held out."""

    text: str
    losses: dict[str, float]
    tokens: dict[str, float]
    test: bool

    @property
    def levels(self) -> list[str]:
        """Names of the levels."""
        return list(self.losses)


def problem_of_scores(row: dict[str, Any], first: dict[str, Any] | None) -> str | None:
    """Say what is wrong with the scores of a row of labels, if anything; `first` is the first row."""
    for name in ("losses", "tokens"):
        values = row.get(name)
        if not isinstance(values, dict) or not all(
            type(v) in (int, float) and math.isfinite(v) and v >= 0 for v in values.values()
        ):
            return f'it has no `{name}` such as {{"coarse": 8, "fine": 5}}'
        if values.keys() != row["losses"].keys() or len(values) < 2:
            return "its `losses` and `tokens` must be of the same levels, two at least"
    if first is not None and row["losses"].keys() != first["losses"].keys():
        return f"its levels are {', '.join(row['losses'])}, and those of the first row {', '.join(first['losses'])}"
    return None


def costs_of(
    questions: Sequence[ScoredQuestion], levels: Sequence[str], prices: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return costs [Q x P x n], losses [Q x n] and tokens [Q x n] of questions, in the order of the model's levels."""
    losses, tokens = (
        torch.tensor([[getattr(question, what)[name] for name in levels] for question in questions], dtype=torch.float64)
        for what in ("losses", "tokens")
    )
    costs = losses.unsqueeze(1) + torch.tensor(prices, dtype=torch.float64).view(1, -1, 1) * tokens.unsqueeze(1)
    return costs, losses, tokens


def priced_loss(logits: torch.Tensor, costs: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the cross-entropy on the soft target softmax(-cost / temperature) plus a pairwise ranking loss.

    Of two levels the cheaper one must lead by their gap of cost / temperature, which is its lead at the soft target: a
    controller that has learned the target has no ranking loss.

    Args:
        logits, costs (`torch.Tensor`): shape [Q x P x n].
    """
    costs = costs / temperature
    soft = F.cross_entropy(logits.flatten(0, 1), (-costs).softmax(-1).flatten(0, 1).to(logits))
    gap = (costs.unsqueeze(-2) - costs.unsqueeze(-1)).to(logits)
    lead = logits.unsqueeze(-1) - logits.unsqueeze(-2)
    cheaper = gap > 0
    ranking = ((gap - lead).relu() * cheaper).sum() / cheaper.sum().clamp(min=1)
    return soft + ranking


def measure_costs(
    chosen: np.ndarray,
    train: Sequence[ScoredQuestion],
    test: Sequence[ScoredQuestion],
    levels: Sequence[str],
    prices: Sequence[float],
) -> list[dict[str, Any]]:
    """Compare the levels chosen for held-out questions [Q x P] with every fixed level and with the oracle, at each price.

    Intervals are 95 % bootstraps over questions ([`~granulon_hf.stats.bootstrap_mean`]).

    Returns:
        `list[dict]`: for each price `price`; `accuracy` (the chosen level costs least, or as little as another) with its
        `accuracy_ci95`; means of `cost`, `loss` and `tokens`; the same of each level in `fixed` and of the cheapest level of
        each question in `oracle`; `best_fixed` (the level that costs least on the training questions) and `saved` (cost against
        it) with its `saved_ci95`; and how often each level was `chosen`.
    """
    costs, losses, tokens = (values.numpy() for values in costs_of(test, levels, prices))
    known = costs_of(train, levels, prices)[0].mean(0).argmin(-1)
    each = np.arange(len(test))
    found = []
    for p, price in enumerate(prices):
        cost = costs[:, p]
        best = cost.min(1) + 1e-9

        def means(level: np.ndarray, cost: np.ndarray = cost, best: np.ndarray = best) -> dict[str, float]:
            right = cost[each, level] <= best
            values = {"accuracy": right, "cost": cost[each, level], "loss": losses[each, level], "tokens": tokens[each, level]}
            return {name: float(value.mean()) for name, value in values.items()}

        own, usual = chosen[:, p], int(known[p])
        samples = {"accuracy": (cost[each, own] <= best).astype(float), "saved": cost[:, usual] - cost[each, own]}
        intervals = {f"{name}_ci95": list(bootstrap_mean(value)[1:]) for name, value in samples.items()}
        found.append(
            {
                "price": price,
                **means(own),
                "saved": float(samples["saved"].mean()),
                **intervals,
                "best_fixed": levels[usual],
                "fixed": {name: means(np.full(len(test), index)) for index, name in enumerate(levels)},
                "oracle": means(cost.argmin(1)),
                "chosen": {name: int((own == index).sum()) for index, name in enumerate(levels)},
            }
        )
    return found
