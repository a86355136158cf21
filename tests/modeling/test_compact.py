"""The compact form: the language model sees semantic tokens alone, of any reducer and any budget."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, DynamicCache, GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from granulon_hf import GranulonConfig, GranulonForConditionalGeneration, GranulonProcessor
from granulon_hf.modeling.reducers_granulon import REDUCERS
from granulon_hf.training.stages import save_adapter, set_stage
from tests.conftest import make_conversation, make_inputs, make_picture
from tests.modeling.test_modeling import language_model_of, removed
from tests.modeling.test_packing import assert_equal, make_batch, pack

LEVELS = [{"name": name, "alpha": 1, "beta": beta, "gamma": 1.0} for name, beta in (("few", 2), ("some", 9), ("many", 20))]
CONVERSATIONS = [
    make_conversation("What is it?", [make_picture(1)]),
    make_conversation("How many small red objects are in the top left corner?", [make_picture(2), make_picture(3)]),
    make_conversation("Describe the image in detail.", [make_picture(4)]),
]
MIXED = ["many", "few", "some"]


@pytest.fixture
def compact(build):
    def make(reducer="adata", name="granulon-compact-qwen2.5", **options):
        return build(name, reducer=reducer, granularity_levels=LEVELS, **options)

    return make


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "choice", [{}, {"granularity": MIXED}, {"visual_tokens": 5}, {"visual_tokens": torch.tensor([1, 20, 7])}]
)
@pytest.mark.parametrize("reducer", REDUCERS)
@torch.no_grad()
def test_logits_are_as_if_pixel_tokens_and_empty_slots_were_not_there(compact, reducer, choice, side):
    model, processor = compact(reducer)
    inputs = make_inputs(processor, CONVERSATIONS, side=side)
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [20, 40, 20]
    outputs = model(**inputs, **choice)
    _, keep, embeds = removed(
        model, inputs | {name: choice[name] for name in choice if name != "granularity"}, choice.get("granularity")
    )
    oracle = language_model_of(model)
    for i, one in enumerate(embeds):
        torch.testing.assert_close(outputs.logits[i][keep[i]], oracle(inputs_embeds=one).logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
@torch.no_grad()
def test_generation_is_as_if_empty_slots_were_removed(compact, options):
    model, processor = compact()
    inputs = make_inputs(processor, CONVERSATIONS)
    _, _, embeds = removed(model, inputs, MIXED)
    oracle = language_model_of(model)
    common = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, disable_compile=True)
    lengths: list[int] = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    whole = model.generate(**inputs, granularity=MIXED, **common, **options)
    assert torch.equal(whole[:, : inputs["input_ids"].shape[1]].unique_consecutive(dim=0), inputs["input_ids"])
    assert lengths[0] == max(one.shape[1] for one in embeds)  # what is empty costs nothing
    kept = model.generate(**inputs, granularity=MIXED, **common, **options, return_dict_in_generate=True)
    assert torch.equal(kept.sequences, whole)  # where the cache comes out, its entries are those of the prompt
    actual = whole[:, inputs["input_ids"].shape[1] :]
    for i, one in enumerate(embeds):
        mask = torch.ones(one.shape[:2], dtype=torch.long)
        expected = oracle.generate(inputs_embeds=one, attention_mask=mask, **common, num_beams=options.get("num_beams", 1))
        assert torch.equal(actual[i], expected[0]), f"sample {i}"


@pytest.mark.parametrize(
    "option",
    [
        lambda prompt: {"stopping_criteria": [lambda ids, scores, **_: torch.full((3,), ids.shape[1] - prompt >= 2)]},
        lambda prompt: {
            "logits_processor": [lambda ids, scores: scores + (ids.shape[1] == prompt + 1) * torch.arange(scores.shape[1])]
        },
        lambda prompt: {"prefix_allowed_tokens_fn": lambda row, ids: [300 + len(ids) - prompt]},
        lambda prompt: {"generation_config": GenerationConfig(max_new_tokens=6, min_length=prompt + 5, pad_token_id=0)},
        lambda prompt: {"position_ids": 3 * torch.arange(prompt).expand(3, -1)},
        lambda prompt: {"cache": DynamicCache()},
        lambda prompt: {"min_length": prompt + 5},
        lambda prompt: {"output_logits": True, "return_dict_in_generate": True},
    ],
)
@torch.no_grad()
def test_whoever_sees_the_prompt_sees_the_whole_prompt(compact, option):
    model, processor = compact()
    inputs = make_inputs(processor, CONVERSATIONS)
    given = option(inputs["input_ids"].shape[1])
    common = dict(granularity=MIXED, do_sample=False, **({} if "generation_config" in given else {"max_new_tokens": 6}))
    actual = model.generate(**inputs, **common, **given)
    again = option(inputs["input_ids"].shape[1])
    expected = super(GranulonForConditionalGeneration, model).generate(**inputs, **common, **again)
    if "return_dict_in_generate" in given:
        actual, expected = actual.sequences, expected.sequences
    assert torch.equal(actual, expected)


@torch.no_grad()
def test_images_whose_empty_slots_are_hidden_already(compact):
    model, processor = compact()
    inputs = make_inputs(processor, CONVERSATIONS)
    images = model.encode_images(**{k: v for k, v in inputs.items() if k != "mm_token_type_ids"})
    bare = BaseModelOutputWithPooling(pooler_output=images.pooler_output)
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert (
        model.generate(**prompt, mm_encoder_outputs={"image": bare}, max_new_tokens=4).shape[1] > prompt["input_ids"].shape[1]
    )


@torch.no_grad()
def test_a_budget_of_the_call(compact):
    """A level, the same number of tokens, and as many placeholders and no more: three ways to one answer."""
    model, processor = compact()
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    inputs = make_inputs(processor, CONVERSATIONS)
    short = make_inputs(processor, CONVERSATIONS, visual_tokens=9)
    assert short["visual_tokens"] == 9
    assert (short["input_ids"] == model.config.image_token_id).sum(1).tolist() == [9, 18, 9]
    answers = [
        model.generate(**inputs, granularity="some", **options),
        model.generate(**inputs, visual_tokens=9, **options),
        model.generate(**inputs, visual_tokens=[9, 9, 9], **options),
        model.generate(**short, **options),
    ]
    assert all(torch.equal(answer[:, -6:], answers[0][:, -6:]) for answer in answers)
    assert model(**short).granularity.tolist() == [-1, -1, -1]
    assert model.aggregate(inputs["pixel_values"], visual_tokens=9).keep.sum(1).tolist() == [9] * 4


@pytest.mark.parametrize("reducer", ["adata", "pool", "question-dpp", "queries"])
@pytest.mark.parametrize(
    "choice", [{}, {"granularity": ["few", None, "many", "some"]}, {"visual_tokens": torch.tensor([3, 8, 1, 20])}]
)
def test_packed_as_padded(compact, reducer, choice):
    model, processor = compact(reducer)
    batch = make_batch(processor)
    batch["labels"][batch["input_ids"] == model.config.image_token_id] = -100
    assert_equal(model, batch, pack(batch), **choice)


def test_more_tokens_than_a_level_has(build):
    """Of the slots, not of the levels: what a call may ask for."""
    model, processor = build(num_semantic_tokens=30)
    keep = model.aggregate(make_inputs(processor, CONVERSATIONS)["pixel_values"], visual_tokens=30).keep
    assert keep.sum(1).tolist() == [30] * 4


def test_the_paper_form_takes_budgets_and_reducers(build):
    model, processor = build(reducer="pool")
    inputs = make_inputs(processor, CONVERSATIONS)
    slots = 36 + 20
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [slots, 2 * slots, slots]
    keep = model(**inputs, visual_tokens=torch.tensor([4, 9, 16])).image_outputs.slot_mask
    assert keep.sum(1).tolist() == [36 + 4, 36 + 9, 36 + 9, 36 + 16]


@pytest.mark.parametrize("reducer", ["adata", "queries", "region-attention"])
@pytest.mark.parametrize("form", ["whole", "adapter"])
@torch.no_grad()
def test_save_and_load(compact, reducer, form, tmp_path):
    model, processor = compact(reducer)
    inputs = make_inputs(processor, CONVERSATIONS)
    expected = model(**inputs).logits
    if form == "whole":
        model.save_pretrained(tmp_path / "model")
    else:
        (tmp_path / "model").mkdir()
        model.model.vision_tower.save_pretrained(tmp_path / "vision")
        text = language_model_of(model)
        text.save_pretrained(tmp_path / "text")
        model.config.backbones = {"vision": {"name": str(tmp_path / "vision")}, "text": {"name": str(tmp_path / "text")}}
        set_stage(model, "projector")
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert any("reducer" in name for name in trained) == (reducer != "adata")
        save_adapter(tmp_path / "model", model)
        held = load_file(tmp_path / "model" / "adapter.safetensors")
        assert {f"model.{name}" for name in held} >= trained
    processor.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    again = GranulonProcessor.from_pretrained(tmp_path / "model")
    assert (loaded.config.visual_tokens, loaded.config.reducer, again.visual_tokens) == ("semantic", reducer, "semantic")
    assert torch.equal(loaded(**make_inputs(again, CONVERSATIONS)).logits, expected)


def test_assembled_from_backbones(compact, tmp_path):
    """Reducers with weights get them, and the same where the model is built at once."""
    model, _ = compact("queries")
    text = language_model_of(model)
    fresh = GranulonForConditionalGeneration.from_backbones(model.config, model.model.vision_tower, text)
    assert all(value.isfinite().all() and not value.is_meta for value in fresh.model.reducer.state_dict().values())
    assert fresh.model.reducer.queries.std() > 0


def test_a_reducers_weights_are_never_random(compact, tmp_path):
    model, _ = compact("queries")
    model.config.reducer = "adata"
    lacking = {name: value for name, value in model.state_dict().items() if ".reducer." not in name}
    model.save_pretrained(tmp_path, state_dict=lacking)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"reducer": "queries"}))
    with pytest.raises(ValueError, match="reducer"):
        GranulonForConditionalGeneration.from_pretrained(tmp_path)


def test_low_rank_training_reaches_projector_and_reducer(compact):
    model, processor = compact("region-attention")
    set_stage(model, "projector+lora")
    batch = make_batch(processor)
    model(**batch, granularity="some").loss.backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("reducer" in name for name in names) and any("lora" in name for name in names)


# --- configuration ----------------------------------------------------------------------------------------------------


def test_defaults_of_each_form():
    paper, compact, plain = (GranulonConfig(visual_tokens=form) for form in ("pixel+semantic", "semantic", "pixel"))
    assert (paper.num_semantic_tokens, paper.slot_position, len(paper.granularity_levels)) == (20, "none", 3)
    assert (compact.num_semantic_tokens, compact.slot_position) == (64, "semantic")
    assert [level["alpha"] for level in compact.granularity_levels] == [1, 1, 1]
    assert plain.granularity_levels == []
    assert GranulonConfig(granularity_levels=[]).visual_tokens == "pixel"


@pytest.mark.parametrize(
    "fields",
    [
        {"visual_tokens": "semantic", "slot_position": "none", "num_semantic_tokens": 20},
        {"visual_tokens": "semantic", "reducer": "pool"},
        {"visual_tokens": "pixel"},
        {},
    ],
)
def test_round_trip(fields, tmp_path):
    config = GranulonConfig(**fields)
    config.save_pretrained(tmp_path)
    again = GranulonConfig.from_pretrained(tmp_path)
    for name in ("visual_tokens", "reducer", "slot_position", "num_semantic_tokens", "granularity_levels"):
        assert getattr(again, name) == getattr(config, name)


def test_a_config_of_before_means_the_paper_form(tmp_path):
    GranulonConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in values.items() if name not in ("visual_tokens", "reducer")}))
    config = GranulonConfig.from_pretrained(tmp_path)
    assert (config.visual_tokens, config.reducer, config.slot_position) == ("pixel+semantic", "adata", "none")


@pytest.mark.parametrize(
    "fields",
    [
        {"visual_tokens": "semantic", "granularity_levels": []},
        {"visual_tokens": "pixel", "granularity_levels": LEVELS},
        {"visual_tokens": "semantic", "pixel_loss_weight": 0.1},
        {"visual_tokens": "pixels"},
        {"reducer": "kmeans"},
    ],
)
def test_configs_that_are_refused(fields):
    with pytest.raises(Exception, match=r"visual_tokens|reducer"):
        GranulonConfig(**fields)


# --- calls that are refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice",
    [
        {"visual_tokens": 0},
        {"visual_tokens": 21},
        {"visual_tokens": 2.5},
        {"visual_tokens": [3, 4]},
        {"visual_tokens": [3, 4, 99]},
        {"visual_tokens": 4, "granularity": "few"},
    ],
)
def test_budgets_that_are_refused(compact, choice):
    model, processor = compact()
    inputs = make_inputs(processor, CONVERSATIONS)
    with pytest.raises(ValueError, match="visual_tokens"):
        model(**inputs, **choice)
    with pytest.raises(ValueError, match="visual_tokens"):
        model.generate(**inputs, **choice, max_new_tokens=1)


@pytest.mark.parametrize("count", [0, 21])
def test_placeholders_that_are_refused(compact, count):
    with pytest.raises(ValueError, match="visual_tokens"):
        make_inputs(compact()[1], CONVERSATIONS, visual_tokens=count)


def test_a_model_of_pixel_tokens_takes_no_budget(build):
    model, processor = build("dinov3-qwen2.5")
    with pytest.raises(ValueError, match="visual_tokens"):
        model(**make_inputs(processor, CONVERSATIONS), visual_tokens=4)


@pytest.mark.parametrize("stream", ["pixel", "semantic"])
def test_one_stream_has_no_other(compact, stream):
    model, processor = compact()
    with pytest.raises(ValueError, match="visual_stream"):
        model(**make_inputs(processor, CONVERSATIONS), visual_stream=stream)


@pytest.mark.parametrize("form", ["semantic", "pixel+semantic"])
def test_a_processor_of_the_other_form_is_refused(compact, build, form):
    model, _ = compact() if form == "semantic" else build()
    _, processor = build() if form == "semantic" else compact()
    with pytest.raises((ValueError, RuntimeError), match="slots"):
        model(**make_inputs(processor, CONVERSATIONS))


@pytest.mark.parametrize(
    "reducer", ["adata", *(pytest.param(name, marks=pytest.mark.slow) for name in REDUCERS if name != "adata")]
)
@torch.no_grad()
def test_compiles_whole_and_once_for_all_budgets(compact, reducer):
    """One graph for levels and one for budgets: which is data, and nothing breaks the graph."""
    model, processor = compact(reducer)
    inputs = make_inputs(processor, CONVERSATIONS)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for name, values in (("granularity", ([0, 1, 2], [2, -1, 0])), ("visual_tokens", ([3, 9, 20], [20, 1, 5]))):
        for value in values:
            choice = {name: torch.tensor(value), "use_cache": False}
            torch.testing.assert_close(compiled(**inputs, **choice).logits, model(**inputs, **choice).logits, atol=1e-5, rtol=0)
    assert len(graphs) == 2
