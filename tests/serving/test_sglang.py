"""SGLang with an exported folder, in an environment of its own, on a CPU: greedy tokens are those of `generate` here.

Run with the path of such an environment in GRANULON_TEST_SGLANG (examples/hub_and_serving.md says how to make one: 11 GB).
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from granulon_hf import hub
from tests.conftest import make_conversation, make_inputs, make_picture
from tests.serving.test_vllm import LENGTH, QUESTIONS, build_wide

FOLDER = os.environ.get("GRANULON_TEST_SGLANG")
# The level that each form is to show, which is not always the one that the model came with.
LEVELS = {"plain": None, "paper": "fine", "compact": "coarse", "pool": "middle"}
# The index has no CPU build of SGLang's kernels. On a CPU without AMX their names must be there, and none is called here.
KERNELS = """__path__ = []


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(name)

    return missing
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER, reason="set GRANULON_TEST_SGLANG to an environment with it")]


@pytest.mark.parametrize("form", LEVELS)
def test_tokens_are_those_of_generate(form, tmp_path, monkeypatch):
    model, processor = build_wide(form, monkeypatch)
    choice = {}
    if LEVELS[form]:
        choice["granularity"] = model.config.default_granularity = processor.default_granularity = LEVELS[form]
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    folder = hub.export(tmp_path / "model", tmp_path / "exported", validate=False)

    pictures = {"0.png": make_picture(0), "1.png": make_picture(1, (96, 96))}
    for file, picture in pictures.items():
        picture.save(tmp_path / file)
    lengths = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "do_sample": False}
    cases, expected = [], []

    def add(prompt, images, inputs, **choice):
        tokens = model.generate(**inputs, **choice, **lengths)[0, inputs["input_ids"].shape[1] :]
        cases.append({"prompt": prompt, "images": images, "length": LENGTH, "bad": False})
        expected.append(tokens.tolist())

    for images in (["0.png"], ["1.png"], ["0.png", "1.png"]):
        for question in QUESTIONS:
            conversation = make_conversation(question, [pictures[file] for file in images])
            prompt = str(processor.apply_chat_template(conversation, add_generation_prompt=True))
            add(prompt, images, make_inputs(processor, [conversation]), **choice)
        # A request of text alone in the same batch, in which somebody has typed a placeholder.
        text = f"What is {processor.image_token}?"
        add(text, [], processor.tokenizer(text, return_tensors="pt"))
    assert len({tuple(tokens) for tokens in expected}) == 7
    cases.append(cases[0] | {"images": ["0.png", "1.png"], "bad": True})
    expected.append(None)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "kernels" / "sgl_kernel").mkdir(parents=True)
    (tmp_path / "kernels" / "sgl_kernel" / "__init__.py").write_text(KERNELS)
    environment = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path / "kernels")}
    script = Path(__file__).with_name("ask_sglang.py")
    command = [Path(FOLDER) / "bin" / "python", script, folder, tmp_path]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=900)
    assert json.loads((tmp_path / "tokens.json").read_text()) == expected
