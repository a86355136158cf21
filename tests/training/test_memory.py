"""Token budgets: what was measured on a GPU, and what a budget never is."""

import pytest
from transformers import Qwen2Config

from granulon_hf.training.memory import bytes_per_token, choose_token_budget

QWEN = Qwen2Config(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, vocab_size=151936)
LENGTHS = [300, 500, 900]


def test_bytes_per_token_are_those_that_were_measured():
    """Peaks of 16.97 and 54.56 GiB at 8 and 32 samples a batch, in bfloat16 (examples/benchmarks/results.md)."""
    more = (54.56 - 16.97) * 2**30 / (32 * 59607 / 128 - 8 * 29977 / 64)
    assert bytes_per_token(QWEN) == pytest.approx(more, rel=0.05)
    assert bytes_per_token(QWEN, size=4) == 2 * bytes_per_token(QWEN) > 20 * bytes_per_token(QWEN, checkpointing=True)


def test_a_budget_fits_and_is_no_shorter_than_a_sample():
    budget = choose_token_budget(QWEN, LENGTHS, 8, 70 * 2**30)
    assert 10_000 < budget < 20_000
    assert choose_token_budget(QWEN, LENGTHS, 8, 140 * 2**30) > 2 * budget
    assert choose_token_budget(QWEN, LENGTHS, 8, 2**30) == 900


def test_without_a_gpu_it_is_an_ordinary_batch():
    assert choose_token_budget(QWEN, LENGTHS, 6, None) == 3400
    assert choose_token_budget(QWEN, [], 6, None) == 1
