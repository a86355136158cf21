"""`granulon demo`: the folder of the embedded model, the page, and one sentence for everything that is wrong."""

import socket
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import huggingface_hub
import pytest
from typer.testing import CliRunner

import granulon_hf.demo
from granulon_hf import demo_model, variants
from granulon_hf.cli import app
from granulon_hf.demo import INSTALL_COMMAND


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    for part in variants.build("granulon-qwen2.5", tiny=True):
        part.save_pretrained(folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)], env={"COLUMNS": "200"})


def sentence(result):
    assert result.exit_code == 2
    assert result.stdout == ""
    [line] = result.stderr.strip().splitlines()
    return line


@pytest.fixture
def no_backbones(monkeypatch, tmp_path):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(demo_model, "distribution", missing)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))


def test_prints_the_folder_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_model, "demo_folder", lambda: tmp_path)
    result = run()
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{tmp_path}\n", "")


@pytest.mark.parametrize("option", [["--model", "x"], ["--host", "0.0.0.0"], ["--port", "8000"], ["--share"]])
def test_options_of_the_page_need_serve(option):
    assert sentence(run(*option)) == "Error: --model, --host, --port and --share are of the page; add --serve."


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "granulon_hf.demo.app", raising=False)
    monkeypatch.delattr(granulon_hf.demo, "app", raising=False)
    line = sentence(run("--serve"))
    assert "gradio" in line and line.endswith('pip install "granulon-hf[demo]"')


class TestServe:
    @pytest.fixture(autouse=True)
    def launched(self, monkeypatch):
        gradio = pytest.importorskip("gradio", reason="needs gradio")
        launched = []
        monkeypatch.setattr(gradio.Blocks, "launch", lambda app, **options: launched.append(options))
        monkeypatch.delenv("GRANULON_MODEL", raising=False)
        return launched

    def test_is_for_this_machine_alone_by_default(self, launched, model):
        result = run("--serve", "--model", model, "--device", "cpu")
        assert result.exit_code == 0, result.stderr
        [options] = launched
        assert (options["server_name"], options["server_port"], options["share"]) == ("127.0.0.1", None, False)

    def test_options_arrive(self, launched, model):
        result = run("--serve", "--model", model, "--device", "cpu", "--host", "0.0.0.0", "--port", 8123, "--share")
        assert result.exit_code == 0, result.stderr
        [options] = launched
        assert (options["server_name"], options["server_port"], options["share"]) == ("0.0.0.0", 8123, True)

    def test_the_model_of_a_space(self, launched, model, monkeypatch):
        monkeypatch.setenv("GRANULON_MODEL", str(model))
        assert run("--serve", "--device", "cpu").exit_code == 0
        assert len(launched) == 1

    def test_bad_models(self, launched, tmp_path):
        assert "holds no model: it has no config.json" in sentence(run("--serve", "--model", tmp_path))
        assert "neither a folder nor reachable on the Hub" in sentence(run("--serve", "--model", "nobody/nothing"))
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        assert "is a llama model, not a Granulon model" in sentence(run("--serve", "--model", tmp_path))
        assert launched == []

    def test_bad_device(self, launched, model):
        assert "no usable device 'abacus'" in sentence(run("--serve", "--model", model, "--device", "abacus"))

    @pytest.mark.usefixtures("no_backbones")
    def test_without_the_backbones(self, launched):
        assert sentence(run("--serve")).endswith(INSTALL_COMMAND)


def test_a_port_that_is_taken(model):
    pytest.importorskip("gradio", reason="needs gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("--serve", "--model", model, "--device", "cpu", "--port", port)
    assert str(port) in sentence(result)


@pytest.mark.usefixtures("no_backbones")
def test_assembled_backbones_are_asked_for_without_serve_too():
    assert sentence(run()).endswith(INSTALL_COMMAND)


def test_requirements_name_the_extra():
    lines = (Path(granulon_hf.demo.__file__).parent / "requirements.txt").read_text().splitlines()
    assert "granulon-hf[demo]" in lines
