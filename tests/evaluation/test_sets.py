"""Sets of evaluation: drawn scenes that training never draws, and what loading left out."""

from dataclasses import replace

import pytest

from granulon_hf.data import load
from granulon_hf.data.datasets.shapes import Shapes
from granulon_hf.data.loading import ADAPTERS
from granulon_hf.evaluation.sets import describe_set, left_out, open_samples
from tests.data import tables


def test_drawn_scenes_are_held_out():
    found = list(open_samples("shapes", drawn=40))
    assert len(found) == 40
    trained = {sample.images[0]["bytes"] for seed in range(3) for sample in Shapes(40, seed)}
    assert trained.isdisjoint(sample.images[0]["bytes"] for sample in found)
    assert [sample.id for sample in open_samples("shapes", drawn=40, limit=2)] == [sample.id for sample in found[:2]]
    assert found[0].id != open_samples("shapes", drawn=1, seed=1)[0].id
    with pytest.raises(ValueError, match="seed"):
        open_samples("shapes", drawn=1, seed=-1000)


def test_conversations_that_lack_something(tmp_path):
    good = {"id": "0", "image": "a.jpg", "conversations": tables.turn("<image>\nWhat?", "This.")}
    bad = [
        {"id": "1", "image": "no.jpg", "conversations": tables.turn("<image>\nWhat?", "This.")},
        {"id": "2", "conversations": tables.turn("<image>\nWhat?", "This.")},
        {"id": "3", "conversations": tables.turn("<image>\nWhat?", "This.")},
        {"id": "4", "conversations": []},
        {"id": "5", "image": "b.jpg", "conversations": [{"from": "robot", "value": "x"}]},
    ]
    samples = open_samples("llava", drawn=1, source=tables.chat(tmp_path, [good, *bad]))
    assert [sample.id for sample in samples] == ["0"]
    left = left_out(samples)
    assert [row["row"] for row in left["rows"]] == [1, 2, 3, 4, 5] and "no.jpg" in left["rows"][0]["reason"]
    line = describe_set(1, left)
    assert line.startswith("1 samples, 5 left out: there are 1 <image> markers for 0 images (2), ")
    assert line.endswith("other reasons (1)")


def test_videos_and_files_that_cannot_be_read(tmp_path):
    rows = [tables.seed_row(0), tables.seed_video(1), tables.seed_row(2, image=[{"bytes": b"garbage", "path": None}])]
    tables.write(tmp_path / "data" / "test-00000-of-00002.parquet", rows, tables.SEED)
    (tmp_path / "data" / "test-00001-of-00002.parquet").write_bytes(b"PAR1")
    samples = open_samples("seed-bench", drawn=1, source=tmp_path)
    assert len(list(samples)) == 1
    left = left_out(samples)
    assert [len(left["rows"]), len(left["files"]), left["filtered"]] == [1, 1, {"a video row": 1}]
    line = describe_set(1, left)
    assert "1 left out: the image cannot be used" in line and "no part of the set: a video row (1)" in line
    assert "1 files cannot be read, such as data/test-00001" in line and "\n" not in line


@pytest.mark.parametrize("name", ["chat.json", "own.jsonl", "own.json"])
def test_own_conversations_by_file_or_folder(tmp_path, name):
    """As examples/train.py takes them."""
    records = [{"id": "7", "image": "a.jpg", "conversations": tables.turn("<image>\nWhat?", "This.")}]
    folder = tables.chat(tmp_path / "own", records, name)
    for source in [folder / name] + [folder] * (name == "chat.json"):
        (sample,) = open_samples(str(source), drawn=1)
        assert (sample.id, sample.reference) == ("7", "This.")
    with pytest.raises(ValueError, match="gone.json"):
        open_samples(str(tmp_path / "gone.json"), drawn=1)


def test_what_is_held_out_of_training_is_the_default(tmp_path, monkeypatch):
    source = tables.flux_folder(tmp_path / "flux", [("Text", 2), ("Imaginative", 2)])
    assert len(open_samples("flux-reason", drawn=1, source=source)) == 40  # too few for a hold-out, in training as well
    adapter = replace(ADAPTERS["flux-reason"], holdout=4)
    monkeypatch.setitem(ADAPTERS, "flux-reason", adapter)
    held = {sample.id for sample in open_samples("flux-reason", drawn=1, source=source)}
    trained = {sample.id for sample in load("flux-reason", source=source)}
    assert len(held) == 4 and len(trained) == 36 and not held & trained
    assert {sample.id for sample in open_samples("flux-reason", drawn=1, source=source, split="train")} == trained
    assert open_samples("granuscenes", drawn=1, source="drawn?scenes=2").split == "test"
