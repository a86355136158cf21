"""The collator: where labels are, what is cut, what is left out, which pixels."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, CLIPImageProcessor, SiglipImageProcessor, Trainer, TrainingArguments

from granulon_hf import variants
from granulon_hf.data import Sample
from granulon_hf.data.collator import GranulonCollator, GranulonPreferenceCollator
from granulon_hf.demo_model import LANGUAGE_PACKAGE, MissingBackbones, packaged_file
from granulon_hf.modeling.images_granulon import open_rgb
from granulon_hf.modeling.processing_granulon import make_chat_template
from tests.conftest import make_conversation, make_inputs, make_picture

ROOT = Path(__file__).parents[2]


def encoded(picture: Image.Image, kind="PNG", **options) -> dict:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def turn(role: str, words: str, images: int = 0) -> dict:
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": words}]}


def make_sample(*turns, images=(), id="a") -> Sample:
    return Sample(id, [encoded(image) if isinstance(image, Image.Image) else image for image in images], list(turns), "", "vqa")


def simple(question="What is it?", answer="A red house.", images=1, **kwargs) -> Sample:
    pictures = kwargs.pop("pictures", None) or [make_picture(seed) for seed in range(images)]
    return make_sample(turn("user", question, len(pictures)), turn("assistant", answer), images=pictures, **kwargs)


# --- labels ----------------------------------------------------------------------------------------------------------

TEMPLATES = {
    "qwen2.5": """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "smollm2": """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "llama3": """{{- bos_token }}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' }}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim }}{% set messages = messages[1:] %}{%- endif %}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}""",
    "mistral": """{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}
{%- set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{{- bos_token }}
{%- for message in messages %}{%- if message['role'] == 'user' %}
{{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
{%- else %}{{- ' ' + message['content'] | trim + eos_token }}{%- endif %}{%- endfor %}""",
    "chatml.jinja": None,
    "llama3.jinja": None,
    "plain.jinja": None,
}
DIALOGUES = {
    "one": [turn("user", "What is in the picture?", 1), turn("assistant", "A small dog.")],
    "system": [turn("system", "Be brief."), turn("user", "What?", 1), turn("assistant", "A dog.")],
    "turns": [
        turn("user", "A dog. Is it a dog?", 1),
        turn("assistant", "A dog."),
        turn("user", "And here? A dog.", 1),
        turn("assistant", " A dog.\nTwo\u00a0cats \u2013 \u732b\u304c\u4e8c\u5339. "),
    ],
    "text": [turn("user", "Why?"), turn("assistant", "A dog. Why? user assistant <b>")],
}


def with_template(name):
    decoder = "llama3.2" if name.startswith("llama3") else "qwen2.5"
    _, processor = variants.build(f"granulon-{decoder}", tiny=True)
    processor.tokenizer.chat_template = TEMPLATES[name] or (ROOT / "modeling" / name).read_text()
    processor.chat_template = make_chat_template(processor.tokenizer, processor.image_token)
    return processor


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_are_what_the_model_has_to_say(template, dialogue):
    """Every answer: what follows the generation prompt of `generate`, up to the token that ends a turn."""
    processor, messages = with_template(template), DIALOGUES[dialogue]
    pictures = [make_picture(seed) for seed in range(sum(part["type"] == "image" for m in messages for part in m["content"]))]
    feature = GranulonCollator(processor).encode(make_sample(*messages, images=pictures))
    ids, labels, end = feature["input_ids"], feature["labels"], processor.tokenizer.eos_token_id
    expected = torch.full_like(labels, -100)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = [{"role": m["role"], "content": list(m["content"])} for m in messages[:index]]
            shown = iter(pictures)
            for m in before:
                m["content"] = [{"type": "image", "image": next(shown)} if p["type"] == "image" else p for p in m["content"]]
            prompt = make_inputs(processor, before)["input_ids"][0]
            assert torch.equal(ids[: len(prompt)], prompt)
            stop = len(prompt) + (ids[len(prompt) :] == end).nonzero()[0].item() + 1
            expected[len(prompt) : stop] = ids[len(prompt) : stop]
    said = processor.tokenizer.decode(labels[labels != -100])
    assert said.count(processor.tokenizer.eos_token) == sum(message["role"] == "assistant" for message in messages)
    differ = (labels != expected).nonzero().flatten()
    # A template may put white space between the prompt and the words ("Answer:" + " A"), which is the model's to say or not.
    assert not processor.tokenizer.decode(ids[differ]).strip()
    question = processor.tokenizer.decode(ids[feature["question_mask"].bool()]).strip()
    assert question == messages[-2]["content"][-1]["text"]


def test_real_tokenizer_and_template():
    """SmolLM2's own, where the package that carries it is installed."""
    try:
        gguf = packaged_file(LANGUAGE_PACKAGE, ".gguf")
    except MissingBackbones as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model, toy = variants.build("granulon-qwen2.5", tiny=True)
    processor = type(toy).from_parts(toy.image_processor, tokenizer, model.config.vision_config, num_semantic_tokens=20)
    sample = make_sample(*DIALOGUES["turns"], images=[make_picture(0), make_picture(1)])
    labels = GranulonCollator(processor).encode(sample)["labels"]
    said = tokenizer.decode(labels[labels != -100]).split("<|im_end|>")
    assert [words.strip() for words in said] == ["A dog.", DIALOGUES["turns"][-1]["content"][0]["text"].strip(), ""]


def test_last_answer_only():
    _, processor = variants.build("granulon-qwen2.5", tiny=True)
    sample = make_sample(*DIALOGUES["turns"], images=[make_picture(0), make_picture(1)])
    labels = GranulonCollator(processor, last_answer_only=True).encode(sample)["labels"]
    said = processor.tokenizer.decode(labels[labels != -100])
    assert said.count("<|im_end|>") == 1 and "Two" in said


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_the_processors(side):
    _, processor = variants.build("granulon-qwen2.5", tiny=True)
    pictures = [make_picture(1), make_picture(2)]
    samples = [simple(pictures=pictures[:1]), simple("And these two here?", images=2, pictures=pictures), simple(images=0)]
    batch = GranulonCollator(processor, padding_side=side)(samples)
    conversations = [
        make_conversation("What is it?", pictures[:1], "A red house."),
        make_conversation("And these two here?", pictures, "A red house."),
        make_conversation("What is it?", [], "A red house."),
    ]
    for name, value in make_inputs(processor, conversations, side=side, generate=False).items():
        torch.testing.assert_close(batch[name], value, msg=name)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["labels"] != processor.image_token_id).all()


def test_padding_to_a_multiple():
    _, processor = variants.build("granulon-qwen2.5", tiny=True)
    for side in ("left", "right"):
        batch = GranulonCollator(processor, padding_side=side, pad_to_multiple_of=64)([simple(), simple(images=2)])
        assert batch["input_ids"].shape[1] % 64 == 0
        assert batch["attention_mask"].sum(1).tolist() == GranulonCollator(processor).lengths([simple(), simple(images=2)])


@pytest.mark.parametrize("name", ["granulon-qwen2.5", "granulon-llama3.2", "siglip-qwen2.5"])
def test_a_packed_batch_is_the_padded_one_to_the_model(build, name):
    model, processor = build(name)
    samples = [simple(), simple("Is it red?", "Yes, both.", images=2), simple("Why?", "No.", images=0)]
    padded, packed = GranulonCollator(processor)(samples), GranulonCollator(processor, packing=True)(samples)
    assert packed["input_ids"].shape == (1, padded["attention_mask"].sum())
    assert packed["seq_idx"][0].bincount().tolist() == padded["attention_mask"].sum(1).tolist()
    assert (packed["labels"][packed["position_ids"] == 0] == -100).all()
    expected, actual = model(**padded), model(**packed)
    torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=0)
    gradient = [torch.autograd.grad(out.loss, model.model.multi_modal_projector.parameters()) for out in (expected, actual)]
    for want, got in zip(*gradient, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_lengths_are_known_without_opening_an_image():
    _, processor = variants.build("granulon-llama3.2", tiny=True)
    collator = GranulonCollator(processor)
    samples = [simple(), simple(images=0), simple("Is it red?", images=2), make_sample(*DIALOGUES["text"])]
    expected = [len(collator.encode(sample)["input_ids"]) for sample in samples]
    for sample in samples:
        sample.images = [{"bytes": b"", "path": None} for _ in sample.images]
    assert collator.lengths(samples) == expected == collator.lengths([sample.to_dict() for sample in samples])
    assert GranulonCollator(processor, max_length=50).lengths(samples) == [min(50, length) for length in expected]
    assert collator.lengths([]) == []
    loader = DataLoader(samples[3:], collate_fn=collator, num_workers=1, multiprocessing_context="spawn")
    assert next(iter(loader))["input_ids"].shape == (1, expected[3])


def test_options_that_contradict():
    _, processor = variants.build("granulon-qwen2.5", tiny=True)
    with pytest.raises(ValueError, match="no padding"):
        GranulonCollator(processor, packing=True, pad_to_multiple_of=8)
    with pytest.raises(ValueError, match="'left' or 'right'"):
        GranulonCollator(processor, padding_side="both")


# --- too long --------------------------------------------------------------------------------------------------------


def test_an_answer_longer_than_the_context_is_cut():
    _, processor = variants.build("granulon-qwen2.5", tiny=True)
    sample = simple(answer="a dog, " * 200)
    whole = GranulonCollator(processor).encode(sample)
    first = (whole["labels"] != -100).nonzero()[0].item()
    for length in (first + 1, first + 50):
        collator = GranulonCollator(processor, max_length=length)
        cut = collator.encode(sample)
        assert len(cut["input_ids"]) == length and (cut["labels"] != -100).sum() == length - first
        assert torch.equal(cut["input_ids"], whole["input_ids"][:length]) and not collator.problems
    assert GranulonCollator(processor, max_length=first).encode(sample) is None


def test_a_prompt_longer_than_the_context_is_left_out(caplog):
    _, processor = variants.build("granulon-qwen2.5", tiny=True)
    collator = GranulonCollator(processor, max_length=120)
    good, long = simple(), simple("Why? " * 100, id="long")
    images = simple(images=2, id="images")
    turns = turn("user", "What?"), turn("assistant", "a " * 90), turn("user", "", 1), turn("assistant", "b")
    late = make_sample(*turns, images=[make_picture(0)], id="late")
    batch = collator([long, good, images, late, long])
    assert len(batch["input_ids"]) == 1 and len(batch["pixel_values"]) == 1
    assert [problem["id"] for problem in collator.problems] == ["long", "images", "late"]
    assert all("do not fit max_length=120" in problem["reason"] for problem in collator.problems)
    assert len(caplog.records) == 1 and "Sample long is left out" in caplog.text


# --- what cannot be used ---------------------------------------------------------------------------------------------

JPEG = encoded(make_picture(0, (640, 480)), "JPEG")["bytes"]
BOMB = encoded(Image.new("1", (20_000, 20_000)))["bytes"]
BAD_IMAGES = {
    "cut off": {"bytes": JPEG[: len(JPEG) // 2], "path": None},
    "no image": {"bytes": b"no image", "path": None},
    "empty": {"bytes": b"", "path": None},
    "nothing": {"bytes": None, "path": None},
    "none": None,
    "missing": {"bytes": None, "path": "nowhere/at_all.jpg"},
    "bomb": {"bytes": BOMB, "path": None},
    "thread": encoded(Image.new("L", (20_000, 1))),
}


@pytest.mark.parametrize("image", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_a_broken_image_is_left_out(image):
    _, processor = variants.build("granulon-qwen2.5", tiny=True)
    collator = GranulonCollator(processor)
    bad = simple(pictures=[image], id="bad")
    assert len(collator([bad, simple()])["input_ids"]) == 1
    assert [problem["id"] for problem in collator.problems] == ["bad"]
    assert collator.problems[0]["reason"].startswith("unusable image: ")


def test_samples_that_say_nothing_or_do_not_fit_their_images():
    _, processor = variants.build("granulon-qwen2.5", tiny=True)
    collator = GranulonCollator(processor)
    few = simple(images=2, id="few")
    few.images.pop()
    more = simple(images=1, id="more")
    more.images.append(encoded(make_picture(3)))
    silent = simple(answer=" \n", id="silent")
    asked = make_sample(turn("user", "What?"), id="asked")
    odd = make_sample({"role": "user", "content": [{"type": "audio"}]}, turn("assistant", "No."), id="odd")
    collator([few, more, silent, asked, odd, {"id": "broken"}, simple()])
    reasons = {problem["id"]: problem["reason"] for problem in collator.problems}
    assert reasons.keys() == {"few", "more", "silent", "asked", "odd", "broken"}
    assert reasons["few"] == "1 images for 2 image parts" and reasons["more"] == "2 images for 1 image parts"
    assert reasons["silent"] == reasons["asked"] == "it has no answer"


@pytest.mark.parametrize("name", ["granulon-qwen2.5", "granulon-llama3.2"])
def test_what_is_typed_is_text_and_one_end_is_supervised(name):
    """Control tokens in a question or an answer are words: they forge no turn, image or end of an answer."""
    _, processor = variants.build(name, tiny=True)
    tokenizer = processor.tokenizer
    collator = GranulonCollator(processor)
    plain = collator([simple("What?", "It ends.")])
    for token in (tokenizer.eos_token, processor.image_token, tokenizer.pad_token, tokenizer.bos_token):
        batch = collator([simple(f"What is {token}?", f"It {token} ends with {token}")])
        assert not collator.problems
        labels = batch["labels"][batch["labels"] != -100].tolist()
        control = [index for index in labels if index in tokenizer.added_tokens_decoder]
        expected = plain["labels"][plain["labels"] != -100].tolist()
        assert control == [index for index in expected if index in tokenizer.added_tokens_decoder]
        assert len(control) == 1
        assert tokenizer.decode(labels).startswith(f"It {token} ends with {token}")
        slots = (batch["input_ids"] == processor.image_token_id).sum()
        assert slots == (plain["input_ids"] == processor.image_token_id).sum() == 56


def test_lengths_count_typed_tokens():
    _, processor = variants.build("granulon-llama3.2", tiny=True)
    samples = [simple(f"What is {processor.image_token}?", "An <|eot_id|>, no end."), simple()]
    collator = GranulonCollator(processor)
    assert collator.lengths(samples) == [len(collator.encode(sample)["input_ids"]) for sample in samples]


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_with_workers_survives_whatever_comes_first(packing):
    """Every worker has a collator of its own, and for one of them the bad sample is the first."""
    model, processor = variants.build("granulon-qwen2.5", tiny=True)
    samples = [simple(f"What is {i}?") for i in range(4)] + [simple("Why? " * 300, id="long")]
    for epoch in range(4):
        order = [4, 4, *range(4)] if epoch % 2 else [0, 4, 4, 1]
        collator = GranulonCollator(processor, max_length=200, packing=packing)
        batches = list(DataLoader([samples[i] for i in order], collate_fn=collator, num_workers=2))
        assert len(batches) == len(order)
        assert all(torch.isfinite(model(**batch, skip_logits=True).loss) for batch in batches)
        assert (batches[epoch % 2 == 0]["labels"] == -100).all()
        # With one thing that stands in for bad batches, workers change nothing.
        collator.stand_in = collator.encode(samples[3])
        alone, shared = (
            list(DataLoader([samples[i] for i in order], collate_fn=collator, num_workers=workers)) for workers in (0, 2)
        )
        for one, other in zip(alone, shared, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_lengths_belong_to_indices():
    """What iterates leaves bad rows out; a sampler asks by index."""
    _, processor = variants.build("granulon-qwen2.5", tiny=True)

    class Rows:
        rows = [simple("One?"), simple("And what is this, if not that?"), simple("\ud83d"), simple("Two?", images=2)]

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            return self.rows[index]

        def __iter__(self):
            yield self.rows[0]

    collator = GranulonCollator(processor)
    lengths = collator.lengths(Rows())
    for i in (0, 1, 3):
        assert lengths[i] == len(collator.encode(Rows.rows[i])["input_ids"])
    assert len(lengths) == 4


def test_a_batch_of_which_nothing_is_left_repeats_the_last_good_sample():
    _, processor = variants.build("granulon-qwen2.5", tiny=True)
    collator, bad = GranulonCollator(processor), simple(pictures=[{"bytes": b"", "path": None}], id="bad")
    assert (collator([bad, bad])["labels"] == -100).all()  # before there was one
    good = collator([bad, simple("One?"), simple("And the other?")])
    repeated = collator([bad])
    assert torch.equal(repeated["input_ids"], good["input_ids"][1:])
    torch.testing.assert_close(repeated["pixel_values"], good["pixel_values"][1:])


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_of_trainer_survives_bad_samples(tmp_path, packing):
    model, processor = variants.build("granulon-qwen2.5", tiny=True)
    samples = [simple(f"What is {i}?", images=i % 3) for i in range(8)]
    samples[3] = simple(pictures=[BAD_IMAGES["cut off"]])
    samples[5] = simple("Why? " * 300)
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, num_train_epochs=2, use_cpu=True, report_to="none",
        remove_unused_columns=False, save_strategy="no", learning_rate=1e-2, logging_steps=1,
    )  # fmt: skip
    collator = GranulonCollator(processor, max_length=512, packing=packing)
    trainer = Trainer(model, arguments, train_dataset=samples, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < losses[0] and np.isfinite(losses).all()
    assert len(collator.problems) == 2


# --- pixels ----------------------------------------------------------------------------------------------------------


def test_images_of_every_kind():
    picture = make_picture(1, (64, 48))
    reference = np.asarray(picture, dtype=float)

    def difference(image):
        return np.abs(np.asarray(open_rgb(image), dtype=float) - reference).mean()

    assert difference(encoded(picture)) == 0
    assert difference(encoded(picture.convert("CMYK"), "JPEG", quality=95)) < 3
    assert difference(encoded(picture.quantize(256))) < 5
    assert difference(encoded(picture.convert("RGBA"))) == 0
    frames = [make_picture(seed, (64, 48)) for seed in (2, 3)]
    assert difference(encoded(picture, "GIF", save_all=True, append_images=frames)) < 12
    for orientation, method in ((3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert difference(encoded(picture.transpose(method), exif=exif)) == 0
    gray = np.asarray(picture.convert("L"), dtype=float)
    deep = Image.fromarray((gray * 257).astype(np.uint16))
    assert np.abs(np.asarray(open_rgb(encoded(deep)), dtype=float)[..., 0] - gray).max() <= 1
    glass = picture.convert("RGBA")
    glass.putalpha(0)
    assert (np.asarray(open_rgb(encoded(glass))) == 255).all()
    see_through = picture.convert("P")
    see_through.info["transparency"] = bytes(256)
    assert (np.asarray(open_rgb(encoded(see_through, transparency=bytes(256)))) == 255).all()
    assert open_rgb(encoded(Image.new("L", (1, 1)))).size == (1, 1)
    assert open_rgb(encoded(Image.new("L", (20_000, 500)))).size == (20_000, 500)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 500), (2, 90)])
def test_extreme_sizes_are_usable(size):
    _, processor = variants.build("granulon-qwen2.5", tiny=True)
    collator = GranulonCollator(processor)
    batch = collator([simple(pictures=[encoded(Image.new("RGB", size, "red"), "JPEG")])])
    assert batch["pixel_values"].shape == (1, 3, 96, 96) and not collator.problems


@pytest.mark.parametrize("size", [(640, 480), (1024, 1024), (3000, 4000)])
@pytest.mark.parametrize(
    "image_processor",
    [
        CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}),
        SiglipImageProcessor(size={"height": 384, "width": 384}),
    ],
    ids=["crop", "squash"],
)
def test_a_jpeg_decoded_small_gives_the_same_pixels(image_processor, size):
    """Against full decoding, in levels of 255."""
    _, processor = variants.build("granulon-qwen2.5", tiny=True)
    processor.image_processor = image_processor
    photograph = Image.open(ROOT / "examples/images/chelsea.jpg").resize(size, Image.Resampling.LANCZOS)
    exif = Image.Exif()
    exif[0x0112] = 6
    sample = simple(pictures=[encoded(photograph, "JPEG", quality=92, exif=exif)])
    deviation = torch.tensor(image_processor.image_std).view(1, 3, 1, 1) * 255
    pixels = [GranulonCollator(processor, jpeg_reduction=r).encode(sample)["pixel_values"] * deviation for r in (None, 2.0)]
    difference = (pixels[0] - pixels[1]).abs()
    assert difference.mean() < 0.5 and difference.max() <= 4
    decoded = open_rgb(sample.images[0], GranulonCollator(processor)._decoded_side())
    side = 224 if isinstance(image_processor, CLIPImageProcessor) else 384
    smaller = min(size) // 2 >= 2 * side
    assert (min(decoded.size) >= 2 * side and max(decoded.size) < max(size)) if smaller else decoded.size == size[::-1]


# --- TRL -------------------------------------------------------------------------------------------------------------


def test_the_controller_reads_the_same_question_of_chosen_and_rejected(build):
    model, processor = build()
    sample = simple("How many?", images=2)
    row = {"images": sample.images, "prompt": sample.prompt, "chosen": sample.messages[-1:]}
    row["rejected"] = [turn("assistant", "The photograph shows a large house in front of snow-covered mountains.")]
    collator = GranulonPreferenceCollator(processor)
    broken = {**row, "images": [BAD_IMAGES["empty"]] * 2}
    batch = collator([row, broken])
    assert batch["input_ids"].shape[0] == 2 and len(batch["pixel_values"]) == 4 and len(collator.problems) == 1
    said = [
        processor.tokenizer.decode(ids[mask == 1])
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    assert said == ["A red house.<|im_end|>", row["rejected"][0]["content"][0]["text"] + "<|im_end|>"]
    assert "labels" not in batch
    batch.pop("completion_mask")
    probs = model(**batch).granularity_probs
    torch.testing.assert_close(probs[0], probs[1])
    assert torch.equal(collator([broken])["input_ids"], collator([row])["input_ids"])
    with pytest.raises(ValueError, match="cannot be packed"):
        GranulonPreferenceCollator(processor, packing=True)
