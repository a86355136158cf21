"""Training of the granularity controller: soft-label cross-entropy on questions with preference weights (paper).

Notation: Q questions, E language width, n number of granularity levels.

The controller reads the mean of a question's states behind the frozen first block (E1), and those never change: they are
computed once and kept in memory, and what is left to train is a small network on Q vectors.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoConfig

from granulon_hf import data, variants
from granulon_hf.data.collator import encode_prompts
from granulon_hf.errors import GranulonError
from granulon_hf.modeling.configuration_granulon import GranulonConfig
from granulon_hf.modeling.controller_granulon import first_block_states
from granulon_hf.training.arguments import ModelArguments, OptionParser
from granulon_hf.training.checkpoints import check_output_dir, check_unused
from granulon_hf.training.run import build_model, versions
from granulon_hf.training.stages import adapter_state, save_adapter, set_stage

# Written by the project, labels included; its card is beside it.
CORPUS = Path(data.__file__).parent / "granularity" / "questions.jsonl"
SUM_TOLERANCE = 1e-3
BINS = 10
RESAMPLES = 2000


@dataclass
class ControllerArguments:
    """What is trained, on what, and how. The paper gives no values for the controller: all of these are ours."""

    variant: str = field(
        default="demo",
        metadata={"help": f"demo, a folder or Hub id of a Granulon model, or one of {', '.join(variants.NAMES)}."},
    )
    tiny: bool = field(default=False, metadata={"help": "The variant's architectures at toy size with random weights."})
    open_weights: bool = field(default=False, metadata={"help": "Read DINOv3 from timm's repository, which has no gate."})
    labels: str = field(
        default=str(CORPUS), metadata={"help": "Of `granulon controller label`; by default the corpus that ships."}
    )
    holdout: float = field(
        default=0.2, metadata={"help": "Share of the questions to test on, where the file has no column split."}
    )
    output_dir: str = field(default="controller-run", metadata={"help": "Folder for weights, results and picture."})
    steps: int = field(default=600, metadata={"help": "Steps of AdamW."})
    batch_size: int = field(default=128, metadata={"help": "Questions per step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "At the first step; it falls linearly to 0."})
    weight_decay: float = field(default=0.05, metadata={"help": "Of AdamW."})
    as_typed: bool = field(default=True, metadata={"help": "Train on each question also in lower case without its last mark."})
    seed: int = field(default=0, metadata={"help": "The same seed gives the same controller."})
    save_full: bool = field(default=False, metadata={"help": "Also write the whole model, for from_pretrained."})

    def __post_init__(self):
        for name in ("steps", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise GranulonError(f"--{name} must be positive, not {getattr(self, name)!r}.")
        if not 0 < self.holdout < 1:
            raise GranulonError(f"--holdout is a share between 0 and 1, not {self.holdout!r}.")


def parse(arguments: list[str]) -> ControllerArguments:
    """Read the arguments of a command line.

    Raises:
        GranulonError: options that cannot be used.
    """
    groups: Any = (ControllerArguments,)
    (args,) = OptionParser(groups, allow_abbrev=False).read(arguments)
    return args


@dataclass(frozen=True)
class Question:
    """A question, its weight for each level by name, and whether it is held out."""

    text: str
    weights: dict[str, float]
    test: bool


# --- labels -----------------------------------------------------------------------------------------------------------


def read_labels(path: str | Path, holdout: float = 0.2, seed: int = 0) -> list[Question]:
    """Labelled questions of a JSONL file with `text`, `weights` and, if wanted, `split` ("train" or anything else: held out).

    Without `split` a share of the different texts is drawn as hold-out; a text that is there twice stays on one side.

    Args:
        path (`str` or `Path`): of the file.
        holdout (`float`, defaults to 0.2): the share.
        seed (`int`, defaults to 0): of the drawing.

    Raises:
        GranulonError: no such file, a row that is not like this, weights that do not sum to 1, rows of different levels, no
            question to train or to test on, one that is in both.
    """
    path = Path(path)
    if not path.is_file():
        raise GranulonError(f"There is no file of labels {str(path)!r}; `granulon controller label` writes one.")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if problem := problem_of(row, rows[0]["weights"] if rows else None):
                raise GranulonError(f"{path}, line {number}: {problem}.")
            rows.append(row)
    if not rows:
        raise GranulonError(f"{path} has no labelled questions.")
    splits = ["split" in row for row in rows]
    if any(splits) and not all(splits):
        raise GranulonError(f"{path}: some rows have a split and some have none; give it to all or to none.")
    if any(splits):
        questions = [Question(row["text"], row["weights"], row["split"] != "train") for row in rows]
    else:
        texts = sorted({plain(row["text"]) for row in rows})
        drawn = np.random.default_rng(seed).permutation(len(texts))[: round(holdout * len(texts))]
        held = {texts[i] for i in drawn}
        questions = [Question(row["text"], row["weights"], plain(row["text"]) in held) for row in rows]
    for test, what in ((False, "to train on"), (True, "held out to test on")):
        if not any(question.test == test for question in questions):
            hint = "the column split names none" if any(splits) else "there are too few"
            raise GranulonError(f"{path} has no questions {what}: {hint}.")
    both = {plain(q.text) for q in questions if q.test} & {plain(q.text) for q in questions if not q.test}
    if both:
        raise GranulonError(f"{path}: {min(both)!r} is both trained on and held out; a question belongs to one split.")
    return questions


def problem_of(row: Any, first: dict[str, float] | None) -> str | None:
    """What is wrong with a row of labels; `first` are the weights of the first row."""
    if not isinstance(row, dict):
        return "it is no JSON object"
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        return "it has no question in `text`"
    weights = row.get("weights")
    if not isinstance(weights, dict) or not all(type(w) in (int, float) and 0 <= w <= 1 for w in weights.values()):
        return 'it has no `weights` such as {"coarse": 0.8, "middle": 0.2, "fine": 0}'
    if first is not None and weights.keys() != first.keys():
        return f"its levels are {', '.join(weights)}, and those of the first row {', '.join(first)}"
    if abs(math.fsum(weights.values()) - 1) > SUM_TOLERANCE:
        return f"its weights sum to {math.fsum(weights.values()):.4g}, not to 1"
    return None


def plain(text: str) -> str:
    """As people also type: lower case, without the last mark."""
    return text.lower().strip().rstrip("?.!").rstrip()


def check_levels(questions: Sequence[Question], levels: Sequence[str], variant: str) -> None:
    """Raises:
    GranulonError: the model has no levels, or others than the labels.
    """
    if not levels:
        raise GranulonError(f"{variant} has no granularity levels, and therefore no controller to train.")
    if set(questions[0].weights) != set(levels):
        raise GranulonError(
            f"The labels are for the levels {', '.join(questions[0].weights)}, and {variant} has {', '.join(levels)}; label "
            "the questions for these (granulon controller label --level NAME=MEANING …)."
        )


def levels_before_loading(variant: str) -> list[str] | None:
    """Names of a variant's levels without its weights; None where only loading will tell."""
    if variant in variants.NAMES:
        return GranulonConfig(**variants.parse(variant)[0].config).level_names
    try:
        return AutoConfig.from_pretrained(variant).level_names
    except (OSError, ValueError, AttributeError):
        return None  # `build_model` says what is wrong


# --- training ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def question_states(model: Any, processor: Any, texts: Sequence[str], show: bool = True) -> torch.Tensor:
    """Mean E1 of each question, over the tokens that the model's own processor marks as the question.

    Args:
        model ([`GranulonForConditionalGeneration`]): with levels.
        processor ([`GranulonProcessor`]): its chat template and question mask are those of inference. Images are left out:
            the question does not see them.
        texts (`Sequence[str]`): the questions.
        show (`bool`, defaults to `True`): a progress bar.

    Returns:
        `torch.Tensor`: shape [Q x E], float32, on the CPU.
    """
    means, size = [], 32
    for start in track(range(0, len(texts), size), description="question states", disable=not show):
        chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in texts[start : start + size]]
        inputs = encode_prompts(processor, chats).to(model.device)
        mask = inputs["question_mask"].bool()
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        states = first_block_states(model.model.language_model, embeds, mask).float()
        mask = mask.unsqueeze(-1)
        means.append((states.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)).cpu())
    return torch.cat(means)


def fit(controller: Any, states: torch.Tensor, targets: torch.Tensor, args: ControllerArguments, show: bool = True) -> float:
    """Train the controller in place, with the soft-label cross-entropy -Σ w log p.

    Args:
        controller ([`GranularityController`]): in float32, trainable.
        states (`torch.Tensor`): mean E1, shape [Q x E].
        targets (`torch.Tensor`): weights, shape [Q x n].
        args ([`ControllerArguments`]): steps, batch size, learning rate, weight decay, seed.
        show (`bool`, defaults to `True`): a progress bar.

    Returns:
        `float`: mean loss of the last tenth of the steps.

    Raises:
        GranulonError: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(controller.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.steps)
    draw, losses = torch.Generator().manual_seed(args.seed), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small are the products that more threads mostly wait for each other
    for step in track(range(args.steps), description="controller", disable=not show):
        chosen = torch.randint(len(states), (args.batch_size,), generator=draw)
        loss = F.cross_entropy(logits_of(controller, states[chosen]), targets[chosen])
        if not loss.isfinite():
            raise GranulonError(f"The loss is not finite at step {step}; lower --learning_rate.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    torch.set_num_threads(threads)
    last = losses[-max(1, args.steps // 10) :]
    return sum(last) / len(last)


def logits_of(controller: Any, states: torch.Tensor) -> torch.Tensor:
    """Logits [Q x n] of mean states [Q x E]: the mean of one token is the token."""
    return controller(states.unsqueeze(1), torch.ones(len(states), 1, dtype=torch.bool))


def train_controller(
    model: Any, processor: Any, questions: Sequence[Question], args: ControllerArguments, show: bool = True
) -> dict[str, Any]:
    """Train the model's controller on the questions and measure it on those held out; everything else stays as it is.

    Training goes on from the controller that the model has. It is done in float32 on the CPU; what is measured is the
    controller in the language model's own precision, as it will be used.

    Args:
        model ([`GranulonForConditionalGeneration`]): whose levels are those of the questions.
        processor ([`GranulonProcessor`]): of the model.
        questions (`Sequence[Question]`): of [`read_labels`].
        args ([`ControllerArguments`]): how.
        show (`bool`, defaults to `True`): progress bars.

    Returns:
        `dict`: `n_train`, `n_test`, `train_loss`, and what [`measure`] says of the hold-out.

    Raises:
        GranulonError: the levels are others, or the loss is not finite.
    """
    levels = model.config.level_names
    check_levels(questions, levels, args.variant)
    model.eval()
    set_stage(model, "controller")
    train, test = ([q for q in questions if q.test == held_out] for held_out in (False, True))
    texts, targets = [q.text for q in train], weights_of(train, levels)
    if args.as_typed:
        texts, targets = texts + [plain(text) for text in texts], targets.repeat(2, 1)
    states = question_states(model, processor, [*texts, *(q.text for q in test)], show)
    device, controller = model.device, model.model.controller.float().cpu()
    loss = fit(controller, states[: len(texts)], targets, args, show)
    controller.requires_grad_(False).to(model.get_input_embeddings().weight.dtype)
    with torch.no_grad():
        probs = logits_of(controller, states[len(texts) :]).softmax(-1)
    controller.to(device)
    found = measure(probs.numpy(), weights_of(test, levels).numpy(), weights_of(train, levels).numpy())
    wrong = [
        {
            "text": q.text,
            "labelled": max(q.weights, key=q.weights.__getitem__),
            "chosen": levels[p.argmax()],
            "p": max(p.tolist()),
        }
        for q, p in zip(test, probs, strict=True)
        if q.weights[levels[p.argmax()]] < max(q.weights.values())
    ]
    return {"levels": levels, "n_train": len(train), "n_test": len(test), "train_loss": loss, **found, "wrong": wrong}


def weights_of(questions: Iterable[Question], levels: Sequence[str]) -> torch.Tensor:
    """Shape [Q x n], in the order of the model's levels."""
    return torch.tensor([[question.weights[name] for name in levels] for question in questions])


# --- measures ---------------------------------------------------------------------------------------------------------


def measure(probs: np.ndarray, weights: np.ndarray, train_weights: np.ndarray) -> dict[str, Any]:
    """How well probabilities [Q x n] meet the weights [Q x n] of held-out questions.

    Soft labels make two questions of calibration. `ece` asks whether the controller is right as often as it is sure, the usual
    one; a controller that fits labels of 0.8 perfectly is right more often than that, and underconfident by it. `ece_weight`
    asks whether it is as sure as the label is: the same error with the label's weight of the chosen level in place of right or
    wrong. Intervals are 95 % percentile bootstraps over questions (2,000 resamples, seed 0).

    Returns:
        `dict`: `accuracy` (the chosen level is the one with the most weight, or one of several), `majority` (accuracy of
        always saying the training questions' most frequent level), `cross_entropy` and `label_entropy` (its least possible
        value), in nats; `ece` and `ece_weight`, each with `_ci95`; `reliability` (of each bin of confidence that is not empty:
        from, to, n, confidence, accuracy, weight) and `confusion` (rows: labelled level, columns: chosen level).
    """
    probs, weights = probs.astype(np.float64), weights.astype(np.float64)
    chosen, each = probs.argmax(1), np.arange(len(probs))
    confidence, weight = probs[each, chosen], weights[each, chosen]
    right = (weight >= weights.max(1) - 1e-9).astype(float)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    usual = np.bincount(train_weights.argmax(1), minlength=weights.shape[1]).argmax()
    draws = np.random.default_rng(0).integers(len(probs), size=(RESAMPLES, len(probs)))
    found: dict[str, Any] = {}
    measures = {
        "accuracy": lambda i: right[i].mean(),
        "ece": lambda i: calibration_error(confidence[i], right[i], bins[i]),
        "ece_weight": lambda i: calibration_error(confidence[i], weight[i], bins[i]),
    }
    for name, of in measures.items():
        found[name] = float(of(each))
        found[f"{name}_ci95"] = np.percentile([of(draw) for draw in draws], [2.5, 97.5]).tolist()
    confusion = np.zeros((weights.shape[1],) * 2, dtype=int)
    np.add.at(confusion, (weights.argmax(1), chosen), 1)
    reliability = [
        {
            **{"from": b / BINS, "to": (b + 1) / BINS, "n": int(inside.sum()), "confidence": float(confidence[inside].mean())},
            **{"accuracy": float(right[inside].mean()), "weight": float(weight[inside].mean())},
        }
        for b in range(BINS)
        if (inside := bins == b).any()
    ]
    logs = np.log(np.maximum(probs, 1e-12)), np.log(np.maximum(weights, 1e-12))
    entropies = [float(-(weights * log).sum(1).mean()) for log in logs]
    return {
        **found,
        "majority": float((weights[:, usual] >= weights.max(1) - 1e-9).mean()),
        "cross_entropy": entropies[0],
        "label_entropy": entropies[1],
        "reliability": reliability,
        "confusion": confusion.tolist(),
    }


def calibration_error(confidence: np.ndarray, truth: np.ndarray, bins: np.ndarray) -> float:
    """Σ over bins of |mean confidence - mean truth|, weighted by how many are in the bin (Guo et al. 2017)."""
    return float(np.abs(np.bincount(bins, confidence - truth)).sum() / len(bins))


# --- a run ------------------------------------------------------------------------------------------------------------


def run_controller(args: ControllerArguments) -> dict[str, Any]:
    """From arguments to a trained controller: everything that can be wrong is looked at first, the cheapest before the rest.

    Args:
        args ([`ControllerArguments`]): what and how.

    Returns:
        `dict`: of [`train_controller`]; `model` and `processor` beside it.

    Raises:
        GranulonError: labels, variant, levels or output folder cannot be used.
    """
    check_output_dir(args.output_dir)
    check_unused(args.output_dir)
    questions = read_labels(args.labels, args.holdout, args.seed)
    if args.variant != "demo" and (levels := levels_before_loading(args.variant)) is not None:
        check_levels(questions, levels, args.variant)
    shown = ModelArguments(variant=args.variant, tiny=args.tiny, open_weights=args.open_weights)
    model, processor = build_model(shown, fresh=True)
    return {"model": model, "processor": processor, **train_controller(model, processor, questions, args)}


def save(folder: Path, model: Any, processor: Any, results: dict[str, Any], full: bool = False) -> None:
    """`adapter.safetensors` with the controller alone, `config.json`, `results.json`, and `controller.png` where matplotlib is
    installed; with `full` the whole model too."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value for name, value in adapter_state(model).items() if name.startswith("controller.")}
    save_adapter(folder, model, state)
    if full:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    described = {**results, "versions": versions()}
    (folder / "results.json").write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n")
    plot(results, folder / "controller.png")


def print_results(results: dict[str, Any], console: Console) -> None:
    """Accuracy, calibration, the reliability and the confusion table."""
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


def plot(results: dict[str, Any], path: Path) -> None:
    """Confusion and reliability side by side; left out where matplotlib is not installed."""
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
