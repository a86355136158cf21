"""Which samples make a batch: packs of a token budget.

For padded batches of similar lengths, transformers has `LengthGroupedSampler(batch_size, lengths=collator.lengths(samples))`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


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
