"""Train the granularity controller on labelled questions, and measure it on held-out ones. Minutes on a CPU.

    python examples/train_controller.py                                    # the demo model, on the corpus that ships
    python examples/train_controller.py --variant granulon-qwen2.5 --output_dir runs/controller
    granulon controller label questions.txt --out labels.jsonl             # labels of GPT-4o, or of your own server
    python examples/train_controller.py --labels labels.jsonl --variant path/to/model --save_full
    granulon controller label --by loss --model MODEL --data DATA --out scored.jsonl   # by measured value, without GPT-4o
    python examples/train_controller.py --variant MODEL --labels scored.jsonl --targets loss --price 0.001 0.01 --save_full
    accelerate launch examples/train.py examples/granulon_qwen2.5.yaml --adapter runs/controller   # then the projector

Leaves adapter.safetensors (the controller alone), config.json, results.json and controller.png in --output_dir, which must not
hold weights yet.
All options: python examples/train_controller.py --help
"""

import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import set_seed

from granulon_hf.errors import GranulonError
from granulon_hf.training.controller import parse, run_controller, save


def print_results(results: dict, console: Console) -> None:
    """Print accuracy, calibration, the confusion and the reliability table."""
    levels = results["levels"]
    numbers = Table("held out", "", "95 % interval", box=None, padding=(0, 2, 0, 0))
    names = {
        "accuracy": "accuracy",
        "ece": "calibration error, to right or wrong",
        "ece_weight": "calibration error, to the labels' weights",
    }
    for key, name in names.items():
        low, high = results[f"{key}_ci95"]
        numbers.add_row(name, f"{results[key]:.3f}", f"{low:.3f} to {high:.3f}")
    numbers.add_row("accuracy of the most frequent level", f"{results['majority']:.3f}", "", style="dim")
    entropies = f"{results['cross_entropy']:.3f}"
    numbers.add_row("cross-entropy", entropies, f"at least {results['label_entropy']:.3f}", style="dim")
    console.print(numbers)
    confusion = Table("labelled \\ chosen", *levels, box=None, padding=(0, 2, 0, 0))
    for name, row in zip(levels, results["confusion"], strict=True):
        confusion.add_row(name, *map(str, row))
    console.print(confusion)
    reliability = Table("sure", "questions", "mean", "right", "labels' weight", box=None, padding=(0, 2, 0, 0))
    for row in results["reliability"]:
        cells = (f"{row[name]:.2f}" for name in ("confidence", "accuracy", "weight"))
        reliability.add_row(f"{row['from']:.1f} to {row['to']:.1f}", str(row["n"]), *cells)
    console.print(reliability)


def print_prices(results: dict, console: Console) -> None:
    """Print what the controller chooses at each price beside every fixed level and the cheapest level of each question."""
    for row in results["prices"]:
        title = f"at {row['price']:g} nats a token"
        table = Table(title, "cheapest level", "cost, nats", "loss, nats", "visual tokens", box=None, padding=(0, 2, 0, 0))
        arms = {"controller": row, **{f"always {name}": fixed for name, fixed in row["fixed"].items()}, "oracle": row["oracle"]}
        for name, arm in arms.items():
            numbers = f"{arm['accuracy']:.3f}", f"{arm['cost']:.4f}", f"{arm['loss']:.4f}", f"{arm['tokens']:.1f}"
            table.add_row(name, *numbers, style=None if name == "controller" else "dim")
        console.print(table)
        low, high = row["saved_ci95"]
        console.print(f"It saves {row['saved']:.4f} nats ({low:.4f} to {high:.4f}) against always {row['best_fixed']}.")


def plot_prices(results: dict, path: Path) -> None:
    """Draw cost and accuracy against visual tokens, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, what, label in zip(
        figure.subplots(1, 2), ("cost", "accuracy"), ("cost, nats", "cheapest level chosen"), strict=True
    ):
        for number, row in enumerate(results["prices"]):
            color, fixed = f"C{number % 10}", sorted(row["fixed"].values(), key=lambda arm: arm["tokens"])
            axes.plot([arm["tokens"] for arm in fixed], [arm[what] for arm in fixed], ".--", color=color, linewidth=0.8)
            axes.plot(row["tokens"], row[what], "o", color=color, label=f"{row['price']:g} nats a token")
            axes.plot(row["oracle"]["tokens"], row["oracle"][what], "*", color=color, markersize=14, markerfacecolor="none")
        axes.set(xlabel="mean visual tokens", ylabel=label)
    axes.legend(fontsize=8, title="controller (line: fixed levels, star: oracle)", title_fontsize=8, framealpha=0.5)
    figure.savefig(path, dpi=120)


def plot(results: dict, path: Path) -> None:
    """Draw confusion and reliability side by side, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    levels, confusion, places = results["levels"], np.array(results["confusion"]), range(len(results["levels"]))
    left.imshow(confusion, cmap="Blues")
    for row in places:
        for column in places:
            dark = confusion[row, column] > confusion.max() / 2
            left.text(column, row, str(confusion[row, column]), ha="center", va="center", color="white" if dark else "black")
    left.set(xticks=places, yticks=places, xticklabels=levels, yticklabels=levels, xlabel="chosen", ylabel="labelled")
    left.set_title(f"accuracy {results['accuracy']:.3f} on {results['n_test']} held-out questions", fontsize=10)
    bins = results["reliability"]
    sure = [row["confidence"] for row in bins]
    right.plot([0, 1], [0, 1], color="tab:gray", linewidth=0.8)
    sizes = [8 + 200 * row["n"] / results["n_test"] for row in bins]
    right.scatter(sure, [row["accuracy"] for row in bins], sizes, color="tab:blue", alpha=0.7, label="right")
    right.scatter(sure, [row["weight"] for row in bins], sizes, color="tab:orange", alpha=0.7, label="labels' weight")
    right.set(xlabel="confidence", ylabel="share", xlim=(0, 1.02), ylim=(0, 1.05))
    right.set_title(f"calibration error {results['ece']:.3f} and {results['ece_weight']:.3f}", fontsize=10)
    right.legend(loc="upper left", markerscale=0.5)
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse(sys.argv[1:])
    started = time.monotonic()
    set_seed(args.seed)
    results = run_controller(args)
    model, processor = results.pop("model"), results.pop("processor")
    priced = args.targets == "loss"
    (print_prices if priced else print_results)(results, Console(highlight=False))
    settings = {**asdict(args), "labels": Path(args.labels).name}
    results |= {"settings": settings, "command": shlex.join(["python", *sys.argv]), "seconds": time.monotonic() - started}
    save(Path(args.output_dir), model, processor, results, full=args.save_full)
    (plot_prices if priced else plot)(results, Path(args.output_dir) / "controller.png")
    print(f"{results['seconds']:.0f} s; written to {args.output_dir}")


if __name__ == "__main__":
    try:
        main()
    except GranulonError as error:
        sys.exit(f"Error: {error}")
