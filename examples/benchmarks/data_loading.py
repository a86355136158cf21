"""Images per second and core of the collator against the plain Hugging Face path, and the share of padding of batches.

    python examples/benchmarks/data_loading.py

Images: photographs of `examples/images`, resized, with a little grain (so that they compress like a camera's), as JPEG of
quality 90. Both paths run in this process on one thread, in turns; the median of the turns counts, in seconds of the CPU, so
that other load matters little. *Plain* is what most scripts do: `Image.open(…)` decoded in full, then
`processor.apply_chat_template(…, padding=True)`, no labels. *Ours* is `GranulonCollator`, labels and question mask included.
`images only` leaves the text out on both sides: `image_processor(…)` against `open_rgb` and the same. `difference` is that of
the pixels of both, in levels of 255. Where a JPEG is less than four times as large as what the image processor wants, it has to
be decoded in full to give the same pixels, and nothing is gained; `jpeg_reduction=1` gains there, at the price of other edges.

Padding: 20,000 samples whose text is log-normal (median 120 tokens, sigma 0.8; captions of a hundred words and short answers
alike) with no (10 %), one (80 %) or two images (10 %) of 216 slots, at most 2,048 tokens, in batches of 16. A pack has no
padding; `unused` is what its token budget (of 8,192) leaves free. Prints a table and one JSON line.
"""

import argparse
import io
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor
from transformers.trainer_pt_utils import LengthGroupedSampler

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from granulon_hf import variants  # noqa: E402
from granulon_hf.data import Sample  # noqa: E402
from granulon_hf.data.collator import GranulonCollator  # noqa: E402
from granulon_hf.data.packing import PackSampler  # noqa: E402
from granulon_hf.modeling.images_granulon import open_rgb  # noqa: E402

SIZES = ((640, 480), (1024, 1024), (4000, 3000))
PROCESSORS = {
    "DINOv3 224": SiglipImageProcessor(size={"height": 224, "width": 224}),
    "CLIP 336": CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
    "SigLIP 384": SiglipImageProcessor(size={"height": 384, "width": 384}),
}


def photographs(size: tuple[int, int], count: int) -> list[bytes]:
    random, files = np.random.default_rng(0), []
    names = sorted(path for path in (ROOT / "examples/images").glob("*.jpg") if "overlay" not in path.name)
    for index in range(count):
        pixels = np.asarray(Image.open(names[index % len(names)]).convert("RGB").resize(size, Image.Resampling.LANCZOS))
        grain = random.normal(0, 4, pixels.shape[:2]).astype(np.float32)[..., None]
        buffer = io.BytesIO()
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def in_turns(calls: dict, turns: int) -> dict[str, float]:
    """Median seconds of the processor that each takes."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn:  # the first one warms up
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def speed(processor, size: tuple[int, int], count: int, turns: int) -> dict:
    files, image_processor = photographs(size, count), processor.image_processor
    question, answer = "What is in the picture? Describe it.", "A photograph. " * 20
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    parts.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    samples = [Sample(str(i), [{"bytes": file, "path": None}], parts, answer, "caption") for i, file in enumerate(files)]
    collators = {"ours": GranulonCollator(processor), "ours, 1.0": GranulonCollator(processor, jpeg_reduction=1.0)}

    def decoded():
        return [Image.open(io.BytesIO(file)).convert("RGB") for file in files]

    def plain():
        turns = [
            [{"role": "user", "content": [{"type": "image", "image": image}, parts[0]["content"][1]]}, parts[1]]
            for image in decoded()
        ]
        padding = {"padding": True, "padding_side": "right"}
        processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=padding)

    def pixels(name):
        side = collators[name]._decoded_side()
        return image_processor([open_rgb({"bytes": file}, side) for file in files], return_tensors="pt")["pixel_values"]

    seconds = in_turns({"plain": plain, **{name: lambda c=c: c(samples) for name, c in collators.items()}}, turns)
    bare = in_turns(
        {
            "plain": lambda: image_processor(decoded(), return_tensors="pt"),
            **{name: lambda name=name: pixels(name) for name in collators},
        },
        turns,
    )
    expected = image_processor(decoded(), return_tensors="pt")["pixel_values"]
    deviation = torch.tensor(image_processor.image_std).view(1, 3, 1, 1) * 255
    kilobytes = round(sum(map(len, files)) / count / 1000)
    result = {"size": size, "kilobytes": kilobytes, "plain_per_s": round(count / seconds["plain"], 1)}
    for name in collators:
        difference = (pixels(name) - expected).abs() * deviation
        result[name] = {
            "per_s": round(count / seconds[name], 1),
            "ratio": round(seconds["plain"] / seconds[name], 2),
            "ratio_images_only": round(bare["plain"] / bare[name], 2),
            "mean_difference": round(difference.mean().item(), 2),
            "max_difference": round(difference.max().item(), 1),
        }
    return result


def padding(count: int = 20_000, batch: int = 16, budget: int = 8192) -> dict:
    random = np.random.default_rng(0)
    images = random.choice(3, count, p=(0.1, 0.8, 0.1))
    lengths = (216 * images + random.lognormal(np.log(120), 0.8, count) + 20).astype(int).clip(max=2048).tolist()

    def padded(order):
        rows = [[lengths[i] for i in order[start : start + batch]] for start in range(0, count, batch)]
        return round(1 - sum(lengths) / sum(len(row) * max(row) for row in rows), 4)

    packs = PackSampler(lengths, budget)
    grouped = LengthGroupedSampler(batch, lengths=lengths, generator=torch.Generator().manual_seed(0))
    return {
        "mean_length": round(sum(lengths) / count),
        "random": padded(random.permutation(count).tolist()),
        "length-grouped": padded(list(grouped)),
        "packed": 0.0,
        "unused": round(1 - sum(lengths) / (budget * len(packs)), 4),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16, help="images per batch")
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    _, processor = variants.build("granulon-qwen2.5", tiny=True)
    results = {}
    columns = ("image processor", "JPEG", "kB", "plain /s", "ours /s", "ratio", "images only", "difference: mean, max")
    columns += ("jpeg_reduction=1: ratio", "images only", "difference")
    print("|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|", flush=True)
    for name, image_processor in PROCESSORS.items():
        processor.image_processor = image_processor
        results[name] = []
        for size in SIZES:
            count = arguments.images if max(size) < 2000 else max(4, arguments.images // 4)
            one = speed(processor, size, count, arguments.turns)
            results[name].append(one)
            ours, bold = one["ours"], one["ours, 1.0"]
            cells = [name, "{}x{}".format(*size), one["kilobytes"], one["plain_per_s"], ours["per_s"], ours["ratio"]]
            cells += [
                ours["ratio_images_only"],
                f"{ours['mean_difference']}, {ours['max_difference']}",
                bold["ratio"],
                bold["ratio_images_only"],
            ]
            cells += [f"{bold['mean_difference']}, {bold['max_difference']}"]
            print("|", " | ".join(map(str, cells)), "|", flush=True)
    print(json.dumps({"speed": results, "padding": padding()}))
