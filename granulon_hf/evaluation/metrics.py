"""Scores of answers, sample by sample, with intervals and paired tests."""

import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

N_RESAMPLES = 2000
ARTICLES = {"a", "an", "the"}


def recall(prediction: str, reference: str) -> float:
    """|pred ∩ ref| / |ref| of the sets of lower-cased words, split at white space (supplement; the released code).

    1.0 for an empty reference, of which nothing can be missed.
    """
    wanted = set(reference.lower().split())
    return len(wanted & set(prediction.lower().split())) / len(wanted) if wanted else 1.0


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra space (ours, after SQuAD's)."""
    words = text.lower().translate(str.maketrans(string.punctuation, " " * len(string.punctuation))).split()
    return " ".join(word for word in words if word not in ARTICLES)


def exact(prediction: str, reference: str) -> float:
    """1.0 where both are the same after [`normalise`] (ours)."""
    return float(normalise(prediction) == normalise(reference))


def option_accuracy(prediction: str, choices: Sequence[str], reference: str) -> float:
    """1.0 where the answer names the right option (ours).

    An answer names an option by its letter alone ("B", "(b)", "B. the dog"), by its content, or, in longer answers, as the only
    option whose content occurs in it. Where it names several or none it is wrong.
    """
    found = chosen_option(prediction, choices)
    return float(found is not None and normalise(choices[found]) == normalise(reference))


def chosen_option(prediction: str, choices: Sequence[str]) -> int | None:
    """Index of the option that an answer names, or None."""
    contents = [normalise(choice) for choice in choices]
    said = normalise(prediction)
    if said in contents:
        return contents.index(said)
    letter = re.match(r"\s*\(?([A-Za-z])\)?\s*(?:[.):]|$)", prediction)
    if letter and (index := ord(letter[1].upper()) - ord("A")) < len(choices):
        return index
    inside = [i for i, content in enumerate(contents) if content and re.search(rf"\b{re.escape(content)}\b", said)]
    # "red car" says "car" too: an option inside of another that was named does not count.
    inside = [i for i in inside if not any(i != j and contents[i] in contents[j] for j in inside)]
    return inside[0] if len(inside) == 1 else None


def corpus_captions(predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """CIDEr, BLEU-4 and ROUGE-L of each sample.

    BLEU is sacrebleu's sentence BLEU, ROUGE rouge-score's F-measure, 0 to 100; CIDEr is pycocoevalcap's times 10, whose word
    statistics are those of all references: it needs several.

    Raises:
        ImportError: names the package that is missing.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
        from rouge_score import rouge_scorer
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise ImportError(f'{error}; the caption metrics need: pip install "granulon-hf[eval]"') from None
    bleu, rouge = BLEU(effective_order=True), rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    spaced = [" ".join(re.findall(r"\w+", text.lower())) for text in (*predictions, *references)]
    count = len(predictions)
    _, cider = Cider().compute_score({i: [spaced[count + i]] for i in range(count)}, {i: [spaced[i]] for i in range(count)})
    return {
        "cider": [10.0 * float(score) for score in cider],
        "bleu": [bleu.sentence_score(p, [r]).score for p, r in zip(predictions, references, strict=True)],
        "rouge_l": [100 * rouge.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)],
    }


def bert_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    model: str = "roberta-large",
    layers: int | None = None,
    **kwargs: Any,
) -> list[float]:
    """BERTScore F1 of each sample, by the bert-score package (supplement: a baseline similarity). An empty answer scores 0.

    Args:
        model (`str`): Hub id or folder of the encoder; with a folder also `layers`.
    """
    from bert_score import BERTScorer

    scorer = BERTScorer(model_type=model, num_layers=layers, **kwargs)
    if scorer._tokenizer.model_max_length > 10**6:  # a folder whose tokenizer knows no limit
        scorer._tokenizer.model_max_length = 512
    kept = [i for i, text in enumerate(predictions) if text.strip() and references[i].strip()]
    scores = [0.0] * len(predictions)
    if kept:
        _, _, f1 = scorer.score([predictions[i] for i in kept], [references[i] for i in kept])
        for i, value in zip(kept, f1.tolist(), strict=True):
            scores[i] = value
    return scores


def bootstrap_mean(values: Sequence[float], n_resamples: int = N_RESAMPLES) -> tuple[float, float, float]:
    """Mean and 95 % percentile bootstrap interval (seed 0).

    Raises:
        ValueError: there are no values.
    """
    return _interval(np.asarray(values, dtype=float), n_resamples)


def paired_difference(
    a: Sequence[float], b: Sequence[float], n_resamples: int = N_RESAMPLES
) -> tuple[float, float, float, float]:
    """Mean of a − b over the same samples, its 95 % bootstrap interval, and the p-value of a sign-flip permutation test.

    Raises:
        ValueError: the lengths differ, or there are no values.
    """
    if len(a) != len(b):
        raise ValueError(f"Paired scores need the same samples; got {len(a)} and {len(b)}.")
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    mean, low, high = _interval(difference, n_resamples)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(n_resamples, len(difference)))
    flipped = np.abs((signs * difference).mean(1))
    return mean, low, high, float((1 + (flipped >= abs(mean) - 1e-12).sum()) / (1 + n_resamples))


def _interval(values: np.ndarray, n_resamples: int) -> tuple[float, float, float]:
    if not len(values):
        raise ValueError("There is nothing to average.")
    draw = np.random.default_rng(0)
    means = np.array([values[draw.integers(len(values), size=len(values))].mean() for _ in range(n_resamples)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


SCORERS: dict[str, Callable[[dict[str, Any]], float]] = {
    "recall": lambda row: recall(row["prediction"], row["reference"]),
    "exact": lambda row: exact(row["prediction"], row["reference"]),
    "option_accuracy": lambda row: option_accuracy(row["prediction"], row["choices"] or [], row["reference"]),
}
