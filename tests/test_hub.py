"""Export and upload over the real client to a local Hub, and loading by name where the package is not to be had."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from granulon_hf import AutoModelForVision2Seq, GranulonForConditionalGeneration, hub
from granulon_hf import export_check as probe
from granulon_hf.errors import GranulonError
from granulon_hf.modeling.configuration_granulon import GranulonConfig
from granulon_hf.training.stages import save_adapter, set_stage
from tests.hub_server import HubServer

CODE = Path(__file__).parents[1] / "modeling"

UPLOAD = """
import sys
from pathlib import Path
import numpy as np, torch
from huggingface_hub import HfApi
from granulon_hf import GranulonForConditionalGeneration, GranulonProcessor, hub
from granulon_hf import export_check as probe
from granulon_hf.errors import GranulonError
from granulon_hf.training.stages import save_adapter

folder = Path(sys.argv[1])
for part in ("vision", "text"):
    HfApi().create_repo(f"org/{part}")
    HfApi().upload_folder(repo_id=f"org/{part}", folder_path=folder / part)
model = GranulonForConditionalGeneration.from_vision_text_pretrained("org/vision", "org/text").requires_grad_(False)
processor = GranulonProcessor.from_vision_text_pretrained("org/vision", "org/text", num_semantic_tokens=20)
with torch.no_grad():
    model.model.controller.fc2.bias.copy_(torch.tensor([0.0, 0.0, 3.0]))
np.savez(folder / "expected.npz", **probe.logits(model, processor))
run = folder / "run"
run.mkdir()
save_adapter(run, model)
processor.save_pretrained(run)
(run / "optimizer.pt").write_bytes(b"optimizer")  # what a run leaves beside
(run / ".cache").mkdir()
(run / ".cache" / "x.json").write_text("{}")
(run / "token.txt").write_text("hf_" + "a" * 34)
commit = hub.push(run, "org/adapter", name=None)
print("URL", commit.commit_url)
hub.push(run, "org/full", form="full", message="first")
hub.push(run, "org/adapter", revision="v2", validate=False)
for name, private in (("org/public", True), ("org/full", False), ("org/other", True)):
    try:
        hub.push(run, name, private=private)
    except GranulonError as error:
        print("REFUSED", error)
"""

LOAD = """
import sys
sys.modules["granulon_hf"] = None
import json, numpy as np, torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
sys.path.insert(0, sys.argv[2])
import probe
first, out = json.loads(sys.argv[1]), sys.argv[3]
trusted = {"trust_remote_code": True}
found = {}
for name in ("org/adapter", "org/full"):
    processor = AutoProcessor.from_pretrained(name, code_revision=first[name], **trusted)
    model = AutoModelForImageTextToText.from_pretrained(name, code_revision=first[name], **trusted)
    assert first[name] in type(model).__module__ , type(model).__module__
    found |= {f"{name}/{level}": value for level, value in probe.logits(model, processor).items()}
np.savez(out, **found)
assert type(AutoModel.from_pretrained(name, code_revision=first[name], **trusted)).__name__ == "GranulonModel"
pipe = pipeline("image-text-to-text", model=model, processor=processor)
content = [{"type": "image", "image": probe.picture()}, {"type": "text", "text": probe.QUESTION}]
text = pipe([{"role": "user", "content": content}], max_new_tokens=4, do_sample=False, return_full_text=False)
print("PIPELINE", json.dumps(text[0]["generated_text"]))
try:
    AutoModelForImageTextToText.from_pretrained("org/full", **trusted)
except RuntimeError as error:
    print("NEWEST", error)
try:
    AutoConfig.from_pretrained("org/adapter", trust_remote_code=False)
except ValueError as error:
    print("UNTRUSTED", " ".join(str(error).split()))
"""


def run(script, *arguments, hub_url, home):
    environment = {**os.environ, "HF_ENDPOINT": hub_url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN": "hf_test"}
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def backbones(build, tmp_path):
    """Folders `vision` and `text` with the two halves of a toy model, as their makers would save them."""
    model, processor = build()
    model.model.vision_tower.save_pretrained(tmp_path / "vision")
    processor.image_processor.save_pretrained(tmp_path / "vision")
    text = make_text_model(model)
    text.save_pretrained(tmp_path / "text")
    processor.tokenizer.save_pretrained(tmp_path / "text")
    return tmp_path


def make_text_model(model):
    from transformers import AutoModelForCausalLM

    text = AutoModelForCausalLM.from_config(model.config.text_config)
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.tie_weights()
    text.generation_config.max_length = 77
    return text


@pytest.fixture
def assembled(backbones):
    from granulon_hf import GranulonProcessor

    paths = str(backbones / "vision"), str(backbones / "text")
    model = GranulonForConditionalGeneration.from_vision_text_pretrained(*paths).requires_grad_(False)
    return model, GranulonProcessor.from_vision_text_pretrained(*paths)


@pytest.fixture
def full(build, tmp_path):
    model, processor = build()
    model.save_pretrained(tmp_path / "full")
    processor.save_pretrained(tmp_path / "full")
    return tmp_path / "full"


def test_upload_and_load_by_name_without_the_package(backbones):
    with HubServer() as server:
        server.private["model", "org/public"] = False
        server.commit(("model", "org/public"), {}, "initial commit")
        server.private["model", "org/other"] = server.private["model", "org/full"] = True
        server.commit(("model", "org/other"), {"config.json": b'{"model_type": "llama"}', "eval.py": b""}, "another model")
        before = {"checkpoints/old.safetensors": b"", "eval.py": b"mine", "README.md": b"", "model-00002.safetensors": b""}
        config = b'{"model_type": "granulon"}'
        server.commit(("model", "org/full"), {**before, "config.json": config, "old_granulon.py": b""}, "an earlier upload")
        printed = run(UPLOAD, str(backbones), hub_url=server.url, home=backbones / "home")
        assert f"URL {server.url}/org/adapter/commit/" in printed and "org/public exists and is public" in printed
        assert "org/full exists and is private" in printed and "org/other holds something else" in printed
        first = {}
        for name, weights in (("org/adapter", "adapter.safetensors"), ("org/full", "model.safetensors")):
            files = server.files("model", name)
            code = {path.name: path.read_bytes() for path in (*CODE.glob("*_granulon.py"), *CODE.glob("*.jinja"))}
            assert {key: value for key, value in files.items() if key in code} == code
            rest = """LICENSE README.md config.json generation_config.json processor_config.json chat_template.jinja
                tokenizer.json tokenizer_config.json""".split()
            kept = {"checkpoints/old.safetensors", "eval.py"} if name == "org/full" else set()  # not ours
            assert set(files) == {*code, weights, *rest, *kept}
            assert server.private["model", name] and len(server.commits["model", name]) == 2
            first[name] = server.commits["model", name][-1][0]
        config = json.loads(server.files("model", "org/adapter")["config.json"])
        shas = {part: server.commits["model", f"org/{part}"][-1][0] for part in ("vision", "text")}
        assert config["backbones"] == {part: {"name": f"org/{part}", "revision": sha} for part, sha in shas.items()}
        assert "base_model:" in server.files("model", "org/adapter")["README.md"].decode()
        assert server.files("model", "org/adapter", "v2") == server.files("model", "org/adapter")
        assert len(server.commits["model", "org/other"]) == 1
        assert not server.files("model", "org/public") and server.commits["model", "org/full"][-1][2] == "first"
        # The backbone goes on, and so does the code: both are pinned.
        server.commit(("model", "org/vision"), {"config.json": b"broken"}, "next")
        broken = {**server.files("model", "org/full"), "modeling_granulon.py": b"raise RuntimeError('the newest code')"}
        server.commit(("model", "org/full"), broken, "next")
        # A home of its own: nothing is known from before.
        (backbones / "alone").mkdir()
        (backbones / "alone" / "probe.py").write_text(Path(probe.__file__).read_text())
        out = str(backbones / "found.npz")
        printed = run(LOAD, json.dumps(first), str(backbones / "alone"), out, hub_url=server.url, home=backbones / "other_home")
    expected, found = np.load(backbones / "expected.npz"), np.load(out)
    assert len(expected) == 4 and not np.array_equal(expected["coarse"], expected["fine"])
    assert np.array_equal(expected["auto"], expected["fine"])  # as the controller was set
    for key in found:
        np.testing.assert_array_equal(found[key], expected[key.split("/")[-1]])
    assert len(found) == 8
    assert "NEWEST the newest code" in printed and "UNTRUSTED" in printed and "trust_remote_code=True" in printed
    assert re.search('PIPELINE ".+"', printed)


def test_an_exported_folder_is_loaded_by_the_installed_classes_without_trust(full, tmp_path):
    folder = hub.export(full, tmp_path / "out", name=None, repo_id="org/x", validate=False)
    model = AutoModelForVision2Seq.from_pretrained(folder)
    assert type(model) is GranulonForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(folder)).__module__ == "granulon_hf.modeling.processing_granulon"
    assert type(AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)) is GranulonForConditionalGeneration
    again = hub.export(folder, tmp_path / "again", repo_id="org/x", validate=False)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}


def test_adapter_form_is_assembled_and_is_small(assembled, tmp_path):
    model, processor = assembled
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    save_adapter(run_folder, model)
    processor.save_pretrained(run_folder)
    assert sorted(key.split(".")[0] for key in load_file(run_folder / "adapter.safetensors")) == (
        ["controller"] * 5 + ["multi_modal_projector"] * 4
    )
    loaded, info = AutoModelForVision2Seq.from_pretrained(run_folder, dtype="bfloat16", output_loading_info=True)
    assert not any(info.values()) and loaded.dtype == torch.bfloat16 and not loaded.training
    assert loaded.generation_config.max_length == 77
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value.bfloat16(), rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "full")  # and is then a checkpoint as any other
    (tmp_path / "text" / "model.safetensors").unlink()
    assert AutoModelForVision2Seq.from_pretrained(tmp_path / "full").config.backbones == model.config.backbones
    with pytest.raises((OSError, ValueError)):
        AutoModelForVision2Seq.from_pretrained(run_folder)


@pytest.mark.parametrize(
    ("form", "reducer"), [("full", "attention-merge"), ("full", "downsample"), ("adapter", "queries"), ("adapter", "adata")]
)
def test_the_compact_form_is_loaded_where_the_package_is_not(backbones, form, reducer, tmp_path):
    """An export is loaded by its own code, in either form, and compared."""
    from granulon_hf import GranulonProcessor

    paths = str(backbones / "vision"), str(backbones / "text")
    model = GranulonForConditionalGeneration.from_vision_text_pretrained(*paths, visual_tokens="semantic", reducer=reducer)
    source = tmp_path / "run"
    source.mkdir()
    save_adapter(source, model) if form == "adapter" else model.save_pretrained(source)
    slots = model.config.num_semantic_slots
    GranulonProcessor.from_vision_text_pretrained(*paths, num_semantic_tokens=slots, visual_tokens="semantic").save_pretrained(
        source
    )
    folder = hub.export(source, tmp_path / "out", form=form)
    config = json.loads((folder / "config.json").read_text())
    assert (config["visual_tokens"], config["reducer"]) == ("semantic", reducer)
    held = load_file(folder / ("adapter.safetensors" if form == "adapter" else "model.safetensors"))
    assert any("reducer" in name for name in held) == (reducer == "queries")
    assert "all that the language model sees" in " ".join((folder / "README.md").read_text().split())


def test_foreign_code_deep_in_a_source_is_neither_run_nor_passed_on(full, tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    (code / "x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import CLIPImageProcessor")
    config = json.loads((full / "processor_config.json").read_text())
    config["image_processor"]["auto_map"] = {"AutoImageProcessor": f"{code}--x.CLIPImageProcessor"}
    (full / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(GranulonError, match="names code that is not"):
        hub.export(full, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_a_broken_model_is_not_exported(full, tmp_path):
    state = load_file(full / "model.safetensors")
    state["model.multi_modal_projector.linear_2.bias"][0] = float("nan")
    save_file(state, full / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GranulonError, match="not all finite"):
        hub.export(full, tmp_path / "out")


def test_backbones_in_folders_are_named_by_whole_paths(backbones, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = GranulonForConditionalGeneration.from_vision_text_pretrained("vision", "text")
    assert model.config.backbones == {part: {"name": str(tmp_path / part)} for part in ("vision", "text")}
    from granulon_hf import GranulonProcessor

    model.save_pretrained("run")
    GranulonProcessor.from_vision_text_pretrained("vision", "text").save_pretrained("run")
    folder = hub.export("run", tmp_path / "out", validate=False)
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.glob("*.json"))


def test_other_places_of_the_backbones(assembled, tmp_path):
    model, _ = assembled
    save_adapter(tmp_path, model)
    for part in ("vision", "text"):
        (tmp_path / part).rename(tmp_path / f"moved_{part}")
    moved = {part: {"name": str(tmp_path / f"moved_{part}")} for part in ("vision", "text")}
    loaded = AutoModelForVision2Seq.from_pretrained(tmp_path, backbones=moved)
    loaded_directly = GranulonForConditionalGeneration.from_pretrained(tmp_path, backbones=moved)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value) and torch.equal(loaded_directly.state_dict()[name], value)


def test_an_adapter_can_begin_to_be_told_where_slots_are(assembled, tmp_path):
    model, _ = assembled
    save_adapter(tmp_path, model)
    loaded = AutoModelForVision2Seq.from_pretrained(tmp_path, slot_position="semantic")
    state = loaded.state_dict()
    assert (state.pop("model.multi_modal_projector.position") == 0).all()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_low_rank_factors_are_merged(assembled, tmp_path):
    model, processor = assembled
    set_stage(model, "projector+lora", lora_rank=2, lora_alpha=6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    save_adapter(tmp_path, model)
    expected = probe.logits(model.eval(), processor)
    found = probe.logits(AutoModelForVision2Seq.from_pretrained(tmp_path), processor)
    plain = probe.logits(
        GranulonForConditionalGeneration.from_vision_text_pretrained(tmp_path / "vision", tmp_path / "text"), processor
    )
    np.testing.assert_allclose(found["fine"], expected["fine"], atol=1e-5)
    assert np.abs(plain["fine"] - expected["fine"]).max() > 1e-3


@pytest.mark.parametrize("stage", ["projector", "projector+lora", "full"])
def test_the_card_says_how_the_model_comes_from_its_backbones(assembled, stage, tmp_path, monkeypatch):
    """Backbones that were trained are no longer those that are named: neither in the config nor as a mere merge."""
    model, processor = assembled
    names = {part: {"name": f"org/{part}", "revision": "1" * 40} for part in ("vision", "text")}
    set_stage(model, stage, lora_rank=2)
    source = tmp_path / "run"
    source.mkdir()
    if stage == "full":
        model.save_pretrained(source)
    else:
        save_adapter(source, model)
    processor.save_pretrained(source)
    (source / "run.json").write_text(json.dumps({"model": {"stage": stage}}))
    monkeypatch.setattr(hub, "read_config", lambda name: with_backbones(GranulonConfig.from_pretrained(name), names))
    folder = hub.export(source, tmp_path / "out", form="full", validate=False)
    held = json.loads((folder / "config.json").read_text())["backbones"]
    card = ModelCard.load(folder / "README.md").data.to_dict()
    assert card["base_model"] == ["org/vision", "org/text"]
    assert card["base_model_relation"] == ("merge" if stage == "projector" else "finetune")
    assert held == (names if stage == "projector" else None)
    if stage != "full":
        card = ModelCard.load(hub.export(source, tmp_path / "adapter", validate=False) / "README.md").data.to_dict()
        assert card["base_model_relation"] == "adapter"


def with_backbones(config, names):
    config.backbones = names
    return config


def test_an_adapter_that_does_not_fit_is_refused(assembled, tmp_path):
    model, _ = assembled
    save_adapter(tmp_path, model)
    state = load_file(tmp_path / "adapter.safetensors")
    for wrong, message in (
        ({key: value for key, value in state.items() if "projector" not in key}, "lacks 4 weights"),
        ({**state, "language_model.norm.weight": torch.ones(3)}, r"language_model.norm.weight as \(3,\)"),
        ({**state, "language_model.x.lora_A.default.weight": torch.ones(2, 3)}, "adapts model.language_model.x.weight"),
    ):
        save_file(wrong, tmp_path / "adapter.safetensors")
        with pytest.raises(ValueError, match=message):
            AutoModelForVision2Seq.from_pretrained(tmp_path)
    save_file({**state, "language_model.unknown": torch.ones(3)}, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match=r"has model.language_model.unknown, which this model lacks"):
        AutoModelForVision2Seq.from_pretrained(tmp_path)
    save_file(state, tmp_path / "adapter.safetensors", metadata={"lora_scale": "evil"})
    with pytest.raises(ValueError, match="lora_scale is 'evil'"):
        AutoModelForVision2Seq.from_pretrained(tmp_path)
    model.config.backbones = None
    save_adapter(tmp_path, model)
    with pytest.raises(ValueError, match="does not say of which backbones"):
        AutoModelForVision2Seq.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "backbones",
    [
        {"vision": {"name": "x"}},
        {"vision": {"name": "x"}, "text": {"revision": "y"}},
        {"vision": {"name": "x", "trust_remote_code": True}, "text": {"name": "y"}},
        {"vision": "x", "text": "y"},
    ],
)
def test_a_config_with_other_backbones_is_refused(backbones):
    with pytest.raises(ValueError, match="backbones are"):
        GranulonConfig(backbones=backbones)


def test_other_backbones_than_those_named_are_found_out(assembled, tmp_path):
    model, processor = assembled
    (tmp_path / "run").mkdir()
    save_adapter(tmp_path / "run", model)
    processor.save_pretrained(tmp_path / "run")
    with torch.no_grad():
        model.model.language_model.norm.weight += 1
    model.save_pretrained(tmp_path / "altered")
    processor.save_pretrained(tmp_path / "altered")
    with pytest.raises(GranulonError, match="backbones that it names are not the ones"):
        hub.export(tmp_path / "altered", tmp_path / "out", form="adapter")
    with pytest.raises(GranulonError, match="is a folder of this machine"):
        hub.export(tmp_path / "run", tmp_path / "out2", repo_id="org/x")


def test_what_cannot_be_exported(full, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").touch()
    for options, message in (
        ({"folder": tmp_path / "used"}, "not an empty folder"),
        ({"form": "pickle"}, "Unknown form"),
        ({"name": "blip"}, "Unknown variant"),
        ({"form": "adapter"}, "does not say where its vision backbone comes from"),
        ({"form": "adapter", "backbones": {"audio": "x"}}, "Unknown backbone"),
        ({"backbones": {"vision": "x"}}, "adapter form only"),
        ({"source": tmp_path / "nothing"}, "Cannot find the model"),
    ):
        with pytest.raises(GranulonError, match=message):
            hub.export(**{"source": full, "folder": tmp_path / "out", "validate": False, **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("pytorch_model.bin", "", "not part of a model"),
        ("optimizer.pt", "", "not part of a model"),
        ("modeling_granulon.py", "import os", "not the code of this package"),
        ("evil.py", "import os", "not the code of this package"),
        ("notes.txt", "hf_" + "a" * 34, "looks like a secret"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["evil/repo--x.Y", null]}}', "names code that is not"),
        ("processor_config.json", '{"image_processor": {"auto_map": {"AutoImageProcessor": "e/r--x.Y"}}}', "names code that"),
        ("config.json", '{"a": [{"b": {"auto_map": "e/r--x.Y"}}]}', "names code that is not"),
    ],
)
def test_a_folder_is_looked_through_before_it_goes(file, content, message, tmp_path):
    (tmp_path / file).write_text(content)
    with pytest.raises(GranulonError, match=message):
        hub.check_export(tmp_path)


def test_pickles_are_read_only_where_asked(full):
    torch.save(load_file(full / "model.safetensors"), full / "pytorch_model.bin")
    (full / "model.safetensors").unlink()
    with pytest.raises(OSError, match="pickled weights"):
        AutoModelForVision2Seq.from_pretrained(full)
    assert AutoModelForVision2Seq.from_pretrained(full, use_safetensors=False)


def test_foreign_code_is_named_and_not_run(full, caplog, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("granulon_hf"), "propagate", True)
    config = json.loads((full / "config.json").read_text())
    config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForImageTextToText"), "evil/repo--x.Y")
    (full / "config.json").write_text(json.dumps(config))
    assert type(AutoModelForVision2Seq.from_pretrained(full)) is GranulonForConditionalGeneration
    assert any("names code of evil/repo" in record.message for record in caplog.records)


@pytest.mark.slow
def test_the_exported_folder_must_say_the_same(full, build, tmp_path):
    folder = hub.export(full, tmp_path / "out", validate=False)
    model, processor = build()
    expected = probe.logits(model, processor)
    assert hub.compare(folder, expected) == 0
    with pytest.raises(GranulonError, match="says something else"):
        hub.compare(folder, {**expected, "fine": expected["fine"] + 1})
    with pytest.raises(GranulonError, match="says something else"):
        hub.compare(folder, {**expected, "coarse": expected["coarse"] * np.nan})
    (folder / "aggregation_granulon.py").unlink()
    with pytest.raises(GranulonError, match="does not load without granulon_hf"):
        hub.compare(folder, expected)


def test_without_a_login_nothing_is_computed(full, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    monkeypatch.setattr(hub, "export", lambda *args, **options: pytest.fail("too early"))
    with pytest.raises(GranulonError, match="hf auth login"):
        hub.push(full, "org/x")
    with pytest.raises(GranulonError, match="not a name of a repository"):
        hub.push(full, "org/x/y")
