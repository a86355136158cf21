"""`granulon push`: what it shows without uploading, and what it refuses before anything is read."""

import json

import pytest
from typer.testing import CliRunner

from granulon_hf import hub
from granulon_hf.cli import app


def push(*arguments):
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def test_a_dry_run_shows_what_would_go_and_keeps_it_where_asked(build, tmp_path, monkeypatch):
    model, processor = build()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(hub, "compare", lambda folder, expected: 0.0)  # tests/test_hub.py does without this
    monkeypatch.setattr(hub, "HfApi", None)  # no Hub is asked
    result = push(tmp_path / "model", "org/x", "--dry-run", "--out", tmp_path / "out", "--public")
    assert result.exit_code == 0, result.output
    for path in (tmp_path / "out").iterdir():
        assert path.name in result.stdout
    assert "model.safetensors" in result.stdout and "Nothing was uploaded" in result.stdout
    assert "org/x (public)" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "org/x", "--dry-run"], "Cannot find the model 'nothing'"),
        (["tiny:granulon-qwen2.5", "org/x", "--dry-run"], "random weights"),
        (["nothing", "org/x/y", "--dry-run"], "'org/x/y' is not a name of a repository"),
        (["nothing", "org/x", "--dry-run", "--form", "pickle"], "Unknown form 'pickle'"),
        (["nothing", "org/x", "--dry-run", "--variant", "blip"], "Unknown variant 'blip'"),
        (["nothing", "org/x", "--results", "scores.json"], "is not the scores.json of granulon eval run"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores.json").write_text(json.dumps({"rows": []}))
    result = push(*arguments)
    assert result.exit_code == 2 and result.stderr.startswith("Error: ") and message in " ".join(result.stderr.split())
    assert result.stderr.count("\n") == 1
