# Copyright 2026 The Granulon team. Licensed under the Apache License, Version 2.0.
"""Reducers: how the patch features of an image become a few visual tokens, AdaTA and what the field uses beside it.

A reducer is a function `(patches, budget, num_slots) -> GranulonAggregation` that [`register_reducer`] gives a name; one with
weights is a module that is called in the same way. All are batched: the budget of each image is data, so that one batch mixes
budgets without a Python loop over images, without host synchronisation and without a break of a compiled graph. Ties go to the
patch with the lower index, and an image gets the same tokens alone as in a batch.

Notation: I images, N = H·W patches on an H×W grid, D vision width, K slots per image, b ≤ K the budget of an image. Slots that
a budget leaves empty hold zeros and are hidden from the language model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .aggregation_granulon import GranulonAggregation, aggregate, cosine_relation, grid_positions


@dataclass
class PatchFeatures:
    """What a reducer may look at.

    Args:
        features (`torch.Tensor`): patch features in row-major order, shape [I x N x D].
        grid (`tuple[int, int]`): H and W.
        alpha (`torch.Tensor`, *optional*): pooling kernel side of each image's level, shape [I], where any level pools; AdaTA
            alone uses it.
        relation (`torch.Tensor`, *optional*): relation between patches for AdaTA, shape [I x N x N].
        attention (`torch.Tensor`, *optional*): how much the image as a whole looks at each patch, shape [I x N]: the CLS
            token's attention, mean over heads; the mean attention that a patch receives in a tower without CLS token. Where
            there is no attention at all the norm of the feature stands in for it.
        keys (`torch.Tensor`, *optional*): attention keys of the patches, shape [I x N x heads·d]; else the features.
        relevance (`torch.Tensor`, *optional*): likeness of each patch to the question, shape [I x N]; without a question all
            patches are equally relevant.
        scales (`dict[int, torch.Tensor]`, *optional*): features [I x s² x D] of the image downsampled to s × s patches.
        training (`bool`): whether the model is being trained; "random" then draws anew.
    """

    features: torch.Tensor
    grid: tuple[int, int]
    alpha: torch.Tensor | None = None
    relation: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    relevance: torch.Tensor | None = None
    scales: dict[int, torch.Tensor] | None = None
    training: bool = False

    @property
    def importance(self) -> torch.Tensor:
        """The attention to each patch, or the norm of its feature. Shape [I x N]."""
        return self.features.float().norm(dim=-1) if self.attention is None else self.attention

    def key_cosine(self) -> torch.Tensor:
        """Cosine similarity of the patches' keys. Shape [I x N x N]."""
        return cosine_relation(self.features if self.keys is None else self.keys)


Reduce = Callable[[PatchFeatures, torch.Tensor, int], GranulonAggregation]
# Slots that a budget fills of every image: (budget, alpha, (H, W)) -> number.
Fills = Callable[[int, int, tuple[int, int]], int]


class Reducer(NamedTuple):
    """An entry of [`REDUCERS`].

    Args:
        build (`Callable`): gives the reducer of a config and a vision width.
        needs (`frozenset[str]`): of "attention" (and keys), "question" and "scales", what [`PatchFeatures`] must hold.
        fills (`Callable`, *optional*): how many slots a budget (at most K) fills of an image with a pooling kernel side and a
            grid; `None` where the picture or the question decides. The filled slots come first.
    """

    build: Callable[[Any, int], Reduce]
    needs: frozenset[str]
    fills: Fills | None = None


REDUCERS: dict[str, Reducer] = {}


def register_reducer(name: str, *needs: str, fills: Fills | None = None) -> Callable:
    """Register a function as the reducer of this name, or a module's class, which is built from a config and a vision width."""

    def register(reducer):
        build = reducer if isinstance(reducer, type) else lambda config, width: reducer
        REDUCERS[name] = Reducer(build, frozenset(needs), fills)
        return reducer

    return register


# --- what several reducers share --------------------------------------------------------------------------------------


def fill_patches(budget: int, alpha: int, grid: tuple[int, int]) -> int:
    """One slot for each chosen patch."""
    return min(budget, grid[0] * grid[1])


def fill_cells(budget: int, alpha: int, grid: tuple[int, int]) -> int:
    """One slot for each cell of [`cut_cells`]."""
    return min(side_of(budget), grid[0]) * min(side_of(budget), grid[1])


def filled(count: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Return true on the first `count` slots of each image. Shape [I x K]."""
    return torch.arange(num_slots, device=count.device) < count.unsqueeze(1)


def order_of(scores: torch.Tensor) -> torch.Tensor:
    """Return the rank of every patch by its score, 0 for the highest, ties by index. Shape [I x N]."""
    return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def every_nth(mask: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Of the patches in a mask choose `count`, equally spaced in row-major order: each n-th, n = ⌊size of the mask / count⌋.

    Args:
        mask (`torch.Tensor`): true on the patches to choose from, shape [I x N].
        count (`torch.Tensor`): shape [I].

    Returns:
        `torch.Tensor`: true on the chosen patches, shape [I x N].
    """
    step = (mask.sum(1) // count.clamp(min=1)).clamp(min=1).unsqueeze(1)
    number = mask.cumsum(1) - 1
    return mask & (number % step == 0) & (number // step < count.unsqueeze(1))


def collect(patches: PatchFeatures, tokens: torch.Tensor, rank: torch.Tensor, count: torch.Tensor, num_slots: int, owner=None):
    """Put the tokens of some patches into slots, each at its patch's place.

    Args:
        tokens (`torch.Tensor`): a token for every patch, shape [I x N x D].
        rank (`torch.Tensor`): the order of the patches; the first `count` get slots. Shape [I x N].
        count (`torch.Tensor`): shape [I].
        owner (`torch.Tensor`, *optional*): the patch into whose token each patch went, -1 for none, shape [I x N]. By default
            a patch with a slot is its own, and no other one.

    Returns:
        [`GranulonAggregation`]: its clusters are the slots; patches that went into no token have the cluster -1.
    """
    height, width = patches.grid
    chosen = rank.argsort(dim=1)[:, :num_slots]
    chosen = F.pad(chosen, (0, num_slots - chosen.shape[1]))
    keep = filled(count, num_slots)
    places = grid_positions(height, width, tokens.device)
    slot = torch.where(rank < count.unsqueeze(1), rank, -1)
    if owner is not None:
        slot = torch.where(owner < 0, -1, slot.gather(1, owner.clamp(min=0)))
    return GranulonAggregation(
        tokens=tokens.gather(1, chosen.unsqueeze(2).expand(-1, -1, tokens.shape[2])) * keep.unsqueeze(2),
        assignment=slot.view(-1, height, width),
        kept_clusters=torch.arange(num_slots, device=keep.device).where(keep, -1),
        positions=places[chosen] * keep.unsqueeze(2),
    )


def in_row_major(*groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Order patches group by group, each in row-major order; groups are disjoint masks [I x N].

    Returns:
        `tuple`: the rank of every patch [I x N], and how many patches are in any group [I].
    """
    group = torch.full_like(groups[0], len(groups), dtype=torch.long)
    for number, mask in enumerate(groups):
        group = group.masked_fill(mask, number)
    return group.argsort(dim=1, stable=True).argsort(dim=1), (group < len(groups)).sum(1)


class Cells(NamedTuple):
    """Each image's grid cut into rows × columns cells, one for each slot, as adaptive pooling cuts it.

    Args:
        rows, columns (`torch.Tensor`): row and column of the cell in each slot, shape [I x K].
        num_rows, num_columns (`torch.Tensor`): how many there are, shape [I x 1].
        keep (`torch.Tensor`): true where a slot has a cell, shape [I x K].
    """

    rows: torch.Tensor
    columns: torch.Tensor
    num_rows: torch.Tensor
    num_columns: torch.Tensor
    keep: torch.Tensor


def side_of(budget: torch.Tensor | int) -> torch.Tensor | int:
    """⌊√b⌋, the side of the largest square of cells within a budget."""
    return math.isqrt(budget) if isinstance(budget, int) else budget.double().sqrt().floor().long()


def cut_cells(grid: tuple[int, int], budget: torch.Tensor, num_slots: int) -> Cells:
    """⌊√b⌋ × ⌊√b⌋ cells, in row-major order; not more rows or columns than the grid has."""
    side = side_of(budget).unsqueeze(1)
    num_rows, num_columns = side.clamp(max=grid[0]), side.clamp(max=grid[1])
    slot = torch.arange(num_slots, device=budget.device).unsqueeze(0)
    return Cells(slot // num_columns, slot % num_columns, num_rows, num_columns, slot < num_rows * num_columns)


def members_of(cells: Cells, grid: tuple[int, int]) -> torch.Tensor:
    """True on the patches of the cell in each slot: rows ⌊r·H/s⌋ to ⌈(r+1)·H/s⌉ and likewise columns. Shape [I x K x N]."""

    def inside(index: torch.Tensor, number: torch.Tensor, size: int) -> torch.Tensor:
        line = torch.arange(size, device=index.device)
        first, last = index * size // number, ((index + 1) * size + number - 1) // number
        return (line >= first.unsqueeze(2)) & (line < last.unsqueeze(2))

    rows = inside(cells.rows, cells.num_rows, grid[0])
    columns = inside(cells.columns, cells.num_columns, grid[1])
    return (rows.unsqueeze(3) & columns.unsqueeze(2)).flatten(2) & cells.keep.unsqueeze(2)


def collect_cells(
    cells: Cells, grid: tuple[int, int], tokens: torch.Tensor, members: torch.Tensor | None = None
) -> GranulonAggregation:
    """The tokens [I x K x D] of cells; each is at the center of its patches, and a patch belongs to the first cell it is in."""
    members = members_of(cells, grid) if members is None else members
    slots = torch.arange(cells.keep.shape[1], device=tokens.device)
    share = members.float() / members.sum(2, keepdim=True).clamp(min=1)
    return GranulonAggregation(
        tokens=tokens * cells.keep.unsqueeze(2),
        assignment=members.byte().argmax(1).view(-1, *grid),
        kept_clusters=slots.where(cells.keep, -1),
        positions=share @ grid_positions(*grid, tokens.device),
    )


# --- reducers without weights -----------------------------------------------------------------------------------------


def adata(patches: PatchFeatures, budget: torch.Tensor, num_slots: int, **options) -> GranulonAggregation:
    """AdaTA (paper, ours): pool(α) → relation-aware clustering into b clusters → the best K of them by quality."""
    return aggregate(
        patches.features, patches.grid, patches.alpha, budget, num_slots=num_slots, relation=patches.relation, **options
    )


def adata_of(config, patches: PatchFeatures, budget: torch.Tensor, num_slots: int) -> GranulonAggregation:
    """AdaTA with the options of a config, as they are when it is called: a sweep changes the levels of the same weights."""
    return adata(
        patches,
        budget,
        num_slots,
        # A call may ask for as many clusters as there are slots.
        max_clusters=max(*(level["beta"] for level in config.granularity_levels), config.num_semantic_tokens),
        relation_weight=config.relation_weight,
        clustering=config.clustering,
        steps=config.clustering_steps,
        filter_weights=config.filter_weights,
    )


def fill_clusters(budget: int, alpha: int, grid: tuple[int, int]) -> int:
    """One slot for each cluster of the pooled patches: none of them runs empty."""
    return min(budget, math.ceil(grid[0] / alpha) * math.ceil(grid[1] / alpha))


REDUCERS["adata"] = Reducer(lambda config, width: partial(adata_of, config), frozenset(), fill_clusters)


@register_reducer("pool", fills=fill_cells)
def pool(patches: PatchFeatures, budget: torch.Tensor, num_slots: int) -> GranulonAggregation:
    """Average-pool the grid to ⌊√b⌋ × ⌊√b⌋ tokens (Matryoshka Multimodal Models, arXiv 2405.17430), with the cells of adaptive
    pooling where the grid cannot be divided."""
    cells = cut_cells(patches.grid, budget, num_slots)
    members = members_of(cells, patches.grid)
    share = members / members.sum(2, keepdim=True).clamp(min=1)
    return collect_cells(cells, patches.grid, share.to(patches.features) @ patches.features, members)


@register_reducer("attention-merge", "attention", fills=fill_patches)
def attention_merge(patches: PatchFeatures, budget: torch.Tensor, num_slots: int) -> GranulonAggregation:
    """Keep the patches that get most attention and merge the rest into a few (VisionZip, arXiv 2412.04467).

    Of the budget, r = ⌊b/6⌋ tokens (the paper's 10 of 64) are merged ones: every n-th of the rest is a target, each other patch
    joins the target with the nearest key (cosine), and a target becomes itself plus the mean of what joined it. First the kept
    patches, then the targets, both in row-major order. The attention is that of the tower's last layer, whose features
    these are (the paper: the penultimate layer, whose features LLaVA takes).
    """
    features = patches.features
    merged = budget // 6
    dominant = order_of(patches.importance) < (budget - merged).unsqueeze(1)
    target = every_nth(~dominant, merged)
    joins = ~dominant & ~target & target.any(1, keepdim=True)
    nearest = patches.key_cosine().masked_fill(~target.unsqueeze(1), -float("inf")).argmax(2)
    patch = torch.arange(features.shape[1], device=features.device)
    joined = (nearest.unsqueeze(1) == patch.unsqueeze(1)) & joins.unsqueeze(1)
    share = joined / joined.sum(2, keepdim=True).clamp(min=1)
    owner = torch.where(joins, nearest, patch.where(dominant | target, -1))
    return collect(patches, features + share.to(features) @ features, *in_row_major(dominant, target), num_slots, owner)


@register_reducer("adaptive-prune", "attention")
def adaptive_prune(patches: PatchFeatures, budget: torch.Tensor, num_slots: int, neighbors: int = 32) -> GranulonAggregation:
    """Keep as many patches as stand out (LLaVA-PruMerge+, arXiv 2403.15388); the budget is an upper bound.

    The m patches whose attention is above Q3 + 1.5 IQR (the highest one, where none is; at most half of the budget), and as
    many of the others, equally spaced. To each the attention-weighted sum of its 32 nearest patches by key (cosine) is added.
    All in row-major order.
    """
    features, importance = patches.features, patches.importance
    number = features.shape[1]
    ordered = importance.sort(dim=1).values
    quarter, three_quarters = (quantile(ordered, part).unsqueeze(1) for part in (0.25, 0.75))
    outliers = (importance > three_quarters + 1.5 * (three_quarters - quarter)).sum(1).clamp(min=1)
    main = order_of(importance) < torch.minimum(outliers, (budget + 1) // 2).unsqueeze(1)
    sample = every_nth(~main, torch.minimum(main.sum(1), budget - main.sum(1)))
    alike = patches.key_cosine().masked_fill(torch.eye(number, dtype=torch.bool, device=features.device), -float("inf"))
    nearest = alike.argsort(dim=2, descending=True, stable=True)[:, :, : min(neighbors, number - 1)]
    weight = torch.zeros_like(alike).scatter(2, nearest, 1.0).to(features) * importance.to(features).unsqueeze(1)
    return collect(patches, features + weight @ features, *in_row_major(main | sample), num_slots)


def quantile(ordered: torch.Tensor, part: float) -> torch.Tensor:
    """A quantile of sorted rows, interpolated linearly as NumPy does. Shape [I]."""
    place = part * (ordered.shape[1] - 1)
    low = math.floor(place)
    high = math.ceil(place)
    return ordered[:, low] + (ordered[:, high] - ordered[:, low]) * (place - low)


@register_reducer("question-dpp", "question")
def question_dpp(patches: PatchFeatures, budget: torch.Tensor, num_slots: int) -> GranulonAggregation:
    """Keep patches that differ from each other and suit the question (CDPruner, arXiv 2506.10967).

    Greedy MAP inference of a determinantal point process with the kernel diag(r) S diag(r): S the cosine of the features, r the
    relevance, scaled to [0, 1] over the image. Relevance is the cosine of the projected patch and the mean embedding of the
    question's words (ours: the paper takes CLIP's text tower, which most towers lack). In row-major order.
    """
    similarity = cosine_relation(patches.features)
    # A patch is exactly as like itself as any other is: rounding must not choose among equals.
    similarity = torch.where(torch.eye(similarity.shape[1], dtype=torch.bool, device=similarity.device), 1.0, similarity)
    relevance = similarity.new_ones(similarity.shape[:2])
    if patches.relevance is not None:
        lowest, highest = patches.relevance.to(similarity).aminmax(dim=1, keepdim=True)
        scaled = (patches.relevance.to(similarity) - lowest) / (highest - lowest).clamp(min=torch.finfo(similarity.dtype).tiny)
        relevance = torch.where(highest > lowest, scaled, 1.0)
    kernel = relevance.unsqueeze(2) * similarity * relevance.unsqueeze(1)
    gain = kernel.diagonal(dim1=1, dim2=2)
    patch = torch.arange(gain.shape[1], device=gain.device)
    rank = torch.full_like(gain, gain.shape[1], dtype=torch.long)
    factors: list[torch.Tensor] = []  # rows of a Cholesky factor, one for each chosen patch
    for step in range(min(num_slots, gain.shape[1])):
        left = gain.masked_fill(rank <= step, -float("inf"))
        best = torch.where(left == left.amax(1, keepdim=True), patch, len(patch)).amin(1, keepdim=True)
        row = kernel.gather(1, best.unsqueeze(2).expand(-1, -1, kernel.shape[2])).squeeze(1)
        for factor in factors:
            row = row - factor * factor.gather(1, best)
        pivot = gain.gather(1, best)
        # What lies in the span of those already chosen adds nothing, and must not add rounding errors.
        factors.append(torch.where(pivot > 1e-10, row / pivot.clamp(min=1e-10).sqrt(), 0.0))
        gain = gain - factors[-1].square()
        rank = torch.where(patch == best, step, rank)
    return collect(patches, patches.features, *in_row_major(rank < budget.unsqueeze(1)), num_slots)


def scatter(index: torch.Tensor) -> torch.Tensor:
    """Hash integers to 32 bits that look drawn at random, without any generator (the finalizer of MurmurHash3)."""
    mixed = index + 0x9E3779B9
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * factor & 0xFFFFFFFF
    return mixed ^ (mixed >> 16)


@register_reducer("random", fills=fill_patches)
def random(patches: PatchFeatures, budget: torch.Tensor, num_slots: int) -> GranulonAggregation:
    """Keep b patches drawn at random, in row-major order: a control that reducers must beat (arXiv 2511.02650).

    In training every image and step draws anew; else one fixed draw, the same for all images, keeps answers repeatable.
    """
    images, number, _ = patches.features.shape
    if patches.training:
        draw = torch.rand(images, number, device=budget.device)
    else:
        draw = scatter(torch.arange(number, device=budget.device)).expand(images, -1)
    return collect(patches, patches.features, *in_row_major(order_of(draw) < budget.unsqueeze(1)), num_slots)


@register_reducer("downsample", "scales", fills=fill_cells)
def downsample(patches: PatchFeatures, budget: torch.Tensor, num_slots: int) -> GranulonAggregation:
    """Let the tower see the image at ⌊√b⌋ × ⌊√b⌋ patches: a control that reducers must beat (arXiv 2510.07143)."""
    cells = cut_cells(patches.grid, budget, num_slots)
    width = next(iter(patches.scales.values())).shape[2]
    tokens = patches.features.new_zeros(len(budget), num_slots, width)
    for side, features in patches.scales.items():
        features = F.pad(features, (0, 0, 0, num_slots - features.shape[1]))
        tokens = torch.where((side_of(budget) == side).view(-1, 1, 1), features, tokens)
    return collect_cells(cells, patches.grid, tokens)


# --- reducers with weights --------------------------------------------------------------------------------------------


def sincos_positions(grid: tuple[int, int], width: int, device: torch.device) -> torch.Tensor:
    """Fixed 2-D sine-cosine embeddings: half of the channels for the row, half for the column. Shape [N x D]."""
    quarter = (width + 3) // 4
    frequency = 10000.0 ** (-torch.arange(quarter, device=device) / quarter)
    place = torch.cartesian_prod(*(torch.arange(size, device=device, dtype=torch.float32) for size in grid))
    angle = place.unsqueeze(2) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=2).flatten(1)[:, :width]


def num_heads(width: int) -> int:
    """Heads of about 64 channels that divide the width."""
    return next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)


@register_reducer("queries", fills=lambda budget, alpha, grid: budget)
class QueryReducer(nn.Module):
    """K learned queries and one cross-attention, of which a budget takes the first b (MQT, arXiv 2405.19315).

    Keys are the normalized features with 2-D sine-cosine positions. The place of a token is the mean place of what its query
    attends to (ours).
    """

    def __init__(self, config, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.num_semantic_tokens, width))
        self.query_norm = nn.LayerNorm(width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads(width), batch_first=True)
        self.out_norm = nn.LayerNorm(width)

    def forward(self, patches: PatchFeatures, budget: torch.Tensor, num_slots: int) -> GranulonAggregation:
        values = self.norm(patches.features.to(self.queries))
        keys = values + sincos_positions(patches.grid, values.shape[2], values.device).to(values)
        queries = self.query_norm(self.queries[:num_slots]).expand(len(values), -1, -1)
        tokens, weights = self.attention(queries, keys, values)
        keep = filled(budget, num_slots)
        height, width = patches.grid
        places = weights.float() @ grid_positions(height, width, weights.device)
        slot = weights.masked_fill(~keep.unsqueeze(2), -1.0).argmax(1)
        return GranulonAggregation(
            tokens=self.out_norm(tokens).to(patches.features) * keep.unsqueeze(2),
            assignment=slot.view(-1, height, width),
            kept_clusters=torch.arange(num_slots, device=keep.device).where(keep, -1),
            positions=places * keep.unsqueeze(2),
        )


@register_reducer("region-attention", fills=fill_cells)
class RegionReducer(nn.Module):
    """⌊√b⌋ × ⌊√b⌋ queries, each attending to its own region of the features (TokenPacker, arXiv 2407.02392).

    Queries are the features downsampled bilinearly; what a query finds in its region is added to it, and an MLP follows with
    its input added. With several `vision_feature_layer`s the features are multi-level ones, as in the paper.
    """

    def __init__(self, config, width: int):
        super().__init__()
        self.query_norm = nn.LayerNorm(width)
        self.norm = nn.LayerNorm(width)
        self.query_proj = nn.Linear(width, width)
        self.key_proj = nn.Linear(width, width)
        self.value_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, patches: PatchFeatures, budget: torch.Tensor, num_slots: int) -> GranulonAggregation:
        features = patches.features.to(self.out_proj.weight)
        cells = cut_cells(patches.grid, budget, num_slots)
        members = members_of(cells, patches.grid)
        coarse = bilinear_weights(cells, patches.grid).to(features) @ features
        values = self.norm(features)
        heads = num_heads(features.shape[2])
        parts = self.query_proj(self.query_norm(coarse)), self.key_proj(values), self.value_proj(values)
        query, key, value = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in parts)
        # An empty slot attends to everything: what it finds is dropped, and no row of the mask may be empty.
        mask = (members | ~cells.keep.unsqueeze(2)).unsqueeze(1)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        tokens = coarse + self.out_proj(found.transpose(1, 2).flatten(2))
        return collect_cells(cells, patches.grid, (tokens + self.mlp(tokens)).to(patches.features), members)


def bilinear_weights(cells: Cells, grid: tuple[int, int]) -> torch.Tensor:
    """Return patch weights in the bilinear downsampling to the cells, as `F.interpolate` does it. Shape [I x K x N]."""

    def along(index: torch.Tensor, number: torch.Tensor, size: int) -> torch.Tensor:
        place = ((index + 0.5) * size / number - 0.5).clamp(0, size - 1).unsqueeze(2)
        return (1 - (torch.arange(size, device=index.device) - place).abs()).clamp(min=0)

    rows = along(cells.rows, cells.num_rows, grid[0])
    columns = along(cells.columns, cells.num_columns, grid[1])
    return (rows.unsqueeze(3) * columns.unsqueeze(2)).flatten(2)


__all__ = ["REDUCERS", "PatchFeatures", "Reducer", "register_reducer"]
