"""`granulon data`: prepare, check, show; what they write, and one clear sentence for what is wrong."""

import json
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import granulon_hf.data
from granulon_hf.cli.data import app
from granulon_hf.data.prepared import write as materialise
from tests.data import tables


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


def ok(result):
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(result, message):
    assert result.exit_code == 2
    assert re.fullmatch(f"Error: .*{message}.*\n", result.stderr), result.stderr


@pytest.fixture
def flux(tmp_path):
    return tables.flux_folder(tmp_path / "flux", [("Text", 2), ("Imaginative", 2)])


@pytest.fixture
def prepared(flux, run, tmp_path):
    out = tmp_path / "out"
    ok(run("prepare", "flux-reason", "--source", flux, "--out", out, "--limit", 25, "--holdout", 5, "--shard-rows", 10))
    return out


def same(first, second):
    """Equal samples, wherever the bytes of their images are."""
    for one, other in zip(first, second, strict=True):
        for sample in (one, other):
            sample.images = [image["bytes"] or Path(image["path"]).read_bytes() for image in sample.images]
        assert one == other


@pytest.mark.parametrize("width", [60, 200])
def test_sets_are_listed(run, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    listed = ok(CliRunner().invoke(app, ["list"]))
    first = [line.split()[0] for line in listed.splitlines() if line[:1].strip()]
    assert first == ["name", *(name for name in granulon_hf.data.ADAPTERS if name != "prepared"), "shapes"]
    if width == 200:
        line = next(line for line in listed.splitlines() if line.startswith("pope"))
        assert "lmms-lab/POPE" in line and "yes_f1" in line


def test_the_benchmarks_of_hallucination_are_refused_by_the_name_of_their_option(run, tmp_path):
    refused(run("prepare", "amber", "--out", tmp_path / "out"), "--source")
    tables.write(tmp_path / "t.parquet", [{"q": "?"}])
    refused(run("prepare", "pope", "--source", tmp_path / "t.parquet", "--out", tmp_path / "out"), "'answer'")


def test_what_is_prepared_is_what_was_loaded(flux, prepared, monkeypatch, tmp_path):
    original = granulon_hf.data.load("flux-reason", source=flux, limit=25, holdout=5)
    same(granulon_hf.data.load(prepared), original)
    same(granulon_hf.data.load(manifest=prepared / "manifest.json"), original)
    assert sorted(path.name for path in (prepared / "data").iterdir()) == [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    loaded = datasets.load_dataset(str(prepared), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["id"][:] == [sample.id for sample in original] and loaded[0]["images"][0].size == (64, 48)
    assert loaded.features == materialise.prepared.features()

    card = (prepared / "README.md").read_text()
    assert "license: apache-2.0" in card and "| samples | 25 |" in card and "| held out of training | 5 rows |" in card
    assert str(tmp_path) not in card
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["prepared"]["complete"] and manifest["prepared"]["samples"] == 25


def test_bad_rows_are_left_out_and_named(run, tmp_path):
    odd = tables.odd_images()
    rows = [tables.flux_row(i, image={"bytes": image, "path": None}) for i, (image, _) in enumerate(odd.values())]
    rows += [tables.flux_row(i, id="same") for i in (20, 21)] + [tables.flux_row(22, caption_detail=None)]
    path = tables.write(tmp_path / "x|[b].parquet", rows, tables.FLUX)
    printed = ok(run("prepare", "flux-reason", "--source", path, "--out", tmp_path / "out", "--shard-rows", 3))
    assert (
        "Note: " not in printed
        and "7 bad rows were left out" in printed
        and "x|[b].parquet, row 12: the caption_detail is empty" in printed
    )
    assert "6 samples" in printed and "1 ids were made unique" in printed
    assert "1 x 1 pixels" in ok(run("check", tmp_path / "out"))
    assert [sample.id for sample in granulon_hf.data.load(tmp_path / "out")][-2:] == ["same", "same#2"]
    refused(
        run("prepare", "flux-reason", "--source", path, "--out", tmp_path / "strict", "--on-error", "raise"),
        r"x\|\[b\]\.parquet, row 4: the image cannot be used",
    )


def test_an_interrupted_preparation_goes_on(flux, run, tmp_path, monkeypatch):
    arguments = ("prepare", "flux-reason", "--source", flux, "--out", tmp_path / "out", "--shard-rows", 8)
    written, write = [], materialise.write_shard

    def interrupted(path, samples, progress):
        if len(written) == 2:
            path.with_name(f".{path.name}.1.part").write_bytes(b"half of it")
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, samples, progress)

    monkeypatch.setattr(materialise, "write_shard", interrupted)
    result = run(*arguments)
    assert result.exit_code == 130 and "run the same command again" in result.stderr
    assert "interrupted" in run("check", tmp_path / "out").stdout and run("check", tmp_path / "out").exit_code == 1

    monkeypatch.setattr(materialise, "write_shard", lambda *a: (written.append(a[0].name), write(*a)))
    refused(run(*arguments, "--seed", 1), "was prepared with another seed; take another folder, or --overwrite it")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").glob("train*")}
    assert "40 samples" in ok(run(*arguments))
    assert written == [f"train-0000{i}-of-00005.parquet" for i in range(5)]  # each once
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert not list((tmp_path / "out").rglob("*.part"))
    same(granulon_hf.data.load(tmp_path / "out"), granulon_hf.data.load("flux-reason", source=flux))
    ok(run(*arguments))
    assert len(written) == 5  # nothing to do
    next(iter(kept)).write_bytes(b"PAR1 lost to a power cut")
    ok(run(*arguments))
    assert len(written) == 6
    assert "12 samples" in ok(run(*arguments, "--limit", 12, "--overwrite"))
    assert len(list((tmp_path / "out" / "data").iterdir())) == 2


def test_an_interrupted_overwriting_goes_on(flux, run, tmp_path, monkeypatch):
    arguments = ("prepare", "flux-reason", "--source", flux, "--out", tmp_path / "out", "--shard-rows", 8)
    ok(run(*arguments))
    again = (*arguments, "--seed", 1, "--overwrite")
    written, write = [], materialise.write_shard

    def interrupted(path, samples, progress):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, samples, progress)

    monkeypatch.setattr(materialise, "write_shard", interrupted)
    assert run(*again).exit_code == 130
    monkeypatch.setattr(materialise, "write_shard", lambda *a: (written.append(a[0].name), write(*a)))
    ok(run(*again))
    assert len(written) == len(set(written)) == 5  # each once
    ok(run(*again))
    assert len(written) == 10  # what is finished is written anew


def test_an_interrupted_overwriting_of_what_changed(flux, run, tmp_path, monkeypatch):
    arguments = ("prepare", "flux-reason", "--source", flux, "--out", tmp_path / "out", "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(materialise, "write_shard", lambda *a: 1 / 0)
        run(*arguments)
    tables.write(next((flux / "Text").iterdir()), [tables.flux_row(i, id=f"new{i}") for i in range(9)], tables.FLUX)
    assert "39 samples" in ok(run(*arguments))


def test_two_preparations_of_one_folder(flux, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = ("prepare", "flux-reason", "--source", flux, "--out", out)
    inner, write = [], materialise.write_shard
    monkeypatch.setattr(materialise, "write_shard", lambda *a: (inner.append(run(*arguments)), write(*a)))
    ok(run(*arguments))
    refused(inner[0], "Another granulon data prepare is writing to .*out'; wait for it")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "data", "manifest.json"]
    ok(run(*arguments))


def test_files_that_cannot_be_read_are_counted(flux, run, tmp_path, monkeypatch):
    next((flux / "Text").iterdir()).write_bytes(b"")
    arguments = ("prepare", "flux-reason", "--source", flux, "--out", tmp_path / "out", "--shard-rows", 20)
    with monkeypatch.context() as patch:
        patch.setattr(materialise, "write_shard", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*arguments).exit_code == 130
    printed = ok(run(*arguments))  # also after an interruption
    assert "0 bad rows and 1 files that cannot be read were left out" in printed and "cannot be read as Parquet" in printed
    assert "30 samples" in printed
    refused(run(*arguments[:4], "--out", tmp_path / "strict", "--on-error", "raise"), "cannot be read as Parquet")


def test_a_missing_shard_is_named(prepared, run, tmp_path):
    shards = sorted((prepared / "data").iterdir())
    shards[1].unlink()
    missing = "data/train-00001-of-00003.parquet: the shard is missing; run granulon data prepare again"
    result = run("check", prepared)
    assert result.exit_code == 1 and missing in result.stdout
    result = run("show", prepared, "--out", tmp_path / "sheet.html")
    assert result.exit_code == 0 and missing in result.stderr
    with pytest.raises(granulon_hf.data.GranulonError, match="the shard is missing"):
        granulon_hf.data.load(prepared, on_error="raise")
    for shard in (shards[0], shards[2]):
        shard.unlink()
    for command in ("check", "show"):
        refused(run(command, prepared), "has no shards: data/train-00000-of-00003.parquet is missing")


def test_a_killed_preparation_goes_on(tmp_path, run):
    root = tables.flux_folder(tmp_path / "flux", [("Text", 3)], rows=100)
    arguments = ["prepare", "flux-reason", "--source", str(root), "--out", str(tmp_path / "out"), "--shard-rows", "10"]
    script = "import sys; from granulon_hf.cli.data import app; app(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((tmp_path / "out").glob("data/train*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    ok(run(*arguments))
    assert len(list(granulon_hf.data.load(tmp_path / "out"))) == 300
    assert "no errors" in ok(run("check", tmp_path / "out"))


def test_a_source_that_changed_is_not_mixed_in(flux, run, tmp_path, monkeypatch):
    arguments = ("prepare", "flux-reason", "--source", flux, "--out", tmp_path / "out")
    ok(run(*arguments))
    part = next((flux / "Text").iterdir())
    tables.write(part, [tables.flux_row(i, id=f"new{i}") for i in range(10)], tables.FLUX)
    refused(run(*arguments), "has changed since the manifest was written")


def test_two_images_text_alone_and_other_sets(run, tmp_path):
    records = [
        {"id": "two", "image": ["a.jpg", "b.jpg"], "conversations": tables.turn("<image> or <image>?", "Erste.")},
        {"id": "none", "conversations": tables.turn("Hé?", "日本語") + tables.turn("And?", "No.")},
    ]
    root = tables.chat(tmp_path / "chat", records)
    ok(run("prepare", "llava", "--source", root, "--out", tmp_path / "out"))
    loaded, original = granulon_hf.data.load(tmp_path / "out"), granulon_hf.data.load("llava", source=root)
    same(loaded, original)
    assert loaded[0].images[1]["path"] == "b.jpg"

    tables.write(tmp_path / "own.parquet", [{"p": tables.jpeg(i), "t": f"t{i}"} for i in range(3)])
    columns = ("--column", "image=p", "--column", "answer=t")
    ok(run("prepare", tmp_path / "own.parquet", *columns, "--out", tmp_path / "own"))
    ok(run("prepare", tmp_path / "own.parquet", *columns, "--out", tmp_path / "own"))
    assert [sample.reference for sample in granulon_hf.data.load(tmp_path / "own")] == ["t0", "t1", "t2"]

    rows = [tables.seed_video(0), *(tables.seed_row(i) for i in range(1, 5))]
    tables.write(tmp_path / "seed" / "data" / "test-00000-of-00001.parquet", rows, tables.SEED)
    printed = ok(run("prepare", "seed-bench", "--source", tmp_path / "seed", "--out", tmp_path / "seeds"))
    assert "1 rows are no part of the set: a video row" in printed
    assert granulon_hf.data.load(tmp_path / "seeds").split == "test"  # the only one that there is
    result = run("prepare", "seed-bench", "--source", tmp_path / "seed", "--out", tmp_path / "paper", "--preset", "paper")
    assert result.stderr.startswith("Note: 1000 rows were asked for") and "4 samples" in ok(result)
    assert "test 4 samples" in ok(run("check", tmp_path / "seeds"))


def test_check_finds_what_is_wrong(prepared, flux, run, tmp_path):
    printed = ok(run("check", prepared))
    assert "answer (words)" in printed and "train 25 samples · 0 warnings · no errors" in printed
    held = tmp_path / "held"
    ok(run("prepare", "flux-reason", "--source", flux, "--out", held, "--split", "holdout", "--holdout", 5))
    assert "no errors" in ok(run("check", prepared, "--against", held))

    path = sorted((held / "data").iterdir())[0]
    rows = pq.read_table(path).to_pylist()
    picture = granulon_hf.data.load(prepared)[3].images[0]["bytes"]
    # The same pixels in another format are the same image.
    rows[0]["images"] = [{"bytes": tables.encode(datasets.Image().decode_example({"bytes": picture, "path": None}), "PNG")}]
    rows[1]["images"] = [{"bytes": tables.jpeg(1)[:-300]}]
    rows[2]["reference"] = ""
    rows[3]["id"] = rows[4]["id"]
    pq.write_table(pq.read_table(path).from_pylist(rows, schema=materialise.prepared.features().arrow_schema), path)
    result = run("check", held, "--against", prepared)
    assert result.exit_code == 1
    for reason in (
        "row 1: unusable image",
        "row 2: the answer is empty",
        "row 4: the id",
        "the image is also in holdout",
        "4 errors",
    ):
        assert reason in result.stdout, result.stdout
    path.unlink()
    assert run("check", held).exit_code == 2


def test_check_in_tokens(prepared, run, tmp_path, build):
    _, processor = build()
    assert isinstance(processor.tokenizer, PreTrainedTokenizerFast)
    processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert "answer (tokens)" in ok(run("check", prepared, "--tokenizer", tmp_path / "tokenizer"))
    refused(run("check", prepared, "--tokenizer", tmp_path / "nothing"), "Cannot load the tokenizer")


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset")]


def test_the_contact_sheet_needs_nothing_and_runs_nothing(run, tmp_path):
    rows = [tables.flux_row(i, caption_detail=f"<script>alert({i})</script> & 日本 <image>") for i in range(5)]
    path = tables.write(tmp_path / "x.parquet", rows, tables.FLUX)
    ok(run("prepare", "flux-reason", "--source", path, "--out", tmp_path / "out"))
    ok(run("show", tmp_path / "out", "--out", tmp_path / "sheet.html", "--limit", 3))
    html = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    parser = Links()
    parser.feed(html)
    assert "script" not in parser.tags and parser.tags.count("img") == parser.tags.count("article") == 3
    assert all(link.startswith("data:image/jpeg;base64,") for link in parser.links)
    assert "&lt;script&gt;alert(0)&lt;/script&gt; &amp; 日本" in html


def test_one_sentence_for_what_is_wrong(run, prepared, flux, tmp_path):
    refused(run("prepare", "flux", "--out", tmp_path / "x"), "no data set or prepared folder 'flux'")
    refused(run("prepare", "flux-reason", "--source", tmp_path / "no", "--out", tmp_path / "x"), "no file or folder")
    refused(run("prepare", "flux-reason", "--source", flux, "--out", flux), "not empty and holds no prepared subset")
    refused(run("prepare", "llava", "--source", flux, "--out", tmp_path / "x"), "lacks the columns 'conversations'")
    refused(run("prepare", "a-okvqa", "--split", "test", "--out", tmp_path / "x"), "withheld; use 'validation'")
    refused(run("prepare", "flux-reason", "--column", "image", "--out", tmp_path / "x"), "--column takes image=COLUMN")
    assert not (tmp_path / "x").exists()
    refused(run("check", tmp_path / "none"), "no folder")
    refused(run("check", flux), "is not prepared: it lacks the columns")
    refused(run("check", prepared, "--against", tmp_path / "none"), "no folder")
    refused(run("show", prepared, "--out", tmp_path / "no" / "sheet.html"), "Cannot write")
    refused(run("show", prepared, "--limit", 0), "--limit must be at least 1")
    refused(run("show", prepared, "--split", "test"), "has no split 'test'; it has 'train'")


def conversations(*pairs, image="a.jpg"):
    return [
        {"id": str(i), "image": image, "conversations": tables.turn(f"<image>\n{question}", answer)}
        for i, (question, answer) in enumerate(pairs)
    ]


def replace_rows(folder, change):
    """Write the first shard of a prepared folder anew."""
    path = sorted((folder / "data").iterdir())[0]
    rows = change(pq.read_table(path).to_pylist())
    pq.write_table(pq.read_table(path).from_pylist(rows, schema=materialise.prepared.features().arrow_schema), path)


def png_of(image):
    return tables.encode(datasets.Image().decode_example(image), "PNG")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, True),
        ({"id": "other"}, True),
        ({"meta": '{"from": "elsewhere"}'}, True),
        ({"images": lambda images: [{"bytes": png_of(images[0]), "path": None}]}, True),  # the same pixels
        ({"images": lambda images: [{"bytes": tables.jpeg(77), "path": None}]}, False),
        ({"images": lambda images: images * 2}, False),
        ({"messages": lambda turns: [turns[0], {"role": "assistant", "content": [{"type": "text", "text": "No."}]}]}, False),
        ({"messages": lambda turns: [{"role": "user", "content": [{"type": "image"}]}, turns[1]]}, False),
    ],
)
def test_duplicates_within_a_split(run, tmp_path, change, found):
    root = tables.chat(tmp_path / "chat", conversations(("What?", "This."), ("Who?", "This."), ("What?", "That.")))
    ok(run("prepare", "llava", "--source", root, "--out", tmp_path / "out"))
    assert "no errors" in ok(run("check", tmp_path / "out"))  # one image of several questions, one question of several answers

    def copy_first(rows):
        copy = {name: value(rows[0][name]) if callable(value) else value for name, value in change.items()}
        return [*rows, rows[0] | {"id": "copy"} | copy]

    replace_rows(tmp_path / "out", copy_first)
    report = granulon_hf.data.check(tmp_path / "out")
    duplicates = [(problem.file, problem.row) for problem in report.errors if "duplicate" in problem.reason]
    assert duplicates == [("data/train-00000-of-00001.parquet", 3)] * found
    assert not [problem for problem in report.warnings + report.errors if "duplicate" not in problem.reason][1:]
    result = run("check", tmp_path / "out")
    assert result.exit_code == 1 and ("it is a duplicate" in result.stdout) == found


def test_text_alone_is_a_duplicate_and_a_leak_too(run, tmp_path):
    rows = [{"id": str(i), "conversations": tables.turn("Hi", "Ho")} for i in range(2)]
    for name, records in (("one", rows), ("other", rows[:1])):
        ok(run("prepare", "llava", "--source", tables.chat(tmp_path / name, records), "--out", tmp_path / f"p-{name}"))
    reasons = [problem.reason for problem in granulon_hf.data.check(tmp_path / "p-one").errors]
    assert len(reasons) == 1 and "duplicate" in reasons[0]
    report = granulon_hf.data.check(tmp_path / "p-other", against=tmp_path / "p-one")
    assert [problem.row for problem in report.errors] == [0, 1] and not any("duplicate" in p.reason for p in report.errors)


BROKEN = {
    "no image": conversations(("What?", "This."), ("Who?", "That."), image="gone.jpg"),
    "no answer": conversations(("What?", " "), ("Who?", "")),
    "no conversation": [{"conversations": "hi"}, {"conversations": []}],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_set_without_a_usable_row_is_an_error(run, tmp_path, name, recwarn):
    root, out = tables.chat(tmp_path / "chat", BROKEN[name]), tmp_path / "out"
    refused(run("prepare", "llava", "--source", root, "--out", out), r"2 rows of .*\(\d\)")
    assert not out.exists()
    out.mkdir()
    refused(run("prepare", "llava", "--source", root, "--out", out), "2 rows")
    assert not list(out.iterdir())
    assert not recwarn.list


def test_a_prepared_folder_without_a_usable_row_is_an_error(prepared, run, tmp_path, recwarn):
    for shard in sorted((prepared / "data").iterdir())[1:]:
        shard.unlink()
    replace_rows(prepared, lambda rows: [row | {"reference": ""} for row in rows])
    for command in (("check",), ("show", "--out", tmp_path / "sheet.html")):
        refused(run(command[0], prepared, *command[1:]), r"10 rows of .*the answer is empty \(10\)")
    replace_rows(prepared, lambda rows: [])
    for command in (("check",), ("show", "--out", tmp_path / "sheet.html")):
        refused(run(command[0], prepared, *command[1:]), "no rows that can be used")
    assert not (tmp_path / "sheet.html").exists() and not recwarn.list


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.json", "", "empty"),
        ("a.json", " \n", "empty"),
        ("a.json", "[]", "empty"),
        ("a.jsonl", "\n\n", "empty"),
        ("a.txt", "", "empty"),
        ("a.json", "[{}]", "empty"),
        ("a.json", "[1, 2]", "a number"),
        ("a.json", "null", "null"),
        ("a.json", "{}", "an object"),
        ("a.json", '"x"', "a text"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", f'[{{"id": {"9" * 5000}}}]', "too many digits"),
        ("a.jsonl", "\x00\x01", "not JSON"),
        ("a.JSONL", "nope", "not JSON"),
        ("a.json", '[{"conversations": [{"from": ["x"]}]}]', "a turn is not from"),
    ],
)
def test_files_with_nothing_in_them(run, tmp_path, name, content, word):
    (tmp_path / name).write_text(content)
    result = run("prepare", "llava", "--source", tmp_path / name, "--out", tmp_path / "out")
    refused(result, word)
    assert not (tmp_path / "out").exists() and "lacks" not in result.stderr
    assert not any(word in result.stderr for word in ("Error:  ", "TypeError", "sys.", "dict", "NoneType")), result.stderr


def test_everything_filtered_out_is_said(run, tmp_path):
    tables.write(tmp_path / "seed" / "test.parquet", [tables.seed_video(i) for i in range(3)], tables.SEED)
    refused(run("prepare", "seed-bench", "--source", tmp_path / "seed", "--out", tmp_path / "out"), r"a video row \(3\)")


@pytest.mark.parametrize("split", ["trian", "", "../x", "Train", "train,test"])
def test_a_split_that_is_not_there_is_not_written(run, flux, tmp_path, split):
    sources = {
        "llava": tables.chat(tmp_path / "chat", conversations(("What?", "This."))),
        "flux-reason": flux,
        "a-okvqa": tables.write(tmp_path / "ok" / "train.parquet", [tables.okvqa_row(0)], tables.OKVQA).parent,
        "granuscenes": "drawn?scenes=2",
    }
    for name, source in sources.items():
        result = run("prepare", name, "--source", source, "--out", tmp_path / "out", f"--split={split}")
        refused(result, f"no split {re.escape(repr(split))}.*'train'")
        assert not (tmp_path / "out").exists()


def test_rows_of_a_prepared_folder_that_are_not_as_written(prepared, run):
    def change(rows):
        rows[0]["messages"] = rows[0]["messages"][1:]
        rows[1]["meta"], rows[2]["meta"] = "[]", "{"
        return rows

    replace_rows(prepared, change)
    report = granulon_hf.data.check(prepared)
    assert [problem.row for problem in report.errors] == [0, 1, 2] and sum(report.samples.values()) == 22


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"prepared": 3}', '{"prepared": {"complete": true, "shards": "x"}, "split": 3}']
)
def test_a_damaged_manifest(prepared, run, text):
    (prepared / "manifest.json").write_text(text)
    result = run("check", prepared)
    assert result.exit_code == 0 and "manifest.json" in result.stdout and "1 warnings" in result.stdout, result.output


def test_paths_that_cannot_be_written(run, tmp_path):
    root = tables.chat(tmp_path / "chat", conversations(("What?", "This.")))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("a" * 300)):
        result = run("prepare", "llava", "--source", root, "--out", out)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "Errno" not in result.stderr, result.stderr


def test_more_than_there_is_is_shown(prepared, run, tmp_path):
    ok(run("show", prepared, "--out", tmp_path / "sheet.html", "--limit", "9" * 30))
    assert (tmp_path / "sheet.html").read_text().count("<article>") == 25
