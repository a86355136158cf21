"""What the package says of Python's arguments, the command line says of its own options."""

import pytest
from typer.testing import CliRunner

from granulon_hf.cli import app
from granulon_hf.cli.common import in_options

NAMES = {"source", "on_error", "limit", "holdout", "column", "max_cost", "price"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("`limit` must be at least 1; got 0.", "--limit must be at least 1; got 0."),
        ("say where its files are with source=….", "say where its files are with --source."),
        ("ask for holdout=20 here", "ask for --holdout 20 here"),
        ("and with columns=… your own", "and with --column your own"),
        ("max_cost needs prices={'own': (1, 2)}.", "--max-cost needs --price."),
        ("on_error must be 'skip'", "--on-error must be 'skip'"),
        ("limit is 'x'; it must be a number", "--limit is 'x'; it must be a number"),
        ("The limit is 3", "The limit is 3"),
        # No option of this command: that of another one, or as it was.
        ("try revision='x'.", "try --revision 'x' of granulon data prepare."),
        ("`encoders` must be a list, shard_rows too", "`encoders` must be a list, shard_rows too"),
        # What the user called something.
        (
            "There is no file 'a/max_cost limit=3', nor \"source=…\".",
            "There is no file 'a/max_cost limit=3', nor \"source=…\".",
        ),
        ("no file on_error.py in out/max_cost", "no file on_error.py in out/max_cost"),
        ("the set's split 'x' and the source's", "the set's split 'x' and the source's"),
    ],
)
def test_arguments_become_options(message, expected):
    assert in_options(message, NAMES) == expected


def prepare(*options):
    return ["data", "prepare", "llava", "--source", "chat.json", "--out", "out", *options]


EVAL = ["eval", "run", "--model", "tiny:clip-qwen2.5", "--out", "out"]
ANALYZE = ["analyze", "alignment", "--model", "tiny:granulon-qwen2.5", "--out", "out"]


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["data", "prepare", "surgvlm", "--out", "out"], "--source"),
        (["data", "prepare", "own", "--out", "out"], "--column"),
        (prepare("--on-error", "ignore"), "--on-error must be"),
        (prepare("--limit", "0"), "--limit must be"),
        (prepare("--seed", "-1"), "--seed must be"),
        (prepare("--holdout-seed", "-1"), "--holdout-seed must be"),
        (prepare("--max-files", "-1"), "--max-files must be"),
        (prepare("--split", "holdout"), "--holdout"),
        (prepare("--column", "imgae=x"), "--column may name"),
        (prepare("--column", "image=x", "--column", "image=y"), "--column takes"),
        (prepare("--revision", "main"), "--revision 'main'"),
        ([*EVAL, "--data", "surgvlm"], "--data NAME=FOLDER"),
        ([*ANALYZE, "--data", "surgvlm"], "--source"),
        ([*ANALYZE, "--answer", "both"], "--answer must be"),
    ],
)
def test_no_command_speaks_python(arguments, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.json").write_text('[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]')
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and done.stderr.strip().count("\n") == 0 and option in done.stderr, done.output
    assert not any(
        word in done.stderr for word in ("source=…", "columns=…", "holdout=…", "on_error", "`", "holdout_seed", "max_files")
    ), done.stderr
    assert not (tmp_path / "out").exists()
