"""`granulon judge`: real commands against the misbehaving server."""

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from granulon_hf.cli import app
from granulon_hf.judge import models
from tests.conftest import make_picture
from tests.judge.server import Reply, Server, prediction_of


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "AZURE_OPENAI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(models, "today", lambda: datetime.date(2026, 11, 28))  # while gpt-4o is served
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    return CliRunner().invoke(app, ["judge", *map(str, arguments)])


def write(rows, name="predictions.jsonl"):
    Path("images").mkdir(exist_ok=True)
    for i, row in enumerate(rows):
        if isinstance(row.get("image", 0), int):
            row["image"] = f"images/{i}.png"
            make_picture(i, (40, 30)).save(row["image"])
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def by_words(server, body):
    """Accuracy is the number in the prediction."""
    number = re.search(r"\d+", prediction_of(body))
    return Reply(content=json.dumps({"accuracy_score": int(number[0]), "hallucination_score": 10}))


def samples(folder="predictions.judged"):
    return [json.loads(line) for line in (Path(folder) / "samples.jsonl").read_text().splitlines()]


def test_run_writes_scores_report_and_summary():
    rows = [{"id": f"s{i}", "prediction": f"number {value}"} for i, value in enumerate((80, 20, 50))]
    rows += [{"id": "empty", "prediction": " "}, {"id": "broken", "prediction": "number 1", "image": "images/none.png"}]
    write(rows)
    with Server(by_words) as server:
        done = run("run", "predictions.jsonl", "--base-url", server.url)
        assert done.exit_code == 0, done.output
        assert len(server.requests) == 3
        again = run("run", "predictions.jsonl", "--base-url", server.url)
        assert len(server.requests) == 3  # all from the store
    assert again.exit_code == 0
    assert [row["accuracy"] for row in samples()] == [80, 20, 50, 0, None]
    assert re.search(r"accuracy\s+37\.5", done.output) and re.search(r"without empty answers\s+50\.0", done.output)
    assert "3 scored, 1 unscored, 1 empty" in done.output and "image:" in done.output
    results = json.loads(Path("predictions.judged/results.json").read_text())
    assert results["accuracy"] == 37.5 and results["n_unscored"] == 1 and results["judge_models"] == ["gpt-4o-2024-11-20"]
    page = Path("predictions.judged/report.html").read_text()
    order = re.findall(r"</span> <small>(\w+)</small>|</b></span>\s*<small>(\w+)</small>", page)
    places = [page.index(f"<small>{name}</small>") for name in ("broken", "empty", "s1", "s2", "s0")]
    assert places == sorted(places), order  # the unscored, then the worst first
    assert page.count("data:image/jpeg;base64,") == 4


def test_the_report_escapes_everything():
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)> 30"
    write([{"id": '"><b>', "prediction": evil, "question": evil, "reference": evil}])
    with Server(by_words) as server:
        assert run("run", "predictions.jsonl", "--base-url", server.url, "--task", "vqa").exit_code == 0
    page = Path("predictions.judged/report.html").read_text()
    assert "<script>alert" not in page and "<img src=x" not in page and '"><b>' not in page
    assert page.count("&lt;script&gt;alert(1)") == 3


def test_dry_run_sends_and_writes_nothing():
    write([{"prediction": "number 1"}, {"prediction": "number 2"}, {"prediction": ""}])
    with Server() as server:
        done = run("run", "predictions.jsonl", "--base-url", server.url, "--dry-run")
        own = run("run", "predictions.jsonl", "--base-url", server.url, "--dry-run", "--model", "own")
        unknown = run("run", "predictions.jsonl", "--base-url", "https://judges.example/v1", "--dry-run", "--model", "own")
        priced = run("run", "predictions.jsonl", "--dry-run", "--model", "own", "--price", "1000", "0")
        assert not server.requests
    assert done.exit_code == 0 and not Path("predictions.judged").exists()
    assert re.search(r"requests\s+2\s*\n", done.output) and re.search(r"empty, not sent\s+1\s*\n", done.output)
    assert re.search(r"cost, about\s+0\.00\d\d USD", done.output)
    assert "unknown for own; say --price" in unknown.output and re.search(r"0\.0000 USD \(.*--price", own.output)
    assert float(re.search(r"cost, about\s+([\d.]+) USD", priced.output)[1]) > 0.1
    assert "prices of 20" in done.output and "prices of 20" not in priced.output


def test_the_price_is_two_amounts():
    write([{"prediction": "a cat"}])
    assert "PROMPT COMPLETION" in run("run", "--help").output and "float,float" not in run("run", "--help").output
    for two in (("1", "1"), ("0", "2.5"), ("1e1", "3")):
        assert run("run", "predictions.jsonl", "--dry-run", "--model", "own", "--price", *two).exit_code == 0
    for two in (("1,1", "2"), ("1,", "1"), ("-1", "1"), ("nan", "1"), ("1", "inf"), ("1", "$2"), ("1,1", "--dry-run")):
        done = run("run", "predictions.jsonl", "--model", "own", "--price", *two)
        assert done.exit_code == 2 and done.output.count("\n") == 1 and "--price 2.5 10" in done.output
    assert run("run", "predictions.jsonl", "--price", "1").exit_code == 2


@pytest.mark.parametrize("long", ["word " * 120_000, "\u8a9e" * 200_000])
def test_a_prompt_that_the_judge_cannot_hold_is_named_and_not_sent(long):
    write([{"id": "short", "prediction": "number 1"}, {"id": "novel", "prediction": long}])
    with Server(by_words) as server:
        dry = run("run", "predictions.jsonl", "--base-url", server.url, "--dry-run")
        done = run("run", "predictions.jsonl", "--base-url", server.url)
        assert len(server.requests) == 1
        own = run("run", "predictions.jsonl", "--dry-run", "--model", "own", "--price", "1", "1")
    assert dry.exit_code == done.exit_code == own.exit_code == 0, done.output
    assert all("'novel'" in found.output and "'short'" not in found.output for found in (dry, done, own))
    assert re.search(r"too long, not sent\s+1\s*\n", dry.output) and re.search(r"requests\s+1\s*\n", dry.output)
    assert re.search(r"requests\s+2\s*\n", own.output)
    assert [row["accuracy"] for row in samples()] == [1, None] and "128,000" in samples()[1]["reason"]


def test_the_limit_of_an_answer_can_be_raised():
    write([{"prediction": "number 1"}])
    with Server(by_words) as server:
        assert run("run", "predictions.jsonl", "--base-url", server.url, "--max-tokens", 3000).exit_code == 0
        assert server.requests[0]["max_tokens"] == 3000


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("--rpm", "0"), "--rpm"),
        (("--poll-seconds", "-1"), "--poll-seconds"),
        (("--backend", "mail"), "--backend"),
        (("--detail", "none"), "--detail"),
        (("--max-cost", "1", "--model", "own"), "--max-cost"),
        (("--out", "predictions.jsonl/folder"), "--out"),
    ],
)
def test_errors_name_the_option(arguments, option):
    write([{"prediction": "number 1"}])
    done = run("run", "predictions.jsonl", "--dry-run", *arguments)
    assert done.exit_code == 2 and done.output.startswith(f"Error: {option} ") and done.output.count("\n") == 1


@pytest.mark.slow  # the judge waits before it says that nobody answers
@pytest.mark.parametrize("model", ["gpt-4o", "unknown"])
def test_no_error_of_a_run_speaks_python(model, monkeypatch):
    write([{"prediction": "number 1"}])
    with Server(lambda server, body: Reply(raw=b"<html>model=x</html>")) as server:
        found = [run("run", "predictions.jsonl", "--base-url", server.url, "--model", model)]
    for status, code in ((401, "invalid"), (403, "no"), (404, "none"), (402, "no")):
        with Server(lambda server, body, status=status, code=code: Reply(status=status, error=(code, "no"))) as server:
            found.append(run("run", "predictions.jsonl", "--base-url", server.url, "--model", model))
    monkeypatch.delenv("OPENAI_API_KEY")
    found.append(run("run", "predictions.jsonl", "--model", model))
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", "http://127.0.0.1:9")
    found.append(run("run", "predictions.jsonl", "--model", model))
    for done in found:
        assert done.exit_code == 2 and not re.search(r"\b[a-z_]+=|--[A-Z]|Error\(|`", done.output), done.output


def test_limit_max_cost_and_resume():
    write([{"prediction": f"number {i}"} for i in range(6)])
    with Server(by_words) as server:
        assert run("run", "predictions.jsonl", "--base-url", server.url, "--limit", 2).exit_code == 0
        assert len(samples()) == 2 and len(server.requests) == 2
        # Each costs 1,000 prompt tokens: 2.5 thousandths of a dollar and a little.
        stopped = run("run", "predictions.jsonl", "--base-url", server.url, "--max-cost", 0.006, "--concurrency", 1)
        assert 2 < len(server.requests) < 6
        assert "--max-cost of 0.006 USD reached" in stopped.output
        refused = run("run", "predictions.jsonl", "--base-url", server.url, "--no-resume")
        assert refused.exit_code == 2 and "already holds answers" in refused.output
        assert run("run", "predictions.jsonl", "--base-url", server.url).exit_code == 0
        assert len(server.requests) == 6 and set(server.paid.values()) == {1}


def test_batch_backend():
    write([{"prediction": f"number {i}"} for i in range(4)])
    with Server(by_words, polls=0) as server:
        done = run("run", "predictions.jsonl", "--base-url", server.url, "--backend", "batch", "--poll-seconds", 0.01)
        assert done.exit_code == 0, done.output
        assert server.batch_creations == 1
    assert [row["accuracy"] for row in samples()] == [0, 1, 2, 3]


def test_parquet_and_datasets_folders_and_columns():
    pictures = [make_picture(i, (40, 30)) for i in range(3)]
    table = {"answer": [f"number {i}" for i in range(3)], "image": pictures, "task": ["caption"] * 3}
    features = datasets.Features(
        {"answer": datasets.Value("string"), "image": datasets.Image(), "task": datasets.Value("string")}
    )
    loaded = datasets.Dataset.from_dict(table, features=features)
    loaded.to_parquet("rows.parquet")
    loaded.save_to_disk("folder")
    raw = [Path(write([{"prediction": ""}])).parent / "images/0.png"]
    pq.write_table(pa.table({"answer": ["number 7"], "image": pa.array([raw[0].read_bytes()], pa.binary())}), "raw.parquet")
    with Server(by_words) as server:
        for source, expected in (("rows.parquet", [0, 1, 2]), ("folder", [0, 1, 2]), ("raw.parquet", [7])):
            done = run("run", source, "--base-url", server.url, "--column", "prediction=answer", "--out", f"out-{source}")
            assert done.exit_code == 0, done.output
            assert [row["accuracy"] for row in samples(f"out-{source}")] == expected
        assert "objective evaluator for image captions" in json.dumps(server.requests[0])


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", (), "holds no predictions"),
        ("[1]\n", (), "line 1 is no JSON object"),
        ('{"prediction": "a", "image": "x"}\n{"prediction"', (), "line 2 is no JSON"),
        ('{"answer": "a", "image": "x"}\n', (), "--column prediction=NAME"),
        ('{"prediction": 5, "image": "x"}\n', (), "not a text"),
        ('{"prediction": "a", "image": 5}\n', (), "not a path or encoded bytes"),
        ('{"prediction": "a", "images": ["a", "b"]}\n', (), "not a list of one"),
        ('{"prediction": "a", "image": "none.png"}\n', (), "None of the images exists"),
        (
            '{"id": 1, "prediction": "a", "image": "p.png"}\n{"id": "1", "prediction": "a", "image": "p.png"}\n',
            (),
            "has the id '1'",
        ),
        ('{"prediction": "a", "image": "p.png", "task": "vqa"}\n{"prediction": "a", "image": "p.png"}\n', (), "say --task"),
        ('{"prediction": "a", "image": "p.png"}\n', ("--task", "poetry"), "must be one of"),
        ('{"prediction": "a", "image": "p.png"}\n', ("--task", "vqa"), "needs a question or a reference"),
        ('{"prediction": "a", "image": "p.png"}\n', ("--column", "x"), "FIELD=COLUMN"),
        ('{"prediction": "a", "image": "p.png"}\n', ("--column", "text=a"), "no field 'text'"),
        ('{"prediction": "a", "image": "p.png"}\n', ("--out", "p.png"), "is a file"),
        ('{"prediction": "a", "image": "p.png"}\n', ("--max-cost", "1", "--model", "own"), "say --price"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_sent(text, arguments, message):
    Image.new("RGB", (8, 8)).save("p.png")
    Path("predictions.jsonl").write_text(text)
    with Server() as server:
        done = run("run", "predictions.jsonl", "--base-url", server.url, *arguments)
        assert not server.requests
    assert done.exit_code == 2 and message in done.output, done.output
    assert done.output.count("\n") == 1 and "Traceback" not in done.output


def test_missing_files_and_wrong_kinds():
    assert "There is no file" in run("run", "none.jsonl").output
    Path("a.tsv").write_text("x")
    assert "neither .jsonl nor .parquet" in run("run", "a.tsv").output
    Path("a.csv").write_bytes(b"prediction,image\n\xff,x.png\n")
    assert "CSV" in run("run", "a.csv").output
    Path("a.parquet").write_text("x")
    assert "no readable Parquet" in run("run", "a.parquet").output
    Path("empty").mkdir()
    assert "save_to_disk" in run("run", "empty").output


def test_a_wrong_key_stops_at_once_and_says_what_to_do():
    write([{"prediction": f"number {i}"} for i in range(5)])
    with Server(lambda server, body: Reply(status=401, error=("invalid_api_key", "Incorrect API key"))) as server:
        done = run("run", "predictions.jsonl", "--base-url", server.url)
        assert len(server.requests) == 1
    assert done.exit_code == 2 and "set OPENAI_API_KEY" in done.output and "the same command goes on" in done.output


@pytest.mark.slow
def test_kill_9_in_a_run_and_the_same_command_goes_on():
    write([{"prediction": f"number {i}"} for i in range(30)])
    with Server(lambda server, body: Reply(delay=0.05, content=by_words(server, body).content)) as server:
        command = [sys.executable, "-m", "granulon_hf", "judge", "run", "predictions.jsonl", "--base-url", server.url]
        process = subprocess.Popen([*command, "--concurrency", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        answers, deadline = Path("predictions.judged/answers.jsonl"), time.monotonic() + 60
        while time.monotonic() < deadline and not (answers.exists() and answers.read_text().count("\n") > 5):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        stored = {json.loads(line)["key"] for line in answers.read_text().splitlines()}
        assert 5 < len(stored) < 30
        before = len(server.requests)
        done = run("run", "predictions.jsonl", "--base-url", server.url)
        assert len(server.requests) - before == 30 - len(stored)
    assert done.exit_code == 0 and [row["accuracy"] for row in samples()] == list(range(30))


def test_agree():
    rows = [{"id": i, "accuracy": 10 * i, "hallucination": 50} for i in range(10)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    people = [{"id": i, "human": min(100, 10 * i + 5)} for i in range(11)]
    Path("b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in people))
    done = run("agree", "a.jsonl", "b.jsonl", "--column", "accuracy=human")
    assert done.exit_code == 0, done.output
    assert re.search(r"accuracy\s+10\s+1\.000\s+0\.98\d \[0\.\d+, 0\.\d+\]\s+-5\.0", done.output)
    assert "1 ids are in b.jsonl alone, such as 10" in done.output
    (found,) = json.loads(run("agree", "a.jsonl", "b.jsonl", "--column", "accuracy=human", "--json").output).values()
    assert found["n"] == 10
    assert "lacks an id or any score" in run("agree", "a.jsonl", "b.jsonl").output


def scored(folder, values, texts=None):
    Path(folder).mkdir()
    rows = [{"id": f"s{i}", "accuracy": x, "hallucination": y} for i, (x, y) in enumerate(values)]
    for row, text in zip(rows, texts or [], strict=False):
        row |= {"prediction": text, "image": f"{row['id']}.png"}
    (Path(folder) / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_compare_writes_a_page_with_the_largest_disagreements_first():
    texts = [f"number <b>{i}</b>" for i in range(6)]
    scored("A.judged", [(90, 5), (80, 10), (70, 10), (60, 30), (None, None), (10, 90)], texts)
    scored("B.judged", [(85, 5), (20, 10), (70, 15), (55, 30), (50, 50), (30, 60)], texts)
    done = run("compare", "A.judged", "B.judged")
    assert done.exit_code == 0, done.output
    assert re.search(r"accuracy\s+5\s+0\.", done.output) and re.search(r"s1\s+80, 20\s+10, 10", done.output)
    page = Path("A-B.compared/comparison.html").read_text()
    places = [page.index(f"<td>s{i}</td>") for i in (1, 5, 0)]
    assert places == sorted(places) and "<td>s4</td>" not in page and "<b>1</b>" not in page
    with Image.open("A-B.compared/bland_altman.png") as plot:
        assert plot.format == "PNG" and plot.width > 500
    swapped = run("compare", "A.judged/samples.jsonl", "B.judged", "--out", "else")
    assert swapped.exit_code == 0 and Path("else/comparison.html").exists()


def test_compare_refuses_what_cannot_be_compared():
    scored("A.judged", [(90, 5), (80, 10)], ["a cat", "a dog"])
    scored("B.judged", [(90, 5), (80, 10)], ["a cat", "a bird"])
    scored("C.judged", [(None, None), (80, 10)], ["a cat", "a dog"])
    for second, word in (("B.judged", "a bird"), ("C.judged", "Fewer than two"), ("none.judged", "no file")):
        done = run("compare", "A.judged", second)
        assert done.exit_code == 2 and word in done.output and done.output.count("\n") == 1
        assert not Path("A-B.compared").exists()


def test_agree_corrects_means_and_looks_at_length():
    texts = ["word " * (10 + 5 * i) for i in range(40)]
    scored("A.judged", [(50 + i % 7, 20) for i in range(40)], texts)
    labels = [{"id": f"s{i}", "accuracy": 45 + i % 7 - i // 8} for i in range(0, 40, 2)]
    Path("labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    done = run("agree", "A.judged", "labels.jsonl")
    assert done.exit_code == 0 and re.search(r"accuracy\s+52\.\d\s+4\d\.\d \[", done.output), done.output
    assert re.search(r"accuracy changes by \+\d\.\d \[", done.output)
    found = json.loads(run("agree", "A.judged", "labels.jsonl", "--json").output)["accuracy"]
    means = found["calibration"]
    assert (means["n_labels"], means["n_rest"]) == (20, 20)
    assert means["corrected"][1] < means["corrected"][0] < means["corrected"][2] < means["judge"]
    assert found["length_bias"][1] > 0


def clustered(form):
    """Write predictions of 8 images, 5 answers each that are scored alike, with the images in one of several forms."""
    rows = [{"id": i, "prediction": f"number {10 * (i % 8) + i // 8} {'word ' * i}", "image": i} for i in range(40)]
    pictures = []
    Path("images").mkdir()
    for row in rows:
        row["image"] = f"images/{row['id']}.png"  # many files with the same bytes
        make_picture(row["id"] % 8, (40, 30)).save(row["image"])
        pictures.append(Path(row["image"]).read_bytes())
    if form == "paths":
        return write(rows)
    for row, data in zip(rows, pictures, strict=True):
        row["image"] = {"bytes": data, "path": "image.png" if form == "placeholder" else None}
    pq.write_table(pa.Table.from_pylist(rows), "predictions.parquet")
    return "predictions.parquet"


@pytest.mark.parametrize("form", ["paths", "bytes", "placeholder"])
def test_answers_about_an_image_are_one_cluster_from_run_to_agree_and_compare(form):
    with Server(by_words) as server:
        done = run("run", clustered(form), "--base-url", server.url)
    assert done.exit_code == 0 and re.search(r"over 8 images", done.output), done.output
    assert len({row["image_id"] for row in samples()}) == 8 and "8 images" in Path("predictions.judged/report.html").read_text()
    results = json.loads(Path("predictions.judged/results.json").read_text())
    assert np.ptp(results["accuracy_ci"]) > 30  # of means of images 10 apart; as if independent 14
    labels = [{"id": float(row["id"]), "human": str(row["accuracy"] + i % 3)} for i, row in enumerate(samples())]
    pd.DataFrame(labels[:30]).to_csv("labels.csv", index=False)
    for other, column in (("labels.csv", "accuracy=human"), ("predictions.judged", "accuracy=accuracy")):
        told = run("agree", "predictions.judged", other, "--column", column, "--json")
        assert told.exit_code == 0, told.output
        found = json.loads(told.output)["accuracy"]
        assert found["n_images"] == 8 and found["calibration"]["n_labels"] == (30 if other == "labels.csv" else 40)
        assert found["calibration"]["labels"][2] - found["calibration"]["labels"][1] > 30
    compared = run("compare", "predictions.judged", "labels.csv", "--column", "accuracy=human")
    assert compared.exit_code == 0 and "over 8 images" in compared.output
    assert "images (8)" in Path("predictions-labels.compared/comparison.html").read_text()


def test_where_no_interval_can_be_given_the_commands_say_so():
    write([{"id": i, "prediction": f"number {30 + i}", "image": "images/cat.png"} for i in range(8)])
    make_picture(0).save("images/cat.png")
    with Server(by_words) as server:
        alone = run("run", "predictions.jsonl", "--base-url", server.url)
    assert re.search(r"accuracy\s+33\.5\s+none of a single image", alone.output), alone.output
    page = Path("predictions.judged/report.html").read_text()
    assert "none of a single image" in page and "1 image;" in page
    Path("labels.csv").write_text("id,accuracy\n" + "".join(f"{i},{40 + i}\n" for i in range(8)))
    told = run("agree", "predictions.judged", "labels.csv")
    assert told.exit_code == 0 and told.output.count("one image") == 2 and "cannot be said" in told.output
    scored("A.judged", [(50 + i, 20) for i in range(20)], ["word " * i for i in range(20)])
    Path("labels.csv").write_text("id,accuracy\n" + "".join(f"s{i},50\n" for i in range(10)))
    told = run("agree", "A.judged", "labels.csv")
    assert told.exit_code == 0 and told.output.count("50.0 (no interval") == 2, told.output
    found = json.loads(run("agree", "A.judged", "labels.csv", "--json").output)["accuracy"]
    assert found["calibration"]["corrected"] == [50, None, None]


def test_predictions_in_csv():
    write([{}])
    text = 'id,prediction,image\n007,"number 5, or so",images/0.png\n1.0,,images/0.png\n,number 7,images/0.png\n'
    Path("predictions.csv").write_text(text)
    with Server(by_words) as server:
        done = run("run", "predictions.csv", "--base-url", server.url)
    assert done.exit_code == 0, done.output
    assert [(row["id"], row["accuracy"]) for row in samples()] == [("007", 5), ("1.0", 0), ("#2", 7)]


def test_a_panel_has_columns_spread_and_agreement():
    write([{"id": f"s{i}", "prediction": f"number {value}"} for i, value in enumerate((80, 20, 50))])

    def behave(server, body):
        number = int(re.search(r"\d+", prediction_of(body))[0]) + 10 * (body["model"] == "b") + body["seed"] // 100
        return Reply(content=json.dumps({"accuracy_score": number, "hallucination_score": 10}))

    with Server(behave) as server:
        panel = ("run", "predictions.jsonl", "--base-url", server.url, "--judge", "a", "--judge", "b", "--samples", 2)
        done = run(*panel)
        assert done.exit_code == 0, done.output
        assert len(server.requests) == 12
        assert run(*panel).exit_code == 0 and len(server.requests) == 12
    assert [row["accuracy"] for row in samples()] == [85.5, 25.5, 55.5]
    assert samples()[0]["accuracy.a"] == 80.5 and samples()[0]["accuracy.b"] == 90.5
    assert samples()[0]["accuracy_spread"] == pytest.approx(50**0.5)
    results = json.loads(Path("predictions.judged/results.json").read_text())
    assert results["model"] == ["a", "b"] and 0.9 < results["agreement"]["accuracy"]["judges"] < 1
    assert results["agreement"]["hallucination"]["judges"] is None
    assert re.search(r"accuracy, b\s+60\.5", done.output) and "α 0.9" in done.output
    page = Path("predictions.judged/report.html").read_text()
    assert "accuracy, a" in page and "2 samples of each" in page and "order of answers" in page
    alone = run("agree", "predictions.judged", "predictions.judged", "--column", "accuracy=accuracy.b")
    assert alone.exit_code == 0 and "-5.0" in alone.output


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize("name", ["gpt-7-imaginary", "gpt-4-turbo"])
def test_a_judge_that_openai_does_not_serve_is_one_sentence_with_the_choices(name, dry):
    write([{"prediction": "number 1"}])
    done = run("run", "predictions.jsonl", "--judge", "gpt-4o", "--judge", name, *dry)
    assert done.exit_code == 2 and done.output.splitlines()[-1].startswith(f"Error: The judge '{name}'")
    assert "gpt-4o" in done.output and "--judge-models" in done.output and "--base-url" in done.output
    priced = run("run", "predictions.jsonl", "--judge", name, "--price", "1", "1", "--dry-run")
    assert priced.exit_code == 0 and re.search(r"requests\s+1", priced.output)


def test_judge_models_in_a_file():
    write([{"prediction": "number 1"}])
    Path("judges.yaml").write_text("thinker: {prompt: 1000, completion: 0, reasons: true}\n")
    with Server(by_words) as server:
        options = ("--base-url", server.url, "--judge", "thinker", "--judge-models", "judges.yaml")
        assert "prices of" in run("run", "predictions.jsonl", *options, "--dry-run").output
        done = run("run", "predictions.jsonl", *options, "--reasoning-effort", "high")
        assert done.exit_code == 0 and server.requests[0]["reasoning_effort"] == "high"
    assert re.search(r"1\.0+\d* USD in this run", done.output), done.output
    for text, word in (
        ("- a", "names of judges"),
        ("a: {prise: 1}", "prise"),
        ("a: [", "YAML"),
        ("a: {prompt: 1}", "go together"),
    ):
        Path("judges.yaml").write_text(text)
        wrong = run("run", "predictions.jsonl", "--judge", "a", "--judge-models", "judges.yaml", "--dry-run")
        assert wrong.exit_code == 2 and word in wrong.output and "--judge-models" in wrong.output
        assert wrong.output.count("\n") == 1


def test_models_are_listed_and_written():
    listed = run("models").output
    assert re.search(r"gpt-4o\s+2\.5\s+10\s+2027-01-14", listed) and "litellm" in listed
    row = {"litellm_provider": "openai", "mode": "chat", "supports_vision": True, "supports_reasoning": True}
    row |= {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6, "max_input_tokens": 9000, "max_output_tokens": 4000}
    Path("prices.json").write_text(json.dumps({"gpt-9": row, "gpt-8": {**row, "deprecation_date": "soon"}}))
    made = run("models", "--litellm", "prices.json", "--out", "judges.yaml")
    assert made.exit_code == 0 and "gpt-8" in made.output and "--judge-models" not in made.output
    assert "gpt-8" not in Path("judges.yaml").read_text()
    assert re.search(r"gpt-9\s+1\s+2\s+yes", run("models", "--judge-models", "judges.yaml").output)
    write([{"prediction": "number 1"}])
    dry = run("run", "predictions.jsonl", "--judge", "gpt-9", "--judge-models", "judges.yaml", "--dry-run")
    assert dry.exit_code == 0 and re.search(r"completion tokens, about\s+600", dry.output)
    snapshot = run("run", "predictions.jsonl", "--judge", "gpt-9-2030-01-01", "--judge-models", "judges.yaml", "--dry-run")
    assert re.search(r"completion tokens, about\s+600", snapshot.output) and "prices of --judge-models" in snapshot.output
    Path("prices.json").write_text("[]")
    wrong = run("models", "--litellm", "prices.json")
    assert wrong.exit_code == 2 and "JSON object" in wrong.output and wrong.output.count("\n") == 1


def test_a_price_of_a_panel_is_of_every_judge_or_refused():
    write([{"prediction": "number 1"}])
    panel = ("run", "predictions.jsonl", "--dry-run", "--base-url", "https://judges.example/v1", "--judge", "own", "--judge")
    Path("judges.yaml").write_text("own: {context: 9000}\nother: {prompt: 3, completion: 3}\n")
    for more, name in ((("gpt-4o",), "gpt-4o"), (("other", "--judge-models", "judges.yaml"), "other")):
        refused = run(*panel, *more, "--price", "1", "2")
        assert refused.exit_code == 2 and f"'{name}'" in refused.output and refused.output.count("\n") == 1
    taken = run(*panel, "else", "--judge-models", "judges.yaml", "--price", "1000", "0")
    assert taken.exit_code == 0 and "--price" in taken.output, taken.output


def test_fields_of_the_file_are_no_options():
    write([{"prediction": "number 1"}])
    for text, what in (
        ("gpt-4o: {prise: 1}", "'prise' of 'gpt-4o' is wrong"),
        ("gpt-4o: {base_url: 5}", "'base_url' of 'gpt-4o' is wrong"),
        ("own: {prompt: 1}", "'own' is wrong"),
    ):
        Path("judges.yaml").write_text(text)
        judge = text.partition(":")[0]
        wrong = run("run", "predictions.jsonl", "--judge", judge, "--judge-models", "judges.yaml", "--dry-run")
        assert wrong.exit_code == 2 and what in wrong.output and "--base-url" not in wrong.output, wrong.output


def test_an_address_in_the_file_is_refused_with_its_line():
    write([{"prediction": "number 1"}])
    with Path("predictions.jsonl").open("a") as file:
        file.write('{"prediction": "a", "image": "http://127.0.0.1:9/a.png"}\n')
    done = run("run", "predictions.jsonl", "--dry-run")
    assert (
        done.exit_code == 2 and "line 2" in done.output and "http://127.0.0.1:9/a.png" in done.output and "path" in done.output
    )
