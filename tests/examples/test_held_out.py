"""The held-out photographs: their list, where they come from, and how answers about them are judged."""

import hashlib
import importlib
import json
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from granulon_hf.errors import GranulonError

pytest.importorskip("timm")

FOLDER = Path(__file__).parents[2] / "examples/demo_model"
MODULES = ("held_out", "train", "scenes")


@pytest.fixture(scope="module")
def held_out():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("held_out")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def groups(held_out):
    return held_out.read_list()


@pytest.fixture(scope="module")
def vocabularies(held_out, groups):
    return held_out.make_vocabularies(groups)


def make_resources(files: dict[str, bytes], version: int = 3, packed: int = 1) -> bytes:
    """Write a Qt resource file; `packed` is the flag of its files: 0 for plain, 1 for zlib."""
    tree: dict = {}
    for path, content in files.items():
        *parents, name = path.split("/")
        folder = tree
        for parent in parents:
            folder = folder.setdefault(parent, {})
        folder[name] = content
    names, payload, nodes = bytearray(), bytearray(), []
    waiting = [("", tree)]
    for name, content in waiting:  # breadth first: the children of a folder lie together
        place = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        if isinstance(content, dict):
            nodes.append(struct.pack(">IHII", place, 2, len(content), len(waiting)))
            waiting += content.items()
        else:
            nodes.append(struct.pack(">IHII", place, packed, 0, len(payload)))
            stored = struct.pack(">I", len(content)) + zlib.compress(content) if packed else content
            payload += struct.pack(">I", len(stored)) + stored
    table = b"".join(node + bytes(8 if version > 1 else 0) for node in nodes)
    start = 24 if version > 2 else 20
    header = struct.pack(">4sIIII", b"qres", version, start, start + len(table) + len(names), start + len(table))
    return header + bytes(start - 20) + table + names + payload


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("packed", [0, 1])
def test_resource_files_are_read(held_out, version, packed):
    files = {"a/b/cat.webp": b"cat" * 100, "a/b/Übung.webp": b"", "a/c.txt": bytes(range(256)), "d": b"d"}
    assert held_out.read_resources(make_resources(files, version, packed)) == files


@pytest.mark.parametrize(
    "data", [b"PK\3\4" + bytes(40), make_resources({"a": b"a"}, version=4), make_resources({"a": b"a"}, packed=4)]
)
def test_other_files_are_refused(held_out, data):
    with pytest.raises(GranulonError):
        held_out.read_resources(data)


@pytest.fixture
def package(held_out, monkeypatch):
    """A Debian package with two pictures, and a stand-in for apt-get and dpkg; its list."""
    files = {"erase/resource/bee.webp": b"a bee", "lang/resource/cup.webp": b"a cup"}

    def run(command, cwd=None, check=False):
        if command[0] == "apt-get":
            (cwd / "pictures_1.deb").touch()
        else:
            share = command[-1] / "usr/share"
            (share / "doc/pictures").mkdir(parents=True)
            (share / "doc/pictures/copyright").write_text("free")
            (share / "game/rcc").mkdir(parents=True)
            for path, content in files.items():
                data = make_resources({held_out.INSIDE + path: content})
                (share / "game/rcc" / f"{path.split('/')[0]}.rcc").write_bytes(data)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(held_out.subprocess, "run", run)
    monkeypatch.setattr(held_out.shutil, "which", lambda tool: tool)
    return [{"path": path, "sha256": hashlib.sha256(content).hexdigest()} for path, content in files.items()]


def test_fetch_writes_the_listed_pictures_and_nothing_else(held_out, package, tmp_path):
    held_out.fetch(tmp_path / "new", "pictures", package)
    found = {str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert found == {"copyright", *(one["path"] for one in package)}
    assert (tmp_path / "new" / package[0]["path"]).read_bytes() == b"a bee"


@pytest.mark.parametrize(
    "change", [{"sha256": "0" * 64}, {"path": "erase/resource/other.webp"}, {"path": "none/resource/bee.webp"}]
)
def test_fetch_writes_nothing_where_a_picture_differs(held_out, package, tmp_path, change):
    package[0] |= change
    with pytest.raises(GranulonError, match=package[0]["path"]):
        held_out.fetch(tmp_path, "pictures", package)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["apt-get", "dpkg"])
def test_fetch_needs_debian(held_out, package, tmp_path, monkeypatch, missing):
    monkeypatch.setattr(held_out.shutil, "which", lambda tool: None if tool == missing else tool)
    with pytest.raises(GranulonError, match=missing):
        held_out.fetch(tmp_path / "new", "pictures", package)
    assert not (tmp_path / "new").exists()


def test_each_name_is_as_often_absent_as_present(groups):
    for pictures in groups.values():
        there = Counter(name for picture in pictures for name in picture["there"])
        assert there == Counter(name for picture in pictures for name in picture["absent"])


def test_no_question_is_asked_twice_with_two_answers(held_out, groups):
    for picture in (picture for pictures in groups.values() for picture in pictures):
        said = {held_out.normalize(name) for name in [*picture["names"], *picture.get("beside", []), picture["kind"]]}
        absent = {held_out.normalize(name.split(" ", 1)[-1]) for name in picture["absent"]}
        assert len(picture["there"]) == len(picture["absent"]) == len(set(picture["absent"])) == 2
        assert not absent & said and not set(picture["there"]) & set(picture["absent"]), picture["path"]


def test_the_list_is_whole(held_out, groups):
    pictures = [picture for group in groups.values() for picture in group]
    assert len(groups["held_out"]) >= 60 and [Path(one["path"]).stem for one in groups["shipped"]] == [
        "chelsea",
        "coffee",
        "rocket",
    ]
    for key in ("path", "sha256"):
        assert len({picture[key] for picture in pictures}) == len(pictures)
    for picture in pictures:
        assert picture["license"] and picture["names"] and picture["kind"]
        assert set(picture.get("color", [])) <= set(held_out.COLORS)
        assert set(picture.get("place", [])) <= set(held_out.PLACES)
    for picture in groups["shipped"]:
        assert hashlib.sha256(held_out.find_picture(picture, Path()).read_bytes()).hexdigest() == picture["sha256"]


@pytest.mark.parametrize(
    ("form", "accept", "answer", "right"),
    [
        ("open", ["cat", "kitten"], "A cat.", True),
        ("open", ["cat", "kitten"], "The picture shows two Kittens", True),
        ("open", ["cat"], "A cat and a goat.", False),
        ("open", ["cat"], "A cat on a cushion.", True),  # which is listed as beside it
        ("open", ["cat"], "A cushion.", False),
        ("open", ["cat"], "A category of things.", False),
        ("open", ["cat"], "An animal.", False),
        ("open", ["cat"], "An animal, a cat.", True),
        ("open", ["cat"], "", False),
        ("open", ["bird", "parrot"], "Birds.", True),
        ("open", ["butterfly"], "Butterflies", True),
        ("open", ["brush"], "Brushes", True),
        ("open", ["bear", "polar bear"], "A polar bear.", True),
        ("open", ["cup"], "A cup of coffee.", False),  # the longest name counts
        ("open", ["cup", "coffee cup"], "A cup.", True),
        ("yes/no", ["yes"], "Yes, there is one.", True),
        ("yes/no", ["yes"], "No.", False),
        ("yes/no", ["no"], "There is no cat.", True),
        ("yes/no", ["no"], "I know.", False),
        ("color", ["black", "white"], "Black and white.", True),
        ("color", ["black", "white"], "Black and red.", False),
        ("color", ["gray", "grey"], "It is grey", True),
        ("place", ["left", "top left"], "At the top left.", True),
        ("place", ["left"], "At the top left.", False),
        ("place", ["middle"], "In the middle.", True),
    ],
)
def test_answers_are_judged(held_out, vocabularies, form, accept, answer, right):
    row = {"form": form, "accept": accept, "kind": "animal", "beside": ["cushion"], "arm": "model", "answer": answer}
    assert held_out.is_right(row, {**vocabularies, "open": vocabularies["open"] | {"cushion"}}) is right


def test_kinds_and_further_things_are_accepted_apart(held_out, vocabularies):
    row = {"form": "open", "accept": ["cat"], "kind": "animal", "beside": [], "arm": "model", "answer": "An animal."}
    assert held_out.is_right(row, vocabularies, kind=True) and not held_out.is_right(row, vocabularies)
    row["answer"] = "A cat and a goat."
    assert held_out.is_right(row, vocabularies, anywhere=True) and not held_out.is_right(row, vocabularies, kind=True)


def test_the_tower_is_right_by_any_name_of_its_class(held_out, vocabularies):
    row = {
        "form": "open",
        "accept": ["cup"],
        "kind": "dish",
        "beside": [],
        "arm": "tower at 224",
        "answer": "cup of coffee, cup",
    }
    assert held_out.is_right(row, vocabularies)
    assert not held_out.is_right(row | {"answer": "cup of coffee, espresso"}, vocabularies)


def cells(table: str) -> dict[str, dict[str, str]]:
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


def test_the_report_counts_right_answers(held_out, vocabularies):
    rows = []
    for path, name, said in (("a", "cat", "A cat."), ("b", "cat", "A dog."), ("c", "fish", "A fish."), ("d", "owl", "An owl.")):
        row = {"path": path, "form": "open", "accept": [name], "kind": "animal", "beside": []}
        answers = {"model": said, "blind": "An owl.", "tower at 448": name, "tower at 224": "dog"}
        rows += [row | {"arm": arm, "answer": answer} for arm, answer in answers.items()]
    found = cells(held_out.report(rows, vocabularies))["open"]
    shares = {arm: int(cell.split(" %")[0]) for arm, cell in found.items() if "%" in cell}
    assert found["n"] == "4"
    assert shares == {
        "model": 75,
        "blind": 25,
        "model − blind": 50,
        "always the same": 50,
        "tower at 448": 100,
        "tower at 224": 0,
    }


def test_the_name_that_is_on_most_in_the_projector(held_out, build, picture):
    model, processor = build()
    layer, names = model.model.multi_modal_projector.linear_1, held_out.unit_names(10_000)
    assert len(set(names)) == len(names) and names[:2] == ["dog", "bird"]
    features = model.model.reusable_features(processor.image_processor([picture], return_tensors="pt")["pixel_values"])[0]
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        layer.bias[[3, 7]] = torch.tensor([1.0, 0.5])  # one is a little on everywhere, the other a lot in one place
        layer.weight[7] = 100 * len(features) * features[0] / features[0].norm()
    model.model.multi_modal_projector.act = torch.nn.ReLU()
    assert held_out.name_units(model, processor, [picture, picture]) == [names[7]] * 2
    with torch.no_grad():
        layer.weight.zero_()
    assert held_out.name_units(model, processor, [picture]) == [names[3]]


SCORE = ["score", "--model", "tiny:granulon-qwen2.5", "--device", "cpu"]


@pytest.mark.parametrize("options", [[], ["--budget", "3"]])
def test_all_questions_are_answered_and_kept(held_out, tmp_path, monkeypatch, capsys, options):
    pictures, out = [], tmp_path / "new/answers.jsonl"
    for name, other in (("cat", "dog"), ("dog", "cat")):
        Image.fromarray(np.random.default_rng(len(pictures)).integers(0, 255, (40, 60, 3), np.uint8)).save(
            tmp_path / f"{name}.png"
        )
        pictures.append(
            {"path": f"{name}.png", "names": [name], "kind": "animal", "there": [name], "absent": [other], "color": ["red"]}
        )
    monkeypatch.setattr(held_out, "read_list", lambda: {"held_out": pictures})
    monkeypatch.setattr(held_out, "LONGEST", 2)
    monkeypatch.setattr(held_out, "classify", lambda images, side, names: ["cat"] * len(images))
    held_out.main([*SCORE, "--pictures", str(tmp_path), "--out", str(out), "--batch_size", "3", *options])
    rows, printed = [json.loads(line) for line in out.read_text().splitlines()], capsys.readouterr().out
    assert Counter(row["arm"] for row in rows) == {"model": 8, "blind": 8, "tower at 448": 2, "tower at 224": 2}
    blind = {(row["question"], row["answer"]) for row in rows if row["arm"] == "blind"}
    assert len(blind) == len({question for question, _ in blind}) == 5
    if options:
        assert {row["visual_tokens"] for row in rows if row["arm"] == "model"} == {36 + 3}
    assert cells(printed.split("\n\n")[1].strip())["open"]["tower at 448"].startswith("50 %")
    held_out.main(["report", str(out)])
    assert capsys.readouterr().out == printed


def test_a_budget_that_the_model_lacks_is_refused(held_out, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "read_list", lambda: {"held_out": []})
    with pytest.raises(GranulonError, match="--budget"):
        held_out.main([*SCORE, "--pictures", str(tmp_path), "--out", str(tmp_path / "out"), "--budget", "1000"])


def test_copies_are_found_and_others_are_not(held_out, tmp_path):
    rng, names = np.random.default_rng(0), "abcdef"
    pictures = {
        name: Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)
        for name in names
    }
    copy = Image.new("RGB", (500, 400), "white")
    copy.paste(held_out.mirror(pictures["c"]).resize((200, 140)), (100, 200))
    copy.save(tmp_path / "copy.jpg")
    pictures["a"].point(lambda value: value // 2).save(tmp_path / "dark.png")
    Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8)).save(tmp_path / "other.png")
    count, pairs = held_out.find_leaks(pictures, sorted(tmp_path.iterdir()))
    assert count == 3 and {(name, path.name) for _, name, path in pairs} == {("c", "copy.jpg"), ("a", "dark.png")}
    assert len(held_out.find_leaks(pictures, [tmp_path / "other.png"])[1]) == 1  # the nearest
