"""Answers, overlays, galleries and analyses of the compact form: every reducer, any number of tokens."""

import json

import pyarrow.parquet as pq
import pytest
import torch

from granulon_hf.data.datasets.shapes import Shapes
from granulon_hf.errors import GranulonError
from granulon_hf.evaluation import gallery
from granulon_hf.evaluation.alignment import Alignment, align_batch
from granulon_hf.evaluation.answer import (
    Generation,
    PredictionRun,
    answer_batch,
    look,
    prefill_shared_image,
    write_parquet,
)
from granulon_hf.evaluation.granularity import GranularityAnalysis, plan_sweep, report
from granulon_hf.loading import check_choice
from granulon_hf.modeling.images_granulon import open_rgb
from granulon_hf.modeling.reducers_granulon import REDUCERS
from granulon_hf.overlay import draw_clusters, model_view
from tests.conftest import build_tiny, make_conversation, make_inputs, make_picture, make_talkative

SAMPLES = list(Shapes(3))
COMPACT = "granulon-compact-qwen2.5"
PICTURES = [make_picture(1), make_picture(2, (64, 128))]
CONVERSATIONS = [
    make_conversation("What is it?", PICTURES[:1]),
    make_conversation("How many small red objects are in the top left corner?", PICTURES),
    make_conversation("Describe nothing."),
]


@pytest.fixture
def talker(build):
    """A toy model whose answers differ from sample to sample."""

    def make(name=COMPACT, **options):
        model, processor = build(name, **options)
        return make_talkative(model, processor)

    return make


def kept(model, processor, samples, **choice):
    """Filled semantic slots of each sample, asked one at a time."""
    counts = []
    for sample in samples:
        conversation = make_conversation(sample.question, [open_rgb(image) for image in sample.images])
        outputs = model(**make_inputs(processor, conversation), **choice)
        counts.append(int(outputs.aggregation.keep.sum()))
    return counts


@pytest.mark.parametrize("reducer", REDUCERS)
@torch.no_grad()
def test_answers_at_levels_and_numbers(talker, reducer):
    model, processor = talker(reducer=reducer)
    free = answer_batch(model, processor, SAMPLES, Generation(6))
    assert all(row["granularity"] in model.config.level_names for row in free)
    assert [row["visual_tokens"] for row in free] == kept(model, processor, SAMPLES)
    number = answer_batch(model, processor, SAMPLES, Generation(6, visual_tokens=9))
    assert {row["granularity"] for row in number} == {None}
    assert [row["visual_tokens"] for row in number] == kept(model, processor, SAMPLES, visual_tokens=9)
    # As many placeholders, and no more.
    spared = {before["prompt_tokens"] - after["prompt_tokens"] for before, after in zip(free, number, strict=True)}
    assert spared == {64 - 9}
    for sample, row in zip(SAMPLES, number, strict=True):
        inputs = make_inputs(processor, make_conversation(sample.question, [open_rgb(sample.images[0])]))
        tokens = model.generate(**inputs, visual_tokens=9, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert row["prediction"] == processor.decode(tokens, skip_special_tokens=True).strip()
    assert [answer_batch(model, processor, [s], Generation(6, visual_tokens=9))[0]["prediction"] for s in SAMPLES] == [
        row["prediction"] for row in number
    ]


@pytest.mark.parametrize(
    ("name", "choice", "pixels"),
    [
        (COMPACT, {}, 0),
        (COMPACT, {"visual_tokens": 5}, 0),
        (COMPACT, {"granularity": "coarse"}, 0),
        ("granulon-llama3.2", {}, 36),
        ("granulon-qwen2.5", {"visual_tokens": 3}, 36),
        ("clip-qwen2.5", {}, 36),
    ],
)
def test_what_the_language_model_sees(build, name, choice, pixels):
    model, processor = build(name)
    seen = look(model, processor, CONVERSATIONS, **choice)
    assert seen.pixel_tokens == 3 * pixels
    keep = [0, 0, 0] if seen.images is None else seen.images.aggregation.keep.sum(1).tolist()
    assert seen.semantic_tokens == sum(keep)
    if asked := choice.get("visual_tokens"):
        assert keep == [asked] * 3 and seen.levels == [None] * 3
    two, nothing = Shapes(8)[1], Shapes(8)[2]
    two.images, two.messages = two.images * 2, make_conversation(two.question, [None, None], "yes")
    nothing.images, nothing.messages = [], make_conversation(nothing.question, [], "yes")
    rows = answer_batch(model, processor, [SAMPLES[0], two, nothing], Generation(1, **choice))
    for row, count in zip(rows, (1, 2, 0), strict=True):
        semantic = row["visual_tokens"] - count * pixels
        assert (semantic > 0) == bool(count and model.config.granularity_levels)
        assert semantic == count * choice.get("visual_tokens", semantic / max(count, 1))


@pytest.mark.parametrize(("stream", "tokens"), [(None, (40, 56)), ("pixel", (36, 36)), ("semantic", (4, 20))])
def test_a_hidden_stream_is_not_seen(build, stream, tokens):
    model, processor = build("granulon-qwen2.5")
    for level, count in zip(("coarse", "fine"), tokens, strict=True):
        rows = answer_batch(model, processor, SAMPLES[:2], Generation(1, granularity=level, visual_stream=stream))
        assert [row["visual_tokens"] for row in rows] == [count] * 2


def test_the_compact_form_has_one_stream(build, tmp_path):
    model, processor = build(COMPACT)
    with pytest.raises(ValueError, match="visual_stream"):
        answer_batch(model, processor, SAMPLES[:1], Generation(1, visual_stream="pixel"))


def test_settings_are_those_of_before_where_nothing_new_is_asked():
    assert Generation(5).settings() == {"max_new_tokens": 5, "granularity": None, "visual_stream": None, "extra": {}}
    assert Generation(5, visual_tokens=9, price=0.0).settings().items() >= {"visual_tokens": 9, "price": 0.0}.items()


def test_rows_and_parquet(talker, tmp_path):
    model, processor = talker()
    for name, generation in (("free", Generation(3)), ("number", Generation(3, visual_tokens=7))):
        rows = PredictionRun(tmp_path / name, {}).run(model, processor, SAMPLES, generation)
        write_parquet(tmp_path / f"{name}.parquet", rows, model="m", data="d", generation=generation)
    tables = [pq.read_table(tmp_path / f"{name}.parquet") for name in ("free", "number")]
    assert tables[0].schema == tables[1].schema
    assert tables[1]["visual_tokens"].to_pylist() == [7] * 3 and set(tables[0]["visual_tokens"].to_pylist()) <= {16, 32, 36}
    assert [table["generation"][0].as_py()["visual_tokens"] for table in tables] == [None, 7]
    line = json.loads((tmp_path / "number" / "predictions.jsonl").read_text().splitlines()[0])
    assert (line["visual_tokens"], line["granularity"]) == (7, None)


def test_a_price_reaches_the_controller(build):
    model, processor = build(COMPACT, controller_prices=[0.0, 0.5])
    controller = model.model.controller
    with torch.no_grad():  # for nothing the finest level, for something the coarsest
        controller.fc2.weight.zero_()
        controller.fc2.bias.copy_(torch.tensor([0.0, 0, 9, 9, 0, 0]))
    for price, level in ((None, "fine"), (0.0, "fine"), (0.5, "coarse")):
        rows = answer_batch(model, processor, SAMPLES[:3], Generation(1, price=price))
        assert {row["granularity"] for row in rows} == {level}
    with pytest.raises(ValueError, match="price"):
        answer_batch(model, processor, SAMPLES[:3], Generation(1, price=0.25))


@pytest.mark.parametrize("choice", [{"visual_tokens": 0}, {"visual_tokens": 65}, {"visual_tokens": 4, "granularity": "fine"}])
def test_choices_that_the_model_does_not_have(build, choice):
    model, processor = build(COMPACT)
    with pytest.raises(ValueError, match="visual_tokens"):
        answer_batch(model, processor, SAMPLES[:1], Generation(1, **choice))


@pytest.mark.parametrize("choice", [{"visual_tokens": 4}, {"price": 0.1}])
def test_a_plain_model_takes_neither(choice):
    model, processor = build_tiny("clip-qwen2.5")
    with pytest.raises(ValueError, match=next(iter(choice))):
        answer_batch(model, processor, SAMPLES[:1], Generation(1, **choice))
    with pytest.raises(GranulonError, match=next(iter(choice))):
        check_choice(model.config, **choice)


@pytest.mark.parametrize("reducer", REDUCERS)
def test_overlays_of_every_reducer(build, reducer):
    """Also of tokens that no patch went into first of all, and of patches that went into none."""
    model, processor = build(COMPACT, reducer=reducer)
    for choice in ({}, {"visual_tokens": 1}, {"visual_tokens": 13}):
        seen = look(model, processor, CONVERSATIONS[1:2], **choice)
        for i, (picture, pixels) in enumerate(zip(PICTURES, seen.pixel_values, strict=True)):
            view = model_view(processor.image_processor, picture, pixels, 240)
            drawn = draw_clusters(view, seen.images.aggregation, i, title="a question", size=240)
            assert drawn.width > 100 and len(drawn.getcolors(1 << 24)) > 10


@pytest.mark.parametrize("reducer", ["adata", "queries", "attention-merge", "question-dpp", "downsample"])
def test_many_questions_about_one_image(build, reducer):
    model, processor = build(COMPACT, reducer=reducer)
    picture = make_picture(3)
    questions = [f"{word} " * (1 + n % 5) + "?" for n, word in enumerate("what where how red many".split())]
    plain = make_inputs(processor, [make_conversation(question, [picture]) for question in questions])
    shared = prefill_shared_image(model, processor, picture, questions)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    answers = model.generate(**shared, **options)[:, -6:]
    assert torch.equal(answers, model.generate(**plain, **options)[:, -6:])


@pytest.mark.parametrize("answer", ["prediction", "reference"])
def test_alignment(talker, answer):
    model, processor = talker()
    rows = {}
    for choice in ({}, {"visual_tokens": 2}, {"visual_tokens": 12}):
        what = Alignment(answer=answer, generation=Generation(4, **choice))
        assert what.settings().items() >= choice.items()
        rows[str(choice)] = align_batch(model, processor, SAMPLES[:3], what)
        one = align_batch(model, processor, SAMPLES[1:2], what)[0]
        assert one["cosine"] == pytest.approx(rows[str(choice)][1]["cosine"], abs=1e-4)
    assert len({str(found) for found in rows.values()}) == 3


def test_clusters_of_a_gallery_are_those_of_the_answers(talker, tmp_path):
    model, processor = talker()
    description = {"generation": Generation(3, visual_tokens=7).settings(), "model": {"source": "m"}}
    PredictionRun(tmp_path / "run", description).run(model, processor, SAMPLES[:2], Generation(3, visual_tokens=7))
    (run,) = gallery.read_runs([tmp_path / "run"])
    assert run.visual_tokens == 7
    cases = gallery.join([run])
    assert not any(answer.forced for case in cases for answer in case.answers)
    draw = gallery.cluster_drawer(model, processor, {}, run.visual_tokens)
    assert gallery.write_gallery(tmp_path / "page.html", cases, draw=draw, overlay_model="m") > 0
    assert [case.overlay_level for case in cases] == ["7 tokens"] * 2 and all(case.overlays[0] for case in cases)


@pytest.mark.parametrize(
    ("name", "reducer", "reference", "settings"),
    [
        (COMPACT, "adata", 64, [3, 8]),
        (COMPACT, "queries", 64, [3, 8]),
        (COMPACT, "downsample", 64, [3, 8]),
        ("granulon-qwen2.5", "pool", 0, [3, 8]),
        ("granulon-qwen2.5", "adata", 0, [3, 8, 90]),
    ],
)
def test_granularity_analysis(build, tmp_path, name, reducer, reference, settings):
    model, processor = build(name, reducer=reducer)
    analysis = GranularityAnalysis(model, processor, SAMPLES[:3], tmp_path / "answers", {}, Generation(2))
    found, cells = analysis.levels(), analysis.sweep([8, 3, 90])
    assert [cell["beta"] for cell in cells] == [reference, *settings]
    assert (
        {row["pixel_tokens"] for row in found} == {0 if "compact" in name else 36} == {cell["pixel_tokens"] for cell in cells}
    )
    expected = [kept(model, processor, SAMPLES[:1], visual_tokens=n)[0] for n in (3, 8)]
    assert [cell["semantic_tokens"] for cell in cells][1:3] == expected
    result = report(tmp_path, found, cells, [], "title", {})
    assert [row["beta"] for row in result["sweep"]] == [reference, *settings] and (tmp_path / "sweep.png").exists()
    if "compact" in name:
        with pytest.raises(GranulonError, match="alpha"):
            plan_sweep(model.config, [3], alpha=2)
        with pytest.raises(GranulonError, match="`k`"):
            plan_sweep(model.config, [3], [2])
