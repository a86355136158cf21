"""Scores of answers, sample by sample, with intervals and paired tests."""

import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from granulon_hf.data.mentions import WORD

ARTICLES = {"a", "an", "the"}
COMPARISON = re.compile("[<>=]")
# Signs and points of numbers are none: -5, 1.5, .5, but not 3-5 or "5."
NUMBER_MARK = r"(?<![\w.])-(?=\.?\d)|(?<=\d)\.(?=\d)|(?<![\w.])\.(?=\d)"
PUNCTUATION = re.compile(rf"(?!{NUMBER_MARK})(?![<>=])[{re.escape(string.punctuation)}]")
MARKDOWN = re.compile(r"[*`]|\b_+|_+\b|(?<!\w)_+|_+(?!\w)")
LETTER = re.compile(r"\(?([a-z])[ \t]*(?:[.):\n]|$)", re.IGNORECASE)
UNSURE = re.compile(
    r"(?:\b(?:not|cannot|unable to)|n't) (?:be )?(?:sure|certain|clear|possible|enough|know|tell|determined?|say|answer)\b"
    r"|\b(?:impossible|unclear|uncertain|unknown|no way|no information)\b"
)
EXPLICIT = re.compile(
    r"\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*(?:option\s+)?\(?([a-z])[ \t]*(?:[.):;!?\n]|,(?!\s*[a-z]\b)|$)", re.IGNORECASE
)


def recall(prediction: str, reference: str) -> float:
    """|pred ∩ ref| / |ref| of the sets of lower-cased words, split at white space (supplement; the released code).

    1.0 for an empty reference, of which nothing can be missed.
    """
    wanted = set(reference.lower().split())
    return len(wanted & set(prediction.lower().split())) / len(wanted) if wanted else 1.0


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and extra space (ours, after SQuAD's).

    Signs and decimal points of numbers stay, and so do `<`, `>` and `=`. Text of which nothing would be left stays too.
    """
    words = COMPARISON.sub(r" \g<0> ", PUNCTUATION.sub(" ", text.casefold().replace("\N{MINUS SIGN}", "-"))).split()
    return " ".join(word for word in words if word not in ARTICLES) or plain(text)


def plain(text: str) -> str:
    """Lower case, without extra space."""
    return " ".join(text.casefold().split())


def exact(prediction: str, reference: str) -> float:
    """1.0 where both are the same after [`normalize`] (ours); an empty answer is never right."""
    return float(bool(prediction.strip()) and normalize(prediction) == normalize(reference))


def option_accuracy(prediction: str, choices: Sequence[str], reference: str) -> float:
    """1.0 where the answer names the option that the reference is (ours), as [`chosen_option`] has it."""
    found = chosen_option(prediction, choices)
    return float(found is not None and found == option_of(reference, choices))


def option_of(text: str, choices: Sequence[str]) -> int | None:
    """Index of the option with this content: the first that is the same, or the only one that is so after [`normalize`]."""
    if not text.strip():
        return None
    contents = [plain(choice) for choice in choices]
    if plain(text) in contents:
        return contents.index(plain(text))
    same = [i for i, choice in enumerate(choices) if normalize(choice) == normalize(text)]
    return same[0] if len({contents[i] for i in same}) == 1 else None


def chosen_option(prediction: str, choices: Sequence[str]) -> int | None:
    """Index of the option that an answer names, or None.

    An answer names an option, in this order,

    1. by its content alone: "the dog";
    2. by its letter at the start, alone or closed by a bracket, a full stop, a colon or the end of the line: "B", "(b)",
       "B. the dog"; "A dog" has no letter;
    3. by a letter after "answer", "answer is", "option" or "choice", with or without a colon, that is closed likewise or by a
       comma: "The answer is B." Several different letters are none;
    4. by its content, as the only option whose content occurs in a longer answer; "the red car" does not name "car" too.

    Markdown's `*`, `_` and backticks are not looked at in 2 and 3.
    """
    whole = option_of(prediction, choices)
    if whole is not None:
        return whole
    text = MARKDOWN.sub("", prediction).strip()
    first = LETTER.match(text)
    letters = {first[1].upper()} if first else {found.upper() for found in EXPLICIT.findall(text)}
    if len(letters) == 1:
        letter = letters.pop()
        named = option_of(letter, choices)  # options that are letters themselves, in whatever order
        index = ord(letter) - ord("A") if named is None else named
        if index < len(choices):
            return index
    contents, rest, inside = [normalize(choice) for choice in choices], normalize(prediction), set()
    for content in sorted(filter(None, set(contents)), key=len, reverse=True):
        # What is found is taken away, so that a shorter option inside of it does not count.
        rest, times = re.subn(rf"(?<![\w.-]){re.escape(content)}(?!\.?\w)", "|", rest)
        if times:
            inside.add(content)
    return option_of(inside.pop(), choices) if len(inside) == 1 else None


def yes_or_no(text: str) -> str | None:
    """Return what an answer says: "yes", "no", or None where that cannot be told.

    In this order: its first word is one of the two; it says that it does not know; one of the two is among its words and the
    other is not; its first sentence negates ("not", "isn't"), or states ("There is a dog"), as POPE's own script reads such
    answers.
    """
    text = MARKDOWN.sub("", text).lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    words, first = WORD.findall(text), WORD.findall(text.partition(".")[0])
    if words and words[0] in ("yes", "no"):
        return words[0]
    named = {"yes", "no"} & set(words)
    if "yes" not in named and UNSURE.search(" ".join(words)):
        return None
    if named:
        return named.pop() if len(named) == 1 else None
    if any(word in ("not", "none", "cannot") or word.endswith("n't") for word in first):
        return "no"
    return "yes" if first[:2] in (["there", "is"], ["there", "are"]) else None


def asks_yes_or_no(row: dict[str, Any]) -> bool:
    return row["reference"].strip().lower() in ("yes", "no")


def accuracy(row: dict[str, Any]) -> float:
    """Score an answer as right or wrong by what is asked: an option, yes or no, or else a word.

    Where the sample's `meta` says `may_abstain`, since there is nothing to know from, an answer that is neither yes nor no is
    right.
    """
    if row["choices"]:
        return option_accuracy(row["prediction"], row["choices"], row["reference"])
    if not asks_yes_or_no(row):
        return exact(row["prediction"], row["reference"])
    said = yes_or_no(row["prediction"])
    if said is None and row["meta"].get("may_abstain"):
        return float(bool(row["prediction"].strip()))
    return float(said == row["reference"].strip().lower())


# Their packages are an extra of their own, for their size.
CAPTION_METRICS = {"cider": "pycocoevalcap", "bleu": "sacrebleu", "rouge_l": "rouge_score"}


def corpus_captions(predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """CIDEr, BLEU-4 and ROUGE-L of each sample.

    BLEU is sacrebleu's sentence BLEU, ROUGE rouge-score's F-measure, 0 to 100; CIDEr is pycocoevalcap's times 10, whose word
    statistics are those of all references: it needs several.

    Raises:
        ImportError: one of the packages is missing (`pip install "granulon-hf[captions]"`).
    """
    from pycocoevalcap.cider.cider import Cider
    from rouge_score import rouge_scorer
    from sacrebleu.metrics import BLEU

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

    `model` is the Hub id of the encoder, or its folder; with a folder give `layers` too.
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


SCORERS: dict[str, Callable[[dict[str, Any]], float]] = {
    "recall": lambda row: recall(row["prediction"], row["reference"]),
    "exact": lambda row: exact(row["prediction"], row["reference"]),
    "accuracy": accuracy,
    "option_accuracy": lambda row: option_accuracy(row["prediction"], row["choices"] or [], row["reference"]),
}
