"""Every set's rows, as they are on the Hub and as they go wrong."""

import ast
import json
from importlib import import_module
from pkgutil import iter_modules

import datasets
import pyarrow as pa
import pytest

import granulon_hf.data.datasets as datasets_package
from granulon_hf.data import ADAPTERS, BadRow, load, prepare
from granulon_hf.data.datasets.surgvlm import TOPICS
from granulon_hf.data.granuscenes import GranuScenes
from granulon_hf.data.granuscenes.dataset import SceneSource
from granulon_hf.data.prepared.format import to_row
from granulon_hf.errors import GranulonError
from tests.data import tables


def reasons(samples):
    return {problem.row: problem.reason for problem in samples.problems}


def test_every_adapter_is_data_and_refuses_what_it_cannot_use():
    rows = {
        "flux-reason": tables.flux_row(0),
        "seed-bench": tables.seed_row(0),
        "a-okvqa": tables.okvqa_row(0),
        "recap": tables.recap_row(0),
        "surgvlm": {"image": b"x", "question": "Phase?", "answer": "Preparation"},
        "llava": {"id": "1", "image": "a.jpg", "conversations": tables.turn("<image>\nWhat?", "This.")},
    }
    rows |= {
        "pope": tables.pope_row(0),
        "hallusion-bench": tables.hallusion_row(0),
        "mmvp": tables.mmvp_row(1),
        "realworldqa": tables.realworldqa_row(0),
        "amber": {"id": 1, "image": b"x", "query": "Is it?", "type": "relation", "truth": "no"},
        "chair": {"id": "1", "image": b"x", "captions": ["A cat."], "objects": ["cat"], "words": {"cat": "cat"}},
    }
    rows["granuscenes"] = next(SceneSource(GranuScenes(scenes=1)).rows("", [0], ["image"]))[1]
    rows["prepared"] = to_row(ADAPTERS["llava"].to_sample(rows["llava"]))
    assert set(rows) == set(ADAPTERS)
    for name, row in rows.items():
        to_sample = ADAPTERS[name].to_sample
        before = repr(row)
        sample = to_sample(row)
        assert repr(row) == before  # pure
        assert sample.messages[-1] == {"role": "assistant", "content": [{"type": "text", "text": sample.reference}]}
        assert sum(part["type"] == "image" for turn in sample.messages for part in turn["content"]) == len(sample.images) == 1
        assert set(sample.images[0]) == {"bytes", "path"}
        missing = "images" if name == "prepared" else "image"
        with pytest.raises(BadRow):
            to_sample(row | {missing: [None] if name == "prepared" else None})


def test_every_module_with_an_adapter_is_registered():
    found = [import_module(f"{datasets_package.__name__}.{module.name}") for module in iter_modules(datasets_package.__path__)]
    adapters = [module.ADAPTER for module in found if hasattr(module, "ADAPTER")]
    assert len(adapters) == 12 and all(ADAPTERS[adapter.name] is adapter for adapter in adapters)


def test_flux(tmp_path):
    rows = [tables.flux_row(i) for i in range(12)] + [tables.flux_row(12, caption_detail=" "), tables.flux_row(13, id=None)]
    path = tables.write(tmp_path / "Text" / "fluxdb-text-00000-of-00143.parquet", rows, tables.FLUX)
    samples = load("flux-reason", source=path)
    found = list(samples)
    assert [sample.reference for sample in found] == [f"Detail {i}." for i in [*range(12), 13]]
    assert len({sample.question for sample in found}) > 2  # an instruction from a pool, ...
    assert [sample.question for sample in found] == [sample.question for sample in load("flux-reason", source=path)]
    assert found[0].task == "reasoning" and found[0].meta["score_image_clarity"] == 7
    assert found[0].meta["file"] == path.name and found[3].meta["row"] == 3
    assert reasons(samples) == {12: "the caption_detail is empty"}
    assert found[-1].id == "fluxdb-text-00000-of-00143-13"  # a row without a name is named by file and row


def test_seed_takes_no_video_and_answers_by_content(tmp_path):
    rows = [tables.seed_row(i) if i % 3 else tables.seed_video(i) for i in range(30)]
    rows += [tables.seed_row(30, answer="E"), tables.seed_row(31, image=[]), tables.seed_row(32, choice_b="")]
    tables.write(tmp_path / "data" / "test-00000-of-00001.parquet", rows, tables.SEED)
    samples = load("seed-bench", source=tmp_path)
    found = list(samples)
    assert samples.filtered == {"a video row": 10} and len(found) == 20 and len(samples) == 23
    assert found[0].question == (
        "How many towels are in picture 1?\nA. a of 1\nB. b of 1\nC. c of 1\nD. d of 1\n(Answer with the option content)"
    )
    assert found[0].reference == "b of 1" and found[0].choices[1] == "b of 1" and found[0].id == "100001"
    assert found[0].meta["category"] == "Instance Identity"
    assert reasons(samples) == {
        30: "the answer is 'E', not one of the letters A to D",
        31: "the image is missing",
        32: "the choice B is empty",
    }
    limited = load("seed-bench", source=tmp_path, limit=15)
    assert len(limited) == 15  # of images: no video is counted on
    assert not any("video" in problem.reason for problem in limited.problems)
    list(load("seed-bench", source=tmp_path, limit=2, on_error="raise", seed=1))  # video rows are no errors


def test_a_okvqa_parses_the_string_and_never_runs_it(tmp_path):
    evil = "__import__('pathlib').Path('owned').touch()"
    rows = [
        tables.okvqa_row(0),
        tables.okvqa_row(1, direct_answers=evil),
        tables.okvqa_row(2, correct_choice_idx=None, direct_answers=""),
        tables.okvqa_row(3, correct_choice_idx=4),
        tables.okvqa_row(4, question="¿Qué tiene en la boca? 口の中に何がある？", choices=["烟", "б", "c", "سيجارة"]),
        tables.okvqa_row(5, question=""),
        tables.okvqa_row(6, direct_answers="'just a string'"),
    ]
    tables.write(tmp_path / "data" / "validation-00000-of-00001.parquet", rows, tables.OKVQA)
    samples = load("a-okvqa", source=tmp_path)
    first, foreign = samples
    assert first.reference == "cigarette" and first.task == "vqa" and len(first.choices) == 4
    assert first.meta["direct_answers"] == ast.literal_eval(rows[0]["direct_answers"])
    assert foreign.reference == "سيجارة" and foreign.question == rows[4]["question"]
    assert set(reasons(samples)) == {1, 2, 3, 5, 6}
    assert "withheld" in reasons(samples)[2] and "use validation" in reasons(samples)[2]


def test_a_okvqa_choices(tmp_path):
    rows = [
        tables.okvqa_row(0, choices=str(["cat", "dog"]), correct_choice_idx=1.0),
        tables.okvqa_row(1, choices=["cat", None], correct_choice_idx=1.0),
        tables.okvqa_row(2, choices="cat", correct_choice_idx=0.0),
        tables.okvqa_row(3, choices=["cat", "dog"], correct_choice_idx=0.5),
        tables.okvqa_row(4, choices=["cat", "dog"], direct_answers="['x', None, '']", correct_choice_idx=0.0),
    ]
    to_sample = ADAPTERS["a-okvqa"].to_sample
    first = to_sample(rows[0])
    assert first.choices == ["cat", "dog"] and first.reference == "dog"
    assert to_sample(rows[4]).meta["direct_answers"] == ["x"]
    for row, message in zip(rows[1:4], ("the choice is empty", "choices is not a list: 'cat'", "idx is 0.5"), strict=True):
        with pytest.raises(BadRow, match=message):
            to_sample(row)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["a", "b"], "is a list, not text"),
        ([], "is a list"),
        ({"a": 1}, "is an object"),
        (b"\xff", "is bytes that are not UTF-8"),
    ],
)
def test_what_is_no_text_is_no_answer(value, message):
    to_sample = ADAPTERS["flux-reason"].to_sample
    with pytest.raises(BadRow, match=f"the caption_detail {message}"):
        to_sample(tables.flux_row(0, caption_detail=value))
    with pytest.raises(BadRow, match="the id"):
        to_sample(tables.flux_row(0, id=value))
    with pytest.raises(BadRow, match="the recaption"):
        ADAPTERS["recap"].to_sample(tables.recap_row(0, recaption=value))
    assert to_sample(tables.flux_row(0, caption_detail="é".encode(), id=b"name")).reference == "é"


def test_lone_surrogates_are_bad_rows(tmp_path):
    half = "yo \ud83d"
    for row in (tables.flux_row(0, caption_detail=half), tables.flux_row(0, id=half)):
        with pytest.raises(BadRow, match="lone surrogate"):
            ADAPTERS["flux-reason"].to_sample(row)
    good = {"id": "good", "conversations": tables.turn("hi", "yo")}
    records = [
        good,
        good | {"id": half},
        good | {"conversations": tables.turn("hi", half)},
        good | {"conversations": tables.turn(half, "yo")},
        good | {"conversations": [{"from": half}]},
        good | {"image": f"{half}.jpg", "conversations": tables.turn("<image>", "yo")},
    ]
    samples = load("llava", source=tables.chat(tmp_path / "chat", records))
    assert [sample.reference for sample in samples] == ["yo"] and set(reasons(samples)) == {1, 2, 3, 4, 5}
    samples.save_manifest(tmp_path / "manifest.json")
    assert len(load(manifest=tmp_path / "manifest.json")) == 6
    manifest = prepare("llava", tmp_path / "out", source=tmp_path / "chat")
    assert manifest["prepared"]["samples"] == 1 and len(manifest["prepared"]["problems"]) == 5
    rows = [tables.okvqa_row(0), tables.okvqa_row(1, rationales=[half])]  # what only `meta` holds
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    samples = load("a-okvqa", source=stream)
    assert len(list(samples)) == 1 and "lone surrogate" in samples.problems[0].reason


def test_a_okvqa_refuses_the_split_without_answers(tmp_path):
    with pytest.raises(GranulonError, match="withheld; use 'validation'"):
        load("a-okvqa", split="test", source=tmp_path)


@pytest.mark.parametrize("form", ["raw", "struct"])
def test_recap_takes_raw_bytes_and_structs_and_unswaps(tmp_path, form):
    rows = [tables.recap_row(1), tables.recap_row(2, "goldfish"), tables.recap_row(3, recaption=None)]
    rows += [tables.recap_row(4, recaption="", recaption_short=None), tables.recap_row(5, "goldfish", recaption="Long not.")]
    kind = pa.binary()
    if form == "struct":
        rows = [row | {"image": {"bytes": row["image"], "path": None}} for row in rows]
        kind = tables.IMAGE
    schema = pa.schema([("image", kind), ("class", pa.string()), ("id", pa.int64())])
    for name in ("recaption", "recaption_short"):
        schema = schema.append(pa.field(name, pa.string()))
    tables.write(tmp_path / "data" / "train-00000-of-08700.parquet", rows, schema)
    samples = load("recap", source=tmp_path)
    swapped, straight, without, other = samples
    assert swapped.reference == straight.reference.replace("2", "1") == "A long caption of picture 1 with many words."
    assert swapped.meta["caption_short"] == "Short 1." and swapped.meta["swapped"] and not straight.meta["swapped"]
    assert without.reference.startswith("A long") and straight.task == "caption" and straight.meta["category"] == "goldfish"
    assert other.reference == "Long not."
    assert reasons(samples) == {3: "the recaption is empty"}
    assert swapped.images[0]["bytes"] == tables.jpeg(1)


def test_llava(tmp_path):
    records = [
        {"id": "one", "image": "a.jpg", "conversations": tables.turn("What is it?\n<image>", "A cat.")},
        {"id": "two", "image": ["a.jpg", "b.jpg"], "conversations": tables.turn("<image>\nor <image>?", "The first.")},
        {"id": "none", "conversations": tables.turn("Hello?", "Hello.") + tables.turn("And?", "Nothing.")},
        {"id": "mismatch", "image": "a.jpg", "conversations": tables.turn("No marker", "x")},
        {"id": "lost", "image": "lost.jpg", "conversations": tables.turn("<image>", "x")},
        {"id": "empty", "image": "a.jpg", "conversations": tables.turn("<image>", "  ")},
        {"id": "open", "conversations": tables.turn("Hi", "Ho")[:1]},
        {"id": "late", "image": "a.jpg", "conversations": tables.turn("Hi", "Ho") + tables.turn("See <image> now", "Aha")},
        {"id": "null", "conversations": None},
        {"id": "answer", "image": "a.jpg", "conversations": tables.turn("Hi", "<image>")},
        {"id": "robot", "conversations": [{"from": "robot", "value": "x"}]},
        "no record",
    ]
    samples = load("llava", source=tables.chat(tmp_path, records))
    one, two, none, late = samples
    assert one.messages[0]["content"] == [{"type": "text", "text": "What is it?"}, {"type": "image"}]
    assert one.images == [{"bytes": None, "path": str(tmp_path / "images" / "a.jpg")}]  # not even opened
    assert [part["type"] for part in two.messages[0]["content"]] == ["image", "text", "image", "text"] and len(two.images) == 2
    assert none.images == [] and len(none.messages) == 4 and none.reference == "Nothing." and none.question == "And?"
    assert late.messages[2]["content"][1] == {"type": "image"} and late.reference == "Aha"
    found = reasons(samples)
    assert set(found) == {3, 4, 5, 6, 8, 9, 10, 11}
    assert found[3] == "there are 0 <image> markers for 1 images" and found[4] == "the image 'lost.jpg' is missing"
    assert found[5] == "the answer is empty"
    assert all(problem.file == "chat.json" for problem in samples.problems)


def test_llava_lines_with_one_that_is_cut_off(tmp_path):
    records = [{"id": str(i), "image": "a.jpg", "conversations": tables.turn("<image>", f"A{i}")} for i in range(3)]
    tables.chat(tmp_path, records, "chat.jsonl")
    path = tmp_path / "chat.jsonl"
    deep = '{"id": "deep", "conversations":' + "[" * 200_000
    path.write_text(path.read_text() + f'\n{{"id": "cut", "conv\n{deep}')
    samples = load("llava", source=path)
    assert [sample.reference for sample in samples] == ["A0", "A1", "A2"]
    assert samples.problems[0].row == 3 and "not JSON" in samples.problems[0].reason
    assert samples.problems[1].row == 4 and "nested too deeply" in samples.problems[1].reason
    path.rename(tmp_path / "chat.json")
    with pytest.raises(GranulonError, match="not JSON"):
        load("llava", source=tmp_path)


def test_medical_conversations_and_lines(tmp_path):
    records = [
        {"id": "v", "image": "a.jpg", "conversations": tables.turn("<image>\nWhich phase?", "Calot triangle dissection")}
    ]
    (sample,) = load("surgvlm", source=tables.chat(tmp_path / "chat", records))
    assert sample.task == "vqa" and sample.meta["category"] == "phase" and len(TOPICS["phase"]) == 7

    root = tmp_path / "lines"
    for video in ("1", "2"):
        (root / video / "vqa").mkdir(parents=True)
        (root / video / "frames").mkdir()
        (root / video / "frames" / "25.jpg").write_bytes(tables.jpeg(int(video)))
        (root / video / "vqa" / "25_QA.txt").write_text(
            f"which tools are used?|hook\nwhat is {video}?|yes\n\nno bar here\n|x\n"
        )
    (root / "2" / "vqa" / "26_QA.txt").write_text("is there a frame?|no\n")
    samples = load("surgvlm", source=root)
    found = list(samples)
    assert [sample.reference for sample in found] == ["hook", "yes"] * 2 and found[0].meta["category"] == "instrument"
    assert found[3].images[0]["path"] == str(root / "2" / "frames" / "25.jpg")  # not video 1's frame of the same name
    assert len({sample.id for sample in found}) == 4
    named = {(problem.file, problem.row): problem.reason for problem in samples.problems}
    assert set(named) == {("1/vqa/25_QA.txt", 3), ("1/vqa/25_QA.txt", 4), ("2/vqa/25_QA.txt", 3), ("2/vqa/25_QA.txt", 4)} | {
        ("2/vqa/26_QA.txt", 0)
    }
    assert named["2/vqa/26_QA.txt", 0] == "the image is missing" and "no |" in named["1/vqa/25_QA.txt", 3]


def own_table():
    return {
        "picture": [tables.jpeg(i) for i in range(4)] + [None],
        "q": ["Que voit-on ?", "b?", "c?", "", "e?"],
        "a": ["un chat", "B", "1", "x", "y"],
        "o": [[], ["no", "yes"], ["0", "1"], [], []],
    }


def test_your_own_columns(tmp_path):
    table = own_table()
    dataset = datasets.Dataset.from_dict(table).cast_column("picture", datasets.Image())
    columns = {"image": "picture", "question": "q", "answer": "a", "choices": "o"}
    samples = load(dataset, columns=columns)
    assert [sample.reference for sample in samples] == ["un chat", "yes", "1"]
    assert samples[0].images[0]["bytes"] == table["picture"][0]  # never decoded and encoded again
    assert samples[1].question.endswith("A. no\nB. yes\n(Answer with the option content)")
    assert reasons(samples) == {3: "the question is empty", 4: "the image is missing"}

    dataset.save_to_disk(str(tmp_path / "saved"))
    assert list(load(tmp_path / "saved", columns=columns)) == list(samples)
    datasets.DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(str(tmp_path / "both"))
    assert len(load(tmp_path / "both", split="test", columns=columns)) == 1
    with pytest.raises(GranulonError, match="no split 'validation'; it has 'train', 'test'"):
        load(tmp_path / "both", split="validation", columns=columns)
    dataset.to_parquet(str(tmp_path / "own.parquet"))
    assert [sample.reference for sample in load(tmp_path / "own.parquet", columns=columns)] == ["un chat", "yes", "1"]

    captions = load(dataset, columns={"image": "picture", "answer": "a"})
    assert captions[0].task == "caption" and captions[0].question


def own(columns=None, **cells):
    table = {"image": [tables.jpeg()], "q": ["?"]} | {name: [value] for name, value in cells.items()}
    named = {"image": "image", "question": "q", "answer": "a", "choices": "o"} if columns is None else columns
    samples = load(datasets.Dataset.from_dict(table), columns=named)
    found = list(samples)
    return found[0] if found else samples.problems[0].reason


def test_choices_by_content_letter_and_index():
    numbers = [1, 2, 3, 4]
    assert own(a=1, o=numbers).reference == "1" and own(a=4.0, o=numbers).reference == "4"  # content, never an index
    assert own(a="B", o=["C", "A"]).reference == "A" and own(a="B", o=["B", "x"]).reference == "B"
    assert "is 'index', not 'answer'" in own(a=1, o=["no", "yes"])
    index = {"image": "image", "question": "q", "index": "a", "choices": "o"}
    assert own(index, a=1, o=numbers).reference == "2" and own(index, a=1.0, o=["no", "yes"]).reference == "yes"
    assert own(index, a=None, o=numbers) == "the index is None, but there are 4 choices"
    assert own(index, a=4, o=numbers) == "the index is 4, but there are 4 choices"
    assert own(index, a=0.5, o=numbers) == "the index is 0.5, but there are 4 choices"
    named = {"image": "image", "question": "q", "answer": "correct_choice_idx", "choices": "o"}
    assert own(named, correct_choice_idx=1, o=numbers).reference == "2"
    assert own(a="dog", o="['cat', 'dog']").choices == ["cat", "dog"]
    assert own(a="dog", o="cat;dog") == "choices is not a list: 'cat;dog'"
    assert own(a="dog", o=["dog", None]) == "the choice is empty"
    many = own(a="ab", o=[f"c{i}" for i in range(30)])
    assert many.reference == "c27" and many.question.splitlines()[26:29] == ["Z. c25", "AA. c26", "AB. c27"]
    assert "none of the choices" in own(a="[", o=[f"c{i}" for i in range(30)])
    with pytest.raises(GranulonError, match="'choices' too"):
        own({"index": "a"}, a=1)


def test_labels_lists_and_decoded_pictures():
    features = datasets.Features(
        {"images": datasets.List(datasets.Image()), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    picture = tables.make_picture(0)
    dataset = datasets.Dataset.from_dict({"images": [[picture, picture], []], "label": [1, 0]}, features=features)
    two, none = load(dataset, columns={"image": "images", "answer": "label"})
    assert (two.reference, len(two.images), none.reference, none.images) == ("dog", 2, "cat", [])


def test_a_stream(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [tables.jpeg(i) for i in range(6)], "label": [0, 1, 0, 1, 0, 1]}
    stream = datasets.Dataset.from_dict(rows, features=features).to_iterable_dataset()
    columns = {"image": "image", "answer": "label"}
    samples = load(stream, columns=columns)
    assert [sample.reference for sample in samples] == ["cat", "dog"] * 3
    assert next(iter(samples)).images[0]["bytes"] == rows["image"][0] and "rows=unknown" in repr(samples)
    names = {split: [s.id for s in load(stream, split, columns=columns, holdout=2, limit=2)] for split in ("train", "holdout")}
    assert names == {"train": ["stream-2", "stream-3"], "holdout": ["stream-0", "stream-1"]}
    bare = datasets.IterableDataset.from_generator(
        lambda: iter([{"image": tables.jpeg(), "label": "x"}, {"image": None, "label": "y"}])
    )
    assert len(list(load(bare, columns=columns))) == 1
    with pytest.raises(GranulonError, match="no random access"):
        samples[0]
    with pytest.raises(GranulonError, match="no manifest"):
        _ = samples.manifest
    with pytest.raises(GranulonError, match="stream cannot be prepared"):
        prepare(stream, tmp_path / "out", columns=columns)
    table = [tables.seed_video(0), tables.seed_row(1)]
    videos = datasets.IterableDataset.from_generator(lambda: iter(table))
    assert [sample.reference for sample in load("seed-bench", source=videos)] == ["b of 1"]


def test_a_negative_label_is_no_answer():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [tables.jpeg(i) for i in range(3)], "label": [1, -1, None]}
    table = datasets.Dataset.from_dict(rows, features=features)
    for source in (table, table.to_iterable_dataset()):
        samples = load(source, columns={"image": "image", "answer": "label"})
        assert [sample.reference for sample in samples] == ["dog"] and set(reasons(samples)) == {1, 2}


def test_wrong_columns_are_named_before_any_work(tmp_path):
    path = tables.write(tmp_path / "x.parquet", [{"picture": tables.jpeg(), "caption": "c"}])
    with pytest.raises(GranulonError, match=r"lacks the columns 'id', 'image', 'caption_detail'; it has 'picture', 'caption'"):
        load("flux-reason", source=path)
    with pytest.raises(GranulonError, match="lacks the columns 'img'; it has 'picture', 'caption'"):
        load(path, columns={"image": "img", "answer": "caption"})
    with pytest.raises(GranulonError, match="'answer' is needed"):
        load(path, columns={"image": "picture"})
    with pytest.raises(GranulonError, match="not 'imgae'"):
        load(path, columns={"imgae": "picture", "answer": "caption"})
    (tmp_path / "chat.json").write_text(json.dumps([{"text": "x"}]))
    with pytest.raises(GranulonError, match="lacks the columns 'conversations'; it has 'text'"):
        load("llava", source=tmp_path / "chat.json")
