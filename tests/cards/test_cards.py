"""Cards: what the Hub reads in them, what their code does, and that they say nothing untrue of a model."""

import ast
import dataclasses
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ChatCompletionInputMessage, DatasetCard, ModelCard, ModelCardData, SpaceCard, constants
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig

import granulon_hf
import granulon_hf.cards
from granulon_hf import variants
from granulon_hf.cards import card_data, model_card
from granulon_hf.modeling.configuration_granulon import GranulonConfig
from granulon_hf.modeling.reducers_granulon import REDUCERS
from tests.conftest import build_tiny
from tests.hub_server import HubServer

FOLDER = Path(granulon_hf.cards.__file__).parent
# https://huggingface.co/docs/hub/repositories-licenses: those that occur here.
LICENSES = {"apache-2.0", "mit", "llama3.2", "unknown", "other"}
WIDTH = {"qwen2.5": 1536, "llama3.2": 3072}
RESULTS = {
    "models": ["other", "granulon-qwen2.5"],
    "data": ["a-okvqa", "/home/somebody/sets/mine"],
    "scores": {
        "other": {"a-okvqa": {"recall": [1.0]}, "/home/somebody/sets/mine": {"recall": [1.0]}},
        "granulon-qwen2.5": {
            "a-okvqa": {"recall": [0.0, 0.25, 0.5, 1.0], "judge": [20, None, 55]},
            "/home/somebody/sets/mine": {"exact": [1.0, 0.0, 1.0]},
        },
    },
}


def full_size(name: str) -> GranulonConfig:
    """A variant's config with the widths of the real backbones."""
    encoder, decoder = variants.parse(name)
    vision = AutoConfig.for_model(**{**encoder.tiny, "hidden_size": 1024})
    width = WIDTH[name.rpartition("-")[2]]
    text = AutoConfig.for_model(**{**decoder.tiny, "hidden_size": width, "vocab_size": 1000})
    return GranulonConfig(vision_config=vision, text_config=text, **encoder.config)


def code_of(card: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.text, flags=re.S)


def prose_of(card: ModelCard) -> str:
    return re.sub(r"```.*?```", "", card.text, flags=re.S)


def test_every_variant_has_a_data_file_and_every_data_file_a_variant():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(variants.NAMES)
    with pytest.raises(ValueError, match="blip.* granulon-llama3"):
        card_data("blip")


@pytest.mark.parametrize("form", ["full", "adapter"])
@pytest.mark.parametrize("name", variants.NAMES)
def test_the_card_of_a_variant(name, form, monkeypatch):
    encoder, decoder = variants.parse(name)
    repo_id = "org/" + ("Llama-" if decoder.gated else "") + name
    card = model_card(full_size(name), name=name, repo_id=repo_id, form=form)

    with HubServer() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        card.validate()
        assert hub.log == ["POST /api/validate-yaml"]
    metadata = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), flags=re.S)[1])
    assert ModelCardData(**metadata).to_dict() == metadata == ModelCard(str(card)).data.to_dict()
    assert metadata["base_model"] == [encoder.hub_id, decoder.hub_id]
    assert metadata["base_model_relation"] == {"full": "merge", "adapter": "adapter"}[form]
    assert metadata["pipeline_tag"] == "image-text-to-text"
    assert metadata["library_name"] == "transformers"
    assert metadata["language"] == "en"
    assert metadata["datasets"] == ["LucasFang/FLUX-Reason-6M"]
    assert set(metadata["metrics"]) <= set(importlib.import_module("granulon_hf.evaluation.benchmark").METRICS)
    assert "granulon" in metadata["tags"]
    assert metadata["license"] in LICENSES
    if metadata["license"] == "other":
        assert re.fullmatch(r"[a-z0-9.-]+", metadata["license_name"])
        assert metadata["license_link"].startswith("https://")
    else:
        assert not {"license_name", "license_link"} & set(metadata)

    for part in (encoder, decoder):  # a gate is a licence that binds whoever passes the weights on
        assert not (part.gated and metadata["license"] in ("apache-2.0", "mit"))
    assert ("Built with Llama" in card.text) == name.endswith("llama3.2")
    assert ("controller" in prose_of(card)) == name.startswith("granulon")
    assert ("backbones are not in this repository" in card.text) == (form == "adapter")
    assert "Not evaluated yet." in card.text
    assert "model-index" not in metadata
    assert repo_id in card.text
    assert len(re.findall(r"\n\n## ", card.text)) == len(re.findall(r"^## ", card.text, flags=re.M)) == 6
    assert "path/to" not in card.text


@pytest.mark.parametrize("named", [True, False])
def test_the_widget_is_a_conversation_about_a_picture(named):
    """As the Hub's chat API takes it, which is what the page of an image-text-to-text model sends."""
    name = "granulon-qwen2.5"
    card = ModelCard(str(model_card(full_size(name), name=name if named else None, repo_id="org/x")))
    assert card.data.pipeline_tag == "image-text-to-text"
    assert len(card.data.to_dict()["widget"]) >= 1
    for example in card.data.to_dict()["widget"]:
        assert isinstance(example["example_title"], str)
        (message,) = map(ChatCompletionInputMessage.parse_obj_as_instance, example["messages"])
        assert message.role == "user"
        chunks = {chunk.type: chunk for chunk in message.content}
        assert set(chunks) == {"image_url", "text"}
        assert chunks["image_url"].image_url.url.startswith("https://")
        assert chunks["text"].text.endswith("?")


@pytest.mark.parametrize(
    ("form", "tuned", "relation"),
    [("full", False, "merge"), ("full", True, "finetune"), ("adapter", False, "adapter"), ("adapter", True, "adapter")],
)
def test_the_relation_to_the_backbones(form, tuned, relation):
    source = {"vision": {"name": "facebook/dinov2-large"}, "text": {"name": "Qwen/Qwen2.5-1.5B-Instruct"}}
    card = model_card(full_size("dinov2-qwen2.5"), form=form, backbones=source, tuned=tuned)
    assert card.data.to_dict()["base_model_relation"] == relation
    assert card.data.base_model == [part["name"] for part in source.values()]
    assert "base_model_relation" not in model_card(full_size("dinov2-qwen2.5"), form=form, tuned=tuned).data.to_dict()


@pytest.mark.parametrize("name", variants.NAMES)
def test_data_files_agree_with_the_variants(name):
    encoder, decoder = variants.parse(name)
    data = card_data(name)
    assert [data["parts"][part]["id"] for part in ("vision", "text")] == data["metadata"]["base_model"]
    assert data["parts"]["text"]["hidden_size"] == WIDTH[name.rpartition("-")[2]]
    licences = {data["parts"][part]["licence"] for part in ("vision", "text")}
    assert (data["metadata"]["license"] == "apache-2.0") == (licences == {"Apache-2.0"})
    assert ("dinov3-license" in str(data["metadata"].get("license_name"))) == (encoder.hub_id.startswith("facebook/dinov3"))
    llama = data["metadata"]["license"] + str(data["metadata"].get("license_name"))
    assert ("llama3.2" in llama) == decoder.gated == data["title"].startswith("Llama") == ("notice" in data)


@pytest.mark.parametrize("name", variants.NAMES)
def test_recipes_train_that_variant(name):
    parse = pytest.importorskip("granulon_hf.training.arguments").parse
    file, *options = card_data(name)["recipe"].split()
    model, _, args = parse([str(Path(__file__).parents[2] / file), *options, "--use_cpu", "true"])
    assert model.variant == name and args.output_dir == f"runs/{name}"


def test_the_recipe_in_the_card_is_that_of_the_training_arguments():
    arguments = pytest.importorskip("granulon_hf.training.arguments").RecipeArguments
    from granulon_hf.data import ADAPTERS

    fields = {name: field.default for name, field in arguments.__dataclass_fields__.items()}
    text = prose_of(model_card(full_size("granulon-qwen2.5"), name="granulon-qwen2.5"))
    assert f"learning rate {fields['learning_rate']:.0e}".replace("e-0", "e-") in text
    assert f"{fields['num_train_epochs']:g} epochs" in text
    assert f"{fields['warmup_steps']:.0%}".replace("%", " % warm-up") in text
    assert f"weight decay {fields['weight_decay']:g}" in text
    assert f"{fields['per_device_train_batch_size']} per device" in text
    assert fields["lr_scheduler_type"] in text
    assert fields["auto_precision"]
    assert f"{ADAPTERS['flux-reason'].paper['train']:,} rows" in text


@pytest.mark.parametrize("name", ["granulon-qwen2.5", "clip-llama3.2"])
def test_the_code_in_the_card_runs(name, build, picture, tmp_path, capsys):
    model, processor = build(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    picture.save(tmp_path / "photo.jpg")
    card = model_card(model.config, repo_id="org/Llama-model")
    used, remote = code_of(card)
    used = used.replace("org/Llama-model", str(tmp_path)).replace("photo.jpg", str(tmp_path / "photo.jpg"))
    exec(compile(used, "card", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= (2 if name.startswith("granulon") else 1)
    for node in ast.walk(ast.parse(remote)):
        if isinstance(node, ast.ImportFrom):
            assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names)
    assert remote.count("trust_remote_code=True") == 2


def test_scores_are_those_of_this_model():
    card = model_card(full_size("granulon-qwen2.5"), name="granulon-qwen2.5", repo_id="org/granulon-qwen2.5", results=RESULTS)
    metadata = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), flags=re.S)[1])
    title, found = model_index_to_eval_results(metadata["model-index"])
    assert title == "granulon-qwen2.5"
    scores = {(result.dataset_name, result.metric_type): result for result in found}
    assert set(scores) == {("a-okvqa", "recall"), ("a-okvqa", "judge"), ("mine", "exact")}
    assert scores["a-okvqa", "recall"].metric_value == pytest.approx(43.75)
    assert scores["a-okvqa", "judge"].metric_value == pytest.approx(37.5)
    assert scores["a-okvqa", "judge"].metric_args["samples"] == 2
    assert scores["mine", "exact"].metric_value == pytest.approx(66.67, abs=0.005)
    assert scores["a-okvqa", "recall"].dataset_type == "HuggingFaceM4/A-OKVQA"
    assert metadata["model-index"] == eval_results_to_model_index(title, found)
    low, high = scores["a-okvqa", "recall"].metric_args["interval_95"]
    draws = np.random.default_rng(1).choice([0.0, 25.0, 50.0, 100.0], size=(20_000, 4)).mean(1)
    plain = np.percentile(draws, [2.5, 97.5])  # of four samples these are too close, as intervals of a normal variable are
    assert 0 <= low < plain[0] and plain[1] < high <= 100
    assert metadata["metrics"] == ["recall", "judge", "exact"]
    assert "| 43.8 [" in card.text
    assert "granulon eval run --model granulon-qwen2.5 --data a-okvqa" in card.text
    assert "Not evaluated" not in card.text
    assert "/home/" not in str(card)


def test_the_folder_that_was_evaluated_finds_its_scores():
    """`eval run --model demo --model runs/mine`, then `push runs/mine`: whatever the repository is called."""
    card = model_card(full_size("granulon-qwen2.5"), repo_id="org/granulon-qwen2.5", results=RESULTS, source="runs/other")
    _, found = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert {result.metric_value for result in found} == {100.0}


def test_figures_of_the_paper_are_the_papers():
    name = "granulon-qwen2.5"
    card = model_card(full_size(name), name=name, results=RESULTS)
    assert "57.13" in card.text
    assert "the paper's own figure" in card.text
    assert "57.13" not in card.data.to_yaml()
    assert "57.13" not in model_card(full_size(name), name=name).text
    unnamed = {**RESULTS, "models": [name]}
    assert "57.13" not in model_card(full_size(name), results=unnamed).text


def test_a_recorded_command_is_shown():
    name = "granulon-qwen2.5"
    results = {**RESULTS, "command": "granulon eval run suite.yaml --limit 4"}
    assert "\ngranulon eval run suite.yaml --limit 4\n" in model_card(full_size(name), name=name, results=results).text


def test_a_model_without_a_name_gets_only_what_its_config_tells():
    config = full_size("granulon-qwen2.5")
    config.granularity_levels = [{"name": "only", "alpha": 3, "beta": 7, "gamma": 0.5}]
    config.default_granularity = "only"
    card = model_card(config, repo_id="me/mine")
    assert card.data.license == "unknown"
    assert not {"base_model", "datasets", "metrics"} & set(card.data.to_dict())
    assert "# mine\n" in card.text
    assert "| only | 3 × 3 | 7 | 0.5 |" in card.text
    assert "dinov3" in card.text
    assert "qwen2" in card.text
    assert "200,000" not in card.text

    source = {"vision": {"name": "facebook/dinov2-large", "revision": "abc"}, "text": {"name": "Qwen/Qwen2.5-1.5B-Instruct"}}
    card = model_card(config, backbones=source)
    assert card.data.base_model == ["facebook/dinov2-large", "Qwen/Qwen2.5-1.5B-Instruct"]
    assert card.data.license == "apache-2.0"
    config.backbones = source
    assert model_card(config).data.base_model == card.data.base_model
    source["vision"]["name"] = "timm/vit_large_patch16_dinov3.lvd1689m"
    assert model_card(config).data.license_name == "dinov3-license"
    source["vision"]["name"] = "/home/somebody/tower"
    card = model_card(config)
    assert card.data.license == "unknown"
    assert "/home/" not in str(card)


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("name", [name for name in variants.NAMES if name.startswith("granulon")])
def test_the_card_says_what_the_language_model_sees(name, reducer):
    config = full_size(name)
    config.reducer = reducer
    text = prose_of(model_card(config, name=name, repo_id="org/Llama-x"))
    compact = "compact" in name
    assert ("compact form" in text) == compact == ("visual_tokens=" in text)
    assert ("join the pixel tokens" in text) == ("196 pixel tokens" in text) == (not compact)
    assert ("clustered" in text) == (reducer == "adata")
    assert ("and the reducer;" in text) == (reducer in ("queries", "region-attention"))
    (row,) = re.findall(r"^\| fine \|.*$", text, flags=re.M)
    values = ["1 × 1"] * (reducer == "adata") + ["64" if compact else "20", "1.0"]
    assert row == f"| {' | '.join(['fine', *values])} |"


@pytest.mark.parametrize("name", variants.NAMES)
def test_a_toy_is_not_taken_for_the_variant(name):
    model, _ = build_tiny(name)
    card = model_card(model.config, name=name, repo_id="org/toy")
    assert f"`{name}` at another size: its language model is 32 wide, not {WIDTH[name.rpartition('-')[2]]}" in card.text
    assert card.data.license == "unknown"
    assert not {"base_model", "datasets", "metrics"} & set(card.data.to_dict())
    assert "Built with Llama" not in card.text
    assert "200,000" not in card.text


def test_the_licence_asks_for_a_name():
    config = full_size("clip-llama3.2")
    with pytest.warns(UserWarning, match="'Llama'.* 'clip'"):
        model_card(config, name="clip-llama3.2", repo_id="org/clip")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "dinov2-qwen2.5"}, "vision tower 'dinov3_vit' instead of 'dinov2'"),
        ({"name": "granulon-llama3.2"}, "language model 'qwen2' instead of 'llama'"),
        ({"name": "dinov3-qwen2.5"}, r"'pixel\+semantic' instead of 'pixel'"),
        ({"name": "granulon-compact-qwen2.5"}, "instead of 'semantic'"),
        ({"name": 'x"\n---\n<b>'}, "Unknown variant"),
        ({"repo_id": 'org/"x"'}, "not a name of a repository"),
        ({"repo_id": "org/x\n---\n"}, "not a name of a repository"),
        ({"repo_id": "org/<script>"}, "not a name of a repository"),
        ({"form": "lora"}, "'full' or 'adapter'"),
        ({"results": RESULTS}, "say which is this model"),
        ({"results": {"a": 1}}, r"no scores\.json"),
        ({"results": {"models": ["a"], "data": [], "scores": {"a": [1]}}}, r"no scores\.json"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        model_card(full_size("granulon-qwen2.5"), **arguments)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    "bad", ['a "b" c', "a\n---\nlicense: mit\n---\n", "<script>x</script>", "a|b `c` ```", "{{ 7 * 7 }}", ": - #"]
)
def test_hostile_words_stay_words(bad):
    config = full_size("granulon-qwen2.5")
    config.granularity_levels = [{"name": bad, "alpha": 1, "beta": 2, "gamma": 1.0}]
    config.default_granularity = bad
    data = bad.replace("/", "")
    results = {"models": [bad], "data": [data], "scores": {bad: {data: {"recall": [1.0, 0.0]}}}}
    card = model_card(config, results=results, backbones={"vision": {"name": bad}, "text": {"name": bad}})
    again = ModelCard(str(card))
    assert again.data.license == "unknown"
    assert again.data.eval_results[0].dataset_name == data
    assert "base_model" not in again.data.to_dict()
    assert "<script>" not in prose_of(again)
    assert "49" not in prose_of(again)
    headings = re.findall(r"^## .*$", again.text, flags=re.M)
    assert headings == [f"## {x}" for x in ("Use", "Training", "Evaluation", "Limits and risks", "Licence", "Citation")]
    cells = [line for line in again.text.splitlines() if "recall" in line and line.startswith("|")]
    assert len(cells) == 1
    assert len(re.findall(r"(?<!\\)\|", cells[0])) == 5


# --- the other cards --------------------------------------------------------------------------------------------------

COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


@pytest.mark.parametrize("path", [FOLDER / "demo_space.md", Path(granulon_hf.__file__).parent / "judge" / "README.md"])
def test_cards_of_spaces(path):
    card = SpaceCard(path.read_text(encoding="utf-8"))
    metadata = card.data.to_dict()
    assert metadata["sdk"] == "gradio"
    assert metadata["app_file"] == "app.py"
    assert metadata["license"] in LICENSES - {"other"}
    assert {metadata["colorFrom"], metadata["colorTo"]} <= COLOURS
    assert len(metadata.get("short_description", "")) <= 60
    for model in metadata.get("models", []):
        validate_repo_id(model)
        assert "/" in model
    for code in code_of(card):
        ast.parse(code)


def test_the_card_of_the_judge_is_that_of_a_metric():
    folder = Path(granulon_hf.__file__).parent / "judge"
    card = SpaceCard((folder / "README.md").read_text(encoding="utf-8"))
    assert {"evaluate", "metric"} <= set(card.data.tags)
    assert card.data.to_dict()["description"]
    assert (folder / card.data.app_file).exists()
    called = next(node for node in ast.walk(ast.parse(code_of(card)[0])) if isinstance(node, ast.Call) and node.keywords)
    judge = pytest.importorskip("granulon_hf.judge.judge")
    accepted = {field.name for field in dataclasses.fields(judge.Options)} | set(judge.Judge().features)
    assert {keyword.arg for keyword in called.keywords} <= accepted


def test_cards_of_data_sets_have_a_head():
    for path in FOLDER.glob("*.md"):
        if path.name != "demo_space.md":
            assert DatasetCard(path.read_text(encoding="utf-8")).data.to_dict(), path
