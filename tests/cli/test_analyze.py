"""`granulon analyze`: what it writes, and one sentence before a model is loaded for everything that is wrong."""

import json

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from granulon_hf import demo_model, variants
from granulon_hf import loading as models
from granulon_hf.cli.analyze import app
from tests.data import tables


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def no_model(monkeypatch):
    def load_model(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load_model", load_model)


ALIGNMENT = ("alignment", "--model", "tiny:granulon-qwen2.5", "--out", "out", "--answer", "reference", "--limit", 4)
GRANULARITY = ("granularity", "--model", "tiny:granulon-qwen2.5", "--out", "out", "--limit", 3, "--max-new-tokens", 2)


def test_alignment_of_two_models(run, tmp_path):
    done = run(*ALIGNMENT, "--model", "tiny:clip-llama3.2", "--batch-size", 3)
    assert done.exit_code == 0, done.output
    assert "tiny:granulon-qwen2.5" in done.stdout and "tiny:clip-llama3.2" in done.stdout
    found = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    stems = ("curves", "heatmap-tiny-granulon-qwen2.5", "heatmap-tiny-clip-llama3.2")
    assert found == {"alignment.parquet", "alignment.json", *(f"{stem}.{kind}" for stem in stems for kind in ("png", "svg"))}
    assert pq.read_table("out/alignment.parquet").num_rows == 2 * 4 * 2  # models, samples, layers
    one = json.loads((tmp_path / "out/alignment.json").read_text())["models"]["tiny:granulon-qwen2.5"]
    assert one["samples"] == 4 and one["description"]["settings"]["answer"] == "reference"
    refused = run(*ALIGNMENT[:-1], 5)
    assert refused.exit_code == 2 and "made with another data" in refused.stderr


def test_a_set_of_the_paper(run, tmp_path):
    rows = [tables.okvqa_row(number) for number in range(2)]
    tables.write(tmp_path / "data" / "validation-00000-of-00001.parquet", rows, tables.OKVQA)
    done = run(*ALIGNMENT[:-2], "--data", "a-okvqa", "--source", tmp_path)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out/alignment.json").read_text())["models"]["tiny:granulon-qwen2.5"]["samples"] == 2


def test_granularity(run, tmp_path):
    arguments = (*GRANULARITY, "--by", "level", "--beta", "5,9")
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert "oracle" in done.stdout and "controller" in done.stdout
    result = json.loads((tmp_path / "out/granularity.json").read_text())
    assert {row["group"] for row in result["choices"]} == {"all", "level=coarse", "level=middle", "level=fine"}
    assert {(row["beta"], row["k"]) for row in result["sweep"]} == {(0, 0), (5, 5), (9, 9)}
    answers = sorted(path.name for path in (tmp_path / "out/answers").iterdir())
    assert answers == ["alpha1-beta5-k5", "alpha1-beta9-k9", "level-coarse", "level-fine", "level-middle", "pixels"]
    again = run(*arguments)
    assert again.exit_code == 0 and again.stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*ALIGNMENT[:-4], "--answer", "both"), "--answer must be one of prediction, reference"),
        ((*ALIGNMENT, "--tokens", "some"), "--tokens must be one of content, all"),
        ((*ALIGNMENT, "--model", "tiny:granulon-qwen2.5"), "the same model twice"),
        ((*ALIGNMENT, "--model", "tiny:nothing"), "Unknown variant 'nothing'"),
        ((*ALIGNMENT, "--model", "."), "holds no model"),
        ((*ALIGNMENT, "--data", "nowhere"), "no data set or prepared folder 'nowhere'"),
        ((*ALIGNMENT, "--split", "train"), "have no split"),
        ((*ALIGNMENT, "--device", "abacus"), "no usable device"),
        ((*ALIGNMENT, "--dtype", "int8"), "Unknown dtype"),
        ((*GRANULARITY, "--score", "bleu"), "Unknown score 'bleu'"),
        ((*GRANULARITY, "--score", "option_accuracy"), "needs samples with choices"),
        ((*GRANULARITY, "--beta", "5;10"), "--beta takes numbers"),
        ((*GRANULARITY, "--beta", "0"), "--beta takes numbers"),
        ((*GRANULARITY, "--beta", "²"), "--beta takes numbers"),
        ((*GRANULARITY, "--k", "9" * 5000), "--k takes numbers"),
        ((*GRANULARITY, "--beta", "5", "--k", "9"), "above every"),
        ((*GRANULARITY, "--by", "weather"), "No sample has the field 'weather'; there are task, level."),
    ],
)
def test_bad_input(run, no_model, arguments, words):
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert words in done.stderr and done.stderr.count("\n") == 1


def test_a_file_in_the_way(run, no_model, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments in (ALIGNMENT, GRANULARITY):
        for out in ("file", "file/below/it"):
            done = run(*arguments, "--out", out)
            assert done.exit_code == 2 and f"--out '{out}' takes a folder" in done.stderr and done.stderr.count("\n") == 1


def test_what_is_left_out_is_told(run, tmp_path):
    rows = [tables.okvqa_row(0), tables.okvqa_row(1, image={"bytes": b"garbage", "path": None})]
    tables.write(tmp_path / "data" / "validation-00000-of-00001.parquet", rows, tables.OKVQA)
    for command, file in ((ALIGNMENT, "alignment.json"), (GRANULARITY[:-2], "granularity.json")):
        done = run(*command, "--data", "a-okvqa", "--source", tmp_path, "--out", command[0])
        assert done.exit_code == 0, done.output
        assert "a-okvqa: 1 samples, 1 left out: the image cannot be used" in done.stdout
        result = json.loads((tmp_path / command[0] / file).read_text())
        left = result.get("left_out_of_data") or result["settings"]["left_out"]
        assert [row["row"] for row in left["rows"]] == [1]


def test_nothing_to_look_at_is_known_before_a_model_is(run, no_model, tmp_path):
    rows = [tables.okvqa_row(1, image={"bytes": b"garbage", "path": None})]
    tables.write(tmp_path / "data" / "validation-00000-of-00001.parquet", rows, tables.OKVQA)
    for command in (ALIGNMENT, GRANULARITY):
        done = run(*command, "--data", "a-okvqa", "--source", tmp_path)
        assert done.exit_code == 2 and "can be used: 0 samples, 1 left out: the image" in done.stderr, done.output


def test_a_model_that_says_nothing_costs_only_its_own_figures(run, tmp_path, monkeypatch):
    from granulon_hf.evaluation import alignment

    monkeypatch.setattr(
        alignment,
        "answer_batch",
        lambda model, processor, samples, generation: [
            {"prediction": "a dog" if model.config.granularity_levels else ""} for _ in samples
        ],
    )
    done = run("alignment", "--model", "tiny:clip-llama3.2", *ALIGNMENT[1:], "--answer", "prediction")
    assert done.exit_code == 1, done.output
    assert "no sample could be compared with tiny:clip-llama3.2 (its answer is empty)" in done.stderr
    assert list(json.loads((tmp_path / "out/alignment.json").read_text())["models"]) == ["tiny:granulon-qwen2.5"]
    assert "tiny:granulon-qwen2.5" in done.stdout and (tmp_path / "out/curves.png").exists()


def test_own_conversations(run, tmp_path):
    records = [{"id": "0", "image": "a.jpg", "conversations": tables.turn("<image>\nWhat?", "This.")}]
    tables.chat(tmp_path / "own", records)
    done = run(*ALIGNMENT, "--data", "own/chat.json")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("\n") == 1 and "Note: 4 rows were asked for, but" in done.stderr
    assert "warn" not in done.stderr


def test_scenes_are_not_those_of_training(run, tmp_path):
    assert run(*ALIGNMENT).exit_code == 0
    ids = pq.read_table("out/alignment.parquet")["id"].to_pylist()
    assert ids and all(int(name.split("-")[1]) >= 1000 for name in ids)


def test_models_that_do_not_fit(run):
    done = run("granularity", "--model", "tiny:clip-qwen2.5", "--out", "out", "--limit", 1)
    assert done.exit_code == 2 and "no granularity levels" in done.stderr
    done = run(*ALIGNMENT, "--granularity", "huge")
    assert done.exit_code == 2 and "Unknown granularity 'huge'" in done.stderr


def test_the_demo_model_is_a_name(run, monkeypatch, tmp_path):
    for part in variants.build("granulon-qwen2.5", tiny=True):
        part.save_pretrained(tmp_path / "granulon-demo-123")
    monkeypatch.setattr(demo_model, "demo_folder", lambda: tmp_path / "granulon-demo-123")
    done = run("alignment", "--model", "demo", "--out", "out", "--answer", "reference", "--limit", 1)
    assert done.exit_code == 0, done.output
    assert "granulon-demo " in done.stdout
