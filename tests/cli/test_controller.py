"""`granulon controller label`: real commands against the misbehaving server."""

import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from granulon_hf.cli import controller
from granulon_hf.training import loss_labels
from granulon_hf.training.controller import read_labels
from granulon_hf.training.labelling import LEVELS
from granulon_hf.training.loss_labels import answer_losses
from tests.judge.server import Reply, Server
from tests.training.test_labelling import GOOD, good, question_of

app = typer.Typer()
app.add_typer(controller.app, name="controller")


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "AZURE_OPENAI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    return CliRunner().invoke(app, ["controller", "label", *map(str, arguments)])


def serve(behave=good):
    return Server(behave, name_of=question_of)


def labels(name="labels.jsonl"):
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def test_a_text_file_becomes_labels_that_training_reads():
    lines = [f"What is number {i}?" for i in range(10)]
    Path("questions.txt").write_text("\n".join([*lines, "", lines[0]]) + "\n")
    with serve() as server:
        done = run("questions.txt", "--out", "labels.jsonl", "--base-url", server.url)
        assert done.exit_code == 0, done.output
        again = run("questions.txt", "--out", "labels.jsonl", "--base-url", server.url)
        assert again.exit_code == 0 and len(server.requests) == 10
    assert [row["text"] for row in labels()] == lines
    assert labels()[0]["weights"] == pytest.approx({"coarse": 0.1, "middle": 0.2, "fine": 0.7})
    assert labels()[0]["model"] == "gpt-4o-2024-11-20"
    assert "10 labelled, 0 left out" in done.output and re.search(r"0\.02\d\d USD in this run", done.output)
    assert "1 questions are there twice" in done.output and "0.0000 USD in this run" in again.output
    questions = read_labels("labels.jsonl", holdout=0.3)
    assert sum(question.test for question in questions) == 3


def test_questions_without_a_label_are_told_and_left_out():
    Path("q.txt").write_text("good\nbad\n")

    def behave(server, body):
        return Reply(content=GOOD if question_of(body) == "good" else "no idea")

    with serve(behave) as server:
        done = run("q.txt", "--out", "labels.jsonl", "--base-url", server.url)
    assert done.exit_code == 0 and [row["text"] for row in labels()] == ["good"]
    assert "1 labelled, 1 left out without a label" in done.output and "1 × unparsable" in done.output
    Path("q2.txt").write_text("bad\n")
    with serve(behave) as server:
        done = run("q2.txt", "--out", "none.jsonl", "--base-url", server.url)
    assert done.exit_code == 2 and "No question got a label" in done.output and not Path("none.jsonl").exists()


def test_dry_run_limit_price_and_budget():
    Path("q.txt").write_text("".join(f"question {i}\n" for i in range(6)))
    with serve() as server:
        dry = run("q.txt", "--out", "labels.jsonl", "--base-url", server.url, "--dry-run")
        assert not server.requests and not list(Path().glob("labels*"))
        assert re.search(r"questions\s+6\s*\n", dry.output) and re.search(r"requests\s+6\s*\n", dry.output)
        assert re.search(r"cost, about\s+0\.00\d\d USD", dry.output) and "Nothing was sent" in dry.output
        unknown = run("q.txt", "--out", "labels.jsonl", "--model", "own", "--dry-run")
        assert "unknown for own; say --price" in unknown.output
        assert run("q.txt", "--out", "labels.jsonl", "--base-url", server.url, "--limit", 2).exit_code == 0
        assert len(labels()) == 2 and len(server.requests) == 2
        stopped = run("q.txt", "--out", "labels.jsonl", "--base-url", server.url, "--max-cost", 0.006, "--concurrency", 1)
        assert 2 < len(server.requests) < 6 and "--max-cost of 0.006 USD reached" in stopped.output
        assert len(labels()) == len(server.requests)
        assert run("q.txt", "--out", "labels.jsonl", "--base-url", server.url).exit_code == 0
        assert len(labels()) == 6 and set(server.paid.values()) == {1}
        assert server.requests[0]["model"] == "gpt-4o"


def test_columns_splits_and_own_levels():
    rows = [{"id": f"s{i}", "ask": f"question {i}", "split": "test" if i % 2 else "train", "image": None} for i in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.table({"question": ["one", "two"]}), "rows.parquet")

    def behave(server, body):
        return Reply(content='{"whole": 0.25, "part": 0.75}')

    levels = ("--level", "whole=all of it", "--level", "part=a piece")
    with serve(behave) as server:
        done = run("rows.jsonl", "--out", "labels.jsonl", "--base-url", server.url, "--column", "question=ask", *levels)
        assert done.exit_code == 0, done.output
        done = run("rows.parquet", "--out", "b.jsonl", "--base-url", server.url, *levels)
        assert done.exit_code == 0, done.output
    assert labels()[1] == {
        **{"text": "question 1", "id": "s1", "split": "test", "weights": {"whole": 0.25, "part": 0.75}},
        "model": "gpt-4o-2024-11-20",
    }
    assert [row["text"] for row in labels("b.jsonl")] == ["one", "two"]
    assert [question.test for question in read_labels("labels.jsonl")] == [False, True, False, True]


@pytest.mark.parametrize(
    ("content", "arguments", "sentence"),
    [
        ("", (), "holds no questions"),
        ('{"answer": "x"}\n', (), "has no question"),
        ('{"text": 3}\n', (), "has no question"),
        ("[1]\n", (), "no JSON object"),
        ('{"text": "a"}\n', ("--column", "image=x"), "no field 'image'"),
        ('{"text": "a"}\n', ("--level", "coarse"), "NAME=MEANING"),
        ('{"text": "a"}\n', ("--level", "a=x"), "at least two levels"),
        ('{"text": "a"}\n', ("--level", "a=x", "--level", "a=y"), "twice"),
        ('{"text": "a"}\n', ("--model", "own", "--max-cost", "1"), "say --price"),
        ('{"text": "a"}\n', ("--out", "q.jsonl"), "was not written by this command"),
        ('{"text": "a"}\n', ("--backend", "post"), "--backend is 'post'"),
    ],
)
def test_bad_input_is_one_sentence(content, arguments, sentence):
    Path("q.jsonl").write_text(content)
    with serve() as server:
        done = run("q.jsonl", "--out", "labels.jsonl", "--base-url", server.url, *arguments)
        assert not server.requests
    assert done.exit_code == 2 and sentence in done.output and "Traceback" not in done.output, done.output
    assert done.output.strip().count("\n") == 0 and not Path("labels.jsonl").exists()
    assert Path("q.jsonl").read_text() == content


def test_a_missing_file_and_a_wrong_key():
    assert "There is no file" in run("none.jsonl", "--out", "labels.jsonl").output
    Path("q.txt").write_text("a\nb\n")
    with serve(lambda server, body: Reply(status=401, error=("invalid_api_key", "no"))) as server:
        done = run("q.txt", "--out", "labels.jsonl", "--base-url", server.url)
    assert done.exit_code == 2 and "set OPENAI_API_KEY" in done.output and "the same command goes on" in done.output


@pytest.mark.parametrize("out", ["", "folder", "q.txt/below.jsonl", "."])
def test_labels_that_cannot_be_written(out):
    Path("q.txt").write_text("a\n")
    Path("folder").mkdir()
    done = run("q.txt", "--out", out, "--dry-run")
    assert done.exit_code == 2 and "--out" in done.output and done.output.count("\n") == 1, done.output


def test_questions_that_are_no_text():
    Path("q.txt").write_bytes(bytes(range(256)))
    done = run("q.txt", "--out", "labels.jsonl")
    assert done.exit_code == 2 and "UTF-8" in done.output and "codec" not in done.output


def test_a_prepared_folder_of_which_nothing_can_be_used():
    from granulon_hf.data import prepare
    from granulon_hf.data.prepared.format import features
    from tests.data import tables

    root = tables.chat(Path("chat"), [{"id": "0", "conversations": tables.turn("Hi?", "Ho.")}])
    prepare("llava", "set", source=root)
    assert run("set", "--out", "labels.jsonl", "--dry-run").exit_code == 0
    shard = next(Path("set/data").iterdir())
    rows = [row | {"reference": ""} for row in pq.read_table(shard).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=features().arrow_schema), shard)
    done = run("set", "--out", "labels.jsonl", "--dry-run")
    assert done.exit_code == 2 and "1 rows" in done.output and "the answer is empty (1)" in done.output


# --- by loss ----------------------------------------------------------------------------------------------------------

LOSS = ("--by", "loss", "--model", "tiny:granulon-compact-qwen2.5", "--data", "shapes", "--limit", 6, "--out", "labels.jsonl")


def test_labels_by_loss_are_kept_and_gone_on_with(monkeypatch):
    done = run(*LOSS)
    assert done.exit_code == 0 and "6 labelled, 0 left out" in done.output, done.output
    rows = labels()
    assert [set(row) for row in rows] == [{"id", "text", "losses", "tokens"}] * 6
    assert all(list(row[name]) == list(LEVELS) for row in rows for name in ("losses", "tokens"))
    journal = Path("labels.scores/scores.jsonl")
    kept = journal.read_text().splitlines()
    journal.write_text("\n".join(kept[:4]) + '\n{"id": "torn')
    scored = []

    def watched(model, batch):
        scored.append(len(batch["labels"]))
        return answer_losses(model, batch)

    monkeypatch.setattr(loss_labels, "answer_losses", watched)
    assert run(*LOSS, "--batch-size", 1).exit_code == 0
    assert scored == [1, 1] and [row["id"] for row in labels()] == [row["id"] for row in rows]
    other = run(*LOSS[:3], "tiny:granulon-qwen2.5", *LOSS[4:])
    assert other.exit_code == 2 and "another model" in other.output
    assert [row["id"] for row in labels()] == [row["id"] for row in rows]
    assert run(*LOSS[:6], "--limit", 4, *LOSS[8:]).exit_code == 2


def test_an_interrupted_run_by_loss_says_how_to_go_on(monkeypatch):
    def interrupted(model, batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(loss_labels, "answer_losses", interrupted)
    done = run(*LOSS)
    assert done.exit_code == 130 and "again" in done.output and not Path("labels.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--out", "l.jsonl"), "QUESTIONS"),
        (("q.txt", "--out", "l.jsonl", "--by", "price"), "--by"),
        (("q.txt", "--out", "l.jsonl", "--data", "shapes"), "--data"),
        (("q.txt", "--out", "l.jsonl", "--batch-size", "8"), "--batch-size"),
        (("q.txt", *LOSS), "QUESTIONS"),
        ((*LOSS, "--max-cost", "1"), "--max-cost"),
        ((*LOSS, "--level", "a=b"), "--level"),
        ((*LOSS, "--dry-run"), "--dry-run"),
        ((*LOSS[:2], *LOSS[4:]), "--model"),
        ((*LOSS[:4], *LOSS[6:]), "--data"),
        ((*LOSS, "--split", "train"), "--split"),
        ((*LOSS, "--device", "tpu9"), "tpu9"),
        ((*LOSS, "--dtype", "int3"), "int3"),
        ((*LOSS[:3], "tiny:clip-qwen2.5", *LOSS[4:]), "levels"),
        ((*LOSS[:3], "nowhere", *LOSS[4:]), "nowhere"),
        ((*LOSS[:-1], "."), "--out"),
        ((*LOSS[:-1], "q.txt"), "--out"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(arguments, word):
    Path("q.txt").write_text("What is it?\n")
    done = run(*arguments)
    assert done.exit_code == 2 and word in done.output and "Traceback" not in done.output, done.output
    assert Path("q.txt").read_text() == "What is it?\n"
