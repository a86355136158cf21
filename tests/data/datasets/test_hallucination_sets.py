"""Benchmarks of hallucination: their real columns, what is made of them, and files that are not theirs."""

import csv
import json

import pytest

from granulon_hf.data import load
from granulon_hf.data.datasets.chair import read_words
from granulon_hf.data.mentions import named_objects
from granulon_hf.errors import GranulonError
from granulon_hf.evaluation.answer import cluster_keys
from granulon_hf.stats import clusters_of
from tests.data import tables


def reasons(samples):
    return {problem.row: problem.reason for problem in samples.problems}


def test_pope(tmp_path):
    rows = [tables.pope_row(i, category=("random", "popular")[i // 12]) for i in range(24)]
    rows += [tables.pope_row(24, answer="maybe"), tables.pope_row(25, question=" "), tables.pope_row(26, answer=" Yes ")]
    tables.write(tmp_path / "data" / "test-00000-of-00001.parquet", rows, tables.POPE)
    tables.write(tmp_path / "Full" / "popular-00000-of-00001.parquet", rows[:2], tables.POPE)  # the same again, by category
    samples = load("pope", source=tmp_path)
    found = list(samples)
    assert len(found) == 25 and set(reasons(samples)) == {24, 25}
    assert found[0].question == "Is there a thing 0 in the image?"
    assert [sample.reference for sample in found[:2]] == ["yes", "no"] and found[-1].reference == "yes"
    assert {sample.meta["category"] for sample in found} == {"random", "popular", "adversarial"}
    assert len(set(clusters_of(map(cluster_keys, found[:24])))) == 4  # six questions about each image


def test_pope_of_its_authors(tmp_path):
    lines = [
        {"question_id": i, "image": f"COCO_{i // 2}.jpg", "text": "Is there a dog in the image?", "label": ("yes", "no")[i % 2]}
        for i in range(4)
    ]
    for line in lines:
        (tmp_path / line["image"]).write_bytes(tables.jpeg())
    path = tmp_path / "coco_pope_random.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = list(load("pope", source=path))
    assert [sample.reference for sample in found] == ["yes", "no", "yes", "no"] and len({sample.id for sample in found}) == 4
    assert found[0].question == "Is there a dog in the image?" and "category" not in found[0].meta


def test_hallusion_bench(tmp_path):
    rows = [tables.hallusion_row(i) for i in range(8)] + [tables.hallusion_row(8, gt_answer="2")]
    rows.append(tables.hallusion_row(9, image=None))  # a figure that should be there
    without = [tables.hallusion_row(i, category="VS", figure_id="0", visual_input="0", image=None) for i in range(2)]
    tables.write(tmp_path / "data" / "image-00000-of-00001.parquet", rows, tables.HALLUSION)
    tables.write(tmp_path / "data" / "non_image-00000-of-00001.parquet", without, tables.HALLUSION)
    samples = load("hallusion-bench", source=tmp_path)
    found = list(samples)
    assert len(found) == 8 and set(reasons(samples)) == {8, 9}
    assert [sample.reference for sample in found[:2]] == ["no", "yes"] and found[0].id == "VD-illusion-0-0-0"
    assert len({sample.meta["figure"] for sample in found}) == 4 and len({sample.meta["set_question"] for sample in found}) == 4
    assert clusters_of(map(cluster_keys, found)) == [0] * 4 + [1] * 4  # by set: a question goes across its figures
    blind = list(load("hallusion-bench", source=tmp_path, split="non_image"))
    assert len(blind) == 2 and all(not sample.images and sample.meta["may_abstain"] for sample in blind)
    assert all("figure" not in sample.meta for sample in blind)


def test_hallusion_bench_of_its_authors(tmp_path):
    rows = [tables.hallusion_row(0), tables.hallusion_row(1, category="VS", figure_id="0", visual_input="0", filename=None)]
    del rows[0]["image"], rows[1]["image"]
    (tmp_path / "hallusion_bench/VD/illusion").mkdir(parents=True)
    (tmp_path / "hallusion_bench/VD/illusion/0.png").write_bytes(tables.jpeg())
    (tmp_path / "HallusionBench.json").write_text(json.dumps(rows))
    first, second = load("hallusion-bench", source=tmp_path / "HallusionBench.json")
    assert len(first.images) == 1 and second.images == [] and second.meta["may_abstain"]


@pytest.mark.parametrize("form", ["parquet", "lower", "csv"])
def test_mmvp(tmp_path, form):
    rows = [tables.mmvp_row(i) for i in (1, 2, 99, 100)] + [tables.mmvp_row(5, **{"Correct Answer": "(c)"})]
    if form == "lower":
        rows = [{"answer" if name == "Correct Answer" else name.lower(): value for name, value in row.items()} for row in rows]
    if form != "csv":
        tables.write(tmp_path / "data" / "train-00000-of-00001.parquet", rows)
    else:  # as the authors have it
        (tmp_path / "MMVP Images").mkdir()
        for row in rows:
            (tmp_path / "MMVP Images" / f"{row['Index']}.jpg").write_bytes(row.pop("image")["bytes"])
        with open(tmp_path / "Questions.csv", "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader(), writer.writerows(rows)
    samples = load("mmvp", source=tmp_path)
    found = list(samples)
    assert [sample.id for sample in found] == ["1", "2", "99", "100"] and list(reasons(samples)) == [4]
    # The pair 99 and 100 is put right.
    assert [sample.reference for sample in found] == ["Open", "Closed", "Closed", "Open"]
    assert found[0].choices == ["Open", "Closed"] and "A. Open\nB. Closed" in found[0].question
    assert [sample.meta["pair"] for sample in found] == ["1", "1", "50", "50"]
    assert clusters_of(map(cluster_keys, found)) == [0, 0, 1, 1]


def test_realworldqa(tmp_path):
    plain = "How many cars are there? Please answer directly with a single word or number."
    rows = [tables.realworldqa_row(i) for i in range(3)]
    rows += [tables.realworldqa_row(3, question=plain, answer="4"), tables.realworldqa_row(4, answer="D")]
    rows += [tables.realworldqa_row(5, question="A. Merkel is on the poster. Who is it?", answer="Merkel")]
    tables.write(tmp_path / "data" / "test-00000-of-00002.parquet", rows)
    samples = load("realworldqa", source=tmp_path)
    found = list(samples)
    assert [sample.reference for sample in found] == ["Left", "Straight", "Right", "4", "Merkel"]
    assert [sample.choices for sample in found[2:]] == [["Left", "Straight", "Right"], None, None]
    assert found[0].question.endswith("nothing else.") and list(reasons(samples)) == [4]


def amber(root):
    """A copy of the repository, with four queries about two images."""
    queries = [(1, 1, "Describe this image."), (2, 2, "Describe this image.")]
    queries += [(3, 1, "Is the sky sunny in this image?"), (4, 1, "Is there a dog in this image?")]
    queries += [(5, 2, "Is there direct contact between the cup and wall?")]
    truths = [
        {"id": 1, "type": "generative", "truth": ["sky", "road", "person", "person"], "hallu": ["dog", "cloud"]},
        {"id": 2, "type": "generative", "truth": ["cup"], "hallu": []},
        {"id": 3, "type": "discriminative-attribute-state", "truth": "yes"},
        {"id": 4, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 5, "type": "relation", "truth": "no"},
    ]
    relation = {
        "sky": [],
        "road": ["path", "street"],
        "person": ["man", "woman"],
        "dog": [],
        "cloud": [],
        "cup": ["mug", "tea-cup"],
    }
    files = {
        "query/query_all.json": [{"id": n, "image": f"AMBER_{image}.jpg", "query": query} for n, image, query in queries],
        "annotations.json": truths,
        "relation.json": relation | {"cat": [], "light": []},
    }
    for name, content in files.items():
        (root / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "data" / name).write_text(json.dumps(content))
    (root / "data" / "safe_words.txt").write_text("orange\nlight\n")
    (root / "image").mkdir()
    for i in (1, 2):
        (root / "image" / f"AMBER_{i}.jpg").write_bytes(tables.jpeg(i))
    return root


def test_amber(tmp_path):
    samples = load("amber", source=amber(tmp_path))
    found = list(samples)
    assert not samples.problems
    assert [sample.meta["category"] for sample in found] == ["generative"] * 2 + ["attribute", "existence", "relation"]
    assert [sample.task for sample in found] == ["caption"] * 2 + ["vqa"] * 3
    assert found[0].meta["objects"] == [["sky"], ["road", "path", "street"], ["person", "man", "woman"]]
    assert found[0].meta["unlikely"] == [["dog"], ["cloud"]] and found[0].meta["neutral"] == ["orange", "light"]
    assert found[0].reference == "sky, road, person" and found[2].reference == "yes"
    assert clusters_of(map(cluster_keys, found)) == [0, 1, 0, 0, 1]
    assert named_objects("Two tea-cups", found[0].meta["words"]) == ["tea-cup"]
    again = load(manifest=samples.manifest)
    assert [sample.id for sample in again] == [sample.id for sample in found]


@pytest.mark.parametrize("name", ["relation.json", "annotations.json", "query/query_all.json"])
@pytest.mark.parametrize("content", ["[[1]]", "[1]", '{"a": 1}', "[]"])
def test_amber_with_files_of_another_form(tmp_path, name, content):
    root = amber(tmp_path)
    if name == "relation.json" and content.startswith("{"):
        content = '{"road": 1}'
    next(root.rglob(name)).write_text(content)
    with pytest.raises(GranulonError):
        assert not list(load("amber", source=root))


def coco(root, synonyms=None):
    (root / "annotations").mkdir(parents=True)
    (root / "val2014").mkdir()
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg", "width": 64, "height": 48} for i in (7, 8)]
    for image in images:
        (root / "val2014" / image["file_name"]).write_bytes(tables.jpeg(image["id"]))
    captions = [
        {"image_id": 7, "id": 1, "caption": "Two puppies play on a sofa."},
        {"image_id": 7, "id": 2, "caption": "A man watches dogs."},
        {"image_id": 8, "id": 3, "caption": "A quiet street."},
    ]
    instances = [{"image_id": 7, "category_id": 18, "id": 1}, {"image_id": 8, "category_id": 3, "id": 2}]
    categories = [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 3, "name": "car", "supercategory": "vehicle"}]
    write = {"captions": {"images": images, "annotations": captions}}
    write["instances"] = {"images": images, "annotations": instances, "categories": categories}
    for name, content in write.items():
        (root / "annotations" / f"{name}_val2014.json").write_text(json.dumps(content))
    if synonyms:
        (root / "synonyms.txt").write_text(synonyms)
    return root


def test_chair(tmp_path):
    found = list(load("chair", source=coco(tmp_path)))
    assert [sample.id for sample in found] == ["7", "8"] and found[0].reference == "Two puppies play on a sofa."
    assert found[0].meta["objects"] == [["couch"], ["dog"], ["person"]] and found[1].meta["objects"] == [["car"]]


def test_synonyms_of_the_paper_take_the_place_of_ours(tmp_path):
    found = list(load("chair", source=coco(tmp_path, "dog, puppy\ncar, street\n")))
    assert found[0].meta["objects"] == [["dog"]] and named_objects("A sofa in a street", found[1].meta["words"]) == ["car"]


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("A man eats hot dogs beside two puppies and a teddy bear.", ["person", "hot dog", "dog", "teddy bear"]),
        ("The baby elephants with women at a dining table", ["elephant", "person", "dining table"]),
        ("A toilet seat, stop signs; knives, buses, geese, glasses", ["toilet", "stop sign", "knife", "bus", "bird"]),
        ("Children on benches; a wine glass and two wine glasses", ["person", "bench", "wine glass", "wine glass"]),
        ("The man's tie. People's bikes.", ["person", "tie", "person", "bicycle"]),
        ("A player slides into home plate with his bat", ["person", "baseball bat"]),
        ("A carpet, a category, a busy scene, dogma", []),
        ("", []),
    ],
)
def test_mentions(tmp_path, caption, named):
    assert named_objects(caption, read_words(tmp_path / "none")) == named


def test_coco_has_eighty_objects(tmp_path):
    assert len(set(read_words(tmp_path / "none").values()) - {""}) == 80


@pytest.mark.parametrize("name", ["pope", "hallusion-bench", "mmvp", "realworldqa"])
def test_wrong_columns_are_named(tmp_path, name):
    path = tables.write(tmp_path / "data" / "test-00000-of-00001.parquet", [{"q": "?", "picture": b"x"}])
    with pytest.raises(GranulonError) as caught:
        load(name, source=path)
    message = str(caught.value)
    assert f"is not {name}" in message and "'picture'" in message and "\n" not in message


def spoil_amber(root):
    (amber(root) / "data" / "annotations.json").unlink()


def wrong_amber(root):
    (amber(root) / "data" / "annotations.json").write_text('[{"identity": 1}]')


def cut_amber(root):
    (amber(root) / "data" / "query" / "query_all.json").write_text('[{"id": 1')


def fewer_amber(root):
    (amber(root) / "data" / "annotations.json").write_text("[]")


def no_coco(root):
    (root / "some.json").write_text("[]")


def half_coco(root):
    (coco(root) / "annotations" / "instances_val2014.json").write_text('{"info": {}}')


@pytest.mark.parametrize(
    ("name", "make", "word"),
    [
        ("amber", spoil_amber, "annotations.json"),
        ("amber", wrong_amber, "'id'"),
        ("amber", cut_amber, "not JSON"),
        ("amber", fewer_amber, "query 1"),
        ("chair", no_coco, "instances_"),
        ("chair", half_coco, "'annotations'"),
    ],
)
def test_files_that_are_not_of_the_set_are_named(tmp_path, name, make, word):
    make(tmp_path)
    with pytest.raises(GranulonError) as caught:
        load(name, source=tmp_path)
    assert word in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["amber", "chair"])
@pytest.mark.parametrize("source", [None, "nowhere"])
def test_sets_without_a_repository_say_what_they_take(name, source):
    with pytest.raises(GranulonError, match="--source"):
        load(name, source=source)


def test_tables_in_csv(tmp_path):
    (tmp_path / "a.jpg").write_bytes(tables.jpeg())
    (tmp_path / "t.csv").write_text('picture,q,a,patient\na.jpg,"What, here?",A cat,p1\na.jpg,And?,,p1\n', encoding="utf-8")
    columns = {"image": "picture", "question": "q", "answer": "a", "group": "patient"}
    samples = load(tmp_path / "t.csv", columns=columns)
    (sample,) = samples
    assert sample.question == "What, here?" and sample.meta["group"] == "p1" and reasons(samples) == {1: "the answer is empty"}
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GranulonError, match="CSV"):
        load(tmp_path / "t.csv", columns=columns)
