"""The demo's functions without a browser: answers as `generate` gives them, one sentence for bad input, stopping, queueing."""

import ast
import functools
import inspect
import itertools
import os
import pickle
import re
import runpy
import shutil
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

gradio = pytest.importorskip("gradio", reason="needs gradio")

from granulon_hf import overlay  # noqa: E402
from granulon_hf.demo import app as work  # noqa: E402
from tests.conftest import make_conversation, make_inputs, make_picture  # noqa: E402

QUESTION = "What is in the picture?"


@pytest.fixture
def talkative(build):
    """A toy variant that does not say the same token again and again."""

    def talkative(name="granulon-qwen2.5"):
        model, processor = build(name)
        model.generation_config.repetition_penalty = 5.0
        model.generation_config.suppress_tokens = processor.tokenizer.all_special_ids
        return model, processor

    return talkative


def last(steps):
    *_, final = steps
    return final


def test_the_answer_is_that_of_generate(talkative, picture):
    model, processor = talkative()
    inputs = make_inputs(processor, make_conversation(QUESTION, [picture]))
    view = overlay.model_view(processor.image_processor, picture, inputs["pixel_values"][0])
    for level in (None, *model.config.level_names):
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False, granularity=level)[
            0, inputs["input_ids"].shape[1] :
        ]
        output = model(**inputs, granularity=level)
        steps = list(work.Answerer(model, processor, 12).answer(picture, QUESTION, level))
        final = steps[-1]
        assert final.text == processor.decode(tokens, skip_special_tokens=True).strip() != ""
        assert final.tokens == len(tokens) == 12
        assert final.level == model.config.level_names[int(output.granularity)]
        np.testing.assert_allclose(list(final.probs.values()), output.granularity_probs[0].tolist(), atol=1e-5)
        assert (final.pixel_tokens, final.semantic_tokens) == (36, int(output.aggregation.keep.sum()))
        assert np.array_equal(np.asarray(final.overlay), np.asarray(overlay.draw_clusters(view, output.aggregation)))
        # It grows: what was shown is not taken back.
        texts = [step.text for step in steps]
        assert texts[0] == ""
        assert len(set(texts)) > 3
        assert all(after.startswith(before.rstrip()) for before, after in itertools.pairwise(texts))


@pytest.mark.parametrize("name", ["clip-llama3.2", "dinov3-qwen2.5"])
def test_a_model_without_levels(talkative, picture, name):
    model, processor = talkative(name)
    inputs = make_inputs(processor, make_conversation(QUESTION, [picture]))
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    final = last(work.Answerer(model, processor, 8).answer(picture, QUESTION))
    assert final.text == processor.decode(tokens, skip_special_tokens=True).strip()
    assert (final.level, final.probs, final.overlay, final.semantic_tokens) == (None, None, None, 0)
    slots = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert work.numbers(final, False).startswith(f"visual tokens: {slots}\nfirst token after ")
    assert work.bars(final) is None
    with pytest.raises(ValueError, match="Unknown level 'fine'; this model's levels are none"):
        next(work.Answerer(model, processor).answer(picture, QUESTION, "fine"))


@pytest.mark.parametrize("reducer", ["adata", "queries", "attention-merge", "random", "downsample"])
def test_the_compact_form(build, picture, reducer):
    model, processor = build("granulon-compact-qwen2.5", reducer=reducer)
    for level in (None, "coarse"):
        final = last(work.Answerer(model, processor, 4).answer(picture, QUESTION, level))
        output = model(**make_inputs(processor, make_conversation(QUESTION, [picture])), granularity=level)
        assert (final.pixel_tokens, final.semantic_tokens) == (0, int(output.aggregation.keep.sum()))
        assert final.level == level or (level is None and final.level in model.config.level_names)
        assert final.overlay.width > 300
        assert f"visual tokens: 0 pixel + {final.semantic_tokens} semantic" in work.numbers(final, level is not None)


def test_the_same_question_at_few_tokens(talkative, picture, tmp_path):
    model, processor = talkative()
    picture.save(tmp_path / "photo.png")
    before = model.config.to_dict(), dict(vars(processor))
    steps = ask_page(work.create_app(model, processor, "toy", compact=True), str(tmp_path / "photo.png"), QUESTION, 0)
    shown = [step for step in steps if isinstance(step[0], str)]
    assert [step[0] for step in shown] == [
        step[0] for step in ask_page(work.create_app(model, processor, "toy"), str(tmp_path / "photo.png"), QUESTION, 0)
    ]
    # Beside it, and below its own figures.
    small = work.at_compact(model, processor)
    inputs = make_inputs(small.processor, make_conversation(QUESTION, [picture]))
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == work.COMPACT
    tokens = small.model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    own, line = steps[-1][3].rsplit("\n", 1)
    assert own == shown[-1][3]
    text = re.escape(processor.decode(tokens, skip_special_tokens=True).strip())
    assert re.fullmatch(rf"at 32 visual tokens: {text} \(first token after \d+\.\d\d s\)", line)
    assert (model.config.to_dict(), dict(vars(processor))) == before
    assert small.model.model.vision_tower is model.model.vision_tower


@pytest.mark.parametrize("name", ["granulon-qwen2.5", "clip-qwen2.5"])
def test_the_tower_runs_once(talkative, picture, name):
    model, processor = talkative(name)
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *arguments: calls.append(1))
    last(work.Answerer(model, processor, 4).answer(picture, QUESTION))
    assert len(calls) == 1


def test_closing_stops_the_model(talkative, picture, monkeypatch):
    model, processor = talkative()
    seen = []

    def put(streamer, value, put=work.TimedStreamer.put):
        seen.append(value)
        time.sleep(0.02)
        put(streamer, value)

    monkeypatch.setattr(work.TimedStreamer, "put", put)
    answerer = work.Answerer(model, processor, 500)
    steps = answerer.answer(picture, QUESTION)
    while next(steps).tokens < 3:
        pass
    steps.close()
    assert not any(thread.name == work.WORKER for thread in threading.enumerate())
    assert 3 < len(seen) < 50  # the prompt is put as well
    assert not answerer.lock.locked()


def test_the_second_question_waits_for_the_first(talkative, picture):
    answerer = work.Answerer(*talkative(), 5)
    first, answers = answerer.answer(picture, QUESTION), []
    next(first)
    second = threading.Thread(target=lambda: answers.append(last(answerer.answer(picture, "Where?"))))
    second.start()
    second.join(1.0)
    assert second.is_alive() and not answers
    assert last(first).tokens == 5
    second.join(20)
    assert answers[0].tokens == 5


def test_a_failure_in_the_thread_reaches_the_caller(talkative, picture, monkeypatch):
    model, processor = talkative()
    answerer = work.Answerer(model, processor, 5)

    def forward(*arguments, **kwargs):
        raise MemoryError("the device\nis full")

    with monkeypatch.context() as patch:
        patch.setattr(model.lm_head, "forward", forward)
        with pytest.raises(RuntimeError, match="^MemoryError: the device is full$"):
            last(answerer.answer(picture, QUESTION))
    assert last(answerer.answer(picture, QUESTION)).tokens == 5, "the next question is answered"


def test_too_long_for_the_model(talkative, picture):
    model, processor = talkative()
    model.config.get_text_config().max_position_embeddings = 70
    with pytest.raises(ValueError, match=r"take \d+ of the model's 70 tokens"):
        next(work.Answerer(model, processor).answer(picture, QUESTION))


def test_timings():
    assert work.timings([], 1.0) == {"tokens": 0, "first_token": None, "rate": None}
    assert work.timings([1.5], 1.0) == {"tokens": 1, "first_token": 0.5, "rate": None}
    assert work.timings([1.5, 2.0, 2.5, 3.5], 1.0) == {"tokens": 4, "first_token": 0.5, "rate": 1.5}


def test_the_time_to_the_first_token_holds_the_tower_but_not_the_drawing(talkative, picture, monkeypatch):
    model, processor = talkative()
    model.model.vision_tower.register_forward_hook(lambda *arguments: time.sleep(0.5))
    monkeypatch.setattr(overlay, "draw_clusters", lambda *arguments: time.sleep(1.5))
    before = time.perf_counter()
    final = last(work.Answerer(model, processor, 3).answer(picture, QUESTION))
    assert 0.5 < final.first_token < time.perf_counter() - before - 1.5 + 0.01


def test_bars_and_numbers():
    probs = {"coarse": 0.2, "middle": 0.7, "fine": 0.1}
    progress = work.Progress("x", "fine", probs, 196, 20, None, 7, 0.987, 12.34)
    assert work.bars(progress) == {"coarse": 0.2, "middle": 0.7, "fine (used)": 0.1}
    assert work.numbers(progress, True).split("\n") == [
        "level: fine (forced; the question asks for middle)",
        "visual tokens: 196 pixel + 20 semantic",
        "first token after 0.99 s",
        "tokens of the answer: 7, 12.3 tokens/s after the first",
    ]
    waiting = work.Progress("", "middle", probs, 196, 10)
    assert work.numbers(waiting, False) == "level: middle (chosen by the question)\nvisual tokens: 196 pixel + 10 semantic"


# --- input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        (None, "Type a question first."),
        (" \n", "Type a question first."),
        ("x" * 501, "The question has 501 characters; at most 500 are taken."),
    ],
)
def test_questions_that_are_refused(question, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        work.read_question(question)


def test_a_question_is_trimmed():
    assert work.read_question("  Where? \n") == "Where?"
    assert len(work.read_question("x" * 500)) == 500


def test_pictures_that_are_refused(tmp_path, monkeypatch):
    def sentence(path):
        with pytest.raises(ValueError, match=r"^[^\n]+\.$") as error:
            work.read_picture(path)
        return str(error.value)

    good = tmp_path / "good.png"
    make_picture(0, (40, 30)).save(good)
    assert work.read_picture(str(good)).size == (40, 30)
    assert sentence(None) == sentence("") == "Give a picture first."
    (tmp_path / "text.png").write_text("<svg onload='alert(1)'/>")
    assert sentence(str(tmp_path / "text.png")).startswith("This picture cannot be used: it is damaged")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:150])
    assert sentence(str(tmp_path / "cut.png")).startswith("This picture cannot be used: ")
    Image.new("RGB", (1000, 4)).save(tmp_path / "thread.png")
    assert "too long and thin" in sentence(str(tmp_path / "thread.png"))
    # A header alone is enough to be refused: nothing is unpacked.
    Image.new("1", (8000, 8000)).save(tmp_path / "large.png")
    assert sentence(str(tmp_path / "large.png")) == "The picture has more than 50 million pixels; make it smaller first."
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    assert "50 million pixels" in sentence(str(tmp_path / "bomb.png"))
    monkeypatch.setattr(work, "MAX_BYTES", good.stat().st_size - 1)
    assert sentence(str(good)).startswith("The picture is larger than 0 MB")


def test_a_picture_is_made_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    make_picture(0, (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    assert work.read_picture(str(tmp_path / "turned.jpg")).size == (30, 40)


# --- page -------------------------------------------------------------------------------------------------------------


def handler(app):
    return next(function for function in app.fns.values() if function.api_name == "ask")


def test_the_handler(talkative, tmp_path):
    app = work.create_app(*talkative(), "toy")
    ask = handler(app)
    assert ask.concurrency_limit == 1
    path = str(tmp_path / "photo.png")
    make_picture(0).save(path)
    text, _, _, numbers = last(ask.fn(path, QUESTION, 1))
    assert text
    assert numbers.startswith("level: coarse (forced; the question asks for fine)")
    first = next(ask.fn(path, QUESTION, 0))
    assert max(first[1], key=first[1].get) == "fine (used)"
    assert first[2].value is not None
    for arguments, sentence in [
        ((None, QUESTION, 0), "Give a picture first."),
        ((path, "", 0), "Type a question first."),
        ((path, "<b>" * 200, 0), "The question has 600 characters; at most 500 are taken."),
    ]:
        with pytest.raises(gradio.Error) as error:
            next(ask.fn(*arguments))
        assert error.value.message == sentence


def test_what_went_wrong_is_no_markup(talkative, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("<img src=x onerror=alert(1)>")
        yield

    monkeypatch.setattr(work.Answerer, "answer", fail)
    make_picture(0).save(tmp_path / "photo.png")
    with pytest.raises(gradio.Error) as error:
        next(handler(work.create_app(*talkative(), "toy")).fn(str(tmp_path / "photo.png"), QUESTION, 0))
    assert error.value.message == "The model failed (RuntimeError: &lt;img src=x onerror=alert(1)&gt;)."


def test_examples_exist_and_fit(monkeypatch, tmp_path):
    here = work.examples()
    assert [Path(path).name for path, _ in here] == list(work.QUESTIONS)
    monkeypatch.setattr(work.granulon_hf, "__file__", str(tmp_path / "granulon_hf" / "__init__.py"))
    installed = work.examples()
    for path, question in here + installed:
        assert work.read_picture(path)
        assert work.read_question(question)
    assert {path for path, _ in here}.isdisjoint(path for path, _ in installed)


def test_the_file_alone_is_a_space(talkative, tmp_path, monkeypatch):
    """Copied elsewhere and run as a script, as a Space does."""
    model, processor = talkative()
    started = []
    monkeypatch.setattr("granulon_hf.loading.load_model", lambda *arguments: (model, processor, arguments[0]))
    monkeypatch.setattr(gradio.Blocks, "launch", lambda app, **kwargs: started.append((app, kwargs)))
    monkeypatch.setenv("GRANULON_MODEL", "org/granulon")
    shutil.copy(work.__file__, tmp_path / "app.py")
    runpy.run_path(str(tmp_path / "app.py"), run_name="__main__")
    [(app, kwargs)] = started
    assert any("org/granulon" in str(block.value) for block in app.blocks.values() if isinstance(block, gradio.HTML))
    assert (kwargs["server_name"], kwargs["share"], kwargs["ssr_mode"]) == (None, False, False)
    assert app.analytics_enabled is False
    assert app.delete_cache == (900, 3600)


@pytest.mark.parametrize("source", ["demo", "org/granulon"])
def test_only_the_demo_model_has_learned_the_compact_form(monkeypatch, source):
    made = []
    monkeypatch.setattr(work, "load_model", lambda source, device: ("model", "processor", source))
    monkeypatch.setattr(work, "create_app", lambda *arguments, compact: made.append(compact))
    monkeypatch.setattr(work, "launch", lambda *arguments: None)
    work.main(source)
    assert made == [source == "demo"]


def test_a_space_installs_the_backbones_that_it_lacks(monkeypatch, tmp_path):
    commands = []

    def folder():
        if not commands:
            raise work.MissingBackbones
        return tmp_path

    monkeypatch.setattr(work, "demo_folder", folder)
    monkeypatch.setattr(work.subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(work, "load_model", lambda source, device: (_ for _ in ()).throw(work.MissingBackbones(source)))
    monkeypatch.delenv("GRANULON_MODEL", raising=False)
    for place, expected in ((None, []), ("org/demo", [[sys.executable, "-m", *work.INSTALL_COMMAND.split()]])):
        monkeypatch.setenv("SPACE_ID", place) if place else monkeypatch.delenv("SPACE_ID", raising=False)
        with pytest.raises(work.MissingBackbones, match="demo"):
            work.main()
        assert commands == expected


class BorrowedGPU:
    """`spaces` on ZeroGPU hardware: a question is answered in another process; what goes there and comes back is pickled."""

    def __init__(self):
        self.decorated, self.calls = [], 0

    def GPU(self, task):
        assert inspect.isgeneratorfunction(task)  # or its answers would not stream
        self.decorated.append(task)

        @functools.wraps(task)
        def borrow(*arguments):
            self.calls += 1
            for value in task(*pickle.loads(pickle.dumps(arguments))):
                yield pickle.loads(pickle.dumps(value))

        return borrow


def ask_page(app, *arguments):
    """What the page's Ask button calls, step by step."""
    (function,) = [one.fn for one in app.fns.values() if one.api_name == "ask"]
    return list(function(*arguments))


def test_on_zerogpu_a_question_borrows_a_gpu(talkative, picture, monkeypatch, tmp_path):
    model, processor = talkative()
    picture.save(tmp_path / "photo.png")
    question = (str(tmp_path / "photo.png"), QUESTION, 0)
    monkeypatch.setattr(work, "spaces", None)
    expected = ask_page(work.create_app(model, processor, "toy"), *question)
    lent = BorrowedGPU()
    monkeypatch.setattr(work, "spaces", lent)
    app = work.create_app(model, processor, "toy")
    assert len(lent.decorated) == 1 and lent.calls == 0
    found = ask_page(app, *question)
    assert lent.calls == 1
    assert [step[0] for step in found] == [step[0] for step in expected] and len(found) > 3
    assert found[0][1] == pytest.approx(expected[0][1])
    first, same = (steps[0][2].constructor_args for steps in (found, expected))
    assert first["alt_text"] == same["alt_text"] and np.array_equal(np.asarray(first["value"]), np.asarray(same["value"]))
    # What a visitor did wrong comes back as the same sentence.
    with pytest.raises(gradio.Error, match="Type a question first"):
        ask_page(app, question[0], " ", 0)
    assert lent.calls == 2


@pytest.mark.parametrize("there", [True, False])
def test_the_package_spaces_is_taken_where_it_is(monkeypatch, there):
    monkeypatch.setitem(sys.modules, "spaces", BorrowedGPU() if there else None)
    names = runpy.run_path(work.__file__, run_name="app")
    assert names["spaces"] is sys.modules["spaces"]
    # ZeroGPU replaces parts of torch, which must not be there before.
    imports = [
        node for node in ast.walk(ast.parse(Path(work.__file__).read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    lines = {alias.name.split(".")[0]: node.lineno for node in imports for alias in node.names}
    assert lines["spaces"] < min(lines[name] for name in ("torch", "gradio", "granulon_hf"))


def test_a_space_installs_what_its_app_imports():
    lines = (Path(work.__file__).parent / "requirements.txt").read_text().splitlines()
    assert {re.split(r"[\[>=]", line)[0] for line in lines if not line.startswith("#")} == {"granulon-hf", "gradio", "spaces"}


def test_only_what_was_uploaded_is_opened(tmp_path, monkeypatch):
    """A client that does not say that its payload is a file gets past gradio's own check."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    mine, other, example = tmp_path / "uploads" / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    for path in (mine, other, example):
        make_picture(0).save(path)
    os.mkfifo(tmp_path / "uploads" / "pipe")
    (tmp_path / "uploads" / "link.png").symlink_to(other)
    shown = {example.resolve()}
    assert work.given_file(None, shown) is None
    for path in (mine, example):
        assert work.given_file(SimpleNamespace(path=str(path)), shown) == str(path.resolve())
    for name in ("b.png", "uploads/../b.png", "uploads/link.png", "uploads/pipe", "uploads", "uploads/none.png"):
        with pytest.raises(gradio.Error, match="not uploaded"):
            work.given_file(SimpleNamespace(path=str(tmp_path / name)), shown)
