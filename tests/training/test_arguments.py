"""Arguments: the supplement's values, recipes in YAML, clear errors."""

from pathlib import Path

import pytest
import torch
import yaml

from granulon_hf.data.collator import GranulonCollator
from granulon_hf.data.datasets.shapes import Shapes
from granulon_hf.errors import GranulonError
from granulon_hf.training import arguments, parse
from granulon_hf.training.arguments import ModelArguments
from granulon_hf.training.run import build_model
from granulon_hf.variants import NAMES

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMO = str(EXAMPLES / "demo.yaml")
SAMPLES = Shapes(4)


def test_defaults_are_the_supplements():
    model, data, args = parse(["--use_cpu", "true"])
    assert (args.learning_rate, args.num_train_epochs, args.lr_scheduler_type, args.warmup_steps) == (1e-4, 2, "cosine", 0.05)
    assert (args.weight_decay, args.per_device_train_batch_size, args.gradient_accumulation_steps) == (0, 8, 4)
    assert args.eval_strategy == "no" and args.save_strategy == "steps" and not args.gradient_checkpointing
    assert (model.stage, model.pixel_loss_weight, model.semantic_loss_weight) == ("projector", 0, 0)
    assert "adamw" in args.optim and data.batching is None


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_that_ships_parses(path):
    if path.name.startswith("compare"):  # of another command: tests/cli/test_compare.py
        return
    if path.name.startswith("accelerate_"):
        assert yaml.safe_load(path.read_text())["compute_environment"] == "LOCAL_MACHINE"
        return
    model, _, args = parse([str(path), "--use_cpu", "true"])
    assert model.variant in (*NAMES, "demo")
    if path.name != "demo.yaml":
        assert args.learning_rate == 1e-4 and args.num_train_epochs == 2


def test_the_line_wins_over_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("variant: clip-qwen2.5\nlearning_rate: 2.0e-5\nuse_cpu: true\nreport_to: none\n")
    model, _, args = parse([str(path), "--learning_rate", "3e-4", "--variant", "siglip-llama3.2"])
    assert (model.variant, args.learning_rate, args.use_cpu) == ("siglip-llama3.2", 3e-4, True)


@pytest.mark.parametrize(
    ("recipe", "line", "loggers"),
    [
        ("report_to: none", "", []),
        ("report_to: trackio", "", ["trackio"]),
        ("report_to: [tensorboard, trackio]", "", ["tensorboard", "trackio"]),
        ("report_to: trackio", "--report_to none", []),
        ("report_to: none", "--report_to tensorboard trackio", ["tensorboard", "trackio"]),
    ],
)
def test_a_run_may_have_several_loggers(tmp_path, recipe, line, loggers):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{recipe}\nuse_cpu: true\n")
    assert parse([str(path), *line.split()])[2].report_to == loggers


@pytest.mark.parametrize(
    ("text", "message"),
    [("learning_rat: 1\n", "'learning_rat'"), ("- a\n", "recipe.yaml"), ("a: [\n", "YAML")],
)
def test_bad_recipes(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(GranulonError, match=message):
        parse([str(path)])
    with pytest.raises(GranulonError, match="none.yaml"):
        parse([str(tmp_path / "none.yaml")])
    with pytest.raises(GranulonError, match="stacked"):
        parse(["--batching", "stacked", "--use_cpu", "true"])


def test_slot_position_reaches_the_model():
    model, _ = build_model(ModelArguments(variant="clip-qwen2.5", tiny=True, slot_position="all"))
    position = model.model.multi_modal_projector.position
    assert model.config.slot_position == "all" and position.requires_grad and (position == 0).all()
    plain, _ = build_model(ModelArguments(variant="clip-qwen2.5", tiny=True))
    assert plain.model.multi_modal_projector.position is None


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"variant": "clip-qwen2.5", "levels": "4,16,8"}, ("pixel+semantic", "adata", ["4", "8", "16"], 16, "8", "none")),
        (
            {"variant": "siglip-llama3.2", "visual_tokens": "semantic", "levels": 3},
            ("semantic", "adata", ["3"], 3, "3", "semantic"),
        ),
        (
            {"variant": "dinov2-qwen2.5", "visual_tokens": "semantic", "reducer": "queries"},
            ("semantic", "queries", ["coarse", "middle", "fine"], 64, "middle", "semantic"),
        ),
        ({"variant": "granulon-compact-qwen2.5", "visual_tokens": "pixel"}, ("pixel", "adata", [], 20, None, "none")),
        (
            {"variant": "granulon-compact-qwen2.5", "reducer": "pool", "levels": "[4, 9]", "slot_position": "none"},
            ("semantic", "pool", ["4", "9"], 9, "9", "none"),
        ),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_another_form_of_a_variant_or_of_a_folder(build, tmp_path, options, fields, folder):
    if folder:
        model, processor = build(options["variant"])
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        options = {**options, "variant": str(tmp_path)}
    model, processor = build_model(ModelArguments(tiny=True, **options))
    config = model.config
    found = (config.visual_tokens, config.reducer, config.level_names, config.num_semantic_tokens)
    assert (*found, config.default_granularity, config.slot_position) == fields
    assert (processor.visual_tokens, processor.num_semantic_tokens) == (config.visual_tokens, config.num_semantic_slots)
    batch = GranulonCollator(processor)([SAMPLES[0], SAMPLES[1]])
    loss = model(**batch).loss
    loss.backward()
    trained = [parameter for parameter in model.model.multi_modal_projector.parameters() if parameter.requires_grad]
    assert loss.isfinite() and trained and all(parameter.grad is not None for parameter in trained)


def test_a_folder_keeps_the_weights_that_fit(build, tmp_path):
    before, processor = build("granulon-compact-qwen2.5", reducer="queries")
    before.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = before.model.state_dict()

    def changed(**options):
        model, _ = build_model(ModelArguments(variant=str(tmp_path), **options))
        return {
            name for name, value in model.model.state_dict().items() if not torch.equal(weights.get(name, value + 1), value)
        }

    assert changed(slot_position="none") == set()
    assert changed(levels="2,4,64") == set()  # as many levels and slots
    assert changed(levels="4,64") == {
        f"controller.{name}" for name in ("in_proj.weight", "fc1.weight", "fc2.weight", "fc2.bias")
    }
    assert {name.partition(".")[0] for name in changed(levels="2,4,8", reducer="queries")} == {"reducer"}
    assert changed(levels="2,4,8", reducer="pool") == set()
    with pytest.raises(GranulonError):
        changed(levels="2,4,8")  # nothing is random that was not asked for


def test_reconfigured_weights_answer_alike(build, tmp_path):
    """What does not change the form does not change the logits."""
    before, processor = build("granulon-compact-qwen2.5")
    before.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    after, _ = build_model(ModelArguments(variant=str(tmp_path), reducer="adata", visual_tokens="semantic"))
    batch = GranulonCollator(processor)([SAMPLES[0]])
    with torch.no_grad():
        assert torch.equal(before(**batch).logits, after.eval()(**batch).logits)


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "granulon-qwen2.5", "slot_position": "pixel"},
        {"variant": "clip-qwen2.5", "slot_position": "semantic"},
        {"variant": "granulon-qwen2.5", "visual_tokens": "compact"},
        {"variant": "granulon-qwen2.5", "reducer": "visionzip"},
        {"variant": "clip-qwen2.5", "reducer": "pool"},
        {"variant": "granulon-qwen2.5", "visual_tokens": "pixel", "reducer": "pool"},
        {"variant": "granulon-qwen2.5", "visual_tokens": "pixel", "levels": "4"},
        {"variant": "granulon-qwen2.5", "visual_tokens": "semantic", "pixel_loss_weight": 1.0},
        {"variant": "granulon-compact-qwen2.5", "semantic_loss_weight": 1.0},
        *({"variant": "granulon-qwen2.5", "levels": levels} for levels in ("", "4,", "a", "0,1", "4,4", "4.5", "-4")),
    ],
)
def test_wrong_forms(options):
    with pytest.raises(GranulonError) as error:
        build_model(ModelArguments(tiny=True, **options))
    assert "\n" not in str(error.value)


def test_other_data_on_the_line_do_not_inherit_the_files_subset(tmp_path):
    """The README's own command: a recipe of the paper's subset, with the folder that it was prepared into."""
    path = str(EXAMPLES / "granulon_qwen2.5.yaml")
    _, data, _ = parse([path, "--data", "flux-200k", "--use_cpu", "true"])
    assert (data.data, data.preset, data.split) == ("flux-200k", None, None)
    _, data, _ = parse([path, "--data=flux-reason", "--split", "holdout", "--use_cpu", "true"])
    assert (data.preset, data.split) == (None, "holdout")
    _, data, _ = parse([path, "--use_cpu", "true"])
    assert (data.preset, data.split) == ("paper", "train")


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ([], {}),
        (["--max_steps", "3"], {"max_steps": 3}),
        (["--learning_rate=2e-5"], {"learning_rate": 2e-5}),
        (["--variant", "demo", "--gradient-accumulation-steps", "2"], {"gradient_accumulation_steps": 2}),
        (["--variant=demo", "--resume_from_checkpoint", "last"], {"resume_from_checkpoint": "last"}),
        (["--save_full"], {"save_full": True}),
        (["--num_train_epochs", "1"], {"num_train_epochs": 1, "max_steps": -1}),
        (["--num_train_epochs", "1", "--max_steps", "9"], {"num_train_epochs": 1, "max_steps": 9}),
        (["--data", "chat.json"], {"data": "chat.json", "limit": None}),
        (["--data", "chat.json", "--limit", "5"], {"data": "chat.json", "limit": 5}),
    ],
)
def test_options_win_over_the_demos_recipe_and_leave_the_rest_of_it(line, changed):
    plain = [vars(group) for group in parse([DEMO, "--use_cpu", "true"])]
    found = [vars(group) for group in parse([*line, "--use_cpu", "true"], default=DEMO)]
    ignored = {"recipe", "deepspeed_plugin", "_n_gpu", "distributed_state", "accelerator_config"}
    different = {
        name: after[name]
        for before, after in zip(plain, found, strict=True)
        for name in before.keys() - ignored
        if before[name] != after[name]
    }
    assert different == changed
    model, _, recipe = parse([*line, "--use_cpu", "true"], default=DEMO)
    in_the_file = yaml.safe_load(Path(DEMO).read_text())
    assert model.variant == "demo" and DEMO in recipe.recipe
    assert all(f"{name} " in recipe.recipe for name in changed if name in in_the_file)


@pytest.mark.parametrize("line", [["--variant", "granulon-qwen2.5"], ["--variant=some/folder", "--max_steps", "3"]])
def test_other_variants_have_the_supplements_defaults(line):
    _, _, recipe = parse([*line, "--use_cpu", "true"], default=DEMO)
    assert (recipe.learning_rate, recipe.gradient_accumulation_steps) == (1e-4, 4) and "demo.yaml" not in recipe.recipe


def test_a_recipe_that_is_named_takes_the_place_of_the_default():
    model, _, recipe = parse([str(EXAMPLES / "medical.yaml"), "--use_cpu", "true"], default=DEMO)
    assert model.variant == "granulon-qwen2.5" and recipe.learning_rate == 1e-4
    assert recipe.recipe == str(EXAMPLES / "medical.yaml")


@pytest.mark.parametrize(
    "line",
    [
        ["--max_steps", "abc"],
        ["--tiny", "maybe"],
        ["--no_such"],
        ["--max_steps"],
        ["--max_steps", "3", "recipe.yaml"],
        ["--logging_strategy", "x"],
    ],
)
@pytest.mark.parametrize("default", [None, DEMO])
def test_options_that_cannot_be_used_are_one_sentence(line, default, capsys):
    with pytest.raises(GranulonError) as error:
        parse([*line, "--use_cpu", "true"] if len(line) > 1 or line == ["--no_such"] else line, default=default)
    assert "\n" not in str(error.value) and "HfArgumentParser" not in str(error.value)
    assert capsys.readouterr().err == ""


def test_liger_is_refused_where_it_cannot_run(monkeypatch):
    line = ["--use_liger_kernel", "true"]
    monkeypatch.setattr(arguments, "is_liger_kernel_available", lambda: False)
    with pytest.raises(GranulonError, match="pip install liger-kernel"):
        parse([*line, "--use_cpu", "true"])
    monkeypatch.setattr(arguments, "is_liger_kernel_available", lambda: True)
    with pytest.raises(GranulonError, match="GPU"):
        parse([*line, "--use_cpu", "true"])
    monkeypatch.setattr(arguments.RecipeArguments, "device", torch.device("cuda"))
    assert parse([*line, "--use_cpu", "true"])[2].use_liger_kernel
    with pytest.raises(GranulonError, match="fused_linear_cross_entropy"):
        parse([*line, "--liger_kernel_config", '{"fused_linear_cross_entropy": true}', "--use_cpu", "true"])


@pytest.mark.parametrize(
    "more", [["--batching", "grouped", "--max_tokens_per_batch", "9"], ["--batching", "packed", "--max_tokens_per_batch", "0"]]
)
def test_a_token_budget_is_of_packed_batches(more):
    with pytest.raises(GranulonError, match="max_tokens_per_batch"):
        parse(["--use_cpu", "true", *more])
