"""Answers do not depend on batches; a killed run goes on."""

import json
import threading
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import load_dataset

from granulon_hf.data.datasets.shapes import Shapes
from granulon_hf.evaluation.answer import (
    Generation,
    PredictionRun,
    answer_batch,
    prefill_shared_image,
    write_parquet,
)
from granulon_hf.evaluation.batching import batches_by_image, count_tokens, fit_tokens, make_batches
from granulon_hf.modeling.images_granulon import open_rgb
from tests.conftest import make_conversation, make_inputs, make_talkative

SAMPLES = [Shapes(14)[i] for i in range(14)]


@pytest.fixture
def talker(build):
    """A toy model whose answers differ from sample to sample."""

    def make(name="granulon-qwen2.5"):
        model, processor = build(name)
        return make_talkative(model, processor)

    return make


@pytest.mark.parametrize("name", ["granulon-qwen2.5", "clip-llama3.2"])
def test_answers_do_not_depend_on_the_batch_size(talker, tmp_path, name):
    model, processor = talker(name)
    runs = []
    for size in (1, 5, 8):
        rows = PredictionRun(tmp_path / str(size), {}).run(model, processor, SAMPLES, Generation(12, batch_size=size))
        runs.append([(row["id"], row["prediction"], row["granularity"], row["new_tokens"]) for row in rows])
    assert runs[0] == runs[1] == runs[2]
    assert [row[0] for row in runs[0]] == [sample.id for sample in SAMPLES]
    assert len({row[1] for row in runs[0]}) > 3


def shown(rows):
    return [(row["id"], row.get("error"), row["prediction"], row.get("granularity"), row.get("new_tokens")) for row in rows]


@pytest.fixture
def mixed():
    """Questions of many lengths, about one, two or no images, and several about one image; one image cannot be used."""
    samples = [replace(SAMPLES[i], id=f"long-{i}", messages=ask(SAMPLES[i].question * (1 + 5 * i), 1)) for i in range(5)]
    samples += [replace(SAMPLES[7], id=f"same-{i}", messages=ask(f"Is it {'very ' * i}red?", 1)) for i in range(6)]
    samples += [replace(SAMPLES[8], id="two", images=SAMPLES[8].images * 2, messages=ask("Are both round?", 2))]
    samples += [replace(SAMPLES[8], id="none", images=[], messages=ask("Why?", 0))]
    return [*samples, replace(SAMPLES[9], id="broken", images=[{"bytes": b"broken", "path": None}])]


def ask(question, images):
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": question}]}]


@pytest.mark.parametrize("name", ["granulon-qwen2.5", "granulon-compact-qwen2.5", "clip-llama3.2"])
def test_answers_do_not_depend_on_the_tokens_of_a_batch(talker, mixed, tmp_path, name):
    model, processor = talker(name)
    expected = PredictionRun(tmp_path / "one", {}).run(model, processor, mixed, Generation(6, batch_size=1))
    assert [row["id"] for row in expected] == [sample.id for sample in mixed]
    cells, generate = [], model.generate

    def count(**inputs):
        rows, length = inputs["attention_mask"].shape
        cells.append((rows, rows * (length + inputs["max_new_tokens"])))
        return generate(**inputs)

    model.generate = count
    made = []
    for budget in (1, 300, 1000, 10**6):
        cells.clear()
        # The words that make room for an answer are a few more.
        rows = PredictionRun(tmp_path / str(budget), {}).run(
            model, processor, mixed, Generation(6, max_tokens_per_batch=budget)
        )
        assert shown(rows) == shown(expected)
        assert all(size == 1 or tokens <= budget + 10 * size for size, tokens in cells)
        made.append(len(list(make_batches(model, processor, mixed, Generation(6, max_tokens_per_batch=budget)))))
    assert made[0] == len(mixed) and made == sorted(made, reverse=True) and len(set(made)) > 2
    cells.clear()
    PredictionRun(tmp_path / "both", {}).run(model, processor, mixed, Generation(6, batch_size=2, max_tokens_per_batch=10**6))
    assert max(size for size, _ in cells) == 2


def test_a_run_goes_on_with_other_batches(talker, mixed, tmp_path):
    model, processor = talker()
    few = Generation(6, max_tokens_per_batch=300)
    many = Generation(6, batch_size=3)
    assert few.settings() == many.settings() == Generation(6).settings()
    expected = PredictionRun(tmp_path / "whole", {}).run(model, processor, mixed, many)

    def stop(done):
        if done and len(run.rows()) > 4:
            raise KeyboardInterrupt

    run = PredictionRun(tmp_path / "cut", {"generation": few.settings()})
    with pytest.raises(KeyboardInterrupt):
        run.run(model, processor, mixed, few, on_progress=stop)
    assert 4 < len(run.rows()) < len(mixed)
    again = PredictionRun(tmp_path / "cut", {"generation": many.settings()})
    assert shown(again.run(model, processor, mixed, many)) == shown(expected)


def test_a_gpu_chooses_by_its_memory(talker, mixed, monkeypatch):
    model, processor = talker()
    mixed = mixed[:-1]
    assert [len(batch) for batch in make_batches(model, processor, SAMPLES, Generation())] == [8, 6]
    lengths = count_tokens(processor, mixed, 6, None)
    assert len(lengths) == len(mixed) and lengths[4] > lengths[0] > lengths[-1] > 6
    chosen = [fit_tokens(model, lengths, free) for free in (0, 2**22, 2**24, 2**34)]
    assert chosen == sorted(chosen) and chosen[0] == max(lengths) and chosen[3] > 100 * chosen[1]
    for free, most in ((0, 4), (2**34, 64)):
        monkeypatch.setattr("granulon_hf.evaluation.batching.free_memory", lambda device, free=free: free)
        batches = list(make_batches(model, processor, [mixed[0]] * 70, Generation(6)))
        assert sum(map(len, batches)) == 70 and 1 <= max(map(len, batches)) <= most
    assert len(batches) == 2
    assert list(make_batches(model, processor, [], Generation())) == []
    # The compact form shows as many tokens as are asked for.
    compact, processor = talker("granulon-compact-qwen2.5")
    whole, few = (count_tokens(processor, mixed, 6, number) for number in (None, 3))
    assert whole[0] - few[0] == compact.config.num_semantic_tokens - 3


def test_a_batch_that_does_not_fit_is_answered_in_parts(talker, mixed, tmp_path, monkeypatch):
    model, processor = talker()
    expected = PredictionRun(tmp_path / "one", {}).run(model, processor, mixed, Generation(6, batch_size=1))
    generate = model.generate

    def small(**inputs):
        if len(inputs["attention_mask"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", small)
    rows = PredictionRun(tmp_path / "parts", {}).run(model, processor, mixed, Generation(6))
    assert shown(rows) == shown(expected)
    monkeypatch.setattr(model, "generate", lambda **inputs: small(attention_mask=range(4)))
    with pytest.raises(torch.OutOfMemoryError):
        PredictionRun(tmp_path / "never", {}).run(model, processor, mixed, Generation(6))


def test_answers_are_those_of_generate(talker):
    model, processor = talker()
    sample = SAMPLES[2]
    (row,) = answer_batch(model, processor, [sample], Generation(10))
    content = [{"type": "image", "image": open_rgb(sample.images[0])}, {"type": "text", "text": sample.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    tokens = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert row["prediction"] == processor.decode(tokens, skip_special_tokens=True).strip()
    assert row["prompt_tokens"] == inputs["input_ids"].shape[1]
    outputs = model(**inputs)
    assert row["granularity"] == model.config.level_names[outputs.granularity[0]]
    assert list(row["granularity_probs"].values()) == pytest.approx(outputs.granularity_probs[0].tolist(), abs=1e-5)


@pytest.mark.parametrize("name", ["granulon-qwen2.5", "granulon-llama3.2"])
def test_many_questions_about_one_image_share_what_they_can(build, name):
    """The same logits and answers as in an ordinary batch, at different levels, with the tower run once."""
    model, processor = build(name)
    picture = open_rgb(SAMPLES[3].images[0])
    questions = [f"{word} " * (1 + n % 5) + "?" for n, word in enumerate("what where how red many circle left is".split())]
    conversations = [make_conversation(question, [picture]) for question in questions]
    plain = make_inputs(processor, conversations)
    expected = model(**plain)
    assert len(set(expected.granularity.tolist())) > 1
    calls = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    shared = prefill_shared_image(model, processor, picture, questions)
    assert calls == [1]
    options = {"max_new_tokens": 6, "do_sample": False}
    answers = model.generate(**shared, **options)[:, shared["input_ids"].shape[1] :]
    assert torch.equal(answers, model.generate(**plain, **options)[:, plain["input_ids"].shape[1] :])
    shared = prefill_shared_image(model, processor, picture, questions)
    first = model.generate(
        **shared, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    ).logits[0]
    torch.testing.assert_close(first, expected.logits[:, -1].float(), atol=1e-4, rtol=1e-4)


def test_samples_about_one_image_are_encoded_once(talker):
    """In a run too: rows are those of samples that are answered one by one, and the tower sees each shared image once."""
    model, processor = talker()
    words = "what where how red many circle left is".split()
    asked = [
        replace(
            SAMPLES[image],
            id=f"{image}-{n}",
            messages=[
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{words[n]} " * (1 + n) + "?"}]}
            ],
        )
        for n in range(5)
        for image in (3, 4)
    ]
    asked += [replace(SAMPLES[5], id="alone")]
    expected = [row for sample in asked for row in answer_batch(model, processor, [sample], Generation(4))]
    calls = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    found = {}
    for batch in batches_by_image(asked, 4):
        rows = answer_batch(model, processor, batch, Generation(4))
        found |= {sample.id: row for sample, row in zip(batch, rows, strict=True)}
    assert sorted(calls) == [1, 1, 3]  # two batches of four; the fifth of each image, and the one that is alone, are a third
    for sample, row in zip(asked, expected, strict=True):
        assert found[sample.id].pop("granularity_probs") == pytest.approx(row.pop("granularity_probs"), abs=1e-5)
        assert found[sample.id] == row
    assert len({row["prediction"] for row in expected}) > 3


def test_a_level_can_be_forced(talker):
    model, processor = talker()
    rows = answer_batch(model, processor, SAMPLES[:3], Generation(4, granularity="fine"))
    assert {row["granularity"] for row in rows} == {"fine"}
    with pytest.raises(ValueError, match="huge"):
        answer_batch(model, processor, SAMPLES[:3], Generation(4, granularity="huge"))


def test_a_killed_run_goes_on_where_it_was(talker, tmp_path, monkeypatch):
    model, processor = talker()
    whole = PredictionRun(tmp_path / "whole", {"m": 1}).run(model, processor, SAMPLES, Generation(6, batch_size=4))
    run = PredictionRun(tmp_path / "cut", {"m": 1})

    def die(done):
        if sum(1 for _ in run.rows()) >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(model, processor, SAMPLES, Generation(6, batch_size=4), on_progress=die)
    part = next((tmp_path / "cut").glob("part-*.jsonl"))
    part.write_text(part.read_text() + '{"id": "torn')
    asked = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **kw: asked.append(len(kw["input_ids"])) or generate(**kw))
    again = PredictionRun(tmp_path / "cut", {"m": 1}).run(model, processor, SAMPLES, Generation(6, batch_size=4))
    assert sum(asked) == 6
    drop = {"seconds"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in again] == [
        {k: v for k, v in row.items() if k not in drop} for row in whole
    ]
    assert not list((tmp_path / "cut").glob("part-*"))


def test_damaged_lines_are_answered_again(talker, tmp_path):
    model, processor = talker()
    whole = PredictionRun(tmp_path, {"m": 1}).run(model, processor, SAMPLES[:4], Generation(4))
    file = tmp_path / "predictions.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1], lines[2] = lines[1][:50] + b"\n", lines[2].replace(b"shapes", b"\xff\xfe")
    file.write_bytes(b"".join([*lines, b"[]\n", b"7\n"]))
    run = PredictionRun(tmp_path, {"m": 1})
    assert list(run.rows()) == [SAMPLES[0].id, SAMPLES[3].id]
    again = run.run(model, processor, SAMPLES[:4], Generation(4))
    assert [row["prediction"] for row in again] == [row["prediction"] for row in whole]
    assert len(file.read_bytes().splitlines()) == 4


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_description_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match="run.json' .* remove the folder"):
        PredictionRun(tmp_path, {})


class Together:
    """What PartialState is to two processes, for two threads."""

    num_processes = 2

    def __init__(self, index, barrier):
        self.process_index, self.wait_for_everyone = index, barrier.wait


class Slow(PredictionRun):
    """Without a model; the second process reads a part no sooner than the first waits for it, or has removed the part."""

    def rows(self):
        if threading.current_thread().name == "1":
            deadline = time.monotonic() + 20
            for part in self.folder.glob("part-*"):
                while not self.barrier.n_waiting and part.exists():
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
                part.read_bytes()
        return super().rows()

    def answer(self, model, processor, batch, generation):
        yield from ({"id": sample.id, "by": threading.current_thread().name} for sample in batch)


def test_no_process_reads_what_the_first_removes_and_all_have_work(tmp_path):
    barrier, found = threading.Barrier(2, timeout=20), {}

    def work(index):
        try:
            run = Slow(tmp_path, {})
            run.barrier = barrier
            found[index] = run.run(
                SimpleNamespace(device=torch.device("cpu")), None, SAMPLES, Generation(4), state=Together(index, barrier)
            )
        except BaseException as error:
            barrier.abort()
            found[index] = error

    # All that is missing would be the first one's, were it not shared anew.
    done = [{"id": sample.id, "by": "before"} for sample in SAMPLES[1::2]]
    (tmp_path / "part-001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in done))
    threads = [threading.Thread(target=work, args=(index,), name=str(index)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[0] == found[1] and [row["id"] for row in found[0]] == [sample.id for sample in SAMPLES]
    assert Counter(row["by"] for row in found[0]) == {"before": 7, "0": 4, "1": 3}


def test_another_run_in_the_same_folder_is_refused(talker, tmp_path):
    model, processor = talker()
    PredictionRun(tmp_path, {"model": "a"}).run(model, processor, SAMPLES[:2], Generation(2))
    with pytest.raises(ValueError, match="another"):
        PredictionRun(tmp_path, {"model": "b"})


def test_broken_images_cost_only_their_own_answer(talker, tmp_path):
    model, processor = talker()
    broken = Shapes(20)[17]
    broken.images = [{"bytes": b"broken", "path": None}]
    rows = PredictionRun(tmp_path, {}).run(model, processor, [*SAMPLES[:3], broken], Generation(4))
    assert rows[3]["prediction"] == "" and "unusable image" in rows[3]["error"]
    assert all("error" not in row for row in rows[:3])
    assert all((tmp_path / row["images"][0]).is_file() for row in rows)


def test_rows_hold_what_is_needed_later(talker, tmp_path):
    model, processor = talker()
    PredictionRun(tmp_path, {"a": 1}).run(model, processor, SAMPLES[:2], Generation(4))
    (row, _) = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert {"id", "question", "reference", "task", "choices", "meta", "images", "prediction", "granularity_probs"} <= row.keys()
    assert (tmp_path / row["images"][0]).read_bytes() == SAMPLES[0].images[0]["bytes"]


def test_parquet_holds_what_the_journal_holds(talker, tmp_path):
    """Read back with `datasets`: probabilities and generation as they were, a broken image, fields of any type, no levels."""
    samples = [*SAMPLES[:2], Shapes(20)[17]]
    samples[1].meta, samples[1].choices = {"level": 3, "année": None}, ["a", "b"]
    samples[2].images, samples[2].meta = [{"bytes": b"broken", "path": None}], {}
    generation = Generation(4, extra={"num_beams": 2})
    written = {}
    for name in ("clip-qwen2.5", "granulon-qwen2.5"):
        model, processor = talker(name)
        written[name] = PredictionRun(tmp_path / name, {}).run(model, processor, samples, generation)
        file = tmp_path / name / "predictions.parquet"
        write_parquet(file, written[name], model=name, data="shapes", generation=generation)
    files = [str(tmp_path / name / "predictions.parquet") for name in written]
    back = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(back) == 6 and not list(tmp_path.rglob("*.part"))
    for row, (name, old) in zip(back, [(name, row) for name, rows in written.items() for row in rows], strict=True):
        assert (row.pop("model"), row.pop("data")) == (name, "shapes")
        row["meta"], settings = json.loads(row["meta"]), row.pop("generation")
        settings = {key: value for key, value in settings.items() if value is not None or key in generation.settings()}
        assert {**settings, "extra": json.loads(settings["extra"])} == generation.settings()
        assert {key: value for key, value in row.items() if value is not None or key in old} == old
    assert sum(back[3]["granularity_probs"].values()) == pytest.approx(1, abs=1e-5) and back[5]["error"]


def test_tower_and_controller_run_once(build):
    """What is seen is encoded once for the level, the answer and the overlay."""
    model, processor = build()
    calls = {"tower": 0, "controller": 0}

    def count(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    model.model.vision_tower.register_forward_hook(count("tower"))
    model.model.controller.register_forward_hook(count("controller"))
    answer_batch(model, processor, SAMPLES[:2], Generation(max_new_tokens=3))
    assert calls == {"tower": 1, "controller": 1}
