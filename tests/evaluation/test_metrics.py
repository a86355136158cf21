"""Scores against independent computations."""

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from granulon_hf.evaluation.metrics import (
    bert_scores,
    chosen_option,
    corpus_captions,
    exact,
    option_accuracy,
    recall,
)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("a red CAR", "A red bus", 2 / 3),
        ("red red red", "red", 1.0),
        ("", "red", 0.0),
        ("anything", "", 1.0),
        ("car.", "car", 0.0),  # words as the released code splits them
        ("红色 汽车", "红色 的 汽车", 2 / 3),
    ],
)
def test_recall(prediction, reference, expected):
    assert recall(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The  Red car.", "red car", 1),
        ("red cars", "red car", 0),
        ("-5", "5", 0),
        ("−5", "-5", 1),  # a minus sign
        ("1.5", "15", 0),
        ("1.5", "1 5", 0),
        ("5.", "5", 1),
        ("3-5", "3 5", 1),
        ("x=-5", "x = -5", 1),
        ("x < 5", "x > 5", 0),
        ("", "A", 0),
        ("", "?", 0),
        ("", "", 0),
        ("?", "?", 1),
        ("a", "A", 1),
        ("the", "A", 0),
    ],
)
def test_exact(prediction, reference, expected):
    assert exact(prediction, reference) == expected


OPTIONS = ["the red car", "car", "a dog", "Two"]


@pytest.mark.parametrize(
    ("prediction", "index"),
    [
        ("B", 1),
        ("(c)", 2),
        ("D. Two", 3),
        ("The dog", 2),
        ("I think it is a dog, really", 2),
        ("It shows the red car.", 0),  # which holds "car"
        ("a dog or two", None),
        ("Neither", None),
        ("", None),
        ("E", None),
        ("A dog", 2),  # no letter: an article
    ],
)
def test_options(prediction, index):
    assert chosen_option(prediction, OPTIONS) == index
    assert option_accuracy(prediction, OPTIONS, "a dog") == float(index == 2)


@pytest.mark.parametrize(
    ("prediction", "choices", "reference", "expected"),
    [
        ("", ["<", ">", "="], "<", 0),
        (">", ["<", ">", "="], "<", 0),
        ("<", ["<", ">", "="], "<", 1),
        ("The sign is <.", ["<", ">", "="], "<", 1),
        ("", ["a", "b"], "a", 0),
        (" ", ["", "b"], "", 0),
        ("A", ["5", "-5"], "-5", 0),
        ("5", ["5", "-5"], "-5", 0),
        ("It is 5.", ["5", "-5"], "-5", 0),
        ("It is -5.", ["5", "-5"], "-5", 1),
        ("5 or -5", ["5", "-5"], "-5", 0),
        ("It is 2.5", ["2", "2.5"], "2", 0),
        ("B", ["B", "A"], "B", 1),
        ("The answer is B.", ["B", "A"], "B", 1),
        ("C++", ["C", "C++"], "C++", 1),
        ("well, C?", ["C!", "C?"], "C!", 0),
        ("car", ["car", "Car", "dog"], "Car", 1),  # the same option twice
        ("B", ["x", "y"], "z", 0),
    ],
)
def test_an_option_is_right_by_its_index(prediction, choices, reference, expected):
    assert option_accuracy(prediction, choices, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "index"),
    [
        ("The answer is B.", 1),
        ("The correct answer is: **B**", 1),
        ("Answer: B", 1),
        ("**Answer:** (b)", 1),
        ("Answer:\nB", 1),
        ("**B**", 1),
        ("`B`", 1),
        ("__B__", 1),
        ("Option B", 1),
        ("The correct option is B, because it barks", 1),
        ("The answer is option B", 1),
        ("(B)", 1),
        ("(B) something else", 1),
        ("B) something else", 1),
        ("B\nBecause it is.", 1),
        ("Not the first. The answer is B", 1),
        ("The answer is A.", 0),
        ("A cat", None),
        ("The answer is a cat.", None),
        ("Answer: A cat", None),
        ("The answer is not B", None),
        ("The answer is A, B", None),
        ("The answer is A. No, the answer is B.", None),
        ("The answer is a tree", 2),
        ("Answer: Z", None),
    ],
)
def test_an_option_is_named_by_its_letter(prediction, index):
    assert chosen_option(prediction, ["a bus", "a dog", "a tree"]) == index


def test_captions_are_the_libraries():
    sacrebleu = pytest.importorskip("sacrebleu")
    references = ["a cat sits on a wall", "two dogs run over green grass", "a cup of coffee on a table"]
    predictions = ["a cat on a wall", "a red rocket", "a cup of coffee on a table"]
    scores = corpus_captions(predictions, references)
    assert scores["bleu"][0] == pytest.approx(sacrebleu.sentence_bleu(predictions[0], [references[0]]).score)
    assert scores["rouge_l"][2] == pytest.approx(100) and scores["rouge_l"][1] < 30
    assert scores["cider"][2] > scores["cider"][0] > scores["cider"][1]


def test_bertscore_is_greedy_matching_of_token_states(tmp_path):
    """F1 by hand: each word's best cosine among all tokens of the other side (bert-score lets it be a special one); an empty
    answer scores 0."""
    pytest.importorskip("bert_score")
    words = "a red blue car bus dog is on the table of".split()
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=64)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).eval()
    model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    predictions, references = ["a red car", "the dog is on the table", ""], ["a blue car", "a dog on a red bus", "a dog"]

    @torch.no_grad()
    def states(text):
        inputs = tokenizer(text, return_tensors="pt")
        found = model(**inputs, output_hidden_states=True).hidden_states[2][0]
        return found / found.norm(dim=-1, keepdim=True)

    expected = []
    for prediction, reference in zip(predictions[:2], references[:2], strict=True):
        likeness = states(prediction) @ states(reference).T
        precision = likeness.max(1).values[1:-1].mean().item()
        recalled = likeness.max(0).values[1:-1].mean().item()
        expected.append(2 * precision * recalled / (precision + recalled))
    found = bert_scores(predictions, references, str(tmp_path), 2)
    assert found[:2] == pytest.approx(expected, abs=1e-5) and found[2] == 0
