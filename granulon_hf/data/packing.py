"""Which samples make a batch: packs of a token budget.

For padded batches of similar lengths, transformers has `LengthGroupedSampler(batch_size, lengths=collator.lengths(samples))`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, Dataset, Sampler


class PackSampler(Sampler[list[int]]):
    """A batch sampler whose batches hold at most so many tokens; made for a collator with `packing=True`.

    First-fit decreasing within windows of the shuffled samples (ours; a window keeps batches random). Every epoch holds every
    sample once, in an order that depends on seed and epoch alone. `Accelerator.prepare` shards the batches over processes.

    Args:
        lengths (`Sequence[int]`): tokens of each sample, image slots included ([`GranulonCollator.lengths`]).
        budget (`int`): tokens per batch, 1 or more. A longer sample makes a batch of its own.
        window (`int`, defaults to 1024): samples that are packed together.
        shuffle (`bool`, defaults to `True`): whether to shuffle samples and batches.
        seed (`int`, defaults to 0): of the shuffling, together with the epoch.

    Example:

    ```python
    >>> from granulon_hf.data.packing import PackSampler

    >>> sorted(map(sorted, PackSampler([7, 3, 5, 5, 2], budget=10)))
    [[0, 1], [2, 3], [4]]
    ```"""

    def __init__(self, lengths: Sequence[int], budget: int, *, window: int = 1024, shuffle: bool = True, seed: int = 0):
        if budget < 1 or window < 1:
            raise ValueError(f"budget and window must be at least 1; got {budget} and {window}.")
        self.lengths, self.budget, self.window, self.shuffle, self.seed = list(lengths), budget, window, shuffle, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew for an epoch."""
        self.epoch = epoch
        self._packs: list[list[int]] | None = None

    @property
    def sampler(self) -> "PackSampler":
        return self  # where accelerate looks for `set_epoch` once it has sharded a batch sampler

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.packs())

    def __len__(self) -> int:
        return len(self.packs())

    def packs(self) -> list[list[int]]:
        """The epoch's batches: indices of samples."""
        if self._packs is None:
            random = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            count = len(self.lengths)
            order = torch.randperm(count, generator=random).tolist() if self.shuffle else list(range(count))
            packs = [pack for i in range(0, count, self.window) for pack in self._fit(order[i : i + self.window])]
            places = torch.randperm(len(packs), generator=random).tolist() if self.shuffle else range(len(packs))
            self._packs = [packs[place] for place in places]
        return self._packs

    def _fit(self, indices):
        packs, rooms = [], []
        for index in sorted(indices, key=lambda index: -self.lengths[index]):
            length = self.lengths[index]
            place = next((place for place, room in enumerate(rooms) if room >= length), len(packs))
            if place == len(packs):
                packs.append([])
                rooms.append(self.budget)
            packs[place].append(index)
            rooms[place] -= length
        return packs


def balanced_packs(indices: Sequence[int], lengths: Sequence[int], budget: int, processes: int = 1) -> list[list[int]]:
    """Share samples between packs of similar numbers of tokens, as few as keep within the budget.

    There are equally many packs for each process, and none is empty: `packs[rank::processes]` are those of one, the longest
    first. A pack goes beyond the budget only where the samples of the processes are too few for more packs.

    Args:
        indices (`Sequence[int]`): samples, at least as many as processes.
        lengths (`Sequence[int]`): tokens of each sample.
        budget (`int`): tokens of a pack.
    """
    longest_first = sorted(indices, key=lambda index: -lengths[index])
    total = sum(lengths[index] for index in indices)
    rounds = max(1, -(-total // (budget * processes)))
    while True:
        rounds = min(rounds, max(1, len(indices) // processes))
        packs: list[list[int]] = [[] for _ in range(rounds * processes)]
        sums = [0] * len(packs)
        for index in longest_first:
            place = min(range(len(packs)), key=lambda place: (sums[place], len(packs[place])))
            packs[place].append(index)
            sums[place] += max(1, lengths[index])
        if max(sums) <= budget or (rounds + 1) * processes > len(indices):
            return [packs[place] for place in sorted(range(len(packs)), key=lambda place: -sums[place])]
        rounds += 1


class StepSampler(Sampler[list[list[int]]]):
    """A batch sampler whose batches are the packs of one process for one optimizer step.

    The samples of a step are those that padded batches in the same order would have had: the global batch, counted in samples,
    stays what it is, and with a loss over its labelled tokens so does the gradient. `Accelerator.prepare` shares the batches
    between processes, one to each in turn. Made for [`Packs`].

    Args:
        order (`Sampler[int]`): gives the order of an epoch, the same in every process.
        lengths (`Sequence[int]`): tokens of each sample, image slots included.
        budget (`int`): tokens of a pack; a longer sample makes a pack of its own.
        batch_size, accumulation, processes (`int`): their product is the global batch.
        drop_last (`bool`, defaults to `False`): leave out a last batch of fewer samples.
    """

    def __init__(
        self,
        order: Any,
        lengths: Sequence[int],
        budget: int,
        *,
        batch_size: int,
        accumulation: int = 1,
        processes: int = 1,
        drop_last: bool = False,
    ):
        self.order, self.lengths, self.budget, self.epoch = order, lengths, budget, 0
        self.size, self.accumulation, self.processes, self.drop_last = batch_size, accumulation, processes, drop_last

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch."""
        self.epoch = epoch

    @property
    def sampler(self) -> "StepSampler":
        return self  # where accelerate looks for `set_epoch` once it has sharded a batch sampler

    def _shards(self, order: Any) -> list[BatchSamplerShard]:
        batches = BatchSampler(order, self.size, self.drop_last)
        return [BatchSamplerShard(batches, self.processes, rank) for rank in range(self.processes)]

    def __len__(self) -> int:
        batches = len(self._shards(self.order)[0])
        return -(-batches // self.accumulation) * self.processes

    def __iter__(self) -> Iterator[list[list[int]]]:
        self.order.set_epoch(self.epoch)
        order = list(self.order)
        rounds = [[i for batch in batches for i in batch] for batches in zip(*self._shards(order), strict=True)]
        for first in range(0, len(rounds), self.accumulation):
            step = [i for one in rounds[first : first + self.accumulation] for i in one]
            packs = balanced_packs(step, self.lengths, self.budget, self.processes)
            for rank in range(self.processes):
                yield packs[rank :: self.processes]


@dataclass
class Packs(Dataset):
    """Samples by packs of their indices, as [`StepSampler`] asks for them.

    `collate` makes of them `{"packs": [batch, …]}`, each batch by a collator of packs.
    """

    samples: Any
    collator: Callable[[Sequence[Any]], dict[str, Any]]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, pack: Sequence[int]) -> list[Any]:
        return [self.samples[i] for i in pack]

    def collate(self, packs: Sequence[Sequence[Any]]) -> dict[str, list[dict[str, Any]]]:
        return {"packs": [self.collator(pack) for pack in packs]}
