"""`granulon eval run`: several models and sets, two processes, bad input."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from granulon_hf import loading as models
from granulon_hf import variants
from granulon_hf.cli import app
from granulon_hf.data.datasets.shapes import Shapes
from granulon_hf.evaluation import benchmark as suite_module
from granulon_hf.evaluation.benchmark import Suite, metrics_for
from granulon_hf.evaluation.metrics import recall
from tests.conftest import make_talkative
from tests.data import tables
from tests.judge.server import Reply, Server

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in list(os.environ):
        if name.startswith("OPENAI_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def invoke(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def run(*arguments):
    return invoke("run", *arguments)


MODELS = ["--model", "tiny:clip-qwen2.5", "--model", "tiny:granulon-qwen2.5"]
SHORT = ["--data", "shapes", "--limit", 8, "--max-new-tokens", 4]


@pytest.fixture
def no_model(monkeypatch):
    def load_model(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load_model", load_model)


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "predictions.jsonl").read_text().splitlines()]


def test_predictions_scores_and_tables():
    done = run(*MODELS, *SHORT, "--out", "out")
    assert done.exit_code == 0, done.output
    result = json.loads(Path("out/scores.json").read_text())
    for model in ("tiny:clip-qwen2.5", "tiny:granulon-qwen2.5"):
        found = rows(f"out/{model.replace(':', '-')}/shapes")
        scores = result["scores"][model]["shapes"]
        assert len(found) == 8 and scores["recall"] == [recall(row["prediction"], row["reference"]) for row in found]
    table = Path("out/table.md").read_text()
    assert "| shapes: recall (n = 8) | shapes: exact (n = 8) |" in table and "p = " in table
    assert "<script" not in Path("out/table.html").read_text()
    again = run(*MODELS, *SHORT, "--out", "out", "--metric", "recall", "--metric", "exact")
    assert again.exit_code == 0 and json.loads(Path("out/scores.json").read_text()) == result
    other = run(*MODELS, *SHORT, "--out", "out", "--granularity", "fine")
    assert other.exit_code == 2 and "predictions of another generation" in other.output


@pytest.fixture
def talker():
    """A folder with a toy model that says something, and not the same of every sample."""
    model, processor = variants.build("granulon-qwen2.5", tiny=True)
    make_talkative(model, processor)
    model.save_pretrained("talker"), processor.save_pretrained("talker")
    return "talker"


def test_two_processes_give_the_same_answers(talker):
    arguments = ["--model", talker, *SHORT, "--device", "cpu"]
    assert run(*arguments, "--out", "one").exit_code == 0
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "granulon_hf"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*head, "eval", "run", *map(str, arguments), "--out", "two"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("shapes: 8 samples") == 1 and done.stdout.count("Tables: ") == 1
    one, two = (rows(f"{name}/talker/shapes") for name in ("one", "two"))
    assert [(r["id"], r["prediction"]) for r in one] == [(r["id"], r["prediction"]) for r in two]
    assert len({row["prediction"] for row in one} - {""}) > 3
    # Each of the two answers only its half, so that all are there only if both took part.
    assert [json.loads(Path(f"{name}/talker/shapes/run.json").read_text())["processes"] for name in ("one", "two")] == [1, 2]
    scores = [json.loads(Path(f"{name}/scores.json").read_text())["scores"] for name in ("one", "two")]
    assert scores[0] == scores[1]


def test_damage_is_mended_or_named():
    arguments = [*MODELS[2:], *SHORT, "--out", "out"]
    assert run(*arguments).exit_code == 0
    folder = Path("out/tiny-granulon-qwen2.5/shapes")
    whole = rows(folder)
    lines = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)
    (folder / "predictions.jsonl").write_text("".join([lines[0], lines[1][:40] + "\n", *lines[2:]]))
    assert run(*arguments).exit_code == 0
    assert [(r["id"], r["prediction"]) for r in rows(folder)] == [(r["id"], r["prediction"]) for r in whole]
    (folder / "run.json").write_text('{"description": {"da')
    done = run(*arguments)
    assert done.exit_code == 2 and f"Error: '{folder}/run.json' is damaged" in done.stderr, done.stderr
    assert f"remove the folder '{folder}'" in done.stderr


def test_own_conversations_and_a_plain_note():
    records = [{"id": "0", "image": "a.jpg", "conversations": tables.turn("<image>\nWhat?", "This.")}]
    tables.chat(Path("own"), records)
    done = run("--model", "tiny:clip-qwen2.5", "--data", "own/chat.json", "--limit", 24, "--max-new-tokens", 2, "--out", "out")
    assert done.exit_code == 0, done.output
    assert [row["id"] for row in rows("out/tiny-clip-qwen2.5/own-chat.json")] == ["0"]
    assert "\nNote: 24 rows were asked for, but" in "\n" + done.stderr and "UserWarning" not in done.stderr


def test_medical_answers_are_scored_by_what_is_asked():
    said = ["Preparation", "Hook", "yes", "Cleaning Coagulation"]
    records = [
        {"id": str(i), "image": "a.jpg", "conversations": tables.turn("<image>\nWhat?", text)} for i, text in enumerate(said)
    ]
    tables.chat(Path("medical"), records)
    done = run(
        *("--model", "tiny:clip-qwen2.5", "--data", "surgvlm=medical", "--max-new-tokens", 2, "--out", "out"),
        *("--metric", "recall", "--limit", 4),
    )
    assert done.exit_code == 0, done.output
    result = json.loads(Path("out/scores.json").read_text())
    scores, columns = result["scores"]["tiny:clip-qwen2.5"], ["surgvlm-phase", "surgvlm-instrument", "surgvlm-other"]
    assert set(result["data"]) == set(scores) == set(columns)
    assert [len(scores[name]["recall"]) for name in columns] == [2, 1, 1]
    table = Path("out/table.md").read_text()
    assert "surgvlm-phase: recall (n = 2)" in table and "surgvlm-instrument: recall (n = 1)" in table
    (paper,) = (line for line in table.splitlines() if "granulon-qwen2.5 (paper)" in line)
    assert "*76.92*" in paper and "*76.07*" in paper


@pytest.mark.parametrize(
    ("tasks", "choices", "names"),
    [
        (["vqa", "vqa"], [None, None], ["recall", "exact"]),
        (["vqa", "caption"], [None, None], ["recall"]),
        (["caption", "vqa"], [None, None], ["recall"]),
        (["vqa", "vqa"], [["a"], ["b"]], ["recall", "option_accuracy"]),
    ],
)
def test_metrics_suit_all_rows(tasks, choices, names):
    found = [{"task": task, "choices": options} for task, options in zip(tasks, choices, strict=True)]
    assert metrics_for(Suite(["m"], ["shapes"], "out"), found) == names


def test_a_judge_of_two_tasks_is_refused_before_anything_is_answered(no_model, monkeypatch):
    whole = Shapes.__getitem__
    monkeypatch.setattr(Shapes, "__getitem__", lambda self, i: replace(whole(self, i), task="caption") if i else whole(self, i))
    done = run(*MODELS, *SHORT, "--judge", "gpt-4o", "--judge-base-url", "http://127.0.0.1:9", "--out", "out")
    assert done.exit_code == 2 and "one task at a time; shapes has caption and vqa" in done.stderr, done.output


def test_scores_are_made_once_everything_is_answered(monkeypatch):
    """A judge takes long; other processes, which only answer, must not wait for it."""
    order = []
    scored = suite_module.score_rows
    monkeypatch.setattr(suite_module, "score_rows", lambda *args: order.append("score") or scored(*args))
    answered = suite_module.PredictionRun.run
    monkeypatch.setattr(
        suite_module.PredictionRun, "run", lambda self, *a, **k: order.append("answer") or answered(self, *a, **k)
    )
    assert run(*MODELS, "--data", "shapes", "--limit", 2, "--max-new-tokens", 2, "--out", "out").exit_code == 0
    assert order == ["answer", "answer", "score", "score"]


def test_the_judge_scores_too_and_is_paid_once():
    with Server(lambda server, body: Reply()) as server:
        judge = ["--judge", "gpt-4o", "--judge-base-url", server.url]
        # Toy models answer little; what is empty is not sent.
        assert run(*MODELS, *SHORT, *judge, "--out", "out").exit_code == 0
        asked = len(server.requests)
        assert run(*MODELS, *SHORT, *judge, "--out", "out").exit_code == 0
        assert len(server.requests) == asked
    assert "shapes: judge" in Path("out/table.md").read_text()
    assert json.loads(Path("out/scores.json").read_text())["judge"] == "gpt-4o"
    assert Path("out/tiny-clip-qwen2.5/shapes/samples.jsonl").exists()


def test_yaml_and_folders():
    model, processor = variants.build("granulon-qwen2.5", tiny=True)
    model.save_pretrained("mine"), processor.save_pretrained("mine")
    Path("suite.yaml").write_text("model: [mine]\ndata: [shapes]\nlimit: 3\nmax_new_tokens: 2\nout: from-yaml\n")
    done = run("suite.yaml", "--limit", 2)
    assert done.exit_code == 0, done.output
    assert len(rows("from-yaml/mine/shapes")) == 2
    model.lm_head.weight.data.mul_(2)
    model.save_pretrained("mine")
    os.utime("mine/model.safetensors", (1, 1))
    done = run("suite.yaml", "--limit", 2)
    assert done.exit_code == 2 and "predictions of another" in done.output


def test_what_is_left_out_is_told_everywhere():
    records = [
        {"id": "0", "image": "a.jpg", "conversations": tables.turn("<image>\nWhat?", "This.")},
        {"id": "1", "image": "gone.jpg", "conversations": tables.turn("<image>\nWhat?", "That.")},
        {"id": "2", "conversations": []},
    ]
    tables.chat(Path("chat"), records)
    done = run("--model", "tiny:clip-qwen2.5", "--data", "llava=chat", *SHORT, "--out", "out")
    assert done.exit_code == 0, done.output
    line = "llava: 1 samples, 2 left out: "
    assert line in done.stderr and "shapes: 8 samples, 0 left out\n" in done.stderr
    sets = json.loads(Path("out/scores.json").read_text())["sets"]
    assert [sets[name]["samples"] for name in ("llava", "shapes")] == [1, 8]
    assert [row["row"] for row in sets["llava"]["left_out"]["rows"]] == [1, 2]
    for name in ("table.md", "table.html"):
        text = Path("out", name).read_text()
        assert line in text and "gone.jpg" in text and "n = 1" in text and "n = 8" in text and "shapes: 8" not in text


def test_answers_that_could_not_be_made_are_counted(monkeypatch):
    whole = Shapes.__getitem__

    def broken(self, index):
        sample = whole(self, index)
        sample.images = [{"bytes": b"broken", "path": None}] if index == 1 else sample.images
        return sample

    monkeypatch.setattr(Shapes, "__getitem__", broken)
    assert run(*MODELS[2:], *SHORT, "--out", "out").exit_code == 0
    assert json.loads(Path("out/scores.json").read_text())["failed"] == {"tiny:granulon-qwen2.5": {"shapes": 1}}
    assert "(1 without an answer)" in Path("out/table.md").read_text()


def test_parquet_beside_the_answers():
    assert run(*MODELS, *SHORT, "--out", "out").exit_code == 0
    from datasets import load_dataset

    files = sorted(str(path) for path in Path("out").glob("*/shapes/predictions.parquet"))
    table = load_dataset("parquet", data_files=files, split="train")
    assert table.unique("model") == ["tiny:clip-qwen2.5", "tiny:granulon-qwen2.5"]
    answers = [row["prediction"] for model in MODELS[1::2] for row in rows(f"out/{model.replace(':', '-')}/shapes")]
    assert table["prediction"] == answers and set(table[8]["granularity_probs"]) == {"coarse", "middle", "fine"}


def test_a_file_in_the_way(no_model):
    Path("taken").write_text("")
    Path("compare.yaml").write_text("llm: qwen2.5\nencoders: [clip, granulon]\neval: {data: [shapes]}\n")
    for out in ("taken", "taken/below/it"):
        for done in (run(*MODELS, *SHORT, "--out", out), invoke("compare", "compare.yaml", "--out", out)):
            assert done.exit_code == 2 and done.stderr.count("\n") == 1, done.output
            assert f"--out '{out}' takes a folder" in done.stderr and "taken' is a file" in done.stderr


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("limit: lots", "suite.yaml': Invalid value for '--limit'"),
        ("limit: 0", "suite.yaml': Invalid value for '--limit'"),
        ("limit: [1, 2]", "limit is [1, 2]; it takes one value"),
        ("data: {shapes: 1}", "it takes a list"),
        ("seed: -1", "seed is a whole number from 0, not -1"),
        ("judge_max_cost: much", "Invalid value for '--judge-max-cost'"),
        ("limits: 3", "unknown name 'limits'"),
        ("- model", "must map names to values; the names are 'batch_size'"),
        ("model: [", "cannot be read"),
    ],
)
def test_bad_yaml_is_one_sentence(no_model, yaml, message):
    Path("suite.yaml").write_text(yaml)
    done = run("suite.yaml", *MODELS, "--data", "shapes", "--out", "out")
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere/at-all"], "Cannot find the model"),
        (["--dtype", "int8"], "Unknown dtype 'int8'"),
        (["--data", "shapes=here"], "Drawn shapes have no source"),
        (
            ["--metric", "cider"],
            'pycocoevalcap is not installed; cider, bleu, rouge_l need: pip install "granulon-hf[captions]"',
        ),
        (["--metric", "bertscore", "--bertscore-model", "no-such-encoder"], "encoder 'no-such-encoder' of BERTScore"),
    ],
)
def test_what_is_wrong_with_the_last_is_known_before_the_first_is_loaded(no_model, arguments, message, monkeypatch):
    monkeypatch.setattr(suite_module, "find_spec", lambda name: None)
    data = [] if "--data" in arguments else ["--data", "shapes"]
    done = run(*MODELS, *data, *arguments, "--limit", 2, "--out", "out")
    assert done.exit_code == 2 and message in done.stderr and not list(Path(".").rglob("run.json")), done.output


def test_a_level_that_the_model_does_not_have():
    done = run(*MODELS[2:], *SHORT, "--granularity", "huge", "--out", "out")
    assert done.exit_code == 2 and "Unknown granularity 'huge'; the levels of tiny:granulon-qwen2.5 are coarse" in done.stderr
    assert not Path("out/scores.json").exists()


def test_one_name_in_yaml_is_a_list_of_one():
    Path("suite.yaml").write_text("model: tiny:clip-qwen2.5\ndata: shapes\nlimit: 2\nmax_new_tokens: 2\nout: 5\n")
    done = run("suite.yaml")
    assert done.exit_code == 0, done.output
    assert len(rows("5/tiny-clip-qwen2.5/shapes")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "shapes"], "There is no model to evaluate"),
        (["--model", "tiny:clip-qwen2.5"], "There is no data set to evaluate"),
        (["--model", "tiny:clip-qwen2.5", "--model", "tiny:clip-qwen2.5", "--data", "shapes"], "named twice"),
        (["--model", "tiny:clip-qwen2.5", "--data", "llava=a", "--data", "llava=b"], "named twice"),
        (["--model", "tiny:clip-gpt5", "--data", "shapes"], "Unknown variant"),
        (["--model", "nowhere/at-all", "--data", "shapes"], "Cannot find the model"),
        (["--model", ".", "--data", "shapes"], "holds no model"),
        (["--model", "tiny:clip-qwen2.5", "--data", "no-such-set"], "cannot be used"),
        (["--model", "tiny:clip-qwen2.5", "--data", "shapes", "--metric", "beauty"], "Unknown metric 'beauty'"),
        (["--model", "tiny:clip-qwen2.5", "--data", "shapes", "--metric", "judge"], "needs a judge"),
        (["--model", "tiny:clip-qwen2.5", "--data", "shapes", "--device", "quantum"], "no usable device"),
        (["none.yaml"], "cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    done = run(*arguments, "--limit", 2, "--out", "out")
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output, done.output


COMPACT = ["--model", "tiny:granulon-compact-qwen2.5"]


def test_numbers_of_tokens():
    done = run(*COMPACT, "--model", "tiny:granulon-llama3.2", *SHORT, "--visual-tokens", 6, "--out", "out")
    assert done.exit_code == 0, done.output
    for name, count in (("tiny-granulon-compact-qwen2.5", 6), ("tiny-granulon-llama3.2", 36 + 6)):
        found = rows(f"out/{name}/shapes")
        assert {row["visual_tokens"] for row in found} == {count} and {row["granularity"] for row in found} == {None}
    other = run(*COMPACT, *SHORT, "--visual-tokens", 7, "--out", "out")
    assert other.exit_code == 2 and "predictions of another generation" in other.output
    Path("suite.yaml").write_text("model: tiny:granulon-compact-qwen2.5\ndata: shapes\nlimit: 8\nvisual_tokens: 6\n")
    again = run("suite.yaml", "--max-new-tokens", 4, "--out", "out")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*COMPACT, *MODELS, "--visual-tokens", 6], ["tiny:clip-qwen2.5", "--visual-tokens"]),
        ([*MODELS, "--price", 0.5], ["tiny:clip-qwen2.5", "--price"]),
        ([*COMPACT, "--price", 0.5], ["tiny:granulon-compact-qwen2.5", "--price"]),
        ([*COMPACT, "--visual-tokens", 65], ["tiny:granulon-compact-qwen2.5", "64"]),
        ([*COMPACT, "--visual-tokens", 6, "--granularity", "fine"], ["--granularity and --visual-tokens"]),
    ],
)
def test_choices_are_checked_before_a_model_is_loaded(no_model, arguments, words):
    done = run(*arguments, *SHORT, "--out", "out")
    assert done.exit_code == 2 and all(word in done.stderr for word in words), done.output
