"""Loading: bad rows, sampling, hold-out, manifests, access."""

import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from granulon_hf.data import ADAPTERS, load
from granulon_hf.data.readers import ParquetSource, split_of
from granulon_hf.data.sampling import file_order
from granulon_hf.errors import GranulonError
from tests.data import tables


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return tables.flux_folder(tmp_path_factory.mktemp("flux"))


def ids(samples):
    return [sample.id for sample in samples]


def test_images_of_every_kind(tmp_path):
    odd = tables.odd_images()
    rows = [tables.flux_row(i, image={"bytes": image, "path": None}) for i, (image, _) in enumerate(odd.values())]
    path = tables.write(tmp_path / "x.parquet", rows, tables.FLUX)
    samples = load("flux-reason", source=path)
    good = [i for i, (_, usable) in enumerate(odd.values()) if usable]
    assert [sample.meta["row"] for sample in samples] == good
    assert [sample.meta["row"] for sample in samples] == good and len(samples.problems) == 10 - len(good)  # counted once
    found = {problem.row: problem for problem in samples.problems}
    assert set(found) == set(range(10)) - set(good)
    names = list(odd)
    assert "20000 x 20 pixels" in found[names.index("thread")].reason and "truncated" in found[names.index("truncated")].reason
    assert str(found[names.index("missing")]) == "x.parquet, row 9: the image is missing"

    with pytest.raises(GranulonError, match=r"x\.parquet, row 4: the image cannot be used"):
        list(load("flux-reason", source=path, on_error="raise"))
    header = load("flux-reason", source=path, verify="header")
    assert [sample.meta["row"] for sample in header] == [*good, names.index("truncated")]
    for i in range(len(samples)):  # an index always gives something that can be used
        assert samples[i].meta["row"] in good
    assert samples[4].meta["row"] == 0 and samples[1].meta["row"] == 1
    with pytest.raises(IndexError):
        samples[10]


def test_values_of_unexpected_types_end_no_epoch(tmp_path):
    rows = [{"image": tables.jpeg(), "class": "CC12M", "id": 1, "recaption": "x", "recaption_short": "y"}]
    tables.write(tmp_path / "a.parquet", [rows[0] | {"image": 7}])
    tables.write(tmp_path / "b.parquet", rows)
    samples = load("recap", source=tmp_path)
    assert len(list(samples)) == 1 and samples.problems[0].reason.startswith("the image is a number")


@pytest.mark.slow
def test_sampling_is_deterministic_uniform_and_spans_the_files(flux):
    first, again, other = (load("flux-reason", source=flux, limit=36, seed=seed) for seed in (0, 0, 1))
    assert ids(first) == ids(again) != ids(other) and len(set(ids(first))) == 36
    files = Counter(sample.meta["file"].split("/")[0] for sample in first)
    assert set(files) == {"Aesthetics-Part01", "Aesthetics-Part02", "Imaginative", "Text"}
    drawn = Counter(name for seed in range(200) for names in load_ids(flux, seed) for name in names)
    # 200 draws of 36 of 120 rows: each is expected 60 times with standard deviation 6.5
    assert len(drawn) == 120 and min(drawn.values()) > 30 and max(drawn.values()) < 90


def load_ids(root, seed):
    return load("flux-reason", source=root, limit=36, seed=seed).ids.values()


def test_train_and_holdout_are_disjoint_whatever_their_limits(flux):
    for seed in range(3):
        held = load("flux-reason", "holdout", flux, holdout=17, seed=seed)
        assert len(held) == 17
        rest = load("flux-reason", "train", flux, holdout=17, seed=seed)
        assert len(rest) == 103 and not set(ids(held)) & set(ids(rest))
        for max_files in (0, 2, 5):
            train = load("flux-reason", "train", flux, holdout=17, seed=seed, limit=30, max_files=max_files)
            assert len(train) == 30 and set(ids(train)) <= set(ids(rest))
        assert set(ids(load("flux-reason", "holdout", flux, holdout=17, limit=5, seed=seed))) <= set(ids(held))
    with pytest.raises(GranulonError, match="no hold-out by default"):
        load("flux-reason", "holdout", flux)
    with pytest.raises(GranulonError, match="has 120 rows, too few to hold out 120"):
        load("flux-reason", "holdout", flux, holdout=120)
    with pytest.raises(GranulonError, match="hold-out has 17 rows, not 20"):
        load("flux-reason", "holdout", flux, holdout=17, limit=20)
    with pytest.raises(GranulonError, match="no split 'test'; .* 'train', 'holdout'"):
        load("flux-reason", "test", flux)


def test_no_seed_of_training_sees_the_holdout(flux):
    held = ids(load("flux-reason", "holdout", flux, holdout=17))
    for seed in range(5):
        assert ids(load("flux-reason", "holdout", flux, holdout=17, seed=seed)) == held
        assert not set(ids(load("flux-reason", "train", flux, holdout=17, seed=seed, limit=40))) & set(held)
    other = load("flux-reason", "train", flux, holdout=17, holdout_seed=1)
    assert set(ids(other)) & set(held) and other.manifest["holdout_seed"] == 1


def frames(samples):
    return {(image["path"], image["bytes"]) for sample in samples for image in sample.images}


@pytest.mark.parametrize("form", ["lines", "lines of one video", "conversations", "two images", "embedded", "own", "group"])
def test_the_holdout_shares_no_image_with_training(tmp_path, form):
    name, columns, row = "surgvlm", None, {"question": "q", "answer": "a"}
    videos = 1 if form == "lines of one video" else 4
    if form.startswith("lines"):
        for i in range(24):
            folder = tmp_path / f"video{i % videos}"
            folder.mkdir(exist_ok=True)
            (folder / f"{i}.jpg").write_bytes(tables.jpeg(i))
            (folder / f"{i}_QA.txt").write_text("phase?|Preparation\ntool?|Hook\nmore?|no\n")
    elif form in ("conversations", "two images"):
        pairs = [[f"{i}.jpg"] if form == "conversations" else [f"{i}.jpg", f"{i + 24}.jpg"] for i in range(24)]
        rows = [
            {"id": f"{i}-{k}", "image": own[:: 1 - 2 * (k % 2)], "conversations": tables.turn("<image>" * len(own), "a")}
            for i, own in enumerate(pairs)
            for k in range(3)
        ]
        name, _ = "llava", tables.chat(tmp_path, rows, images=[f"{i}.jpg" for i in range(48)])
    else:
        if form != "embedded":
            columns = {"image": "image", "question": "question", "answer": "answer"}
            columns |= {"group": "patient"} if form == "group" else {}
        rows = [row | {"image": tables.jpeg(i), "patient": i % 6, "id": f"{i}-{k}"} for k in range(3) for i in range(24)]
        for k in range(3):  # the same images again in another file
            tables.write(tmp_path / f"{k}.parquet", rows[k * 24 : k * 24 + 24])
    name = name if columns is None else tmp_path
    options = {"source": tmp_path, "columns": columns, "holdout": 10}
    train, held = (load(name, split, **options) for split in ("train", "holdout"))
    assert len(held) == len(list(held)) == 10 and len(train) >= 36 and frames(train)
    assert not frames(train) & frames(held)
    if form == "lines":
        videos = [{Path(sample.meta["file"]).parts[0] for sample in samples} for samples in (train, held)]
        assert not videos[0] & videos[1]
    if form == "group":
        picture = {tables.jpeg(i): i % 6 for i in range(24)}
        patients = [{picture[data] for _, data in frames(samples)} for samples in (train, held)]
        assert not patients[0] & patients[1]
    again = load(name, "train", **options, seed=9, limit=20)
    assert len(again) == 20 and not frames(again) & frames(held)


def test_a_holdout_without_groups_enough(tmp_path):
    rows = [{"id": str(i), "image": "a.jpg", "conversations": tables.turn("<image>", "x")} for i in range(20)]
    with pytest.raises(GranulonError, match="20 rows, but too few that share no video or image with others, to hold out 5"):
        load("surgvlm", source=tables.chat(tmp_path, rows), holdout=5)


def test_the_holdout_of_the_set_is_kept_out_by_default(flux, monkeypatch):
    import dataclasses

    monkeypatch.setitem(ADAPTERS, "flux-reason", dataclasses.replace(ADAPTERS["flux-reason"], holdout=12))
    train, held = load("flux-reason", source=flux), load("flux-reason", "holdout", flux)
    assert len(train) == 108 and len(held) == 12 and not set(ids(train)) & set(ids(held))
    assert train.manifest["holdout"] == 12


def test_few_files_are_read(flux, monkeypatch):
    opened, read = Counter(), Counter()
    open_file, read_group = ParquetSource._open, pq.ParquetFile.read_row_group
    monkeypatch.setattr(ParquetSource, "_open", lambda self, part: opened.update([part]) or open_file(self, part))
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, *a, **k: read.update("r") or read_group(self, *a, **k))
    samples = load("flux-reason", source=flux, limit=4, max_files=4, holdout=0)
    assert not read and len(opened) <= 5  # and the first file, for its columns
    found = list(samples)
    assert len({sample.meta["file"] for sample in found} | set(opened)) <= 5 and sum(read.values()) <= 4
    order = file_order([f"a/{i}" for i in range(90)] + [f"b/{i}" for i in range(10)], seed=3)
    assert sorted(order) == sorted([f"a/{i}" for i in range(90)] + [f"b/{i}" for i in range(10)])
    assert all(1 <= sum(part.startswith("b") for part in order[i : i + 20]) <= 3 for i in range(0, 100, 20))


@pytest.mark.slow
def test_the_papers_subsets(flux, tmp_path):
    wanted = {
        "flux-reason": {"train": 200_000, "holdout": 1_000},
        "seed-bench": {"test": 1_000},
        "a-okvqa": {"validation": 1_000},
        "recap": {"train": 1_000},
        "surgvlm": {"train": 50_000, "holdout": 1_000},
    }
    assert {name: adapter.paper for name, adapter in ADAPTERS.items() if adapter.paper} == wanted
    rows = [{"id": str(i), "image": f"{i}.jpg", "conversations": tables.turn("<image>", "x")} for i in range(60_000)]
    root = tables.chat(tmp_path, rows)
    train = load("surgvlm", source=root, preset="paper")
    held = load("surgvlm", "holdout", root, preset="paper")
    names = [set(samples.ids["chat.json"]) for samples in (train, held)]
    assert (len(names[0]), len(names[1])) == (50_000, 1_000) and not names[0] & names[1]
    with pytest.warns(UserWarning, match="200000 rows were asked for, but .* only 120"):
        assert len(load("flux-reason", source=flux, preset="paper")) == 120
    with pytest.raises(GranulonError, match="no preset 'big'"):
        load("flux-reason", source=flux, preset="big")
    with pytest.raises(GranulonError, match="no subset of a-okvqa's split 'train', only of validation"):
        load("a-okvqa", "train", flux, preset="paper")


def test_a_manifest_gives_the_very_same_rows(tmp_path):
    root = tables.flux_folder(tmp_path / "flux", [("Text", 3)])
    samples = load("flux-reason", source=root, limit=9, holdout=4, seed=5)
    samples.save_manifest(tmp_path / "manifest.json")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == samples.manifest and manifest["seed"] == 5 and manifest["revision"] is None
    assert sum(len(entry["ids"]) for entry in manifest["files"].values()) == 9
    tables.write(root / "Text" / "later-00009-of-00010.parquet", [tables.flux_row(99)], tables.FLUX)  # others do not matter
    again = load(manifest=tmp_path / "manifest.json")
    assert list(again) == list(samples) and again.manifest == manifest and again.split == "train"
    moved = root.rename(tmp_path / "moved")
    with pytest.raises(GranulonError, match="no file or folder"):
        load(manifest=manifest)
    assert ids(load(manifest=manifest, source=moved)) == ids(samples)

    part = next(iter(manifest["files"]))
    rows = [row | {"id": f"new-{row['id']}"} for row in pq.read_table(moved / part).to_pylist()]
    tables.write(moved / part, rows, tables.FLUX)
    with pytest.raises(GranulonError, match=f"{Path(part).name}' .* has changed since the manifest was written: its content"):
        load(manifest=manifest, source=moved)
    manifest["files"][part]["fingerprint"] = None
    with pytest.raises(GranulonError, match="its rows have other ids"):
        load(manifest=manifest, source=moved)
    tables.write(moved / part, rows[:5], tables.FLUX)
    with pytest.raises(GranulonError, match="5 rows instead of 10"):
        load(manifest=manifest, source=moved)
    (moved / part).unlink()
    with pytest.raises(GranulonError, match="it is gone"):
        load(manifest=manifest, source=moved)
    with pytest.raises(GranulonError, match="says which rows"):
        load(manifest=manifest, limit=3)


def test_repeated_ids_are_made_unique_and_reported(tmp_path):
    names = ["a", "b", "a", "a#2", "a", None, None]
    rows = [tables.flux_row(i, id=name) for i, name in enumerate(names)]
    path = tables.write(tmp_path / "x.parquet", rows, tables.FLUX, row_group_size=2)
    samples = load("flux-reason", source=path)
    found = ids(samples)
    assert found[:2] == ["a", "b"] and len(set(found)) == 7
    assert [samples[i].id for i in range(7)] == found  # in whatever order they are asked for
    assert [problem.row for problem in samples.renamed] == [2, 4] and "'a'" in samples.renamed[0].reason
    assert not samples.problems


def test_splits_by_file_name(tmp_path):
    for name in (
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/validation-00000-of-00001.parquet",
    ):
        tables.write(tmp_path / name, [tables.okvqa_row(len(name))], tables.OKVQA)
    assert len(load("a-okvqa", source=tmp_path)) == 1 and len(load("a-okvqa", "train", tmp_path)) == 2
    tables.write(tmp_path / "x.parquet", [tables.seed_row(1)], tables.SEED)
    with pytest.raises(GranulonError, match="no split 'test'; it has 'train', 'validation'"):
        load("seed-bench", source=tmp_path)
    assert split_of("Text/fluxdb-text-00000-of-00143.parquet") is None and split_of("latest/contest.parquet") is None


def test_folders_of_lines_name_the_split(tmp_path):
    for i, split in enumerate(("train", "test")):
        folder = tmp_path / split / "video1"
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(tables.jpeg(i))
        (folder / "0_QA.txt").write_text(f"which?|{split}\n")
    for split in ("train", "test"):
        (sample,) = load("surgvlm", split, tmp_path)
        assert sample.reference == split and sample.images[0]["path"] == str(tmp_path / split / "video1" / "0.jpg")
    with pytest.raises(GranulonError, match="no split 'validation'; it has 'test', 'train'"):
        load("surgvlm", "validation", tmp_path)


def test_files_with_other_columns(tmp_path):
    talk = {"conversations": tables.turn("hi", "yo")}
    tables.write(tmp_path / "chat" / "a.parquet", [{"id": "a"} | talk])
    seen = {"id": "b", "image": tables.jpeg(), "conversations": tables.turn("<image>", "seen")}
    tables.write(tmp_path / "chat" / "b.parquet", [seen])
    assert [sample.reference for sample in load("llava", source=tmp_path / "chat")] == ["yo", "seen"]
    tables.write(tmp_path / "mixed" / "a.parquet", [seen])
    tables.write(tmp_path / "mixed" / "b.parquet", [{"image": tables.jpeg(1), "question": "q", "answer": "told"}])
    samples = load("surgvlm", source=tmp_path / "mixed")
    assert [sample.reference for sample in samples] == ["seen", "told"] and ids(samples) == ["b", "b-0"]
    assert samples[1].reference == "told" and not samples.problems
    assert samples.manifest["files"]["b.parquet"]["ids"] == [""]


def id_table(names):
    images = pa.array([{"bytes": tables.jpeg(i), "path": None} for i in range(4)], tables.IMAGE)
    return pa.table({"id": names, "image": images, "caption_detail": [f"t{i}" for i in range(4)]})


def test_ids_that_cannot_be_read(tmp_path):
    raw = pa.array([b"ab", b"\xff\xfe", b"cd", b"ef"], pa.binary())
    invalid = pa.StringArray.from_buffers(4, *raw.buffers()[1:])
    pq.write_table(id_table(invalid), tmp_path / "a.parquet")
    pq.write_table(id_table(["p", "q", "r", "s"]), tmp_path / "b.parquet", row_group_size=2, compression="none")
    samples = load("flux-reason", source=tmp_path)
    assert ids(samples) == ["ab", "cd", "ef", "p", "q", "r", "s"] and samples.ids["a.parquet"] == ["ab", "", "cd", "ef"]
    assert [(problem.file, problem.row) for problem in samples.problems] == [("a.parquet", 1)]
    with pytest.raises(GranulonError, match="a.parquet, row 1: the row cannot be read"):
        list(load("flux-reason", source=tmp_path, on_error="raise"))

    path = tmp_path / "b.parquet"
    chunk = pq.read_metadata(path).row_group(0).column(0)
    data, start = bytearray(path.read_bytes()), chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 20] = b"\xff" * 20
    path.write_bytes(data)
    samples = load("flux-reason", source=path)
    assert [sample.reference for sample in samples] == ["t2", "t3"]
    assert [problem.row for problem in samples.problems] == [0, 1]


def test_files_that_cannot_be_read_are_named(tmp_path):
    root = tables.flux_folder(tmp_path / "flux", [("Text", 4)])
    first, second, *_ = sorted((root / "Text").iterdir())
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:-200])
    samples = load("flux-reason", source=root, holdout=3)
    assert len(samples) == 17 and len(list(samples)) == 17
    assert {problem.file for problem in samples.problems} == {f"Text/{path.name}" for path in (first, second)}
    assert all(problem.row is None and "cannot be read as Parquet" in str(problem) for problem in samples.problems)
    assert not set(ids(samples)) & set(ids(load("flux-reason", "holdout", root, holdout=3)))
    assert load(manifest=samples.manifest).problems == samples.problems
    with pytest.raises(GranulonError, match=f"{first.name}' .* cannot be read as Parquet"):
        load("flux-reason", source=root, on_error="raise")
    for path in (root / "Text").iterdir():
        path.write_bytes(b"")
    with pytest.raises(GranulonError, match="Not one of 4 files can be read: .*cannot be read as Parquet"):
        load("flux-reason", source=root)


def test_an_empty_file_is_said(tmp_path):
    tables.write(tmp_path / "x.parquet", [], tables.FLUX)
    with pytest.raises(GranulonError, match="empty"):
        load("flux-reason", source=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.pop("source"), "the manifest lacks 'source'"),
        (lambda manifest: manifest.update(files=[1]), "'files' lacks"),
        (lambda manifest: manifest["files"].update(x={"rows": 3}), "'x' lacks 'fingerprint', 'take', 'ids'"),
        (lambda manifest: next(iter(manifest["files"].values())).update(take=[9999]), "takes rows of .* none of its 10"),
        (lambda manifest: next(iter(manifest["files"].values())).update(take=[-1]), "takes rows of .* none of its 10"),
        (lambda manifest: next(iter(manifest["files"].values())).update(take="some"), "takes rows of"),
    ],
)
def test_a_manifest_that_is_not_whole(flux, change, message):
    manifest = json.loads(json.dumps(load("flux-reason", source=flux, limit=9).manifest))
    change(manifest)
    with pytest.raises(GranulonError, match=message):
        load(manifest=manifest)


def test_lazy_pickled_and_as_a_dataset(flux, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    samples = load("flux-reason", source=flux, limit=6)
    copy = pickle.loads(pickle.dumps(samples))
    assert list(copy) == list(samples) and "rows=6" in repr(samples)
    dataset = samples.to_dataset()
    assert dataset["id"][:] == ids(samples) and dataset[0]["images"][0].size == (64, 48)
    assert json.loads(dataset[0]["meta"]) == samples[0].meta
    assert dataset[0]["messages"][1]["content"] == [{"type": "text", "text": samples[0].reference}]


def test_a_damaged_file_is_named(tmp_path):
    rows = [tables.flux_row(i) for i in range(8)]
    path = tables.write(tmp_path / "x.parquet", rows, tables.FLUX)
    data = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(1).data_page_offset
    data[start + 60 : start + 90] = bytes(30)
    path.write_bytes(data)
    samples = load("flux-reason", source=path)
    found = list(samples)  # no crash, whatever Parquet makes of it
    assert len(found) >= 4 and len(found) + len(samples.problems) == 8
    path.write_bytes(data[:-100])
    with pytest.raises(GranulonError, match=r"'x\.parquet' .* cannot be read as Parquet"):
        load("flux-reason", source=path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "flux"}, "no data set or prepared folder 'flux'; known are flux-reason"),
        ({}, "Say which data set"),
        ({"name": "surgvlm"}, "say where its files are"),
        ({"name": "llava", "source": "no/such/place"}, "no file or folder 'no/such/place'"),
        ({"name": "recap", "limit": 0}, "`limit` must be at least 1"),
        ({"name": "recap", "on_error": "ignore"}, "'skip' or 'raise'"),
        ({"name": "recap"}, "Cannot reach the data set 'gmongaras/.*give source="),
        ({"name": np.zeros(3)}, "Say which columns"),
        ({"manifest": "nowhere.json"}, "Cannot read the manifest"),
        ({"manifest": {"format": 9}}, "no manifest"),
    ],
)
def test_one_clear_sentence(arguments, message):
    with pytest.raises(GranulonError, match=message):
        load(**arguments)


def test_an_empty_folder(tmp_path):
    with pytest.raises(GranulonError, match="holds no Parquet, JSON"):
        load("llava", source=tmp_path)


def test_the_only_split_that_there_is(tmp_path):
    tables.write(tmp_path / "own" / "train.parquet", [tables.seed_row(1)], tables.SEED)
    assert load("seed-bench", source=tmp_path / "own").split == "train"
    path = tables.write(tmp_path / "test-00000-of-00001.parquet", [tables.okvqa_row(1)], tables.OKVQA)
    with pytest.raises(GranulonError, match="withheld; use 'validation'"):
        load("a-okvqa", source=path)


def test_workers_and_slices(flux):
    from torch.utils.data import DataLoader

    samples = load("flux-reason", source=flux, limit=12)
    batches = list(DataLoader(samples, batch_size=5, num_workers=2, collate_fn=list))
    assert [sample.id for batch in batches for sample in batch] == ids(samples)
    assert (
        ids(samples[3:7]) == ids(samples)[3:7]
        and len(samples[10:99]) == 2
        and len(samples[12:]) == 0
        and samples[-1].id == ids(samples)[-1]
    )


def dataset(answer="a"):
    import datasets

    return datasets.Dataset.from_dict({"image": [tables.jpeg()], "q": ["?"], "a": [answer]})


COLUMNS = {"image": "image", "question": "q", "answer": "a"}


def make_source(kind, path):
    """A source of one row, which names no split, or train and another one."""
    import datasets

    if kind == "table":
        return dataset()
    if kind == "stream":
        return dataset().to_iterable_dataset()
    if kind == "file":
        dataset().to_parquet(path / "x.parquet")
        return path / "x.parquet"
    if kind == "list":
        dataset().to_parquet(path / "x.parquet")
        return [path / "x.parquet"]
    splits = {"train": dataset("of train"), "val": dataset("of val"), "mini": dataset("of mini")}
    if kind == "dictionary":
        return splits
    if kind == "DatasetDict":
        return datasets.DatasetDict(splits)
    if kind == "saved":
        datasets.DatasetDict(splits).save_to_disk(path / "saved")
        return path / "saved"
    for name, table in splits.items():  # as `push_to_hub` names them
        table.to_parquet(path / "hub" / "data" / f"{name}-00000-of-00001.parquet")
    return path / "hub"


@pytest.mark.parametrize("kind", ["table", "stream", "file", "list"])
def test_what_a_source_without_splits_can_be_called(kind, tmp_path):
    source = make_source(kind, tmp_path)
    for split, name in (("train", "train"), ("validation", "validation"), ("val", "validation"), ("test", "test")):
        samples = load(source, split, columns=COLUMNS)
        assert len(list(samples)) == 1 and samples.split == name
    for split in ("trian", "", "mini", "TEST", "a/b"):
        with pytest.raises(GranulonError, match=r"'train', 'validation', 'test', 'holdout'"):
            load(source, split, columns=COLUMNS)


@pytest.mark.parametrize("kind", ["dictionary", "DatasetDict", "saved", "hub"])
def test_splits_that_are_named_are_the_choices(kind, tmp_path):
    source = make_source(kind, tmp_path)
    for split, answer in (("train", "of train"), ("val", "of val"), ("validation", "of val"), ("mini", "of mini")):
        assert [sample.reference for sample in load(source, split, columns=COLUMNS)] == [answer]
    for split in ("trian", "test", ""):
        with pytest.raises(GranulonError, match=f"no split {split!r}; it has .*'mini'"):
            load(source, split, columns=COLUMNS)


def test_a_holdout_that_is_a_split_of_its_own():
    import datasets

    source = datasets.DatasetDict(train=dataset("of train"), holdout=dataset("held out"))
    assert [sample.reference for sample in load(source, "holdout", columns=COLUMNS)] == ["held out"]


@pytest.mark.parametrize("split", ["mini", "test_heldout"])
def test_a_split_of_any_name_is_prepared_and_loaded(split, tmp_path):
    from granulon_hf.data import check, prepare

    prepare({split: dataset(), "train": dataset("b")}, tmp_path / "out", split=split, columns=COLUMNS)
    assert check(tmp_path / "out").samples == {split: 1}
    for asked in (None, split):
        assert load(tmp_path / "out", asked).split == split
    with pytest.raises(GranulonError, match=f"it has '{split}'"):
        load(tmp_path / "out", "train")


def test_an_empty_file_among_others_is_no_error(tmp_path):
    tables.chat(tmp_path, [{"conversations": tables.turn("hi", "yo")}], "b.json")
    (tmp_path / "a.json").write_text("[]")
    assert [sample.reference for sample in load("llava", source=tmp_path)] == ["yo"]


def test_an_empty_stream():
    import datasets

    with pytest.raises(GranulonError, match="empty"):
        load(datasets.IterableDataset.from_generator(lambda: iter([])), columns=COLUMNS)
