"""The processor: slots per image, the question mask, the chat template, saving, and clear errors."""

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, TimmWrapperConfig
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from granulon_hf import GranulonProcessor, variants
from granulon_hf.modeling.processing_granulon import to_serializable
from tests.conftest import make_conversation, make_inputs, make_picture

QUESTION = "How many small red objects are in the corner?"


@pytest.fixture(params=["granulon-qwen2.5", "granulon-llama3.2"])
def processor(request):
    return variants.build(request.param, tiny=True)[1]


def question_of(processor, inputs, row=0):
    return processor.tokenizer.decode(inputs["input_ids"][row][inputs["question_mask"][row].bool()])


@pytest.mark.parametrize("name", variants.NAMES)
def test_slots_per_image(name):
    model, processor = variants.build(name, tiny=True)
    inputs = make_inputs(processor, make_conversation(QUESTION, [make_picture(0), make_picture(1)]))
    slots = (inputs["input_ids"] == model.config.image_token_id).sum().item()
    assert slots == 2 * (36 + (20 if name.startswith("granulon") else 0))
    assert inputs["pixel_values"].shape[0] == 2
    tokens = processor._get_num_multimodal_tokens(image_sizes=[(100, 50)] * 2)
    assert tokens.num_image_tokens == [slots // 2] * 2


def test_full_strategy_counts_prefix_tokens():
    model, processor = variants.build("dinov3-qwen2.5", tiny=True, vision_feature_select_strategy="full")
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


def test_plain_text_call_has_no_question_mask(processor):
    inputs = processor(text=f"USER: {processor.image_token} {QUESTION}", images=make_picture(0), return_tensors="pt")
    assert "question_mask" not in inputs
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 56


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
    processor = variants.build("granulon-llama3.2", tiny=True)[1]
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
    ("images", "text", "message"),
    [
        (None, "{image} What?", "no images were passed"),
        ([0, 1], "{image} What?", "1 .* tokens and 2 images"),
        ([0], "What?", "0 .* tokens and 1 images"),
    ],
)
def test_images_without_placeholder_and_the_reverse(processor, images, text, message):
    images = None if images is None else [make_picture(seed) for seed in images]
    with pytest.raises(ValueError, match=message):
        processor(images=images, text=text.format(image=processor.image_token), return_tensors="pt")


def test_truncation_through_image_slots_is_refused(processor):
    with pytest.raises(ValueError, match="truncation"):
        make_inputs(processor, make_conversation(QUESTION, [make_picture(0)]), truncation=True, max_length=20)


def test_other_kinds_of_content_are_refused(processor):
    with pytest.raises(Exception, match="reads parts of type 'image' and 'text'; got 'audio'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio", "audio": "x"}]}])


def test_an_image_token_of_several_pieces_is_refused(processor):
    with pytest.raises(ValueError, match="not a single token"):
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
    _, processor = variants.build("granulon-qwen2.5", tiny=True)
    if not crops:
        processor.image_processor.do_center_crop = False
        processor.image_processor.size = {"height": 64, "width": 64}
    inputs = processor(images=[make_picture(0)], text=processor.image_token, return_tensors="pt")
    (counted,) = processor._get_num_multimodal_tokens(image_sizes=[(96, 120)]).num_image_tokens
    assert counted == (inputs["input_ids"] == processor.image_token_id).sum()
