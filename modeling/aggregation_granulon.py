# Copyright 2026 The Granulon team. Licensed under the Apache License, Version 2.0.
"""AdaTA, the adaptive token aggregation: pool, cluster, filter. Pure functions over batched tensors.

Notation: I images, N = H·W patch tokens on an H×W grid, D vision width, C the largest number of clusters of any level, K
semantic slots. The level of each image is data (tensors `alpha` and `beta` of shape [I]), not control flow: images of
different levels are aggregated together, without a Python loop over images, without host synchronisation and without any
random generator.

The kernel is held in fixed point, so that the sums of k-means are exact whatever their order: an image gets the same labels
alone and in any batch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

# One unit of the fixed-point kernel. Sums over N² entries stay below 2^53 for N up to about 90,000.
KERNEL_UNIT = 2.0**-20


@dataclass
class GranulonAggregation(ModelOutput):
    """
    Args:
        tokens (`torch.Tensor`): semantic tokens, best first; zeros in empty slots. Shape [I x K x D].
        assignment (`torch.Tensor`): cluster index of every patch. Shape [I x H x W].
        kept_clusters (`torch.Tensor`): cluster index in each slot, -1 where the slot is empty. Shape [I x K].
        scores (`torch.Tensor`): quality of every cluster, `-inf` where there is no cluster. Shape [I x C].
        positions (`torch.Tensor`): mean row and column of the patches of the cluster in each slot, each from -1 to 1; zeros in
            empty slots. Shape [I x K x 2].
        level (`torch.Tensor`, *optional*): index of the granularity level of every image. Shape [I].
    """

    tokens: torch.Tensor | None = None
    assignment: torch.Tensor | None = None
    kept_clusters: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    level: torch.Tensor | None = None

    @property
    def keep(self) -> torch.Tensor:
        """Return true where a slot is filled. Shape [I x K]."""
        return self.kept_clusters >= 0


def _work_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def grid_positions(height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Return row and column of every patch in row-major order, each from -1 to 1. Shape [H·W x 2]."""
    return torch.cartesian_prod(torch.linspace(-1, 1, height, device=device), torch.linspace(-1, 1, width, device=device))


def cosine_relation(features: torch.Tensor) -> torch.Tensor:
    """Return A = F̂F̂ᵀ [I x N x N], the cosine similarity between patch tokens [I x N x D] (what the released code clusters)."""
    unit = F.normalize(features.to(_work_dtype(features.device)), dim=-1)
    return unit @ unit.transpose(1, 2)


def pooling_cells(alpha: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cell of every patch [I x N] in an α×α average pooling, and the number of (rows, columns) of cells [I x 2].

    It is in ceil mode: 14 / 4 gives 4 × 4 cells, the ragged ones smaller. `alpha` is the kernel's side for each image [I].
    """
    patch = torch.arange(height * width, device=alpha.device)
    side = alpha.unsqueeze(1)
    shape = torch.stack([(height + alpha - 1) // alpha, (width + alpha - 1) // alpha], dim=1)
    return (patch // width // side) * shape[:, 1:] + (patch % width) // side, shape


def greedy_medoids(distance: torch.Tensor, valid: torch.Tensor, num_medoids: int) -> torch.Tensor:
    """Choose C medoids [I x C] among the `valid` tokens [I x N] by squared distances [I x N x N], without a random number.

    Each next one is the token that lowers the total distance to the nearest medoid most (ours).
    """
    distance = distance.masked_fill(~valid.unsqueeze(2), 0.0)
    nearest = torch.zeros_like(distance[:, :, 0]).masked_fill(valid, float("inf"))
    free = valid
    medoids = []
    for _ in range(num_medoids):
        total = torch.minimum(nearest.unsqueeze(2), distance).sum(1)
        medoid = total.masked_fill(~free, float("inf")).argmin(1, keepdim=True)
        free = free & (torch.arange(free.shape[1], device=free.device) != medoid)
        nearest = torch.minimum(nearest, distance.gather(2, medoid.unsqueeze(1).expand(-1, distance.shape[1], 1)).squeeze(2))
        medoids.append(medoid)
    return torch.cat(medoids, dim=1)


def _fill_empty_clusters(labels, distance, valid, num_clusters):
    """Give every empty cluster the token farthest from its own center, never the one nearest to it.

    Keeping one representative per cluster makes it certain that no other cluster runs empty.
    """
    clusters = torch.arange(distance.shape[2], device=labels.device)
    member = (labels.unsqueeze(2) == clusters) & valid.unsqueeze(2)
    occupied = member.any(1)
    empty = ~occupied & (clusters < num_clusters.unsqueeze(1))
    own = distance.gather(2, labels.unsqueeze(2)).squeeze(2)
    representative = own.unsqueeze(2).masked_fill(~member, float("inf")).argmin(1)
    spare = valid & ~((representative.unsqueeze(1) == torch.arange(labels.shape[1], device=labels.device).view(1, -1, 1))
                      & occupied.unsqueeze(1)).any(2)  # fmt: skip
    farthest = own.masked_fill(~spare, -float("inf")).argsort(dim=1, descending=True, stable=True)
    token = farthest.gather(1, (empty.long().cumsum(1) - 1).clamp(0, labels.shape[1] - 1))
    token = torch.where(empty, token, labels.shape[1])  # the rest write to a column that is dropped
    return F.pad(labels, (0, 1)).scatter(1, token, clusters.expand_as(token))[:, :-1]


def kernel_kmeans(
    kernel: torch.Tensor, valid: torch.Tensor, num_clusters: torch.Tensor, max_clusters: int, steps: int
) -> torch.Tensor:
    """Return the cluster of every token [I x N] by kernel k-means from greedy medoids; no cluster stays empty.

    Args:
        kernel (`torch.Tensor`): symmetric kernel, shape [I x N x N].
        valid (`torch.Tensor`): true on real tokens, shape [I x N].
        num_clusters (`torch.Tensor`): clusters of each image, at most its number of real tokens, shape [I].
        max_clusters (`int`): C, an upper bound of `num_clusters`.
        steps (`int`): how many, always.
    """
    pair = valid.unsqueeze(1) & valid.unsqueeze(2)
    kernel = kernel.masked_fill(~pair, 0.0)
    scale = kernel.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(kernel.dtype).tiny)
    kernel = torch.round(kernel / scale / KERNEL_UNIT)
    diagonal = kernel.diagonal(dim1=1, dim2=2)
    distance = diagonal.unsqueeze(1) + diagonal.unsqueeze(2) - 2 * kernel

    clusters = torch.arange(max_clusters, device=kernel.device)
    absent = (clusters >= num_clusters.unsqueeze(1)).unsqueeze(1)
    medoids = greedy_medoids(distance, valid, max_clusters)
    center_distance = distance.gather(2, medoids.unsqueeze(1).expand(-1, distance.shape[1], -1))
    for _ in range(steps + 1):
        center_distance = center_distance.masked_fill(absent, float("inf"))
        labels = _fill_empty_clusters(center_distance.argmin(2), center_distance, valid, num_clusters)
        member = ((labels.unsqueeze(2) == clusters) & valid.unsqueeze(2)).to(kernel.dtype)
        size = member.sum(1, keepdim=True).clamp(min=1)
        to_members = kernel @ member
        center_distance = (member * to_members).sum(1, keepdim=True) / size**2 - 2 * to_members / size
    return labels


def cluster_quality(
    pooled: torch.Tensor, member: torch.Tensor, cells: torch.Tensor, cell_grid: torch.Tensor, weights: list[float]
) -> torch.Tensor:
    """Return scores s = η₁·size + η₂·coherence − η₃·dispersion [I x C], each term in [0, 1]; `-inf` without a member (ours).

    Size is the share of the tokens, coherence the mean cosine of the members to the cluster mean, dispersion their mean
    squared distance to the centroid on the grid scaled to the unit square, over the largest possible value.

    Args:
        pooled (`torch.Tensor`): pooled features, shape [I x N x D].
        member (`torch.Tensor`): one-hot clusters of the real tokens, shape [I x N x C].
        cells (`torch.Tensor`): number of real tokens, shape [I].
        cell_grid (`torch.Tensor`): (rows, columns) of the tokens' grid, shape [I x 2].
        weights (`list[float]`): η₁, η₂, η₃.
    """
    size = member.sum(1)
    share = member / size.clamp(min=1).unsqueeze(1)
    mean = share.transpose(1, 2) @ pooled
    cosine = F.normalize(pooled, dim=-1) @ F.normalize(mean, dim=-1).transpose(1, 2)
    coherence = (cosine * share).sum(1).clamp(0, 1)

    token = torch.arange(pooled.shape[1], device=pooled.device)
    columns = cell_grid[:, 1:]
    position = torch.stack([token // columns, token % columns], dim=2) / (cell_grid - 1).clamp(min=1).unsqueeze(1)
    position = position.to(pooled.dtype)
    centroid = share.transpose(1, 2) @ position
    squared = (position.unsqueeze(2) - centroid.unsqueeze(1)).square().sum(-1)
    # A quarter per axis is the variance of two halves at opposite ends; an axis of one cell has none.
    largest = 0.25 * (cell_grid > 1).sum(1, keepdim=True).clamp(min=1)
    dispersion = (squared * share).sum(1) / largest

    score = weights[0] * size / cells.unsqueeze(1) + weights[1] * coherence - weights[2] * dispersion
    return torch.round(score, decimals=9).masked_fill(size == 0, -float("inf"))  # equal clusters tie exactly


def aggregate(
    features: torch.Tensor,
    grid: tuple[int, int],
    alpha: torch.Tensor | None,
    beta: torch.Tensor,
    *,
    num_slots: int,
    max_clusters: int,
    relation: torch.Tensor | None = None,
    relation_weight: float = 1.0,
    clustering: str = "joint",
    steps: int = 10,
    filter_weights: list[float] = (1.0, 1.0, 1.0),
) -> GranulonAggregation:
    """AdaTA: pool(α) → relation-aware clustering(β) → quality filter(K).

    The semantic token of a cluster is the mean of its members' pooled features, differentiable with respect to `features`;
    everything else runs without gradient.

    Args:
        features (`torch.Tensor`): patch tokens in row-major order, shape [I x N x D].
        grid (`tuple[int, int]`): H and W, with H · W = N.
        alpha (`torch.Tensor` or `None`): pooling kernel side of each image, integer, shape [I]; `None`, which costs less, says
            that no image is pooled.
        beta (`torch.Tensor`): number of clusters of each image, integer, shape [I].
        num_slots (`int`): K.
        max_clusters (`int`): an upper bound of `beta`.
        relation (`torch.Tensor`, *optional*): relation A between patches, shape [I x N x N]; cosine if not given.
        relation_weight (`float`): λ_f.
        clustering (`"joint"` or `"relation"`): the kernel is F̂F̂ᵀ + (λ_f / 2)·sym(A), or that of the rows of A.
        steps (`int`): k-means steps.
        filter_weights (`list[float]`): η.

    Returns:
        [`GranulonAggregation`]

    Raises:
        ValueError: `features` do not fill the grid.
    """
    height, width = grid
    images, patches, _ = features.shape
    if height * width != patches:
        raise ValueError(f"{patches} patch tokens do not fill a grid of {height} x {width}.")
    max_clusters = min(max_clusters, patches)

    with torch.no_grad():
        dtype = _work_dtype(features.device)
        cell_of_patch, cell_grid = pooling_cells(torch.ones_like(beta) if alpha is None else alpha, height, width)
        cells = cell_grid.prod(1)
        token = torch.arange(patches, device=features.device)
        valid = token < cells.unsqueeze(1)
        pooled = features.to(dtype)
        cosine = cosine_relation(features) if relation is None else None
        relation = cosine if relation is None else relation.to(dtype)
        if alpha is not None:
            pool = (cell_of_patch.unsqueeze(1) == token.view(1, -1, 1)).to(dtype)
            pool = pool / pool.sum(2, keepdim=True).clamp(min=1)
            pooled = pool @ pooled
            relation, cosine = pool @ relation @ pool.transpose(1, 2), None
        if clustering == "relation":
            kernel = relation @ relation.transpose(1, 2)
        else:
            cosine = cosine_relation(pooled) if cosine is None else cosine
            kernel = cosine + relation_weight / 4 * (relation + relation.transpose(1, 2))
        labels = kernel_kmeans(kernel, valid, torch.minimum(beta, cells), max_clusters, steps)

        clusters = torch.arange(max_clusters, device=features.device)
        member = ((labels.unsqueeze(2) == clusters) & valid.unsqueeze(2)).to(dtype)
        scores = cluster_quality(pooled, member, cells, cell_grid, filter_weights)
        kept = scores.argsort(dim=1, descending=True, stable=True)[:, :num_slots]
        kept = kept.masked_fill(scores.gather(1, kept) == -float("inf"), -1)
        kept = F.pad(kept, (0, num_slots - kept.shape[1]), value=-1)

        chosen = member.gather(2, kept.clamp(min=0).unsqueeze(1).expand(-1, patches, -1)) * (kept >= 0).unsqueeze(1)
        chosen = chosen / chosen.sum(1, keepdim=True).clamp(min=1)
        mean_of_patches = chosen.transpose(1, 2) if alpha is None else chosen.transpose(1, 2) @ pool
        cluster_of_patch = labels.gather(1, cell_of_patch)
        inside = (cluster_of_patch.unsqueeze(1) == kept.unsqueeze(2)).float()
        positions = inside @ grid_positions(height, width, features.device) / inside.sum(2, keepdim=True).clamp(min=1)

    return GranulonAggregation(
        tokens=mean_of_patches.to(features.dtype) @ features,
        assignment=cluster_of_patch.view(images, height, width),
        kept_clusters=kept,
        scores=scores.float(),
        positions=positions,
    )


def record_clusters(aggregation: GranulonAggregation, alpha: int) -> torch.Tensor:
    """Return what [`recall`] needs to make the tokens of an aggregation again, as integers of shape [I x 2 x N].

    They are the slot of every patch, -1 where its cluster is not kept, and the divisor of the patch in the slot's mean.
    """
    height, width = aggregation.assignment.shape[1:]
    inside = aggregation.assignment.flatten(1).unsqueeze(1) == aggregation.kept_clusters.unsqueeze(2)
    slot = torch.where(inside.any(1), inside.int().argmax(1), -1)
    cell, _ = pooling_cells(torch.tensor([alpha], device=slot.device), height, width)
    in_cell = (cell.unsqueeze(1) == cell.unsqueeze(2)).sum(2)
    # A token is the mean of its cells, of which ragged ones hold fewer patches.
    cells = (inside / in_cell.unsqueeze(1)).sum(2).round().int()
    return torch.stack([slot, in_cell * cells.gather(1, slot.clamp(min=0))], dim=1).int()


def recall(features: torch.Tensor, grid: tuple[int, int], clusters: torch.Tensor, num_slots: int) -> GranulonAggregation:
    """Make semantic tokens as [`aggregate`] has made them of the same features, without clustering them again.

    Args:
        features, grid, num_slots: as in [`aggregate`].
        clusters (`torch.Tensor`): what [`record_clusters`] returned, shape [I x 2 x N].
    """
    slot, divisor = clusters.unsqueeze(2).unbind(1)
    index = torch.arange(num_slots, device=slot.device)
    inside = slot == index.unsqueeze(1)
    share = (inside / divisor.to(_work_dtype(slot.device))).to(features.dtype)
    inside = inside.float()
    size = inside.sum(2, keepdim=True)
    return GranulonAggregation(
        tokens=share @ features,
        assignment=slot.view(-1, *grid),
        kept_clusters=index.where(size.squeeze(2) > 0, -1),
        positions=inside @ grid_positions(*grid, slot.device) / size.clamp(min=1),
    )


__all__ = ["GranulonAggregation", "aggregate", "cosine_relation", "recall", "record_clusters"]
