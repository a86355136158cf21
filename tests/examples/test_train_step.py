"""The benchmark of the training step at the smallest size: its arms compute the same loss over the same samples."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

PATH = Path(__file__).parents[2] / "examples/benchmarks/train_step.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("train_step", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_step"] = module  # its classes are pickled
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options(benchmark):
    return benchmark.parse(
        ["--size", "tiny", "--samples", "4", "--batch", "2", "--rounds", "1", "--median-words", "8", "--ablation"]
    )


def test_all_arms_compute_the_same_loss(benchmark, options, capsys):
    summary = benchmark.measure(options)
    arms = summary["arms"]
    assert len(arms) == 10
    losses = [arm["loss"] for arm in arms.values()]
    assert max(losses) - min(losses) < 1e-5
    assert arms["ours, packed"]["padding"] == 1 <= arms["ours, grouped"]["padding"] <= arms["released style"]["padding"]
    assert arms["TRL"]["padding"] == arms["released style"]["padding"]
    assert arms["ours, packed, 4 batches in one"]["padding"] == 1
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(arms)


def test_kernels_are_counted(benchmark, options, capsys):
    """Fewer where nothing is computed twice, and those of a part are in the sum."""
    options.kernels = True
    arms = {name: arm["kernels"] for name, arm in benchmark.measure(options)["arms"].items()}
    for found in arms.values():
        assert 0 < found["tower"] < found["all"] and 0 < found["AdaTA"] < found["all"]
        assert found["tower"] + found["AdaTA"] < found["all"]
    assert arms["released, no checkpointing"]["all"] < arms["released style"]["all"]
    assert "kernels, AdaTA" in capsys.readouterr().out


def test_float8_has_a_loss_of_its_own(benchmark, options, capsys):
    options.fp8, options.arms = True, ["ours, packed", benchmark.FP8]
    arms = benchmark.measure(options)["arms"]
    difference = arms[benchmark.FP8]["loss"] - arms["ours, packed"]["loss"]
    assert 0 < abs(difference) < 0.05
    assert f"differs by {difference:+.2e}" in capsys.readouterr().out


def test_another_loss_is_an_error(benchmark, options, monkeypatch):
    monkeypatch.setattr(benchmark, "drop_labels_behind_the_answer", lambda batch, end: dict(batch))
    with pytest.raises(SystemExit, match="same loss"):
        benchmark.measure(options)


def test_the_small_size_has_the_proportions_of_the_full_one(benchmark):
    small, full = benchmark.shares("small"), benchmark.shares("full")
    for name, share in full.items():
        assert small[name] == pytest.approx(share, rel=0.1)
