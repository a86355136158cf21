"""The controller reads the question and nothing else."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from granulon_hf.modeling.controller_granulon import first_block_states
from tests.conftest import make_conversation, make_inputs, make_picture

QUESTION = "How many small red objects are in the top left corner?"


def probs(model, inputs):
    with torch.no_grad():
        return model(**inputs).granularity_probs


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)  # the fixture amplifies rounding 100-fold


@pytest.fixture(params=["granulon-qwen2.5", "granulon-llama3.2"])
def setup(request, build):
    model, processor = build(request.param)
    alone = probs(model, make_inputs(processor, make_conversation(QUESTION, [make_picture(0)])))
    other = probs(model, make_inputs(processor, make_conversation("What is it?", [make_picture(0)])))
    assert (alone - other).abs().max() > 1e-3, "the test would see nothing"
    return model, processor, alone


def test_not_changed_by_the_answer(setup):
    model, processor, alone = setup
    for answer in ("Two.", "There are three of them, next to the house; " * 4, QUESTION):
        inputs = make_inputs(processor, make_conversation(QUESTION, [make_picture(0)], answer), generate=False)
        assert_same(probs(model, inputs), alone)


def test_without_a_question_mask_the_labels_keep_the_answer_out(setup):
    model, processor, _ = setup
    seen = []
    for answer in ("Two.", "Two objects."):
        inputs = make_inputs(processor, make_conversation(QUESTION, [make_picture(0)], answer), generate=False)
        prompt = make_inputs(processor, make_conversation(QUESTION, [make_picture(0)]))["input_ids"].shape[1]
        del inputs["question_mask"]
        labels = inputs["input_ids"].clone()
        labels[:, :prompt] = -100
        seen.append(model(**inputs, labels=labels).granularity_probs)
    assert_same(seen[0], seen[1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_not_changed_by_padding(setup, side):
    model, processor, alone = setup
    for extra in ("Why?", "Describe the whole image in detail, please. " * 5):
        conversations = [make_conversation(QUESTION, [make_picture(0)]), make_conversation(extra, [make_picture(1)])]
        assert_same(probs(model, make_inputs(processor, conversations, side=side))[:1], alone)
    padded = make_inputs(
        processor, [make_conversation(QUESTION, [make_picture(0)])], side=side, padding="max_length", max_length=200
    )
    assert padded["input_ids"].shape[1] == 200
    assert_same(probs(model, padded), alone)


def test_not_changed_by_the_images(setup):
    model, processor, alone = setup
    for images in ([make_picture(5)], [make_picture(6), make_picture(7), make_picture(8)]):
        assert_same(probs(model, make_inputs(processor, make_conversation(QUESTION, images))), alone)
    text_only = make_inputs(processor, make_conversation(QUESTION))
    with torch.no_grad():
        assert_same(model.get_granularity_probs(text_only["input_ids"], question_mask=text_only["question_mask"]), alone)


def test_several_turns_use_the_last_user_turn(setup):
    model, processor, alone = setup
    first = make_conversation("What is it?", [make_picture(0)], "A house.")
    assert_same(probs(model, make_inputs(processor, [*first, *make_conversation(QUESTION)])), alone)
    system = [{"role": "system", "content": [{"type": "text", "text": "Answer briefly."}]}]
    assert_same(probs(model, make_inputs(processor, [*system, *make_conversation(QUESTION, [make_picture(0)])])), alone)


def test_the_formula_in_numpy(build):
    model, processor = build()
    controller = model.model.controller
    tokens = processor.tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(tokens)
        actual = model.get_granularity_probs(tokens)[0].numpy()
        # E1 by the whole decoder, asked for its hidden states: [1] is the output of the first block.
        states = model.model.language_model(inputs_embeds=embeds, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(
            first_block_states(model.model.language_model, embeds, torch.ones_like(tokens).bool()), states
        )
    parameters = {name: value.detach().double().numpy() for name, value in controller.named_parameters()}
    h = parameters["in_proj.weight"] @ (1 / (1 + np.exp(-states[0].double().numpy().mean(0))))
    z = parameters["fc1.weight"] @ h + parameters["fc1.bias"]
    gelu = 0.5 * z * (1 + torch.erf(torch.from_numpy(z) / 2**0.5).numpy())
    logits = parameters["fc2.weight"] @ gelu + parameters["fc2.bias"]
    np.testing.assert_allclose(actual, np.exp(logits) / np.exp(logits).sum(), atol=1e-5)


@pytest.mark.parametrize("decoder", ["qwen2", "qwen3", "llama", "mistral", "smollm3", "phi3"])
@torch.no_grad()
def test_first_block_of_other_decoders(decoder):
    """Against the whole decoder's hidden states; with padding between, which must not matter."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = AutoConfig.for_model(decoder, **sizes, num_key_value_heads=2, pad_token_id=0)
    model = AutoModel.from_config(config).eval()
    ids = torch.randint(1, 64, (2, 9))
    expected = model(ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(first_block_states(model, model.embed_tokens(ids), torch.ones_like(ids).bool()), expected)
    spread = torch.zeros(2, 18, dtype=torch.long)
    spread[:, ::2] = ids
    states = first_block_states(model, model.embed_tokens(spread), (spread > 0))
    torch.testing.assert_close(states[:, ::2], expected)


def test_no_question_gives_the_default_level(build):
    model, processor = build(default_granularity="fine")
    inputs = make_inputs(processor, make_conversation(QUESTION, [make_picture(0)]))
    inputs["question_mask"] = torch.zeros_like(inputs["question_mask"])
    assert model(**inputs).granularity.tolist() == [2]


def test_a_question_mask_of_another_length_is_refused(build):
    model, processor = build()
    inputs = make_inputs(processor, make_conversation(QUESTION, [make_picture(0)]))
    for mask in (inputs["question_mask"][:, :-3], inputs["question_mask"][:, :1]):
        with pytest.raises(ValueError, match="question_mask"):
            model(**inputs | {"question_mask": mask})


def test_training_the_model_does_not_touch_the_controller(build):
    model, processor = build()
    inputs = make_inputs(processor, make_conversation(QUESTION, [make_picture(0)], "Two."), generate=False)
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is None for parameter in model.model.controller.parameters())


def test_the_controller_can_be_trained_on_its_own(build):
    model, processor = build()
    questions = ["What is it?", "How many dots are in the corner?", "Describe the image."]
    inputs = make_inputs(processor, [make_conversation(question) for question in questions])
    controller = model.model.controller.requires_grad_(True)
    optimizer = torch.optim.Adam(controller.parameters(), lr=1e-3)
    target = torch.eye(3)
    for _ in range(150):
        p = model.get_granularity_probs(inputs["input_ids"], inputs["attention_mask"], inputs["question_mask"])
        loss = -(target * p.clamp(min=1e-9).log()).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert p.argmax(-1).tolist() == [0, 1, 2]


def test_with_one_level_the_question_is_not_read(build):
    model, processor = build(granularity_levels=[{"name": "all", "alpha": 1, "beta": 4, "gamma": 1.0}])
    inputs = make_inputs(processor, make_conversation(QUESTION, [make_picture(0)]))
    blocks = []
    model.model.language_model.layers[0].register_forward_hook(lambda *_: blocks.append(1))
    outputs = model(**inputs)
    assert outputs.granularity.tolist() == [0] and outputs.granularity_probs.tolist() == [[1.0]]
    assert len(blocks) == 1  # the decoder's own; the controller ran none before it


def test_a_model_without_levels_has_no_controller(build):
    model, _ = build("clip-qwen2.5")
    with pytest.raises(ValueError, match="controller"):
        model.get_granularity_probs(torch.ones(1, 3, dtype=torch.long))


def assert_untrained(model, default):
    controller = model.model.controller
    assert type(controller.fc2) is torch.nn.Linear and not controller.fc2.weight.any()
    assert controller.fc2.bias.tolist() == [2.0 * (level == default) for level in model.config.level_names]
    assert controller.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("default", ["coarse", "middle", "fine"])
def test_a_new_controller_favors_the_default_level_however_the_model_is_made(build, default, tmp_path):
    model, _ = build(trained=False, default_granularity=default)
    assert_untrained(model, default)
    # A checkpoint without a controller, or with a part of one: what is there is kept.
    for kept in (0, 2):
        state = dict(model.state_dict())
        names = [name for name in state if name.startswith("model.controller.")]
        state = {name: value for name, value in state.items() if name not in names[kept:]}
        model.save_pretrained(tmp_path / str(kept), state_dict=state)
        loaded, info = type(model).from_pretrained(tmp_path / str(kept), output_loading_info=True)
        assert set(info["missing_keys"]) == set(names[kept:])
        assert_untrained(loaded, default)
        assert all(dict(loaded.named_parameters())[name].equal(value) for name, value in state.items())
    language = AutoModelForCausalLM.from_config(model.config.text_config)
    assert_untrained(type(model).from_backbones(model.config, model.model.vision_tower, language), default)


def test_a_trained_controller_is_loaded_to_the_bit(build, tmp_path):
    model, _ = build()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    expected = dict(model.model.controller.named_parameters())
    assert list(expected) == ["in_proj.weight", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert all(value.equal(expected[name]) for name, value in loaded.model.controller.named_parameters())


def test_what_is_no_number_chooses_no_level(build):
    model, processor = build()
    inputs = make_inputs(processor, make_conversation("What is it?", [make_picture(0)]))
    model.model.controller.fc2.bias.data[1] = float("nan")
    with pytest.raises(RuntimeError, match="controller"):
        model(**inputs)


# --- prices -----------------------------------------------------------------------------------------------------------


def test_each_price_has_its_own_choice(build):
    model, processor = build("granulon-compact-qwen2.5", controller_prices=[0.0, 0.01, 0.5])
    assert model.model.controller.fc2.out_features == 9
    inputs = make_inputs(processor, make_conversation("What is it?", [make_picture(1)]))
    with torch.no_grad():  # at each price another level, whatever the question
        model.model.controller.fc2.weight.zero_()
        model.model.controller.fc2.bias.copy_(torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]]).flatten())
        assert [model(**inputs, price=price).granularity.item() for price in (0.0, 0.01, 0.5, None)] == [2, 1, 0, 2]
        answers = [model.generate(**inputs, max_new_tokens=4, price=price) for price in (0.5, 0.01)]
        forced = [model.generate(**inputs, max_new_tokens=4, granularity=level) for level in ("coarse", "middle")]
    assert all(torch.equal(*pair) for pair in zip(answers, forced, strict=True))
    ids = inputs["input_ids"], inputs["attention_mask"], inputs["question_mask"]
    assert model.get_granularity_probs(*ids, price=0.01).argmax(-1).item() == 1
    chat = processor.apply_chat_template(
        make_conversation("What is it?", [make_picture(1)]), tokenize=True, return_dict=True, return_tensors="pt", price=0.01
    )
    assert model(**chat).granularity.item() == 1


@pytest.mark.parametrize("prices", [None, [0.0, 0.1]])
def test_prices_that_no_controller_was_trained_at(build, prices):
    model, processor = build(controller_prices=prices)
    inputs = make_inputs(processor, make_conversation("What is it?", [make_picture(1)]))
    for call in (model, lambda **kwargs: model.generate(**kwargs, max_new_tokens=1)):
        with pytest.raises(ValueError, match=r"price=0\.2"):
            call(**inputs, price=0.2)


def test_an_untrained_controller_takes_its_default_at_every_price(build):
    model, processor = build(trained=False, controller_prices=[0.0, 0.1])
    inputs = make_inputs(processor, make_conversation("What is it?", [make_picture(1)]))
    assert [model(**inputs, price=price).granularity.item() for price in (0.0, 0.1)] == [1, 1]
