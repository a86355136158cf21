"""`granulon ask`: what it prints, and one clear sentence with exit code 2 for everything that is wrong."""

import base64
import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from typer.testing import CliRunner

from granulon_hf import __version__, demo_model, variants
from granulon_hf.cli import app
from granulon_hf.cli.ask import open_image
from granulon_hf.modeling.images_granulon import to_rgb
from granulon_hf.modeling.modeling_granulon import GranulonModel
from tests.conftest import make_conversation, make_inputs, make_picture

QUESTION = "What is in the picture?"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of a Granulon and of a plain LLaVA, at toy size."""
    folders = {}
    for name in ("granulon-qwen2.5", "granulon-compact-qwen2.5", "clip-llama3.2"):
        folders[name] = tmp_path_factory.mktemp(name)
        for part in variants.build(name, tiny=True):
            part.save_pretrained(folders[name])
    return folders


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    make_picture(0).save(path)
    return str(path)


@pytest.fixture
def run(models, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments, model="granulon-qwen2.5"):
        model = [] if model is None else ["--model", str(models.get(model, model))]
        return CliRunner().invoke(app, ["ask", *map(str, arguments), *model])

    return run


def answer_as_json(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_prints_answer_levels_and_tokens(run, photo):
    result = run(photo, QUESTION)
    assert result.exit_code == 0, result.stderr
    for text in ("coarse", "10.7%", "middle", "78.7%  ◀ used", "fine", "36 pixel + 9 semantic tokens"):
        assert text in result.stdout
    assert result.stderr == ""


def test_json_is_one_object_and_the_models_own_answer(run, photo, models):
    result = answer_as_json(run(photo, QUESTION, "--json", "--max-new-tokens", 5))
    model, processor = variants.build("granulon-qwen2.5", tiny=True)
    inputs = make_inputs(processor, make_conversation(QUESTION, [Image.open(photo)]))
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert result["answer"] == processor.decode(tokens, skip_special_tokens=True).strip()
    assert result["granularity"] == "middle"
    assert list(result["granularity_probs"]) == ["coarse", "middle", "fine"]
    assert (result["pixel_tokens"], result["semantic_tokens"]) == (36, 9)
    assert result["images"] == [photo]
    assert result["model"] == str(models["granulon-qwen2.5"])
    assert result["overlay"] is None


@pytest.mark.parametrize(("level", "tokens"), [("coarse", 4), ("middle", 9), ("fine", 20)])
def test_forced_levels(run, photo, level, tokens):
    result = answer_as_json(run(photo, QUESTION, "--granularity", level, "--json"))
    assert (result["granularity"], result["semantic_tokens"]) == (level, tokens)
    assert max(result["granularity_probs"], key=result["granularity_probs"].get) == "middle"


@pytest.mark.parametrize(
    ("model", "options", "tokens", "level"),
    [
        ("granulon-compact-qwen2.5", [], (0, 32), "middle"),
        ("granulon-compact-qwen2.5", ["--granularity", "coarse"], (0, 16), "coarse"),
        ("granulon-compact-qwen2.5", ["--visual-tokens", 7], (0, 7), None),
        ("granulon-qwen2.5", ["--visual-tokens", 7], (36, 7), None),
        ("tiny:granulon-compact-llama3.2", ["--visual-tokens", 1], (0, 1), None),
    ],
)
def test_numbers_of_tokens(run, photo, tmp_path, model, options, tokens, level):
    result = answer_as_json(run(photo, QUESTION, "--json", "--overlay", tmp_path / "o.png", *options, model=model))
    assert (result["pixel_tokens"], result["semantic_tokens"]) == tokens
    assert result["granularity"] == level and (tmp_path / "o.png").stat().st_size > 1000
    shown = run(photo, QUESTION, *options, model=model).stdout
    assert f"{tokens[0]} pixel + {tokens[1]} semantic tokens" in shown and ("◀ used" in shown) == (level is not None)


def test_several_images_and_their_overlay(run, photo, tmp_path):
    other = tmp_path / "other.jpg"
    make_picture(1, (64, 128)).save(other)
    overlay = tmp_path / "both.png"
    result = answer_as_json(run(photo, other, "Which is brighter?", "--overlay", overlay, "--json"))
    assert (result["pixel_tokens"], result["semantic_tokens"]) == (72, 18)
    assert result["overlay"] == str(overlay)
    picture = np.asarray(Image.open(overlay)).astype(int)
    assert picture.shape[1] > picture.shape[0]
    saturated = (picture.max(-1) - picture.min(-1)) > 60
    assert saturated.mean() > 0.5


def test_streaming_prints_the_answer_once(run, photo):
    plain = run(photo, QUESTION, "--max-new-tokens", 6).stdout
    streamed = run(photo, QUESTION, "--max-new-tokens", 6, "--stream").stdout
    answer = answer_as_json(run(photo, QUESTION, "--max-new-tokens", 6, "--json"))["answer"]
    for text in (plain, streamed):
        assert "pixel + 9 semantic tokens" in text
    assert "".join(streamed.split()).startswith("".join(answer.split()))


def test_without_an_image(run):
    result = answer_as_json(run("Say hello.", "--json"))
    assert (result["pixel_tokens"], result["semantic_tokens"], result["granularity"]) == (0, 0, None)


def test_a_model_without_levels(run, photo):
    result = answer_as_json(run(photo, QUESTION, "--json", model="clip-llama3.2"))
    assert (result["pixel_tokens"], result["semantic_tokens"], result["granularity_probs"]) == (36, 0, None)


def test_as_a_module_and_version():
    done = subprocess.run([sys.executable, "-m", "granulon_hf", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"granulon_hf {__version__}"
    assert CliRunner().invoke(app, ["ask", "--help"]).exit_code == 0


def test_the_time_is_that_of_the_clock(models, photo):
    command = [sys.executable, "-m", "granulon_hf", "ask", photo, QUESTION, "--model", str(models["granulon-qwen2.5"])]
    began = time.monotonic()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    clock = time.monotonic() - began
    result = json.loads(done.stdout)
    # Ending the process is left.
    assert 0.6 * clock < result["seconds"] <= clock + 0.1 and 0 <= result["answer_seconds"] < result["seconds"]


def test_both_times_are_told(run, photo):
    assert re.search(r"answered in \d+\.\d s, \d+\.\d s with starting and loading\n$", run(photo, QUESTION).stdout)


def test_the_missing_backbones_are_named(run, photo, monkeypatch, tmp_path):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(demo_model, "distribution", missing)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    for model in (None, "demo"):
        result = run(photo, QUESTION, model=model)
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: ") and result.stderr.endswith(f"{demo_model.INSTALL_COMMAND}\n")


# --- bad input -------------------------------------------------------------------------------------------------------


def assert_refused(result, *words):
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1, "one sentence on one line"
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture
def broken(tmp_path, photo):
    whole = tmp_path / "whole.jpg"
    make_picture(0, (400, 300)).save(whole)
    files = {
        "truncated.jpg": whole.read_bytes()[:2000],
        "truncated.png": (tmp_path / "photo.png").read_bytes()[:300],
        "text.jpg": b"this is no picture",
        "empty.png": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.png").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("truncated.jpg", "truncated"),
        ("truncated.png", "truncated"),
        ("text.jpg", "damaged"),
        ("empty.png", "damaged"),
        ("folder.png", "is a folder"),
        ("missing.png", "There is no image"),
    ],
)
def test_unreadable_images(run, broken, name, words):
    assert_refused(run(broken / name, QUESTION), words, name)


def test_a_decompression_bomb(run, photo, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert_refused(run(photo, QUESTION), "unreasonably large")


def test_an_image_too_thin_to_be_resized(run, tmp_path):
    Image.new("RGB", (1, 5000)).save(tmp_path / "thin.png")
    assert_refused(run(tmp_path / "thin.png", QUESTION), "1 x 5000 pixels are too long and thin")


def test_an_overlay_never_replaces_the_image(run, photo):
    before = Path(photo).read_bytes()
    assert_refused(run(photo, QUESTION, "--overlay", photo), "would overwrite the image itself")
    assert Path(photo).read_bytes() == before


@pytest.fixture
def server(tmp_path):
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_images_from_urls(run, server, tmp_path):
    Image.new("RGBA", (40, 30), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(f"{server}/clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert_refused(run(f"{server}/missing.png", QUESTION), "404")
    (tmp_path / "page.png").write_text("<html></html>")
    assert_refused(run(f"{server}/page.png", QUESTION), "damaged")


def test_images_as_base64(run, photo):
    text = base64.b64encode(Path(photo).read_bytes()).decode()
    plain = answer_as_json(run(photo, QUESTION, "--json"))
    for source in (text, f"data:image/png;base64,{text}"):
        assert answer_as_json(run(source, QUESTION, "--json"))["answer"] == plain["answer"]
    # Letters that happen to be base64 are a name that was mistyped.
    assert_refused(run("mistyped", QUESTION), "There is no image 'mistyped'")


def test_a_variant_at_toy_size_is_a_model(run, photo):
    assert answer_as_json(run(photo, QUESTION, "--json", model="tiny:granulon-qwen2.5"))["model"] == "tiny:granulon-qwen2.5"
    assert_refused(run(photo, QUESTION, model="tiny:blip"), "Unknown variant 'blip'")


def test_a_missing_question(run, photo):
    for last in (photo, "mistyped.jpg", "https://example.org/photo"):
        assert_refused(run(last), "The last argument is the question")
    assert_refused(run(photo, "  "), "The question is empty")


def test_folders_and_names_without_a_granulon_model(run, photo, tmp_path):
    assert_refused(run(photo, QUESTION, model=tmp_path), "holds no model")
    AutoConfig.for_model("llama", hidden_size=64).save_pretrained(tmp_path / "llama")
    assert_refused(run(photo, QUESTION, model=tmp_path / "llama"), "is a llama model, not a Granulon model")
    assert_refused(run(photo, QUESTION, model="nobody/nothing"), "Cannot find the model 'nobody/nothing'")
    assert_refused(run(photo, QUESTION, model=photo), "is a file")
    (tmp_path / "config.json").write_text("{not json")
    assert_refused(run(photo, QUESTION, model=tmp_path), "config.json", "cannot be read")
    (tmp_path / "config.json").write_text('{"model_type": "granulon", "num_semantic_tokens": 0}')
    assert_refused(run(photo, QUESTION, model=tmp_path), "is not valid", "num_semantic_tokens must be at least 1")
    # Code of another model is neither run nor asked about.
    (tmp_path / "config.json").write_text('{"model_type": "weird", "auto_map": {"AutoConfig": "weird.Config"}}')
    assert_refused(run(photo, QUESTION, model=tmp_path), "is a weird model")


def test_weights_that_are_missing(run, photo, models, tmp_path):
    for file in models["granulon-qwen2.5"].iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert_refused(run(photo, QUESTION, model=tmp_path), "safetensors")
    # With some tensors only, transformers would go on with random ones in place of the others.
    weights = load_file(models["granulon-qwen2.5"] / "model.safetensors")
    some = {name: value for name, value in weights.items() if "projector" not in name}
    save_file(some, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_refused(run(photo, QUESTION, model=tmp_path), "multi_modal_projector.linear_1.bias", "3 more")


def test_a_question_with_the_image_placeholder(run, photo):
    assert run(photo, "What is <|image_pad|>?").exit_code == 0


def test_weights_and_processors_that_are_damaged(run, photo, models, tmp_path):
    for file in models["granulon-qwen2.5"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_refused(run(photo, QUESTION, model=tmp_path), "incomplete or damaged")
    (tmp_path / "processor_config.json").unlink()
    assert_refused(run(photo, QUESTION, model=tmp_path), "incomplete or damaged")


def test_the_photograph_is_never_overwritten(run, photo, tmp_path):
    (tmp_path / "link.png").hardlink_to(photo)
    before = (tmp_path / "photo.png").read_bytes()
    for name in ("photo.png", "link.png"):
        assert_refused(run(photo, QUESTION, "--overlay", tmp_path / name), "would overwrite the image itself")
    assert (tmp_path / "photo.png").read_bytes() == before


def test_a_question_longer_than_the_context(run, photo):
    assert_refused(run(photo, "cat " * 3000), "leaves no room")


def test_a_terminal_that_knows_fewer_characters(models, photo):
    command = [sys.executable, "-m", "granulon_hf", "ask", photo, QUESTION, "--model", str(models["granulon-qwen2.5"])]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert b"semantic tokens" in done.stdout


def test_a_question_that_begins_with_a_tilde(run, photo):
    assert run(photo, "~what is this?", "--json").exit_code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--granularity", "huge"], "Unknown granularity 'huge'; this model's levels are coarse, middle, fine."),
        (["--dtype", "int8"], "the choices are auto, float32"),
        (["--max-new-tokens", "0"], "must be at least 1; got 0"),
        (["--device", "abacus"], "no usable device 'abacus'"),
        (["--device", "meta"], "no usable device 'meta'"),
        (["--device", "cuda:99"], "no usable device 'cuda:99'"),
        (["--overlay", "no/such/folder/x.png"], "does not exist"),
        (["--overlay", "overlay.docx"], "ending .png"),
        (["--overlay", "overlay.xbm"], "ending .png"),  # Pillow writes it, but in black and white only
        (["--json", "--stream"], "exclude each other"),
        (["--visual-tokens", "0"], "--visual-tokens must"),
        (["--visual-tokens", "21"], "between 1 and 20"),
        (["--visual-tokens", "4", "--granularity", "fine"], "--granularity and --visual-tokens"),
        (["--price", "0.1"], "--price 0.1"),
    ],
)
def test_wrong_options(run, photo, options, words):
    assert_refused(run(photo, QUESTION, *options), words)


@pytest.mark.parametrize(
    "options", [["--granularity", "fine"], ["--overlay", "x.png"], ["--visual-tokens", "4"], ["--price", "0.5"]]
)
def test_what_needs_levels(run, photo, options):
    assert_refused(run(photo, QUESTION, *options, model="clip-llama3.2"), "no granularity levels", options[0])


def test_usage_errors_have_exit_code_2(run, photo):
    assert run(photo, QUESTION, "--no-such-option").exit_code == 2


def test_debug_shows_the_traceback(run, broken):
    result = run(broken / "text.jpg", QUESTION, "--debug")
    assert result.exit_code == 1
    assert result.exception is not None


# --- images ----------------------------------------------------------------------------------------------------------


def test_orientation_is_respected(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = open_image(str(tmp_path / "turned.jpg"))
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[1] < 60
    assert upright.getpixel((10, 35))[1] > 200


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("LA", (2, 2), (0, 255)), (0, 0, 0)),
        (Image.new("I;16", (2, 2), 32768), (128, 128, 128)),
        (Image.new("I", (2, 2), 200), (200, 200, 200)),
        (Image.new("F", (2, 2), 100.0), (100, 100, 100)),
        (Image.new("CMYK", (2, 2), (0, 0, 0, 255)), (0, 0, 0)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
    ],
)
def test_modes(image, expected):
    assert to_rgb(image).getpixel((0, 0)) == expected


def test_the_tower_runs_once(run, photo, tmp_path, monkeypatch):
    """Level, answer and overlay come from one look at the picture."""
    calls = []
    patched = GranulonModel._patch_features
    monkeypatch.setattr(GranulonModel, "_patch_features", lambda *args, **kwargs: calls.append(1) or patched(*args, **kwargs))
    assert run(photo, QUESTION, "--overlay", str(tmp_path / "clusters.png")).exit_code == 0
    assert len(calls) == 1
