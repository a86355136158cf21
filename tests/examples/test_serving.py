"""A real `granulon serve`, asked by the real `openai` client: its answers are those of `generate` in this process.

Skipped where the serving requirements are not installed: `pip install -e ".[serve]"`.
"""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers.utils.import_utils import is_serve_available

if not is_serve_available():
    pytest.skip("The serving requirements are not installed: pip install -e '.[serve]'", allow_module_level=True)

import openai
from typer.testing import CliRunner

from granulon_hf import hub
from granulon_hf.cli import app
from tests.conftest import build_tiny, data_url, end, make_conversation, make_inputs, make_picture

ROOT = Path(__file__).parents[2]
QUESTIONS = (
    "What is this?",
    "How many rectangles are there, and of what colour is the largest one of them?",
    "Which is the brightest corner of this picture?",
)
START_SECONDS = 240  # on a loaded machine; usually a few seconds
MAX_NEW_TOKENS = 8


@pytest.fixture(scope="module")
def talker():
    """A toy model that says something, and not the same at every level, with a controller that is not of one mind."""
    model, processor = build_tiny()
    parts, controller = (model.model.language_model.layers, model.model.multi_modal_projector), model.model.controller
    random, table = torch.Generator().manual_seed(14), model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in (parameter for part in parts for parameter in part.parameters() if parameter.ndim == 2):
            parameter.normal_(std=0.4, generator=random)
        for layer, std in ((controller.in_proj, 100), (controller.fc1, 1), (controller.fc2, 1)):
            layer.weight.normal_(std=std, generator=random)
        controller.in_proj.weight -= controller.in_proj.weight.mean(1, keepdim=True)  # sigmoid(0) cancels
        controller.fc2.bias.zero_()
        # Neither special tokens nor parts of characters.
        texts = [processor.decode([i], skip_special_tokens=True).strip() for i in range(len(table))]
        table[[i for i, text in enumerate(texts) if not (text and text.isascii() and text.isprintable())]] = 0
    return model.eval(), processor


@pytest.fixture(scope="module", params=["granulon", "transformers"])
def server(talker, tmp_path_factory, request):
    """Address, model name and command of a running server: ours, and theirs on an exported folder's own code."""
    folder, log = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("log") / "server.txt"
    for part in talker:
        part.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module, more = [sys.executable, "-m", "granulon_hf"], ["--max-requests", "4"]
    if request.param == "transformers":
        folder = hub.export(folder, folder / "exported", validate=False)
        more = ["--trust-remote-code"]
        module = [
            sys.executable,
            "-c",
            "import sys; sys.modules['granulon_hf'] = None; from transformers.cli.transformers import main; main()",
        ]
    command = [*module, "serve", str(folder), "--device", "cpu", "--host", "127.0.0.1"]
    command += more
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, env=environment, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_healthy(port):
            assert process.poll() is None, f"The server ended:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"The server is not ready:\n{log.read_text()}"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", str(folder), request.param
    finally:
        end(process)


def is_healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).status == 200
    except OSError:
        return False


def connect(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


def user(question: str, *urls: str) -> dict:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": question}]}


def ask(server, *messages, **options):
    options = {"model": server[1], "temperature": 0, "max_tokens": MAX_NEW_TOKENS, **options}
    # A connection of its own: after an error 500 the server closes it.
    reply = connect(server).chat.completions.create(messages=list(messages), **options)
    return reply if options.get("stream") else reply.choices[0].message.content


def expected(talker, conversation, **options) -> str:
    model, processor = talker
    inputs = make_inputs(processor, [conversation])
    tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, **options)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_every_question_gets_its_own_visual_tokens(talker, server, picture):
    """One picture, questions of different levels, one after the other: no answer is made of another question's tokens."""
    model, processor = talker
    conversations = [make_conversation(question, [picture]) for question in QUESTIONS]
    levels = [model.config.level_names[int(model(**make_inputs(processor, [one])).granularity)] for one in conversations]
    assert len(set(levels)) == len(QUESTIONS)
    want = [expected(talker, one) for one in conversations]
    for index, one in enumerate(conversations):  # else stale tokens would not be noticed
        assert want[index] != expected(talker, one, granularity=levels[index - 1])
    assert [ask(server, user(question, data_url(picture))) for question in QUESTIONS] == want


@pytest.mark.slow
def test_a_stream_is_the_same_answer(talker, server, picture):
    chunks = ask(server, user(QUESTIONS[0], data_url(picture)), stream=True)
    parts = [part for chunk in chunks if (part := chunk.choices[0].delta.content)]
    assert "".join(parts) == expected(talker, make_conversation(QUESTIONS[0], [picture])) and len(parts) > 1


@pytest.mark.slow
def test_stop_strings(talker, server, picture):
    answer = expected(talker, make_conversation(QUESTIONS[0], [picture]))
    stop = answer[len(answer) // 2 :][:2]
    before = answer.partition(stop)[0]
    for stops in (stop, ["no such", stop]):
        told = ask(server, user(QUESTIONS[0], data_url(picture)), stop=stops)
        # transformers' own server ends there, too, and leaves the stop string (and the rest of its token) in the answer.
        assert told == before if server[2] == "granulon" else told.startswith(before + stop) and answer.startswith(told)
    chunks = ask(server, user(QUESTIONS[0], data_url(picture)), stop=stop, stream=True)
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert told == before if server[2] == "granulon" else told.startswith(before + stop)


@pytest.mark.slow
def test_many_at_once_get_their_own_answers(talker, server, picture):
    """Four times as many clients as places; the client's retries see to it that nothing is lost."""
    url, want = data_url(picture), [expected(talker, make_conversation(question, [picture])) for question in QUESTIONS]

    def one(index: int) -> bool:
        client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=50)
        options = {"model": server[1], "temperature": 0, "max_tokens": MAX_NEW_TOKENS}
        reply = client.chat.completions.create(messages=[user(QUESTIONS[index % 3], url)], **options)
        return reply.choices[0].message.content == want[index % 3]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(32)))


@pytest.mark.slow
def test_responses_rounds_and_several_pictures(talker, server, picture):
    other = make_picture(1)
    part = [{"type": "input_image", "image_url": data_url(picture)}, {"type": "input_text", "text": QUESTIONS[1]}]
    reply = connect(server).responses.create(
        model=server[1],
        input=[{"role": "user", "content": part}],
        temperature=0,
        max_output_tokens=MAX_NEW_TOKENS,
        stream=False,  # the server streams unless it is told not to
    )
    assert reply.output_text == expected(talker, make_conversation(QUESTIONS[1], [picture]))

    rounds = [*make_conversation(QUESTIONS[0], [picture, other], "A dog."), *make_conversation(QUESTIONS[2])]
    messages = [user(QUESTIONS[0], data_url(picture), data_url(other)), {"role": "assistant", "content": "A dog."}]
    assert ask(server, *messages, user(QUESTIONS[2])) == expected(talker, rounds)


@pytest.mark.slow
def test_bad_requests_are_errors_and_the_server_lives(talker, server, picture):
    question, url = QUESTIONS[0], data_url(picture)
    # Theirs has no name for what is wrong with a picture.
    error = openai.BadRequestError if server[2] == "granulon" else openai.InternalServerError
    for broken in (url[:-400], "data:image/png;base64,AAAA"):
        for stream in (False, True):
            with pytest.raises(error):
                ask(server, user(question, broken), stream=stream)
    if server[2] == "granulon":
        forbidden = (str(ROOT / "examples" / "images" / "chelsea.jpg"), f"{server[0]}/health", "http://169.254.169.254/")
        for address in forbidden:
            with pytest.raises(openai.BadRequestError):
                ask(server, user(question, address))
        for options in ({"max_tokens": 0}, {"extra_body": {"chat_template_kwargs": {"granularity": "corse"}}}):
            with pytest.raises(openai.BadRequestError):
                ask(server, user(question, url), **options)
    with pytest.raises(openai.BadRequestError):
        ask(server, user(question, url), model="another/model")
    # A forced level has one place in a request.
    forced = {"chat_template_kwargs": {"granularity": "coarse"}}
    assert [ask(server, user(question, url), extra_body=forced) for question in QUESTIONS] == [
        expected(talker, make_conversation(question, [picture]), granularity="coarse") for question in QUESTIONS
    ]
    number = {"chat_template_kwargs": {"visual_tokens": 7}}
    answer = expected(talker, make_conversation(question, [picture]), visual_tokens=7)
    assert ask(server, user(question, url), extra_body=number) == answer
    with pytest.raises(openai.UnprocessableEntityError):
        ask(server, user(question, url), extra_body={"granularity": "coarse"})
    assert ask(server, user(question, url)) == expected(talker, make_conversation(question, [picture]))


@pytest.mark.slow
def test_the_example_runs(server, monkeypatch, capsys):
    """The client of `hub_and_serving.md`, with this server's address and model."""
    guide = (ROOT / "examples" / "hub_and_serving.md").read_text()
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "OpenAI(" in code)
    assert code.count("http://localhost:8000") == code.count('"FOLDER"') == 1
    monkeypatch.chdir(ROOT)
    exec(code.replace("http://localhost:8000", server[0]).replace('"FOLDER"', repr(server[1])), {})
    whole, streamed = capsys.readouterr().out.strip().split("\n")
    assert whole == streamed and whole


def test_what_cannot_be_served_is_refused(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for folder, message in ((tmp_path, "is a llama model, not a Granulon model"), (tmp_path / "none", "Cannot find the model")):
        result = CliRunner().invoke(app, ["serve", str(folder)])
        assert result.exit_code == 2 and message in result.stderr
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    result = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert result.exit_code == 2 and "pip install 'granulon-hf[serve]'" in result.stderr
