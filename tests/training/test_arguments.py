"""Arguments: the supplement's values, recipes in YAML, clear errors."""

from pathlib import Path

import pytest
import torch
import yaml

from granulon_hf.errors import GranulonError
from granulon_hf.evaluation.comparison import check
from granulon_hf.training import arguments, parse
from granulon_hf.training.arguments import ModelArguments
from granulon_hf.training.run import build_model
from granulon_hf.variants import NAMES

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMO = str(EXAMPLES / "demo.yaml")


def test_defaults_are_the_supplements():
    model, data, args = parse(["--use_cpu", "true"])
    assert (args.learning_rate, args.num_train_epochs, args.lr_scheduler_type, args.warmup_steps) == (1e-4, 2, "cosine", 0.05)
    assert (args.weight_decay, args.per_device_train_batch_size, args.gradient_accumulation_steps) == (0, 8, 4)
    assert args.eval_strategy == "no" and args.save_strategy == "steps" and not args.gradient_checkpointing
    assert (model.stage, model.pixel_loss_weight, model.semantic_loss_weight) == ("projector", 0, 0)
    assert "adamw" in args.optim and data.batching == "grouped"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_that_ships_parses(path):
    if path.name == "compare.yaml":  # of another command
        check(yaml.safe_load(path.read_text()))
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
    ("options", "message"),
    [
        ({"variant": "granulon-qwen2.5", "slot_position": "pixel"}, "'pixel'"),
        ({"variant": "clip-qwen2.5", "slot_position": "semantic"}, "granularity"),
        ({"variant": "demo", "slot_position": "all"}, "--slot_position"),
    ],
)
def test_wrong_slot_positions(options, message):
    with pytest.raises(GranulonError, match=message):
        build_model(ModelArguments(tiny=True, **options))


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
