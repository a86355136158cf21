"""Training of the controller: labels, the oracle of inference, measures against scikit-learn, the script."""

import json
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import granulon_hf
from granulon_hf.errors import GranulonError
from granulon_hf.training import controller
from granulon_hf.training.arguments import ModelArguments
from granulon_hf.training.controller import (
    CORPUS,
    ControllerArguments,
    Question,
    check_levels,
    measure,
    read_labels,
    run_controller,
    save,
    train_controller,
)
from granulon_hf.training.loss_targets import ScoredQuestion, measure_costs, priced_loss
from granulon_hf.training.run import build_model
from granulon_hf.training.stages import load_adapter_state, set_stage
from tests.conftest import make_conversation, make_inputs, make_picture

ROOT = Path(__file__).parents[2]
LEVELS = ("coarse", "middle", "fine")


def row(text, weights=(0.1, 0.2, 0.7), levels=LEVELS, **more):
    return {"text": text, "weights": dict(zip(levels, weights, strict=True)), **more}


def write(path, rows):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows))
    return path


SMALL = [
    *(row(f"What kind of scene is number {i}?", (0.8, 0.15, 0.05), split="train" if i % 4 else "test") for i in range(12)),
    *(row(f"How many things has {i}?", (0.1, 0.8, 0.1), split="train" if i % 4 else "test") for i in range(12)),
    *(row(f"Where is the cat left of the {i}", (0.05, 0.15, 0.8), split="train" if i % 4 else "test") for i in range(12)),
]


# --- labels -----------------------------------------------------------------------------------------------------------


def test_the_corpus_that_ships():
    rows = [json.loads(line) for line in CORPUS.read_text().splitlines()]
    questions = read_labels(CORPUS)
    assert len(questions) == len(rows) >= 450 and len({re.sub(r"\W+", " ", r["text"].lower()) for r in rows}) == len(rows)
    assert all(list(r["weights"]) == list(LEVELS) and r["split"] in ("train", "test") for r in rows)
    for held_out in (False, True):
        counts = Counter(max(q.weights, key=q.weights.get) for q in questions if q.test == held_out)
        assert max(counts.values()) < 1.1 * min(counts.values())
    for r in rows:  # templates of the demo's scenes and what fills them
        assert "{" not in r["text"] and ("topic" in r or "template" not in r)
        if "template" in r:
            pattern = re.sub(r"\\\{\w+\\\}", ".+", re.escape(r["template"]))
            assert re.fullmatch(pattern, r["text"])
    card = (CORPUS.parent / "README.md").read_text()
    assert f"{len(rows)} English questions" in card and "not GPT-4o's labels" in card
    for level in LEVELS:
        numbers = [sum(max(q.weights, key=q.weights.get) == level and q.test == t for q in questions) for t in (False, True)]
        assert re.search(rf"\| {level} \|.*\| {numbers[0]} \| {numbers[1]} \|", card)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "labels.jsonl"),
        (["{"], "line 1"),
        ([row("a", split="train"), "[1]"], "line 2"),
        ([{"weights": {"coarse": 1, "fine": 0}}], "`text`"),
        ([{"text": "a", "weights": [0.5, 0.5]}], "`weights`"),
        ([row("a", (0.5, 0.7, -0.2))], "`weights`"),
        ([row("a", (0.5, 0.3, 0.3))], "1.1"),
        ([row("a"), row("b", levels=("coarse", "middle", "tiny"))], "coarse, middle, tiny"),
        ([row("a", split="train"), row("b", split="train")], "test"),
        ([row("a", split="test")], "train"),
        ([row("a")], "few"),
        ([row("a", split="train"), row("b")], "split"),
        ([row("What is it?", split="train"), row("what is it", split="test")], "held out"),
    ],
)
def test_bad_labels_are_one_sentence(tmp_path, rows, sentence):
    with pytest.raises(GranulonError, match=re.escape(sentence)) as error:
        read_labels(write(tmp_path / "labels.jsonl", rows))
    assert "\n" not in str(error.value)


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(GranulonError, match="granulon controller label"):
        read_labels(tmp_path / "none.jsonl")


def test_a_hold_out_is_drawn_by_text(tmp_path):
    path = write(tmp_path / "labels.jsonl", [row(f"Question {i // 2}{'?' * (i % 2)}") for i in range(100)])
    first, again, other = (read_labels(path, 0.3, seed) for seed in (1, 1, 2))
    held = [[q.test for q in questions] for questions in (first, again, other)]
    assert held[0] == held[1] != held[2] and sum(held[0]) == 30
    assert held[0][::2] == held[0][1::2]  # the same words are on one side


def test_levels_must_be_the_models():
    questions = [Question("a", {"coarse": 0.5, "tiny": 0.5}, False)]
    with pytest.raises(GranulonError, match="coarse, tiny.* coarse, fine.* controller label"):
        check_levels(questions, ["coarse", "fine"], "m")
    with pytest.raises(GranulonError, match="granularity"):
        check_levels(questions, [], "m")


@pytest.mark.parametrize("name", ["steps", "batch_size", "learning_rate", "holdout"])
def test_arguments_are_checked(name):
    with pytest.raises(GranulonError, match=f"--{name}"):
        ControllerArguments(**{name: 0})


# --- training ---------------------------------------------------------------------------------------------------------


def questions_of(rows):
    return [Question(r["text"], r["weights"], r["split"] == "test") for r in rows]


def arguments(**kwargs):
    return ControllerArguments(**{"variant": "toy", "steps": 60, "batch_size": 32, **kwargs})


@pytest.mark.parametrize("name", ["granulon-qwen2.5", "granulon-llama3.2"])
def test_probabilities_are_those_of_inference(build, name, monkeypatch):
    """Text-only states in batches of any padding against `get_granularity_probs` with an image, alone and on either side."""
    model, processor = build(name)
    probs = {}
    monkeypatch.setattr(controller, "measure", lambda p, *others: probs.update(test=p) or {"accuracy": 0.0})
    questions = questions_of(SMALL)
    train_controller(model, processor, questions, arguments(learning_rate=0.02), show=False)
    held_out = [q.text for q in questions if q.test]
    assert np.ptp(probs["test"], axis=0).max() > 0.02  # it does look at the question
    for side in ("left", "right"):
        chats = [make_conversation(text, [make_picture(0)]) for text in held_out]
        inputs = make_inputs(processor, chats, side=side)
        shown = model.get_granularity_probs(inputs["input_ids"], question_mask=inputs["question_mask"])
        torch.testing.assert_close(shown, torch.from_numpy(probs["test"]), atol=1e-5, rtol=0)
    inputs = make_inputs(processor, [make_conversation(held_out[0], [make_picture(1)], answer="On the sofa.")], generate=False)
    output = model(**inputs)
    torch.testing.assert_close(output.granularity_probs[0], torch.from_numpy(probs["test"][0]), atol=1e-5, rtol=0)


def test_it_learns_and_nothing_else_moves(build):
    model, processor = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = train_controller(model, processor, questions_of(SMALL), arguments(steps=400, learning_rate=0.01), show=False)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("model.controller.") for name in moved)
    assert result["accuracy"] == 1 and result["n_train"] == 27 and result["n_test"] == 9 and not result["wrong"]
    assert result["confusion"] == [[3, 0, 0], [0, 3, 0], [0, 0, 3]]
    assert result["label_entropy"] < result["cross_entropy"] < 1


def test_the_seed_decides(build):
    found = []
    for seed in (0, 0, 1):
        model, processor = build()
        train_controller(model, processor, questions_of(SMALL), arguments(seed=seed, steps=20), show=False)
        found.append(model.model.controller.fc2.weight.detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_levels_go_by_name_and_precision_is_the_models(build):
    model, processor = build()
    model.to(torch.bfloat16)
    rows = [row(r["text"], list(r["weights"].values())[::-1], LEVELS[::-1], split=r["split"]) for r in SMALL]
    result = train_controller(model, processor, questions_of(rows), arguments(steps=400, learning_rate=0.01), show=False)
    assert result["accuracy"] > 0.9 and result["levels"] == list(LEVELS)
    assert {parameter.dtype for parameter in model.model.controller.parameters()} == {torch.bfloat16}


def test_a_loss_that_is_not_finite_ends_the_training(build):
    model, processor = build()
    with torch.no_grad():
        model.model.controller.fc1.weight.fill_(float("nan"))
    with pytest.raises(GranulonError, match="step 0"):
        train_controller(model, processor, questions_of(SMALL), arguments(), show=False)


# --- measures ---------------------------------------------------------------------------------------------------------


def test_measures_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    probs, weights = random.dirichlet([0.7] * 3, 200), random.dirichlet([0.5] * 3, 200)
    found = measure(probs, weights, weights[:50])
    truth, chosen = weights.argmax(1), probs.argmax(1)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, chosen))
    assert found["confusion"] == metrics.confusion_matrix(truth, chosen).tolist()
    assert found["accuracy_ci95"][0] < found["accuracy"] < found["accuracy_ci95"][1]
    assert found["cross_entropy"] == pytest.approx(
        np.mean([-(w * np.log(p)).sum() for w, p in zip(weights, probs, strict=True)])
    )
    ece = ece_weight = 0.0
    for low in np.arange(10) / 10:  # by the definition
        inside = [i for i in range(200) if low <= probs[i].max() < low + 0.1]
        if inside:
            sure = np.mean([probs[i].max() for i in inside])
            ece += len(inside) / 200 * abs(sure - np.mean([truth[i] == chosen[i] for i in inside]))
            ece_weight += len(inside) / 200 * abs(sure - np.mean([weights[i, chosen[i]] for i in inside]))
    assert found["ece"] == pytest.approx(ece) and found["ece_weight"] == pytest.approx(ece_weight)
    assert sum(bin["n"] for bin in found["reliability"]) == 200


def test_perfect_probabilities():
    weights = np.array([[0.8, 0.2], [0.2, 0.8], [0.5, 0.5]])
    found = measure(weights, weights, weights)
    assert found["accuracy"] == 1  # of two equal weights either is right
    assert found["ece_weight"] == pytest.approx(0, abs=1e-9) and found["ece"] == pytest.approx((0.2 + 0.2 + 0.5) / 3)
    assert found["cross_entropy"] == pytest.approx(found["label_entropy"])


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    """Run the script in this process, as `python` would."""

    def script(*options):
        path = str(ROOT / "examples" / "train_controller.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, options)])
        runpy.run_path(path, run_name="__main__")

    return script


def test_the_script_end_to_end(tmp_path, build, script, capsys):
    labels = write(tmp_path / "labels.jsonl", SMALL)
    out = tmp_path / "run"
    model, processor = build()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    options = ("--variant", tmp_path / "model", "--steps", 400, "--learning_rate", 0.01)
    script(*options, "--labels", labels, "--output_dir", out, "--save_full")
    printed = capsys.readouterr().out
    assert "calibration error, to right or wrong" in printed and "labelled \\ chosen" in printed
    results = json.loads((out / "results.json").read_text())
    assert results["accuracy"] > 0.9 and results["n_test"] == 9 and results["seconds"] > 0 and "torch" in results["versions"]
    assert str(tmp_path) not in json.dumps(results["settings"]["labels"])
    pytest.importorskip("matplotlib")
    assert (out / "controller.png").read_bytes()[:4] == b"\x89PNG"
    state = load_file(out / "adapter.safetensors")
    assert {name.split(".")[0] for name in state} == {"controller"}
    # The same controller by way of the adapter, and of the whole model.
    whole = granulon_hf.AutoModelForVision2Seq.from_pretrained(out)
    set_stage(model, "controller")
    load_adapter_state(model, state)
    inputs = make_inputs(processor, [make_conversation(r["text"], [make_picture(0)]) for r in SMALL if r["split"] == "test"])
    asked = {"input_ids": inputs["input_ids"], "question_mask": inputs["question_mask"]}
    probs = model.get_granularity_probs(**asked)
    torch.testing.assert_close(probs, whole.get_granularity_probs(**asked), atol=1e-5, rtol=0)
    right = sum(int(probs[i].argmax()) == i // 3 for i in range(9))
    assert right / 9 == pytest.approx(results["accuracy"])


def test_a_run_refuses_before_any_time_is_spent(tmp_path):
    other = str(write(tmp_path / "other.jsonl", [row(f"q {i}", levels=("a", "b", "c")) for i in range(10)]))
    file = write(tmp_path / "file", [""])
    for options, sentence in (
        ({"labels": str(tmp_path / "none.jsonl")}, "none.jsonl"),
        ({"variant": "granulon-qwen2.5", "labels": other}, "coarse, middle, fine"),
        ({"variant": "clip-qwen2.5"}, "granularity"),
        ({"variant": "granulon-qwen2.5", "tiny": True, "output_dir": str(file / "x")}, "file"),
        ({"variant": str(tmp_path / "nowhere")}, "nowhere"),
    ):
        with pytest.raises(GranulonError, match=sentence):
            run_controller(ControllerArguments(**{"output_dir": str(tmp_path / "run"), **options}))
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


@pytest.mark.parametrize("name", ["adapter.safetensors", "model.safetensors", "checkpoint-3"])
def test_what_an_earlier_run_left_is_not_overwritten(tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(GranulonError, match=name):
        run_controller(ControllerArguments(variant="granulon-qwen2.5", tiny=True, output_dir=str(tmp_path / "run")))


@pytest.mark.parametrize("line", [["--steps", "many"], ["--step", "3"], ["--steps", "0"]])
def test_options_that_cannot_be_used_are_one_sentence(line):
    with pytest.raises(GranulonError, match="--step") as error:
        controller.parse(line)
    assert "\n" not in str(error.value)


def test_the_script_says_one_sentence(tmp_path, script):
    with pytest.raises(SystemExit) as refused:
        script("--output_dir", tmp_path / "run", "--labels", tmp_path / "none.jsonl")
    assert refused.value.code.startswith("Error: ") and "none.jsonl" in refused.value.code and "\n" not in refused.value.code


# --- targets of measured value ----------------------------------------------------------------------------------------

# The right level is known by a word: what each level loses there, so that a high price moves the choice.
WORDS = {"overall": (1.0, 0.9, 0.8), "number": (3.0, 1.0, 0.9), "corner": (6.0, 4.0, 1.0)}
BEST = {
    0.01: {"overall": "coarse", "number": "middle", "corner": "fine"},
    0.1: {"overall": "coarse", "number": "middle", "corner": "middle"},
}
TOKENS = {"coarse": 16, "middle": 32, "fine": 64}


def scored(word, i, **more):
    text = f"Say about picture {i}: the {word} of the things?"
    return {"id": f"{word}-{i}", "text": text, "losses": dict(zip(LEVELS, WORDS[word], strict=True)), "tokens": TOKENS, **more}


SCORED = [scored(word, i) for i in range(60) for word in WORDS]


@pytest.mark.parametrize("variant", ["granulon-compact-qwen2.5", "granulon-compact-llama3.2"])
def test_the_right_level_is_chosen_at_each_price(tmp_path, build, script, capsys, variant):
    """By the script, with its own defaults; then by `generate`'s way of asking, from the adapter and from the whole model."""
    labels, out = write(tmp_path / "labels.jsonl", SCORED), tmp_path / "run"
    model, processor = build(variant, trained=False)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    options = ("--variant", tmp_path / "model", "--labels", labels, "--output_dir", out, "--save_full")
    script(*options, "--targets", "loss", "--price", 0.01, 0.1, "--temperature", 0.5)
    printed = capsys.readouterr().out
    assert "always middle" in printed and "oracle" in printed
    results = json.loads((out / "results.json").read_text())
    assert [row["price"] for row in results["prices"]] == [0.01, 0.1]
    assert results["settings"]["temperature"] == 0.5 and results["n_test"] == 36 and (out / "controller.png").exists()
    for row in results["prices"]:
        assert row["accuracy"] >= 0.95 and row["cost"] == pytest.approx(row["oracle"]["cost"], rel=0.05)
        assert min(fixed["cost"] for fixed in row["fixed"].values()) >= row["oracle"]["cost"]
        assert row["saved_ci95"][0] <= row["saved"] <= row["saved_ci95"][1] and row["saved"] > 0
    texts = {word: f"Say about picture 77: the {word} of the things?" for word in WORDS}
    inputs = make_inputs(processor, [make_conversation(text, [make_picture(0)]) for text in texts.values()])
    asked = {"input_ids": inputs["input_ids"], "question_mask": inputs["question_mask"]}
    adapted, _ = build_model(ModelArguments(variant=str(tmp_path / "model"), adapter=str(out)))
    for loaded in (granulon_hf.AutoModelForVision2Seq.from_pretrained(out), adapted):
        assert loaded.config.controller_prices == [0.01, 0.1]
        for price in (0.01, 0.1):
            levels = loaded.get_granularity_probs(**asked, price=price).argmax(-1)
            assert [LEVELS[level] for level in levels] == list(BEST[price].values())


def test_the_loss_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    logits, costs = (torch.randn(5, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    total = hinge = pairs = 0.0
    for q in range(5):
        for p in range(2):
            s, c = logits[q, p], costs[q, p] / 0.7
            target = (-c).exp() / (-c).exp().sum()
            total -= float((target * (s.exp() / s.exp().sum()).log()).sum()) / 10
            for i in range(3):
                for j in range(3):
                    if c[i] < c[j]:
                        pairs += 1
                        hinge += max(0.0, float((c[j] - c[i]) - (s[i] - s[j])))
    assert priced_loss(logits, costs, 0.7).item() == pytest.approx(total + hinge / pairs)
    learned = priced_loss(-costs, costs, 1.0)  # at the soft target nothing is left but its entropy
    target = (-costs).softmax(-1)
    assert learned.item() == pytest.approx(float(-(target * target.log()).sum(-1).mean()))


def test_costs_are_measured_against_fixed_levels_and_the_oracle():
    losses, tokens = {"a": 2.0, "b": 1.0}, {"a": 1, "b": 11}
    questions = [ScoredQuestion("q", losses, tokens, True), ScoredQuestion("r", {"a": 1.0, "b": 1.5}, tokens, True)]
    cheap, dear = measure_costs(np.array([[1, 0], [0, 1]]), questions, questions, ["a", "b"], [0.0, 0.2])
    assert cheap["accuracy"] == 1 and cheap["cost"] == cheap["oracle"]["cost"] == 1 and cheap["tokens"] == 6
    assert cheap["fixed"]["a"] == {"accuracy": 0.5, "cost": 1.5, "loss": 1.5, "tokens": 1}
    assert cheap["best_fixed"] == "b" and cheap["saved"] == pytest.approx(0.25) and cheap["chosen"] == {"a": 1, "b": 1}
    assert dear["oracle"] == {"accuracy": 1, "cost": pytest.approx(1.7), "loss": 1.5, "tokens": 1}
    assert dear["accuracy"] == 0.5 and dear["cost"] == pytest.approx((2.2 + 3.7) / 2) and dear["best_fixed"] == "a"


@pytest.mark.parametrize(
    ("rows", "targets"),
    [
        (SMALL, "loss"),
        (SCORED, "weights"),
        ([SCORED[0], SMALL[0]], "loss"),
        ([{**SCORED[0], "tokens": {"coarse": 1, "fine": 2}}], "loss"),
        ([{**SCORED[0], "losses": {"coarse": 1.0}, "tokens": {"coarse": 1}}], "loss"),
        ([{**SCORED[0], "losses": dict.fromkeys(LEVELS, float("nan"))}], "loss"),
        ([{**SCORED[0], "losses": dict.fromkeys(LEVELS, -1.0)}], "loss"),
        ([SCORED[0], {**SCORED[1], "losses": {"a": 1, "b": 2}, "tokens": {"a": 1, "b": 2}}], "loss"),
        ([{"text": "a", "losses": dict.fromkeys(LEVELS, 1.0)}], "loss"),
    ],
)
def test_labels_of_another_kind_are_one_sentence(tmp_path, rows, targets):
    with pytest.raises(GranulonError, match="line") as error:
        read_labels(write(tmp_path / "labels.jsonl", rows), targets=targets)
    assert "\n" not in str(error.value)


def test_samples_of_splits_may_share_their_words(tmp_path):
    rows = [scored("number", 1, split=split) for split in ("train", "train", "test")]
    assert [q.test for q in read_labels(write(tmp_path / "labels.jsonl", rows), targets="loss")] == [False, False, True]
    rows = [scored("number", i, split="train") for i in range(10)]  # of one split alone: the hold-out is drawn
    assert sum(q.test for q in read_labels(write(tmp_path / "labels.jsonl", rows), targets="loss")) == 2


@pytest.mark.parametrize(
    "line",
    [
        "--targets value",
        "--targets loss --labels x.jsonl",
        "--targets loss --price 0.1",
        "--targets loss --labels x.jsonl --price -1",
        "--targets loss --labels x.jsonl --price 0.1 0.1",
        "--targets loss --labels x.jsonl --price nan",
        "--targets loss --labels x.jsonl --price 0.1 --temperature 0",
        "--price 0.1",
        "--temperature 2",
    ],
)
def test_options_of_targets_that_do_not_go_together(line):
    with pytest.raises(GranulonError) as error:
        controller.parse(line.split())
    assert "\n" not in str(error.value)


def test_adapters_carry_their_prices(tmp_path, build):
    """A controller of two prices and three levels has as many outputs as one of three and two."""
    model, processor = build("granulon-compact-qwen2.5", trained=False)
    args = arguments(targets="loss", price=[0.1, 0.2], labels="x", steps=2)
    questions = [ScoredQuestion(r["text"], r["losses"], TOKENS, i > 9) for i, r in enumerate(SCORED[:20])]
    train_controller(model, processor, questions, args, show=False)
    save(tmp_path, model, processor, {})
    other, _ = build_model(ModelArguments(variant="granulon-compact-qwen2.5", tiny=True, adapter=str(tmp_path)))
    assert other.config.controller_prices == [0.1, 0.2] and not other.model.controller.fc2.weight.requires_grad
    assert torch.equal(other.model.controller.fc2.weight, model.model.controller.fc2.weight)
    with pytest.raises(GranulonError):
        build_model(ModelArguments(variant="granulon-compact-qwen2.5", tiny=True, levels="4,8", adapter=str(tmp_path)))
    # Labels by wording know no price: trained on, the controller has none.
    train_controller(model, processor, questions_of(SMALL), arguments(steps=2), show=False)
    assert model.config.controller_prices is None and model.model.controller.fc2.out_features == 3
