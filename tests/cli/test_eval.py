"""`granulon eval run`: several models and sets, two processes, bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from granulon_hf import variants
from granulon_hf.cli import app
from granulon_hf.evaluation.metrics import recall
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


def run(*arguments):
    return CliRunner().invoke(app, ["eval", "run", *map(str, arguments)])


MODELS = ["--model", "tiny:clip-qwen2.5", "--model", "tiny:granulon-qwen2.5"]
SHORT = ["--data", "shapes", "--limit", 8, "--max-new-tokens", 4]


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
    assert "| shapes: recall | shapes: exact |" in table and "p = " in table
    assert "<script" not in Path("out/table.html").read_text()
    again = run(*MODELS, *SHORT, "--out", "out", "--metric", "recall", "--metric", "exact")
    assert again.exit_code == 0 and json.loads(Path("out/scores.json").read_text()) == result
    other = run(*MODELS, *SHORT, "--out", "out", "--granularity", "fine")
    assert other.exit_code == 2 and "predictions of another generation" in other.output


def test_two_processes_give_the_same_answers():
    assert run(*MODELS[2:], *SHORT, "--out", "one").exit_code == 0
    head = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "granulon_hf"]
    arguments = ["eval", "run", *MODELS[2:], *SHORT, "--out", "two", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*head, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (rows(f"{name}/tiny-granulon-qwen2.5/shapes") for name in ("one", "two"))
    assert [(r["id"], r["prediction"]) for r in one] == [(r["id"], r["prediction"]) for r in two]


def test_the_judge_scores_too_and_is_paid_once():
    with Server(lambda server, body: Reply()) as server:
        judge = ["--judge", "gpt-4o", "--judge-base-url", server.url]
        # Toy models answer little; what is empty is not sent.
        assert run(*MODELS, *SHORT, *judge, "--out", "out").exit_code == 0
        asked = len(server.requests)
        assert run(*MODELS, *SHORT, *judge, "--out", "out").exit_code == 0
        assert len(server.requests) == asked
    assert "shapes: judge" in Path("out/table.md").read_text()
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
