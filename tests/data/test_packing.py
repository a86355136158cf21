"""Packs: a partition of the samples within the budget, the same for the same seed and epoch, also over processes."""

from itertools import chain

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import BatchSampler, DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler

from granulon_hf import variants
from granulon_hf.data.collator import GranulonCollator
from granulon_hf.data.packing import Packs, PackSampler, StepSampler, balanced_packs
from tests.data.test_collator import simple


def make_lengths(count=3000, longest=2048):
    random = torch.Generator().manual_seed(0)
    text = torch.empty(count).log_normal_(4.0, 0.8, generator=random).long() + 20
    return (text + 216 * torch.randint(0, 3, (count,), generator=random)).clamp(max=longest).tolist()


@pytest.mark.parametrize("shuffle", [True, False])
def test_packs_hold_every_sample_once_within_the_budget(shuffle):
    lengths = make_lengths()
    packs = list(PackSampler(lengths, 2048, shuffle=shuffle))
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in pack) for pack in packs]
    assert max(sums) <= 2048
    assert sum(sums) / (2048 * len(packs)) > 0.98
    assert len(packs) == len(PackSampler(lengths, 2048, shuffle=shuffle))


def test_a_window_keeps_the_order():
    packs = list(PackSampler(make_lengths(), 2048, window=100, shuffle=False))
    assert all(max(pack) - min(pack) < 100 for pack in packs)


def test_packs_depend_on_seed_and_epoch_alone():
    lengths = make_lengths(300)
    state = torch.get_rng_state()
    sampler = PackSampler(lengths, 2048, seed=1)
    first = list(sampler)
    assert torch.equal(state, torch.get_rng_state())
    assert first == list(sampler) == list(PackSampler(lengths, 2048, seed=1)) != list(PackSampler(lengths, 2048, seed=2))
    sampler.set_epoch(1)
    assert first != list(sampler)
    sampler.set_epoch(0)
    assert first == list(sampler)


def test_what_does_not_fit_is_a_pack_of_its_own():
    assert sorted(map(sorted, PackSampler([5, 20, 5], 10))) == [[0, 2], [1]]
    assert list(PackSampler([], 10)) == []
    with pytest.raises(ValueError, match="at least 1"):
        PackSampler([1], 0)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_processes_share_the_packs(processes):
    sampler = PackSampler(make_lengths(100), 2048)
    shards = [BatchSamplerShard(sampler, processes, rank) for rank in range(processes)]
    parts = [list(shard) for shard in shards]
    assert {len(part) for part in parts} == {len(shards[0])}  # nobody waits for ever
    seen = [index for part in parts for pack in part for index in pack]
    assert set(seen) == set(range(100))


def test_under_accelerate():
    model, processor = variants.build("granulon-qwen2.5", tiny=True)
    collator = GranulonCollator(processor, packing=True)
    samples = [simple(f"What is {i}?", "A dog. " * (i % 5 + 1), images=i % 3) for i in range(12)]
    sampler = PackSampler(collator.lengths(samples), 400)
    loader = Accelerator(cpu=True).prepare(DataLoader(samples, batch_sampler=sampler, collate_fn=collator))
    orders = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        assert sampler.epoch == epoch
        batches = list(loader)
        assert all(batch["input_ids"].shape[1] <= 400 for batch in batches) and len(batches) == len(sampler)
        assert sum(int(batch["seq_idx"].max()) + 1 for batch in batches) == 12
        orders.append([batch["input_ids"].shape[1] for batch in batches])
        assert model(**batches[0]).loss.isfinite()
    assert orders[0] != orders[1]
    shard = BatchSamplerShard(sampler, 2, 0)
    shard.batch_sampler.sampler.set_epoch(7)  # how accelerate reaches it
    assert sampler.epoch == 7


def test_lengths_feed_transformers_length_grouped_sampler():
    lengths = make_lengths(640)
    order = list(LengthGroupedSampler(8, lengths=lengths, generator=torch.Generator().manual_seed(0)))

    def padding(order):
        rows = [[lengths[i] for i in order[start : start + 8]] for start in range(0, len(order), 8)]
        return 1 - sum(map(sum, rows)) / sum(8 * max(row) for row in rows)

    assert padding(order) < 0.2 * padding(range(640))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("budget", [300, 2048, 10**6])
def test_packs_of_a_step_are_balanced(processes, budget):
    lengths = make_lengths(96)
    packs = balanced_packs(range(96), lengths, budget, processes)
    assert sorted(index for pack in packs for index in pack) == list(range(96)) and all(packs)
    assert len(packs) % processes == 0
    sums = [sum(lengths[index] for index in pack) for pack in packs]
    assert all(total <= budget or len(pack) == 1 for total, pack in zip(sums, packs, strict=True))
    loads = [sum(sums[rank::processes]) for rank in range(processes)]
    assert max(loads) - min(loads) <= max(lengths)
    if budget > 2048:
        assert len(packs) == processes and max(sums) < 1.05 * min(sums)


def test_packs_of_a_step_where_samples_are_few_or_empty():
    assert sorted(map(sorted, balanced_packs([0, 1], [5000, 1], 10, 2))) == [[0], [1]]
    assert balanced_packs([3], [0, 0, 0, 7], 1) == [[3]]
    assert all(balanced_packs(range(8), [0] * 8, 1, 4))


def steps_of(sampler, processes):
    """The samples of each step, sorted."""
    shards = [list(BatchSamplerShard(sampler, processes, rank)) for rank in range(processes)]
    assert len({len(shard) for shard in shards}) == 1
    for step in zip(*shards, strict=True):
        assert len({len(packs) for packs in step}) == 1  # nobody waits for ever
        yield sorted(index for packs in step for pack in packs for index in pack)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [96, 97, 101])
def test_steps_have_the_samples_of_padded_batches(count, processes, drop_last):
    lengths, options = make_lengths(count), {"batch_size": 4, "accumulation": 3}
    order = SeedableRandomSampler(range(count), data_seed=5)
    sampler = StepSampler(order, lengths, 600, processes=processes, drop_last=drop_last, **options)
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        order.set_epoch(epoch)
        batches = BatchSampler(list(order), 4, drop_last)
        shards = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
        rounds = [[*chain(*batches)] for batches in zip(*shards, strict=True)]
        expected = [sorted(chain(*rounds[i : i + 3])) for i in range(0, len(rounds), 3)]
        found = list(steps_of(sampler, processes))
        assert found == expected and len(sampler) == processes * len(found)


def test_packs_are_collated_apart():
    packs = Packs("abcdef", lambda samples: {"text": "".join(samples)})
    assert len(packs) == 6
    assert packs.collate([packs[i] for i in ([0, 2], [5])]) == {"packs": [{"text": "ac"}, {"text": "f"}]}
