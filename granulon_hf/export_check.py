"""What a model says to a fixed picture, and, run as a script, what it says where this package is not installed.

python granulon_hf/export_check.py FOLDER_OR_HUB_ID OUT.npz
"""

import sys
from typing import Any

import numpy as np
import torch
from PIL import Image

QUESTION = "Which letters are on the small sign, and is it raining?"


def picture() -> Image.Image:
    """Rectangles on a gradient, 96 x 96."""
    rows, columns = np.mgrid[0:96, 0:96]
    pixels = np.stack([rows * 2, columns * 2, np.where((rows // 24 + columns // 32) % 2, 30, 220)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


@torch.inference_mode()
def logits(model: Any, processor: Any) -> dict[str, np.ndarray]:
    """Logits [L x vocabulary] at the level that the model chooses ("auto") and at each of its levels, in float32."""
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    ).to(model.device)
    levels: dict[str, dict[str, str]] = {"auto": {}} | {name: {"granularity": name} for name in model.config.level_names}
    return {name: model(**inputs, **forced).logits[0].float().cpu().numpy() for name, forced in levels.items()}


def main(source: str, out: str) -> None:
    sys.modules["granulon_hf"] = None  # type: ignore[assignment]
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True).eval()
    if not type(model).__module__.startswith("transformers_modules."):
        sys.exit(f"{source} was loaded as {type(model)}, not by its own code")
    np.savez(out, **logits(model, processor))  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
