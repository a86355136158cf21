"""Layer-wise alignment: against NumPy on sequences put together by hand, batches of any size, and a run that was killed."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from granulon_hf.data.datasets.shapes import Shapes
from granulon_hf.data.sample import Sample
from granulon_hf.evaluation import alignment
from granulon_hf.evaluation.alignment import Alignment, AlignmentRun, align_batch, curve, mean_states, report
from granulon_hf.evaluation.answer import Generation
from granulon_hf.modeling.images_granulon import open_rgb

NAMES = ["granulon-qwen2.5", "granulon-llama3.2", "clip-qwen2.5"]


def settings(batch_size=2, **kwargs):
    return Alignment(**{"answer": "reference", **kwargs}, generation=Generation(4, batch_size=batch_size))


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def states_of(model, **inputs):
    with torch.no_grad():
        found = model.model(**inputs, output_hidden_states=True)
    return [layer[0].double().numpy() for layer in found.hidden_states[1:]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", ["all", "content"])
def test_against_numpy_on_sequences_without_padding_and_empty_slots(build, name, tokens):
    """By hand: tokens found by their text, empty slots taken out of the sequence before the decoder sees it."""
    model, processor = build(name)
    sample, tokenizer = Shapes(1)[0], processor.tokenizer
    (row,) = align_batch(model, processor, [sample], settings(tokens=tokens))

    content = [{"type": "image", "image": open_rgb(sample.images[0])}, {"type": "text", "text": sample.question}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": sample.reference}]}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}, answer], tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids, question = inputs["input_ids"][0], inputs["question_mask"][0].bool()
    image = ids == processor.image_token_id
    slots = model.get_image_features(inputs["pixel_values"])
    filled = torch.ones_like(image)
    if model.config.granularity_levels:
        level = model.model(**inputs).granularity
        slots = model.get_image_features(inputs["pixel_values"], granularity=level)
        filled[image] = slots.slot_mask[0].bool()
        assert not filled.all()  # else the test would say nothing about empty slots
    embeds = model.get_input_embeddings()(ids).masked_scatter(image[:, None], slots.pooler_output[0])
    with torch.no_grad():
        found = model.model.language_model(inputs_embeds=embeds[filled][None], output_hidden_states=True)
    states = [layer[0].double().numpy() for layer in found.hidden_states[1:]]

    words = tokenizer(sample.reference, add_special_tokens=False)["input_ids"]
    if tokens == "all":
        counted, alone, first = np.ones(int(filled.sum()), dtype=bool), tokenizer(sample.reference)["input_ids"], 0
    else:
        start = max(i for i in range(len(ids)) if ids[i : i + len(words)].tolist() == words)
        said = torch.zeros_like(image)
        said[start : start + len(words)] = True
        counted, alone, first = (image | question | said)[filled].numpy(), [int(ids[0]), *words], 1
    reference = states_of(model, input_ids=torch.tensor([alone]))
    expected = [cosine(a[counted].mean(0), b[first:].mean(0)) for a, b in zip(states, reference, strict=True)]
    assert len(row["cosine"]) == model.config.text_config.num_hidden_layers
    np.testing.assert_allclose(row["cosine"], expected, atol=2e-5)


def test_mean_states_ignores_what_padding_holds():
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [float("nan"), 9.0]]])
    assert mean_states([states, 2 * states], torch.tensor([[True, True, False]])).tolist() == [[[2.0, 4.0]], [[4.0, 8.0]]]


@pytest.mark.parametrize("tokens", ["all", "content"])
def test_numbers_do_not_depend_on_the_batch(build, tokens):
    model, processor = build()
    samples = list(Shapes(5))
    together = align_batch(model, processor, samples, settings(tokens=tokens))
    alone = [align_batch(model, processor, [sample], settings(tokens=tokens))[0] for sample in samples]
    assert [row["id"] for row in together] == [sample.id for sample in samples]
    np.testing.assert_allclose([r["cosine"] for r in together], [r["cosine"] for r in alone], atol=2e-5)


def test_the_models_own_answer_is_the_default(build, monkeypatch):
    model, processor = build()
    samples = list(Shapes(3))
    monkeypatch.setattr(alignment, "answer_batch", lambda *_: [{"prediction": text} for text in ("a dog", " ", "the cat")])
    rows = align_batch(model, processor, samples, Alignment())
    assert [row.get("answer") for row in rows] == ["a dog", None, "the cat"]
    assert rows[1] == {"id": samples[1].id, "error": "its answer is empty"}
    said = [Sample(s.id, s.images, s.messages, text, "vqa") for s, text in zip(samples, ("a dog", "", "the cat"), strict=True)]
    forced = align_batch(model, processor, said, settings())
    assert rows[0]["cosine"] != forced[0]["cosine"]  # the same sequence, against another reference


def test_a_run_goes_on_where_it_was_killed(build, tmp_path):
    model, processor = build()
    whole, broken = AlignmentRun(tmp_path / "a", {"seed": 0}), AlignmentRun(tmp_path / "b", {"seed": 0})
    whole.run(model, processor, Shapes(5), settings())
    broken.run(model, processor, Shapes(3), settings())
    with open(broken.journal.path, "a") as file:
        file.write('{"id": "shapes-0-3", "cos')
    seen = []
    AlignmentRun(tmp_path / "b", {"seed": 0}).run(model, processor, Shapes(5), settings(), seen.append)
    assert seen == [1, 1, 1, 2]
    a, b = list(whole.journal), list(broken.journal)
    assert [row["id"] for row in a] == [row["id"] for row in b]
    np.testing.assert_allclose([r["cosine"] for r in a], [r["cosine"] for r in b], atol=2e-5)
    with pytest.raises(ValueError, match="seed"):
        AlignmentRun(tmp_path / "b", {"seed": 1})


def test_what_is_held_is_one_batch(build, tmp_path, monkeypatch):
    """Samples are drawn from the stream only when their batch is due, and let go after it; no state outlives its batch."""
    model, processor = build()
    alive, most, states = [0], [0], []

    class Counted(Sample):
        def __del__(self):
            alive[0] -= 1

    def stream():
        for i, sample in enumerate(Shapes(9)):
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            yield Counted(**{**vars(sample), "id": f"s{i}"})

    reduced = alignment.mean_states
    monkeypatch.setattr(alignment, "mean_states", lambda *a: states.append(found := reduced(*a)) or found)
    run = AlignmentRun(tmp_path, {})
    run.run(model, processor, stream(), settings(batch_size=3))
    assert len(list(run.journal)) == 9
    assert most[0] <= 3 + 2  # a batch, what the loop's variable holds, and the next one
    layers, width = model.config.text_config.num_hidden_layers, model.config.text_config.hidden_size
    assert {tuple(state.shape) for state in states} == {(layers, 3, width)}


def test_a_bad_image_costs_its_own_sample_only(build, tmp_path):
    model, processor = build()
    samples = list(Shapes(3))
    samples[1].images = [{"bytes": b"no image", "path": None}]
    run = AlignmentRun(tmp_path, {})
    run.run(model, processor, samples, settings(batch_size=3))
    assert [("cosine" in row) for row in run.journal] == [True, False, True]
    assert run.errors()[0]["id"] == samples[1].id


def test_the_band_is_a_bootstraps(monkeypatch):
    monkeypatch.setattr(alignment, "BLOCK", 37)
    values = np.random.default_rng(1).normal([0.2, 0.8], [0.1, 0.02], (400, 2))
    found = curve(pd.DataFrame(values), 4000)
    np.testing.assert_allclose(found["mean"], values.mean(0))
    draw = np.random.default_rng(2)
    means = np.stack([values[draw.integers(400, size=400)].mean(0) for _ in range(4000)])
    np.testing.assert_allclose([found["low"], found["high"]], np.percentile(means, [2.5, 97.5], axis=0), atol=1e-3)
    single = curve(pd.DataFrame(values[:1]))
    np.testing.assert_allclose([single["low"], single["high"]], [values[0], values[0]])


def test_report(tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "HEATMAP_ROWS", 4)
    runs, draw = {}, np.random.default_rng(0)
    for name, layers in (("one", 3), ("two/b", 4)):
        run = runs[name] = AlignmentRun(tmp_path / name.replace("/", "-"), {"model": name})
        lines = [{"id": f"s{i}", "cosine": draw.uniform(0, 1, layers).round(6).tolist()} for i in range(10)]
        run.journal.path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"id": "bad", "error": "broken"}]))
    monkeypatch.setattr(alignment, "BLOCK", 4)
    summary = report(tmp_path, runs)
    table = pq.read_table(tmp_path / "alignment.parquet")
    assert pq.ParquetFile(tmp_path / "alignment.parquet").num_row_groups == 6
    assert table.column_names == ["model", "id", "layer", "cosine"] and table.num_rows == 10 * 3 + 10 * 4
    row = table.slice(4, 1).to_pylist()[0]  # second sample, second layer
    assert (row["model"], row["id"], row["layer"]) == ("one", "s1", 2)
    assert row["cosine"] == pytest.approx(list(runs["one"].journal)[1]["cosine"][1])
    one = np.array([r["cosine"] for r in runs["one"].journal if "cosine" in r])
    np.testing.assert_allclose(summary["models"]["one"]["mean"], one.mean(0), atol=1e-6)
    assert summary["models"]["two/b"]["left_out"] == [{"id": "bad", "reason": "broken"}]
    rows = alignment.heatmap_rows(one, 4)
    np.testing.assert_allclose(rows, [one[:3].mean(0), one[3:6].mean(0), one[6:9].mean(0), one[9]])
    for stem in ("curves", "heatmap-one", "heatmap-two-b"):
        for kind in ("png", "svg"):
            assert (tmp_path / f"{stem}.{kind}").stat().st_size > 1000


def make_run(folder, ids, bad=()):
    run = AlignmentRun(folder, {"model": folder.name})
    lines = [{"id": name, "cosine": [number / 10, 0.5]} for name, number in ids.items()]
    lines += [{"id": name, "error": "its answer is empty"} for name in bad]
    run.journal.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_models_are_compared_on_the_samples_that_all_have(tmp_path, monkeypatch):
    figures, drawn = [], alignment.curves
    monkeypatch.setattr(alignment, "curves", lambda found: figures.append(drawn(found)) or figures[-1])
    one = make_run(tmp_path / "one", {"a": 1, "b": 2, "c": 6}, ["d"])
    two = make_run(tmp_path / "two", {"d": 9, "c": 4, "b": 3}, ["a"])
    summary = report(tmp_path, {"one": one, "two": two})
    assert [summary["models"][name]["mean"][0] for name in ("one", "two")] == pytest.approx([0.4, 0.35])
    assert [(m["samples"], m["usable"]) for m in summary["models"].values()] == [(2, 3), (2, 3)]
    labels = figures[0].axes[0].get_legend().texts
    assert [label.get_text() for label in labels] == ["one (n = 2)", "two (n = 2)"]
    assert pq.read_table(tmp_path / "alignment.parquet").num_rows == 2 * 3 * 2  # all of both
    other = make_run(tmp_path / "other", {"x": 5})
    summary = report(tmp_path, {"one": one, "other": other})  # nothing in common
    assert [m["samples"] for m in summary["models"].values()] == [3, 1] and summary["samples"] == "each model's own"


def test_a_model_without_a_sample_costs_only_its_own_figures(tmp_path):
    one, mute = make_run(tmp_path / "one", {"a": 1}), make_run(tmp_path / "mute", {}, ["a"])
    summary = report(tmp_path, {"mute": mute, "one": one})
    assert summary["failed"] == {"mute": "its answer is empty"} and list(summary["models"]) == ["one"]
    assert (tmp_path / "curves.png").exists() and (tmp_path / "alignment.json").exists()
    with pytest.raises(ValueError, match="mute"):
        report(tmp_path, {"mute": mute})


def test_a_damaged_description_is_named(tmp_path):
    AlignmentRun(tmp_path / "a", {})
    (tmp_path / "a" / "run.json").write_text("{")
    with pytest.raises(ValueError, match="a/run.json' .* '.*a'"):
        AlignmentRun(tmp_path / "a", {})


def test_wrong_settings():
    with pytest.raises(ValueError, match="prediction, reference.* 'both'"):
        Alignment(answer="both")
    with pytest.raises(ValueError, match="tokens"):
        Alignment(tokens="some")
