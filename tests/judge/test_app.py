"""The Space's app, against the same server."""

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

gradio = pytest.importorskip("gradio")

from granulon_hf.judge import judge  # noqa: E402

from .server import Reply, Server  # noqa: E402


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("judge_app", Path(judge.__file__).with_name("app.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def press(app, server, image=None, prediction="a cat", task="reasoning", question="", reference="", key="sk"):
    image = image or Image.new("RGB", (8, 8))
    return app.score(image, prediction, task, question, reference, "gpt-4o", server.url, key, True)


def test_scores(app):
    with Server() as server:
        result = press(app, server)
        assert press(app, server, task="vqa", question="What is it?")["task"] == "vqa"
    assert (result["accuracy"], result["hallucination"], result["hardened"]) == (70, 20, True)


def test_failures_are_one_sentence(app):
    with Server(lambda server, body: Reply(status=401, error=("invalid_api_key", "no"))) as server:
        with pytest.raises(gradio.Error, match="API key"):
            press(app, server)
        with pytest.raises(gradio.Error, match="answer"):
            press(app, server, prediction=" ")
        with pytest.raises(gradio.Error, match="needs a question"):
            press(app, server, task="vqa")
    with pytest.raises(gradio.Error, match="image"):
        app.score(None, "a", "reasoning", "", "", "gpt-4o", "", "sk", True)


def test_the_page_is_built(app):
    assert app.demo.get_api_info()["named_endpoints"]
