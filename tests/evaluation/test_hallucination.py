"""Scores of hallucination benchmarks by hand, and through `granulon eval run`."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from sklearn.metrics import precision_recall_fscore_support
from typer.testing import CliRunner

from granulon_hf.cli import app
from granulon_hf.cli.eval import show
from granulon_hf.evaluation import answer
from granulon_hf.evaluation.hallucination import WEIGHTED
from granulon_hf.evaluation.metrics import accuracy, yes_or_no
from tests.data import tables
from tests.data.datasets.test_hallucination_sets import amber, coco


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("**No**, there is none.", "no"),
        ("Yes, there is no doubt.", "yes"),
        ("The answer is: yes", "yes"),
        ("Answer: NO", "no"),
        ("There is a dog in the image.", "yes"),
        ("There are no dogs.", "no"),
        ("There isn't a dog.", "no"),
        ("There isn\N{RIGHT SINGLE QUOTATION MARK}t a dog.", "no"),
        ("The dog is not there. It may be outside.", "no"),
        ("I know nothing of it", None),
        ("a dog", None),
        ("yes or no", "yes"),
        ("Either yes or no", None),
        ("", None),
        ("Noon", None),
        ("I cannot tell.", None),
        ("I cannot see a dog.", "no"),
        ("This can't be determined from the image.", None),
        ("I'm not sure", None),
        ("There is no way to know.", None),
        ("It isn't clear", None),
        ("I do not know", None),
        ("I cannot be sure, but yes.", "yes"),
        ("No, I cannot see one.", "no"),
    ],
)
def test_what_an_answer_says(text, said):
    assert yes_or_no(text) == said


def question(prediction, reference, **meta):
    return {"prediction": prediction, "reference": reference, "choices": None, "task": "vqa", "meta": meta}


def mean(name, rows):
    values, weights = zip(*WEIGHTED[name](rows), strict=True)
    return np.average([0 if value is None else value for value in values], weights=weights)


def test_yes_and_no_are_scikit_learns():
    rng = np.random.default_rng(0)
    right, said = rng.choice(["yes", "no"], 200), rng.choice(["yes", "no"], 200, p=[0.7, 0.3])
    rows = [question(f"{prediction.title()}.", reference) for prediction, reference in zip(said, right, strict=True)]
    for word in ("yes", "no"):
        precision, recall, f1, _ = precision_recall_fscore_support(right, said, pos_label=word, average="binary")
        found = [mean(f"{word}_{name}", rows) for name in ("precision", "recall", "f1", "ratio")]
        assert found == pytest.approx([precision, recall, f1, np.mean(said == word)])
    assert mean("accuracy", rows) == pytest.approx(np.mean(right == said))


def test_an_answer_that_is_neither_is_wrong_and_no_yes():
    rows = [question(text, reference) for text, reference in (("yes", "yes"), ("what?", "yes"), ("", "no"), ("no", "no"))]
    assert mean("accuracy", rows) == 0.5 and mean("yes_ratio", rows) == 0.25 and mean("no_ratio", rows) == 0.25
    assert mean("yes_recall", rows) == 0.5 and mean("yes_precision", rows) == 1


def test_accuracy_goes_by_what_is_asked():
    options = {"choices": ["Left", "Right"], "task": "vqa", "meta": {}, "reference": "Right"}
    assert [accuracy({**options, "prediction": text}) for text in ("B", "(b)", "right", "A", "")] == [1, 1, 1, 0, 0]
    assert [accuracy(question(text, "4")) for text in ("4", "4.", "5")] == [1, 1, 0]
    unsure = [
        accuracy(question(text, "yes", may_abstain=True)) for text in ("I cannot know.", "It is unclear", "yes", "no", "")
    ]
    assert unsure == [1, 1, 1, 0, 0]
    assert accuracy(question("I cannot know.", "yes")) == 0


def test_groups_are_right_as_a_whole():
    said = [("yes", "yes"), ("no", "no"), ("yes", "no"), ("yes", "yes"), ("no", "no")]
    keys = [("a", "q"), ("a", "r"), ("b", "q"), ("b", "r"), (None, "s")]
    rows = [question(p, r, figure=f, set_question=q, pair=f) for (p, r), (f, q) in zip(said, keys, strict=True)]
    assert mean("fAcc", rows) == pytest.approx(1 / 2)  # a of a, b; the last has no figure
    assert mean("qAcc", rows) == pytest.approx(2 / 3)  # r, s of q, r, s
    assert mean("pair_accuracy", rows) == pytest.approx(1 / 2)
    assert mean("pair_accuracy", rows[:3]) == 1  # half a pair says nothing
    assert WEIGHTED["fAcc"](rows)[-1] == (None, 0)


WORDS = {"cat": "cat", "kitten": "cat", "dog": "dog", "car": "car", "hot dog": "hot dog"}


def caption(text, *objects, **meta):
    meta = {"words": WORDS, "objects": [[name] for name in objects], **meta}
    return {"prediction": text, "reference": "-", "choices": None, "task": "caption", "meta": meta}


def test_chair_by_hand():
    rows = [
        caption("A cat and two dogs. The cat sleeps.", "cat", "car"),  # 1 of 3 mentions; 1 of 2 objects
        caption("A kitten in a car.", "cat", "car"),  # 0 of 2; 2 of 2
        caption("A hot dog, a hot dog and a dog.", "dog"),  # 2 of 3; 1 of 1
        caption("Nothing.", "dog"),  # 0 of 0; 0 of 1
    ]
    assert mean("chair_s", rows) == pytest.approx(2 / 4)
    assert mean("chair_i", rows) == pytest.approx(3 / 8)
    assert mean("object_recall", rows) == pytest.approx(4 / 6)


def test_amber_by_hand():
    """Objects have several names, safe words are never wrong, and of what people would expect it counts what is named."""
    words = dict.fromkeys(("sky", "road", "street", "dog", "cloud", "light"))
    words = {word: word for word in words}
    meta = {"words": words, "objects": [["sky"], ["road", "street"]], "unlikely": [["dog"], ["cloud"]], "neutral": ["light"]}
    rows = [caption("A street with light and a dog", **meta), caption("The sky", **meta)]
    found = [mean(name, rows) for name in ("chair_i", "chair_s", "object_recall", "cog")]
    assert found == pytest.approx([1 / 4, 1 / 2, 2 / 4, 1 / 4])


@pytest.fixture
def answering(monkeypatch, tmp_path):
    """Runs `granulon eval run` with given answers by sample id, as if two models had made them; returns result and table."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)

    def evaluate(data, *models, options=()):
        names = ["tiny:clip-qwen2.5", "tiny:siglip-qwen2.5"][: len(models)]
        turn = iter(models)
        known = {}

        def answer_batch(model, processor, samples, generation):
            if id(model) not in known:
                known[id(model)] = next(turn)
            return [{"prediction": known[id(model)](sample), "new_tokens": 1, "prompt_tokens": 1} for sample in samples]

        monkeypatch.setattr(answer, "answer_batch", answer_batch)
        given = [part for name in names for part in ("--model", name)]
        done = CliRunner().invoke(app, ["eval", "run", *given, "--data", data, "--out", "out", *options])
        assert done.exit_code == 0, done.output
        return json.loads(Path("out/scores.json").read_text()), Path("out/table.md").read_text()

    return evaluate


def cells(table):
    """The rows of a table in Markdown, as dictionaries by column."""
    head, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_a_wide_table_has_a_line_for_each_column(capsys):
    columns = [("pope", name) for name in WEIGHTED]
    rows = [{"name": name, "cells": [f"{i}.0 [1, 2]; +1" for i in range(len(columns))], "paper": False} for name in "ab"]
    show({"columns": columns, "rows": rows, "counts": {"pope": 9}, "remarks": []})
    printed = capsys.readouterr().out
    assert all(f"pope: {name} (n = 9)" in printed for name in WEIGHTED)
    show(
        {
            "columns": columns[:2],
            "rows": [row | {"cells": row["cells"][:2]} for row in rows],
            "counts": {"pope": 9},
            "remarks": [],
        }
    )
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "0.0" in line] == ["a", "b"]


def test_pope_through_the_table(answering, tmp_path):
    rows = [tables.pope_row(i, category=("random", "popular")[i // 12 % 2]) for i in range(48)]
    tables.write(tmp_path / "pope" / "data" / "test-00000-of-00001.parquet", rows, tables.POPE)
    wrong = {str(i) for i in range(12)}
    result, table = answering(
        "pope=pope",
        lambda sample: "Yes." if sample.id in wrong else sample.reference,
        lambda sample: sample.reference,
    )
    assert result["data"] == ["pope", "pope-random", "pope-popular"]
    first, second = cells(table)
    # Of 48 questions 6 noes are answered with yes, all of the category random.
    expected = {"accuracy": 42 / 48, "yes_precision": 24 / 30, "yes_recall": 1, "yes_f1": 48 / 54, "yes_ratio": 30 / 48}
    for name, value in expected.items():
        assert first[f"pope: {name} (n = 48)"].startswith(f"{100 * value:.1f} [")
    assert first["pope-random: accuracy (n = 24)"].startswith("75.0 [")
    assert first["pope-popular: yes_f1 (n = 24)"].startswith("100.0 [")
    assert second["pope: accuracy (n = 48)"].split("; ")[1].startswith("+12.5 [")
    # Six questions about each of eight images, of which two are answered wrongly: as many clusters.
    assert len(set(result["clusters"]["pope"])) == 8 and len(result["clusters"]["pope-random"]) == 24
    again, _ = answering("pope=pope", str, str, options=["--metric", "exact"])
    assert set(again["scores"]["tiny:clip-qwen2.5"]["pope"]) == {"exact"}


def test_results_for_the_hub(answering, tmp_path):
    rows = [tables.pope_row(i, category=("random", "popular")[i // 6 % 2]) for i in range(24)]
    tables.write(tmp_path / "pope" / "data" / "test-00000-of-00001.parquet", rows, tables.POPE)
    (tmp_path / "eval.yaml").write_text("results_yaml: true\nseed: 0\n")
    answering("pope=pope", lambda sample: "yes", options=["--data", "shapes", "--limit", "24", "eval.yaml"])
    (path,) = Path("out").rglob(".eval_results/*")
    assert path.name == "pope.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    found = {entry.task_id: entry.value for entry in entries}
    assert found["accuracy"] == 50 and found["random_yes_ratio"] == 100 and found["popular_yes_f1"] == 66.67
    assert {entry.dataset_id for entry in entries} == {"lmms-lab/POPE"} and len(found) == 15
    assert all("[" in entry.notes and entry.date for entry in entries)


def test_hallusion_bench_and_mmvp_through_the_table(answering, tmp_path):
    rows = [tables.hallusion_row(i) for i in range(8)]
    tables.write(tmp_path / "hb" / "data" / "image-00000-of-00001.parquet", rows, tables.HALLUSION)
    pairs = [tables.mmvp_row(i) for i in range(1, 9)]
    tables.write(tmp_path / "mmvp" / "data" / "train-00000-of-00001.parquet", pairs)
    _, table = answering(
        "hallusion-bench=hb", lambda sample: "yes" if sample.id.startswith("VD-illusion-0-0") else sample.reference
    )
    (row,) = cells(table)
    # One of two questions about one of four figures is wrong, and that question of one of two sets.
    found = [row[f"hallusion-bench: {name} (n = 8)"].split(" [")[0] for name in ("accuracy", "fAcc", "qAcc")]
    assert found == ["87.5", "75.0", "75.0"]
    _, table = answering("mmvp=mmvp", lambda sample: "(a)" if sample.id in ("2", "4") else sample.reference)
    (row,) = cells(table)
    found = [row[f"mmvp: {name} (n = 8)"].split(" [")[0] for name in ("accuracy", "pair_accuracy")]
    assert found == ["75.0", "50.0"]


def test_amber_and_chair_through_the_table(answering, tmp_path):
    amber(tmp_path / "amber")
    captions = {
        "1": "A man and a dog on a path under an orange light.",
        "2": "A mug with a cat.",
        "3": "Yes",
        "4": "Yes",
        "5": "No",
    }
    result, table = answering("amber=amber", lambda sample: captions[sample.id])
    (row,) = cells(table)
    # Mentions: man, dog, path, light (orange is no object here), mug, cat. Objects: path and man of sky, road, person; cup.
    overall = {"accuracy": 2 / 3, "no_precision": 1, "no_recall": 1 / 2, "chair_i": 2 / 6, "object_recall": 3 / 4}
    overall |= {"chair_s": 1, "cog": 1 / 2}
    for name, value in overall.items():
        assert row[f"amber: {name} (n = 5)"].startswith(f"{100 * value:.1f} ["), name
    assert set(result["scores"]["tiny:clip-qwen2.5"]["amber-generative"]) == {"chair_i", "chair_s", "object_recall", "cog"}
    assert set(result["scores"]["tiny:clip-qwen2.5"]["amber-relation"]) == {"accuracy", "no_precision", "no_recall", "no_f1"}
    assert "unscored" not in table and "[no interval]" in table and "undefined" in table
    coco(tmp_path / "coco")
    _, table = answering("chair=coco", lambda sample: "Dogs and a truck." if sample.id == "7" else "A car.")
    (row,) = cells(table)
    found = [row[f"chair: {name} (n = 2)"].split(" [")[0] for name in ("chair_s", "chair_i", "object_recall")]
    assert found == ["50.0", "33.3", "50.0"]
