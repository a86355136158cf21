"""Small files of the real schemas, with everything in them that goes wrong."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.conftest import make_picture

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encode(picture, format="JPEG", **kwargs):
    buffer = io.BytesIO()
    picture.save(buffer, format=format, **kwargs)
    return buffer.getvalue()


def jpeg(seed=0, size=(64, 48)):
    return encode(make_picture(seed, size))


def odd_images():
    """Name -> encoded image and whether it can be used."""
    frames = [make_picture(i, (40, 40)).convert("P") for i in range(3)]
    return {
        "1x1": (encode(Image.new("RGB", (1, 1)), "PNG"), True),
        "cmyk": (encode(make_picture(1).convert("CMYK")), True),
        "gif": (encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), True),
        "wide": (encode(Image.new("L", (20_000, 500)), "PNG"), True),
        "thread": (encode(Image.new("L", (20_000, 20)), "PNG"), False),
        "bomb": (encode(Image.new("1", (20_000, 20_000)), "PNG"), False),
        "truncated": (jpeg(2)[:-400], False),
        "garbage": (b"not an image", False),
        "empty": (b"", False),
        "missing": (None, False),
    }


def write(path, rows, schema=None, row_group_size=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=row_group_size)
    return path


FLUX_CAPTIONS = ["composition", "entity", "text", "imaginative", "style", "abstract", "original", "detail"]
FLUX = pa.schema(
    [("id", pa.string()), ("image", IMAGE)]
    + [(f"caption_{name}", pa.string()) for name in FLUX_CAPTIONS]
    + [(f"caption_{name}_cn", pa.string()) for name in FLUX_CAPTIONS]
    + [(f"bool_caption_{name}", pa.bool_()) for name in FLUX_CAPTIONS[:-2]]
    + [(f"score_{name}", pa.int64()) for name in FLUX_CAPTIONS[:-1]]
    + [("score_image_clarity", pa.int64()), ("score_image_structure", pa.int64())]
)


def flux_row(number, **changes):
    row = {"id": f"flux-{number:06d}", "image": {"bytes": jpeg(number), "path": None}, "caption_detail": f"Detail {number}."}
    return row | {"score_image_clarity": 7, "caption_detail_cn": "细节"} | changes


def flux_folder(root, sizes=(("Aesthetics-Part01", 4), ("Aesthetics-Part02", 4), ("Imaginative", 2), ("Text", 2)), rows=10):
    """The layout of the repository, with files of `rows` rows."""
    number = 0
    for folder, count in sizes:
        for i in range(count):
            name = f"fluxdb-{folder.lower()}-{i:05d}-of-{count:05d}.parquet"
            write(root / folder / name, [flux_row(number + j) for j in range(rows)], FLUX)
            number += rows
    return root


SEED = pa.schema(
    [(name, pa.string()) for name in ("answer", "choice_a", "choice_b", "choice_c", "choice_d", "data_id", "data_type")]
    + [("image", pa.list_(IMAGE)), ("question", pa.string()), ("question_id", pa.string())]
    + [("question_type_id", pa.int64()), ("segment", pa.list_(pa.string()))]
)


def seed_row(number, **changes):
    row = {
        "answer": "ABCD"[number % 4],
        **{f"choice_{letter}": f"{letter} of {number}" for letter in "abcd"},
        "data_id": f"{number}_0",
        "data_type": "image",
        "image": [{"bytes": jpeg(number), "path": None}],
        "question": f"How many towels are in picture {number}?",
        "question_id": str(100_000 + number),
        "question_type_id": 1 + number % 9,
        "segment": None,
    }
    return row | changes


def seed_video(number):
    frames = [{"bytes": jpeg(number, (16, 16)), "path": None}] * 8
    return seed_row(number, data_type="video", image=frames, question_type_id=10, segment=["1", "2"])


OKVQA = pa.schema(
    {
        "image": IMAGE,
        "question_id": pa.string(),
        "question": pa.string(),
        "choices": pa.list_(pa.string()),
        "correct_choice_idx": pa.int8(),
        "direct_answers": pa.string(),
        "difficult_direct_answer": pa.bool_(),
        "rationales": pa.list_(pa.string()),
    }
)


def okvqa_row(number, **changes):
    row = {
        "image": {"bytes": jpeg(number), "path": None},
        "question_id": f"q{number}",
        "question": "What is in the motorcyclist's mouth?",
        "choices": ["toothpick", "food", "popsicle stick", "cigarette"],
        "correct_choice_idx": 3,
        "direct_answers": "['cigarette', \"it's a cigarette\", 'cigarette']",
        "difficult_direct_answer": False,
        "rationales": ["He is smoking."],
    }
    return row | changes


def recap_row(number, kind="CC12M", **changes):
    long, short = f"A long caption of picture {number} with many words.", f"Short {number}."
    if kind == "CC12M":
        long, short = short, long
    row = {"image": jpeg(number), "class": kind, "id": number, "recaption": long, "recaption_short": short}
    return row | changes


POPE = pa.schema(
    dict.fromkeys(("id", "question_id", "question", "answer", "image_source"), pa.string())
    | {"image": IMAGE, "category": pa.string()}
)


def pope_row(number, **changes):
    row = {
        "id": str(number),
        "question_id": str(1 + number % 6),
        "question": f"Is there a thing {number} in the image?",
        "answer": ("yes", "no")[number % 2],
        "image_source": f"COCO_val2014_{number // 6:012d}",
        "image": {"bytes": jpeg(number // 6), "path": None},
        "category": "adversarial",
    }
    return row | changes


HALLUSION_NAMES = ("category", "subcategory", "visual_input", "set_id", "figure_id", "sample_note", "question_id", "question")
HALLUSION = pa.schema(
    dict.fromkeys((*HALLUSION_NAMES, "gt_answer_details", "gt_answer", "filename"), pa.string()) | {"image": IMAGE}
)


def hallusion_row(number, **changes):
    row = {
        "category": "VD",
        "subcategory": "illusion",
        "visual_input": "1",
        "set_id": str(number // 4),
        "figure_id": str(number // 2 % 2),
        "sample_note": "circle",
        "question_id": str(number % 2),
        "question": "Are the two circles of the same size?",
        "gt_answer_details": "They are.",
        "gt_answer": str(number % 2),
        "filename": f"./hallusion_bench/VD/illusion/{number}.png",
        "image": {"bytes": jpeg(number // 2), "path": None},
    }
    return row | changes


def mmvp_row(number, **changes):
    row = {
        "Index": number,
        "Question": "Are the butterfly's wings closer to being open or closed?",
        "Options": "(a) Open (b) Closed",
        "Correct Answer": "(a)" if number % 2 else "(b)",
        "image": {"bytes": jpeg(number), "path": None},
    }
    return row | changes


def realworldqa_row(number, **changes):
    row = {
        "image": {"bytes": jpeg(number), "path": None},
        "image_path": f"{number}.webp",
        "question": (
            "In which direction is the front wheel of the car on the right side facing?\n\nA. Left\nB. Straight\nC. Right\n"
            "Please answer directly with only the letter of the correct option and nothing else."
        ),
        "answer": "ABC"[number % 3],
    }
    return row | changes


def chat(root, records, name="chat.json", images=("a.jpg", "b.jpg")):
    (root / "images").mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        (root / "images" / image).write_bytes(jpeg(i))
    text = json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records))
    (root / name).write_text(text)
    return root


def turn(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
