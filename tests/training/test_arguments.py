"""Arguments: the supplement's values, recipes in YAML, clear errors."""

from pathlib import Path

import pytest
import yaml

from granulon_hf.evaluation.comparison import check
from granulon_hf.training import RecipeError, parse
from granulon_hf.training.arguments import ModelArguments
from granulon_hf.training.run import build_model
from granulon_hf.variants import NAMES

EXAMPLES = Path(__file__).parents[2] / "examples"


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
    [("learning_rat: 1\n", "unknown name 'learning_rat'"), ("- a\n", "no names and values"), ("a: [\n", "no valid YAML")],
)
def test_bad_recipes(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        parse([str(path)])
    with pytest.raises(RecipeError, match="no YAML file of a recipe"):
        parse([str(tmp_path / "none.yaml")])
    with pytest.raises(RecipeError, match="Unknown batching"):
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
        ({"variant": "granulon-qwen2.5", "slot_position": "pixel"}, "'pixel': it is none, semantic or all"),
        ({"variant": "clip-qwen2.5", "slot_position": "semantic"}, "needs granularity levels"),
        ({"variant": "demo", "slot_position": "all"}, "for the variants and for checkpoints"),
    ],
)
def test_wrong_slot_positions(options, message):
    with pytest.raises(RecipeError, match=message):
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
