"""The processor: slots per image, the question mask, the chat template, saving, and clear errors."""

import json
import pickle
import string
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoProcessor, PreTrainedTokenizerFast, TimmWrapperConfig
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from granulon_hf import GranulonProcessor, variants
from granulon_hf.modeling import processing_granulon
from granulon_hf.modeling.processing_granulon import make_chat_template, to_serializable
from granulon_hf.modeling.prompt_granulon import Prompt, encode_typed
from granulon_hf.modeling.reducers_granulon import REDUCERS
from tests.conftest import build_tiny, make_conversation, make_inputs, make_picture

MODELING = Path(processing_granulon.__file__).parent
QUESTION = "How many small red objects are in the corner?"


@pytest.fixture(params=["granulon-qwen2.5", "granulon-llama3.2"])
def processor(request):
    return build_tiny(request.param)[1]


def question_of(processor, inputs, row=0):
    return processor.tokenizer.decode(inputs["input_ids"][row][inputs["question_mask"][row].bool()])


@pytest.mark.parametrize("name", variants.NAMES)
def test_slots_per_image(name):
    model, processor = build_tiny(name)
    inputs = make_inputs(processor, make_conversation(QUESTION, [make_picture(0), make_picture(1)]))
    slots = (inputs["input_ids"] == model.config.image_token_id).sum().item()
    assert slots == 2 * (64 if "compact" in name else 36 + 20 if name.startswith("granulon") else 36)
    assert inputs["pixel_values"].shape[0] == 2
    tokens = processor._get_num_multimodal_tokens(image_sizes=[(100, 50)] * 2)
    assert tokens.num_image_tokens == [slots // 2] * 2


def offsets_of(processor, images, **choice):
    """What an engine asks of the processor: placeholders alone, and what becomes of each."""
    text = processor.image_token * len(images)
    inputs = processor(images=images, text=text, return_text_replacement_offsets=True, return_tensors="pt", **choice)
    return inputs, [len(one["replacement"]) // len(processor.image_token) for one in inputs["text_replacement_offsets"][0]]


LEVELS = [
    {"name": name, "alpha": a, "beta": b, "gamma": 1.0} for name, a, b in (("a", 4, 5), ("b", 5, 9), ("c", 1, 60), ("d", 2, 8))
]
CHOICES = ({}, *({"granularity": name} for name in "abcd"), *({"visual_tokens": number} for number in (1, 5, 8, 40)))
COUNTED = [name for name, reducer in REDUCERS.items() if reducer.fills]


@pytest.mark.parametrize("form", ["pixel+semantic", "semantic"])
@pytest.mark.parametrize("reducer", COUNTED)
def test_an_engine_gets_slots_that_are_filled(form, reducer):
    """As many placeholders as the model fills, and the model gives their slots alone; never an empty one."""
    fields = {"granularity_levels": LEVELS, "num_semantic_tokens": 40, "default_granularity": "d"}
    model, processor = build_tiny(visual_tokens=form, reducer=reducer, **fields)
    images = [make_picture(0), make_picture(1, (64, 96))]
    for choice in CHOICES:
        inputs, counts = offsets_of(processor, images, **choice)
        assert "question_mask" not in inputs and inputs["num_image_slots"].tolist() == counts
        kept = {name: inputs[name] for name in ("num_image_slots", "granularity", "visual_tokens") if name in inputs}
        features = model.model.get_image_features(inputs["pixel_values"], **kept)
        whole = model.model.get_image_features(inputs["pixel_values"], **choice)  # by the default level where none is given
        assert whole.slot_mask.sum(1).tolist() == counts
        for slots, all_slots, mask in zip(features.pooler_output, whole.pooler_output, whole.slot_mask.bool(), strict=True):
            torch.testing.assert_close(slots, all_slots[mask])
        most = processor._get_num_multimodal_tokens(image_sizes=[(9, 9)], **choice).num_image_tokens
        assert most == counts[:1] if choice else most >= counts[:1]


def test_an_engine_is_refused_what_cannot_be_counted(tmp_path):
    for reducer in set(REDUCERS) - set(COUNTED):
        _, processor = build_tiny("granulon-compact-qwen2.5", reducer=reducer)
        with pytest.raises(ValueError, match=reducer):
            offsets_of(processor, [make_picture(0)])
    _, processor = build_tiny()
    for choice in (
        {"granularity": "corse"},
        {"visual_tokens": 21},
        {"visual_tokens": 0},
        {"granularity": "fine", "visual_tokens": 5},
    ):
        with pytest.raises(ValueError, match=next(iter(choice))):
            offsets_of(processor, [make_picture(0)], **choice)
    processor.granularity_levels = None  # as one that was saved before has none
    with pytest.raises(ValueError, match="granulon push"):
        offsets_of(processor, [make_picture(0)])
    _, plain = build_tiny("dinov3-qwen2.5")
    assert offsets_of(plain, [make_picture(0)])[1] == [36]
    with pytest.raises(ValueError, match="granularity"):
        offsets_of(plain, [make_picture(0)], granularity="fine")
    # The arguments of a request are also those of loading.
    processor.save_pretrained(tmp_path)
    assert GranulonProcessor.from_pretrained(tmp_path, visual_tokens=5, granularity="fine").visual_tokens == "pixel+semantic"


def test_elsewhere_a_choice_is_handed_on(processor):
    for choice in ({"granularity": "fine"}, {"visual_tokens": 3}):
        inputs = processor(images=make_picture(0), text=processor.image_token, return_tensors="pt", **choice)
        assert (inputs["input_ids"] == processor.image_token_id).sum() == 36 + 20
        assert choice.items() <= inputs.items() and "num_image_slots" not in inputs
    # Whoever trains on assistants' tokens asks for offsets, too.
    inputs = processor.apply_chat_template(
        make_conversation(QUESTION, [make_picture(0)], "An answer."),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
    )
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 36 + 20 and "question_mask" in inputs


def test_full_strategy_counts_prefix_tokens():
    model, processor = build_tiny("dinov3-qwen2.5", vision_feature_select_strategy="full")
    inputs = make_inputs(processor, make_conversation(QUESTION, [make_picture(0)]))
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 36 + 5
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_question_mask_is_the_last_users_words(processor, side):
    conversations = [
        make_conversation(QUESTION, [make_picture(0)]),
        [*make_conversation("What is it?", [make_picture(0)], QUESTION), *make_conversation("  Why so?\n")],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Plain <b>string</b> 漢字?"}],
        make_conversation("The answer repeats the question.", [make_picture(1)], "The answer repeats the question."),
    ]
    inputs = make_inputs(processor, conversations, side=side, generate=False)
    expected = [QUESTION, "Why so?", "Plain <b>string</b> 漢字?", "The answer repeats the question."]
    for row, question in enumerate(expected):
        # A token may hold the white space before the first word, never markup.
        assert question_of(processor, inputs, row).strip() == question
        assert inputs["question_mask"][row].sum() < inputs["attention_mask"][row].sum()
    assert not (inputs["question_mask"] * (inputs["input_ids"] == processor.image_token_id)).any()
    assert inputs["question_mask"].dtype == inputs["attention_mask"].dtype == torch.int64


def test_marks_leave_no_trace(processor):
    text = processor.apply_chat_template(make_conversation(QUESTION), add_generation_prompt=True)
    plain = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert make_inputs(processor, make_conversation(QUESTION))["input_ids"][0].tolist() == plain
    assert set(make_inputs(processor, make_conversation(QUESTION))) == {"input_ids", "attention_mask", "question_mask"}


def test_several_text_parts_are_one_question(processor):
    content = [
        {"type": "text", "text": "What is left"},
        {"type": "image", "image": make_picture(0)},
        {"type": "text", "text": "of the house?"},
    ]
    inputs = make_inputs(processor, [{"role": "user", "content": content}])
    # The break between the parts is neither's word.
    assert "".join(question_of(processor, inputs).split()) == "Whatisleftofthehouse?"
    first_text = inputs["question_mask"][0].argmax()
    assert (inputs["input_ids"][0, first_text:] != processor.image_token_id).all()  # images first


def test_the_conversation_is_not_changed(processor):
    conversation = make_conversation(QUESTION, [make_picture(0)])
    text = conversation[0]["content"][1]["text"]
    make_inputs(processor, conversation)
    assert conversation[0]["content"][1]["text"] == text


def test_assistant_masks_still_work(processor):
    inputs = processor.apply_chat_template(
        make_conversation(QUESTION, [make_picture(0)], "Two of them."),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    answer = processor.tokenizer.decode(inputs["input_ids"][0][torch.as_tensor(inputs["assistant_masks"][0]).bool()])
    assert answer.startswith("Two of them.")
    assert question_of(processor, inputs).strip() == QUESTION


def test_lists_without_tensors(processor):
    inputs = processor.apply_chat_template(
        [make_conversation(QUESTION), make_conversation("Why?")], tokenize=True, return_dict=True
    )
    assert [len(mask) for mask in inputs["question_mask"]] == [len(ids) for ids in inputs["input_ids"]]


TEMPLATES = {
    "own": None,
    "chatml": "chatml",
    "llama3": "llama3",
    "plain": "plain",
    "default system": """{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\nYou are kind.<|im_end|>\n' -}}{%- endif -%}{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}""",
    "in the user's turn": """{{- bos_token -}}{%- set begun = namespace(text='') -%}{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{%- set begun.text = '<<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' -%}
{%- elif message['role'] == 'user' -%}{{- '[INST] ' + begun.text + message['content'] + ' [/INST]' -}}
{%- set begun.text = '' -%}{%- else -%}{{- ' ' + message['content'] + eos_token -}}{%- endif -%}{%- endfor -%}""",
    "before the turn": """{{- bos_token -}}{%- for message in messages -%}{%- if message['role'] == 'system' -%}
{{- message['content'] + '\n' -}}{%- elif message['role'] == 'user' -%}{{- '[INST] ' + message['content'] + ' [/INST]' -}}
{%- else -%}{{- ' ' + message['content'] + eos_token -}}{%- endif -%}{%- endfor -%}""",
    "brackets": """{{- bos_token -}}{%- for message in messages -%}{%- if message['role'] == 'user' -%}
{{- '[INST] ' + message['content'] + ' [/INST]' -}}{%- elif message['role'] == 'assistant' -%}
{{- ' ' + message['content'] + eos_token -}}{%- endif -%}{%- endfor -%}""",
}


@pytest.fixture(params=TEMPLATES)
def templated(request):
    """A processor with the chat template of another language model; not every one knows a system prompt."""
    processor = build_tiny("granulon-llama3.2" if request.param == "llama3" else "granulon-qwen2.5")[1]
    template = TEMPLATES[request.param]
    if template is not None:
        processor.tokenizer.chat_template = (MODELING / f"{template}.jinja").read_text() if "{" not in template else template
        processor.chat_template = make_chat_template(processor.tokenizer, processor.image_token)
    processor.speaks_system = request.param != "brackets"
    return processor


def conversations_of(templated):
    picture = make_picture(0)
    yield make_conversation(QUESTION, [picture])
    yield make_conversation(QUESTION)
    yield make_conversation("  Why so?\n\nSay more. ", [picture, make_picture(1)])
    yield [*make_conversation("What is it?", [picture], QUESTION), *make_conversation("And now?")]
    yield make_conversation("A question with an answer.", [picture], "An answer.")
    if templated.speaks_system:
        yield [{"role": "system", "content": "Be brief. Always."}, *make_conversation(QUESTION, [picture])]


STEPS = {
    "as it is": lambda text: text,
    "a copy": lambda text: "".join(text),
    "through JSON": lambda text: json.loads(json.dumps(text)),
    "formatted": lambda text: f"{text}",
    "pickled": lambda text: pickle.loads(pickle.dumps(text)),
    "without the last line break": lambda text: str(text).rstrip("\n"),
}


@pytest.mark.parametrize("step", STEPS)
def test_one_call_or_two(templated, step):
    """Rendering first and calling then gives the tokens and the question of the call that does both."""
    for conversation in conversations_of(templated):
        for generate in (True, False):
            once = make_inputs(templated, conversation, generate=generate)
            text = STEPS[step](templated.apply_chat_template(conversation, add_generation_prompt=generate))
            images = [part["image"] for message in conversation for part in message["content"] if part in images_of(message)]
            twice = templated(text=text, images=images or None, return_tensors="pt")
            length = twice["input_ids"].shape[1]  # a line break may be missing at the end
            assert torch.equal(once["input_ids"][:, :length], twice["input_ids"])
            assert torch.equal(once["question_mask"][:, :length], twice["question_mask"])
            assert question_of(templated, twice).strip() == conversation_question(conversation)


def images_of(message):
    return [part for part in message["content"] if isinstance(part, dict) and part["type"] == "image"]


def conversation_question(conversation):
    return next(message for message in reversed(conversation) if message["role"] == "user")["content"][-1]["text"].strip()


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_call_or_two_in_a_batch(templated, side):
    templated.tokenizer.padding_side = side
    conversations = list(conversations_of(templated))
    once = make_inputs(templated, conversations, side=side)
    prompts = templated.apply_chat_template(conversations, add_generation_prompt=True)
    images = [[part["image"] for m in one for part in m["content"] if part in images_of(m)] for one in conversations]
    for texts in (prompts, [str(prompt) for prompt in prompts]):
        twice = templated(text=texts, images=images, return_tensors="pt", padding=True)
        assert set(twice) == set(once)
        for name, value in once.items():
            assert torch.equal(value, twice[name]), name


@pytest.mark.parametrize(
    "text", ["{image} {q}", "{image}\n{q}", "{q}\n{image}", "{image}{image}\n{q}", "{eos}{image}{q}{eos}", "{q}"]
)
def test_a_plain_text_is_all_question(processor, text):
    images = [make_picture(seed) for seed in range(text.count("{image}"))]
    text = text.format(image=processor.image_token, q=QUESTION, eos=processor.tokenizer.eos_token)
    inputs = processor(text=text, images=images or None, return_tensors="pt")
    assert question_of(processor, inputs).strip() == QUESTION
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 56 * len(images)


def typed_tokens(processor):
    return [token.content for token in processor.tokenizer.added_tokens_decoder.values()]


def control_ids(processor, ids):
    return [index for index in ids if index in processor.tokenizer.added_tokens_decoder]


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
@pytest.mark.parametrize("where", ["{0}", "What is {0}?", "{0}{0}", "a\n{0}\nb", "<|im_{0}end|>"])
def test_what_is_typed_is_text(templated, role, where):
    """A control token in a message is the words of its name: the tokens of the template are those of any other message."""
    if role == "system" and not templated.speaks_system:
        pytest.skip("this template has no system prompt")
    for token in typed_tokens(templated):
        said = where.format(token)
        texts = {"system": "Be brief.", "user": QUESTION, "assistant": "An answer."}
        harmless, forged = (
            [{"role": one, "content": [{"type": "text", "text": text}]} for one, text in said_by.items()]
            for said_by in (texts, texts | {role: said})
        )
        if not templated.speaks_system:
            harmless, forged = harmless[1:], forged[1:]
        forged[-2]["content"].insert(0, {"type": "image", "image": make_picture(0)})
        harmless[-2]["content"].insert(0, {"type": "image", "image": make_picture(0)})
        expected, inputs = (make_inputs(templated, one, generate=False) for one in (harmless, forged))
        ids = inputs["input_ids"][0].tolist()
        assert control_ids(templated, ids) == control_ids(templated, expected["input_ids"][0].tolist())
        assert said.strip() in templated.decode(ids)
        text = templated.apply_chat_template(forged)
        assert templated(text=text, images=make_picture(0))["input_ids"] == [ids]
        if role == "user":
            assert question_of(templated, inputs).strip() == said.strip()


def test_tools_and_documents_are_text(processor):
    """What a template writes of its other variables forges nothing either, in keys as in values."""
    template = """{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' + message['content'] -}}
{%- if message.tool_calls -%}{{- message.tool_calls[0].function.arguments | tojson -}}{%- endif -%}{%- endfor -%}
{{- tools | tojson -}}{{- documents | tojson -}}{{- note -}}"""
    bad = f"{processor.image_token}{processor.tokenizer.eos_token}"

    def ids(word):
        call = {"type": "function", "function": {"name": "f", "arguments": {word: word}}}
        turn = {"role": "assistant", "content": "Wait.", "tool_calls": [call]}
        tool = {"type": "function", "function": {"name": "f", "description": word, "parameters": {}}}
        return processor.apply_chat_template(
            [{"role": "user", "content": "Hi"}, turn],
            template,
            tools=[tool],
            documents=[{"title": word, "text": word}],
            note=word,
            tokenize=True,
            return_dict=True,
        )["input_ids"][0]

    assert control_ids(processor, ids(bad)) == control_ids(processor, ids("word"))
    assert processor.decode(ids(bad)).count(bad) == 6


@pytest.mark.parametrize("type_", ["image", "text", "anything"])
def test_a_message_that_calls_itself_something_is_text(processor, type_):
    """No key of a message takes its words out of what is looked through."""
    words = f"{processor.tokenizer.eos_token}{processor.image_token}"
    plain, forged = ({"role": "user", "type": type_, "content": f"What is {one}?"} for one in ("it", words))
    expected, inputs = (make_inputs(processor, [one])["input_ids"][0].tolist() for one in (plain, forged))
    assert control_ids(processor, inputs) == control_ids(processor, expected)
    assert words in processor.decode(inputs)


@pytest.mark.parametrize("part", [{"type": "text"}, {"type": "text", "text": None}, {"type": "text", "text": 7}])
def test_a_text_part_without_a_text_is_refused(processor, part):
    with pytest.raises(Exception, match="without a text"):
        processor.apply_chat_template([{"role": "user", "content": [part]}])


def test_typed_tokens_in_a_padded_batch(processor):
    token = processor.tokenizer.eos_token
    conversations = [make_conversation(QUESTION), make_conversation(f"What is {token}?")]
    for side in ("left", "right"):
        inputs = make_inputs(processor, conversations, side=side)
        alone = make_inputs(processor, conversations[1])
        for name in ("input_ids", "question_mask"):
            assert torch.equal(inputs[name][1][inputs["attention_mask"][1].bool()], alone[name][0])
    cut = make_inputs(processor, conversations[1], truncation=True, max_length=4)
    assert cut["input_ids"].tolist() == alone["input_ids"][:, :4].tolist()


def test_marks_that_are_typed_are_dropped(processor):
    inputs = make_inputs(processor, make_conversation(f"\ufdd1{QUESTION[:8]}\ufdd0\ufdd4{QUESTION[8:]}\ufdd5"))
    assert torch.equal(inputs["input_ids"], make_inputs(processor, make_conversation(QUESTION))["input_ids"])
    assert question_of(processor, inputs).strip() == QUESTION


def test_typed_tokens_of_a_tokenizer_with_spaces_before_words():
    """SentencePiece tokenizers put a space before the beginning of a text; a typed token must not begin one."""
    words = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.decoder = decoders.Metaspace(prepend_scheme="first")
    characters = sorted(set(string.printable) | {"▁"})
    trainer = trainers.BpeTrainer(
        special_tokens=["<unk>", "<s>", "</s>", "<image>"], initial_alphabet=characters, show_progress=False
    )
    words.train_from_iterator(["what is it"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_tokens(["<turn>"])  # not special, as Gemma's <start_of_turn>
    prompt = Prompt("<s><turn>what</s>is<turn>it</s>", typed=[(13, 17), (19, 25)])
    data = encode_typed(tokenizer, [prompt], add_special_tokens=False)
    assert control_ids(type("P", (), {"tokenizer": tokenizer}), data["input_ids"][0]) == [
        tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "<turn>", "</s>")
    ]
    assert tokenizer.decode(data["input_ids"][0]) == str(prompt)
    covered = "".join(prompt[start:end] for start, end in data["offset_mapping"][0])
    assert covered == str(prompt)


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, GranulonProcessor)
    conversation = make_conversation(QUESTION, [make_picture(0)])
    before, after = make_inputs(processor, conversation), make_inputs(loaded, conversation)
    assert set(before) == set(after)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert {"processor_config.json", "chat_template.jinja"} <= {path.name for path in tmp_path.iterdir()}


def test_llamas_date_does_not_change_from_day_to_day():
    processor = build_tiny("granulon-llama3.2")[1]
    processor.chat_template += "{{- date_string if date_string is defined else strftime_now('%d %b %Y') -}}"
    assert processor.apply_chat_template(make_conversation("Hi")).endswith("26 Jul 2024")
    assert processor.apply_chat_template(make_conversation("Hi"), date_string="1 May 2030").endswith("1 May 2030")


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_timm_preprocessing_as_one_of_transformers_own(crop_mode):
    config = dict(input_size=(3, 64, 64), crop_pct=0.875, interpolation="bicubic", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    timm_processor = TimmWrapperImageProcessor(config | {"crop_mode": crop_mode}, architecture="resnet18")
    picture = make_picture(2, (160, 100))
    expected = timm_processor(picture)["pixel_values"]
    actual = to_serializable(timm_processor)(picture, return_tensors="pt")["pixel_values"]
    assert actual.shape == expected.shape
    # 8-bit rounding after resizing, and resampling by two libraries: about one grey level of 255.
    assert (actual - expected).abs().mean() < 0.02


def test_timm_towers_give_a_processor_that_can_be_saved(tmp_path):
    config = TimmWrapperConfig(architecture="resnet18", pretrained_cfg={"input_size": [3, 96, 64]})
    tokenizer = variants.tiny_tokenizer(variants.DECODERS["qwen2.5"])
    timm_processor = TimmWrapperImageProcessor({"input_size": (3, 96, 96)}, architecture="resnet18")
    processor = GranulonProcessor.from_parts(timm_processor, tokenizer, config)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    inputs = make_inputs(loaded, make_conversation(QUESTION, [make_picture(0)]))
    assert (inputs["input_ids"] == loaded.image_token_id).sum() == 9
    assert loaded.patch_size == 32


@pytest.mark.parametrize(
    ("images", "texts"),
    [
        (None, ["{image} What?"]),
        ([0, 1], ["{image} What?"]),
        ([0], ["What?"]),
        ([[0], [1, 2]], ["{image}{image} What?", "{image} Why?"]),
        ([[], [0]], ["{image} What?", "Why?"]),
    ],
)
def test_images_without_placeholder_and_the_reverse(processor, images, texts):
    def pictures(seeds):
        return [pictures(seed) if isinstance(seed, list) else make_picture(seed) for seed in seeds]

    images = None if images is None else pictures(images)
    with pytest.raises(ValueError, match="placeholder"):
        processor(images=images, text=[text.format(image=processor.image_token) for text in texts], padding=True)


def test_truncation_through_image_slots_is_refused(processor):
    with pytest.raises(ValueError, match="truncation"):
        make_inputs(processor, make_conversation(QUESTION, [make_picture(0)]), truncation=True, max_length=20)


def test_other_kinds_of_content_are_refused(processor):
    with pytest.raises(Exception, match="'audio'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio", "audio": "x"}]}])


def test_an_image_token_of_several_pieces_is_refused(processor):
    with pytest.raises(ValueError, match="token"):
        GranulonProcessor(processor.image_processor, processor.tokenizer, patch_size=16, image_token="picture here")


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "I;16", "1", "LA"])
def test_any_kind_of_image(processor, mode):
    picture = Image.new("I;16", (40, 30), 30000) if mode == "I;16" else make_picture(0, (40, 30)).convert(mode)
    inputs = make_inputs(processor, make_conversation(QUESTION, [picture]))
    assert inputs["pixel_values"].shape[1:] == (3, 96, 96)
    assert inputs["pixel_values"].isfinite().all()


@pytest.mark.parametrize("crops", [True, False])
def test_slots_are_counted_as_they_are_written(crops):
    """What is said of an image's tokens beforehand is what `__call__` writes, also where nothing is cropped."""
    _, processor = build_tiny()
    if not crops:
        processor.image_processor.do_center_crop = False
        processor.image_processor.size = {"height": 64, "width": 64}
    inputs = processor(images=[make_picture(0)], text=processor.image_token, return_tensors="pt")
    (counted,) = processor._get_num_multimodal_tokens(image_sizes=[(96, 120)]).num_image_tokens
    assert counted == (inputs["input_ids"] == processor.image_token_id).sum()
