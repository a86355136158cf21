"""Training of the granularity controller: soft-label cross-entropy on questions with preference weights (paper), or on what
their answers lose at each level (ours, [`~granulon_hf.training.loss_targets`]).

Notation: Q questions, E language width, n number of granularity levels.

The controller reads the mean of a question's states behind the frozen first block (E1), and those never change: they are
computed once and kept in memory, and what is left to train is a small network on Q vectors.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track

from granulon_hf import data, variants
from granulon_hf.data.collator import encode_prompts
from granulon_hf.errors import GranulonError
from granulon_hf.loading import read_config
from granulon_hf.modeling.configuration_granulon import GranulonConfig
from granulon_hf.modeling.controller_granulon import first_block_states
from granulon_hf.overrides import set_prices
from granulon_hf.training.arguments import ModelArguments, OptionParser
from granulon_hf.training.checkpoints import check_output_dir, check_unused
from granulon_hf.training.loss_targets import ScoredQuestion, costs_of, measure_costs, priced_loss, problem_of_scores
from granulon_hf.training.run import build_model, versions
from granulon_hf.training.stages import adapter_state, save_adapter, set_stage

# Written by the project, labels included; its card is beside it.
CORPUS = Path(data.__file__).parent / "granularity" / "questions.jsonl"
SUM_TOLERANCE = 1e-3
KINDS = {"weights": "weights", "loss": "losses"}  # targets, and the column of labels that they are made of
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
    targets: str = field(
        default="weights",
        metadata={"help": "weights: of labels by wording (paper); loss: of labels by loss, at every --price (ours)."},
    )
    price: list[float] = field(
        default_factory=list,
        metadata={"help": "Of a visual token, in nats; several train one controller that may be asked at each."},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Of the targets softmax(-(loss + price * tokens) / temperature)."}
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
        if self.targets not in KINDS:
            raise GranulonError(f"--targets must be {' or '.join(KINDS)}; got {self.targets!r}.")
        if self.targets == "weights":
            if self.price or self.temperature != 1:
                name = "price" if self.price else "temperature"
                raise GranulonError(f"--{name} is for --targets loss; leave it out, or say --targets loss.")
            return
        if not self.price or not all(0 <= p < math.inf for p in self.price) or len(set(self.price)) < len(self.price):
            got = " ".join(map(str, self.price)) or "none"
            raise GranulonError(
                f"--targets loss needs --price: different numbers of at least 0, such as 0.001 0.01; got {got}."
            )
        if not 0 < self.temperature < math.inf:
            raise GranulonError(f"--temperature must be a positive number, not {self.temperature!r}.")
        if self.labels == str(CORPUS):
            raise GranulonError("--targets loss needs --labels: a file of granulon controller label --by loss.")


def parse(arguments: list[str]) -> ControllerArguments:
    """Read the arguments of a command line; raises GranulonError for options that cannot be used."""
    groups: Any = (ControllerArguments,)
    (args,) = OptionParser(groups, allow_abbrev=False).read(arguments)
    return args


@dataclass(frozen=True)
class Question:
    """A question, its weight for each level by name, and whether it is held out."""

    text: str
    weights: dict[str, float]
    test: bool

    @property
    def levels(self) -> list[str]:
        """Names of the levels."""
        return list(self.weights)


def read_labels(path: str | Path, holdout: float = 0.2, seed: int = 0, targets: str = "weights") -> list[Any]:
    """Read the labelled questions of a JSONL file with `text` and, if wanted, `split` ("train" or else: held out).

    Labels are `weights`, or with the targets "loss" `losses` and `tokens`: the questions are [`Question`] or
    [`ScoredQuestion`]. Where no `split` holds questions out the share `holdout` of the different texts is drawn; a text that is
    there twice stays on one side. GranulonError says what cannot be used.
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
            if problem := problem_of(row, rows[0] if rows else None, targets):
                raise GranulonError(f"{path}, line {number}: {problem}.")
            rows.append(row)
    if not rows:
        raise GranulonError(f"{path} has no labelled questions.")
    splits = [row["split"] != "train" for row in rows if "split" in row]
    if splits and len(splits) < len(rows):
        raise GranulonError(f"{path}: some rows have a split and some have none; give it to all or to none.")
    if not any(splits):
        texts = sorted({plain(row["text"]) for row in rows})
        drawn = np.random.default_rng(seed).permutation(len(texts))[: round(holdout * len(texts))]
        held = {texts[i] for i in drawn}
        splits = [plain(row["text"]) in held for row in rows]
    questions = [
        ScoredQuestion(row["text"], row["losses"], row["tokens"], test)
        if targets == "loss"
        else Question(row["text"], row["weights"], test)
        for row, test in zip(rows, splits, strict=True)
    ]
    train, test = ({plain(q.text) for q in questions if q.test == side} for side in (False, True))
    if not (train and test):
        hint = "there are too few" if train else "the column split names none"
        raise GranulonError(f"{path} has no questions {'held out to test on' if train else 'to train on'}: {hint}.")
    # The same words are asked of many images, whose answers are scored one by one.
    if targets == "weights" and (both := train & test):
        raise GranulonError(f"{path}: {min(both)!r} is both trained on and held out; a question belongs to one split.")
    return questions


def problem_of(row: Any, first: dict[str, Any] | None, targets: str = "weights") -> str | None:
    """Say what is wrong with a row of labels for such targets, if anything; `first` is the first row."""
    if not isinstance(row, dict):
        return "it is no JSON object"
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        return "it has no question in `text`"
    if KINDS[targets] not in row and (other := [name for name, column in KINDS.items() if column in row]):
        return f"it has `{KINDS[other[0]]}`, which are for --targets {other[0]}; this run has --targets {targets}"
    if targets == "loss":
        return problem_of_scores(row, first)
    weights = row.get("weights")
    if not isinstance(weights, dict) or not all(type(w) in (int, float) and 0 <= w <= 1 for w in weights.values()):
        return 'it has no `weights` such as {"coarse": 0.8, "middle": 0.2, "fine": 0}'
    if first is not None and weights.keys() != first["weights"].keys():
        return f"its levels are {', '.join(weights)}, and those of the first row {', '.join(first['weights'])}"
    if abs(math.fsum(weights.values()) - 1) > SUM_TOLERANCE:
        return f"its weights sum to {math.fsum(weights.values()):.4g}, not to 1"
    return None


def plain(text: str) -> str:
    """Write a question as people also type it: in lower case, without the last mark."""
    return text.lower().strip().rstrip("?.!").rstrip()


def check_levels(questions: Sequence[Any], levels: Sequence[str], variant: str) -> None:
    """Raise GranulonError where a model has no levels, or others than the labels."""
    if not levels:
        raise GranulonError(f"{variant} has no granularity levels, and therefore no controller to train.")
    if set(questions[0].levels) != set(levels):
        raise GranulonError(
            f"The labels are for the levels {', '.join(questions[0].levels)}, and {variant} has {', '.join(levels)}; label "
            "the questions for these with granulon controller label."
        )


@torch.no_grad()
def question_states(model: Any, processor: Any, texts: Sequence[str], show: bool = True) -> torch.Tensor:
    """Compute the mean E1 of each question, over the tokens that the model's own processor marks; [Q x E], float32, on the CPU.

    Images are left out: the question does not see them.
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


def fit(
    controller: Any,
    count: int,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    args: ControllerArguments,
    show: bool = True,
) -> float:
    """Train the controller (float32) in place by the loss of drawn questions, given as indices below `count`; return the mean
    of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(controller.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.steps)
    draw, losses = torch.Generator().manual_seed(args.seed), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small are the products that more threads mostly wait for each other
    for step in track(range(args.steps), description="controller", disable=not show):
        loss = loss_of(torch.randint(count, (args.batch_size,), generator=draw))
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
    """Return logits [Q x P x n] of mean states [Q x E] at each of P prices (1 without prices); the mean of one token is the
    token."""
    alone = torch.ones(len(states), 1, dtype=torch.bool)
    return torch.stack([controller(states.unsqueeze(1), alone, price) for price in range(controller.num_prices)], dim=1)


@torch.no_grad()
def standardize(controller: Any, states: torch.Tensor) -> None:
    """Let the first layer of a controller tell questions apart: of mean states [Q x E] it makes features of mean 0, variance 1.

    Sigmoids of states differ far less from question to question than they differ from 0, so that their mean is left out.
    """
    weight, features = controller.in_proj.weight, torch.sigmoid(states)
    mean = features.mean(0)
    weight -= torch.outer(weight @ mean, mean) / mean.dot(mean)
    weight /= (features @ weight.T).std(0).clamp(min=1e-6).unsqueeze(1)


def train_controller(
    model: Any, processor: Any, questions: Sequence[Any], args: ControllerArguments, show: bool = True
) -> dict[str, Any]:
    """Train the model's controller on the questions and measure it on those held out; everything else stays as it is.

    Training goes on from the controller that the model has, whose last layer is new where it was not trained at these prices.
    It is done in float32 on the CPU; what is measured is the controller in the language model's own precision, as it will be
    used.

    Returns:
        `dict`: `levels`, `n_train`, `n_test`, `train_loss`; what [`measure`] says of the hold-out, and the questions it gets
        `wrong`, or with the targets "loss" `prices`, what [`measure_costs`] says.

    Raises:
        GranulonError: the levels of model and questions differ, or the loss is not finite.
    """
    levels = model.config.level_names
    check_levels(questions, levels, args.variant)
    model.eval()
    new = set_prices(model, args.price or None)
    set_stage(model, "controller")
    train, test = ([q for q in questions if q.test == held_out] for held_out in (False, True))
    texts = [q.text for q in train]
    priced = args.targets == "loss"
    targets = costs_of(train, levels, args.price)[0] if priced else weights_of(train, levels)
    if args.as_typed:
        texts, targets = texts + [plain(text) for text in texts], torch.cat([targets, targets])
    states = question_states(model, processor, [*texts, *(q.text for q in test)], show)
    device, controller = model.device, model.model.controller.float().cpu()
    if new:
        standardize(controller, states[: len(texts)])

    def loss_of(chosen: torch.Tensor) -> torch.Tensor:
        logits = logits_of(controller, states[chosen])
        return (
            priced_loss(logits, targets[chosen], args.temperature) if priced else F.cross_entropy(logits[:, 0], targets[chosen])
        )

    loss = fit(controller, len(texts), loss_of, args, show)
    controller.requires_grad_(False).to(model.get_input_embeddings().weight.dtype)
    with torch.no_grad():
        logits = logits_of(controller, states[len(texts) :])
    controller.to(device)
    found: dict[str, Any] = {"levels": levels, "n_train": len(train), "n_test": len(test), "train_loss": loss}
    if priced:
        return {**found, "prices": measure_costs(logits.argmax(-1).numpy(), train, test, levels, args.price)}
    probs = logits[:, 0].softmax(-1)
    found |= measure(probs.numpy(), weights_of(test, levels).numpy(), weights_of(train, levels).numpy())
    wrong = []
    for q, p in zip(test, probs, strict=True):
        chosen, most = levels[p.argmax()], max(q.weights, key=q.weights.__getitem__)
        if q.weights[chosen] < q.weights[most]:
            wrong.append({"text": q.text, "labelled": most, "chosen": chosen, "p": p.max().item()})
    return {**found, "wrong": wrong}


def weights_of(questions: Iterable[Question], levels: Sequence[str]) -> torch.Tensor:
    """Return weights of shape [Q x n], in the order of the model's levels."""
    return torch.tensor([[question.weights[name] for name in levels] for question in questions])


def measure(probs: np.ndarray, weights: np.ndarray, train_weights: np.ndarray) -> dict[str, Any]:
    """Measure how well probabilities [Q x n] meet the weights [Q x n] of held-out questions.

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
    best = weights.max(1) - 1e-9
    right = (weight >= best).astype(float)
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
    reliability = []
    for b in np.unique(bins):
        inside = bins == b
        columns = {"confidence": confidence, "accuracy": right, "weight": weight}
        means = {name: float(column[inside].mean()) for name, column in columns.items()}
        reliability.append({"from": int(b) / BINS, "to": int(b + 1) / BINS, "n": int(inside.sum()), **means})
    confusion = np.zeros((weights.shape[1],) * 2, dtype=int)
    np.add.at(confusion, (weights.argmax(1), chosen), 1)
    entropies = [float(-(weights * np.log(np.maximum(p, 1e-12))).sum(1).mean()) for p in (probs, weights)]
    return {
        **found,
        "majority": float((weights[:, usual] >= best).mean()),
        "cross_entropy": entropies[0],
        "label_entropy": entropies[1],
        "reliability": reliability,
        "confusion": confusion.tolist(),
    }


def calibration_error(confidence: np.ndarray, truth: np.ndarray, bins: np.ndarray) -> float:
    """Return Σ over bins of |mean confidence - mean truth|, weighted by how many are in the bin (Guo et al. 2017)."""
    return float(np.abs(np.bincount(bins, confidence - truth)).sum() / len(bins))


def run_controller(args: ControllerArguments) -> dict[str, Any]:
    """Train a controller as told; everything that can be wrong is looked at first, the cheapest before the rest.

    Returns:
        `dict`: of [`train_controller`]; `model` and `processor` beside it.
    """
    check_output_dir(args.output_dir)
    check_unused(args.output_dir)
    questions = read_labels(args.labels, args.holdout, args.seed, args.targets)
    if args.variant in variants.NAMES:  # weights come last
        check_levels(questions, GranulonConfig(**variants.parse(args.variant)[0].config).level_names, args.variant)
    elif args.variant != "demo":
        check_levels(questions, read_config(args.variant).level_names, args.variant)
    shown = ModelArguments(variant=args.variant, tiny=args.tiny, open_weights=args.open_weights)
    model, processor = build_model(shown, fresh=True)
    return {"model": model, "processor": processor, **train_controller(model, processor, questions, args)}


def save(folder: Path, model: Any, processor: Any, results: dict[str, Any], full: bool = False) -> None:
    """Write `adapter.safetensors` with the controller alone, `config.json` and `results.json`; with `full` the whole model."""
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(folder, model, {name: v for name, v in adapter_state(model).items() if name.startswith("controller.")})
    if full:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    described = {**results, "versions": versions()}
    (folder / "results.json").write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n")
