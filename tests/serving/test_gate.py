"""What stands before the server: bad requests, pictures of other servers, bounds, and stop strings."""

import asyncio
import base64
import contextlib
import io
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image
from transformers.utils.import_utils import is_serve_available

if not is_serve_available():
    pytest.skip("The serving requirements are not installed: pip install -e '.[serve]'", allow_module_level=True)

import httpx
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from granulon_hf import serving
from granulon_hf.serving import Gate, Refused, Stopper, fetch, is_public
from tests.conftest import build_tiny, data_url, make_picture

CHAT = "/v1/chat/completions"


def png(size=(20, 16)) -> bytes:
    file = io.BytesIO()
    make_picture(0, size).save(file, "PNG")
    return file.getvalue()


def request_of(*urls, **options) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}], **options}


@pytest.fixture(scope="module")
def config():
    return build_tiny()[0].config


@pytest.fixture
def backend():
    """A server that says what it was sent."""

    async def echo(request):
        return JSONResponse(await request.json())

    async def fails(request):
        raise ValueError("The processor cannot use this. It says more.")

    return Starlette(routes=[Route(CHAT, echo, methods=["POST"]), Route("/v1/responses", echo, methods=["POST"]),
                             Route("/v1/completions", fails, methods=["POST"])])  # fmt: skip


def post(app, body, path=CHAT, **options):
    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            content = body if isinstance(body, bytes) else json.dumps(body)
            return await client.post(path, content=content, headers={"content-type": "application/json"}, **options)

    return asyncio.run(run())


def test_pictures_arrive_as_data_urls(backend, config):
    app, data = Gate(backend, config), png()
    sent = (data_url(data), base64.b64encode(data).decode())
    reply = post(app, request_of(*sent, temperature=0, stop=None)).json()
    pictures = [part["image_url"]["url"] for part in reply["messages"][0]["content"][:-1]]
    assert [base64.b64decode(one.partition(",")[2]) for one in pictures] == [data, data]
    part = {"type": "input_image", "image_url": sent[0]}
    assert post(app, {"input": [{"role": "user", "content": [part]}]}, "/v1/responses").status_code == 200
    assert post(app, {"input": "Only text"}, "/v1/responses").status_code == 200


TEXT = {"role": "user", "content": "What?"}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"\xff", 400),
        ([], 400),
        ({}, 400),
        ({"messages": []}, 400),
        ({"messages": ["What?"]}, 400),
        ({"messages": [{"role": "user", "content": ["What?"]}]}, 400),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400),
        ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "/etc/passwd"}}]}]}, 400),
        ({"messages": [{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}]}, 400),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400),
        ({"messages": [TEXT], "max_tokens": 0}, 400),
        ({"messages": [TEXT], "max_tokens": "many"}, 400),
        ({"messages": [TEXT], "temperature": -1}, 400),
        ({"messages": [TEXT], "stop": ""}, 400),
        ({"messages": [TEXT], "stop": ["a"] * 5}, 400),
        ({"messages": [TEXT], "n": 2}, 400),
        ({"messages": [TEXT], "chat_template_kwargs": {"granularity": "corse"}}, 400),
        ({"messages": [TEXT], "chat_template_kwargs": {"visual_tokens": 999}}, 400),
        ({"messages": [TEXT], "chat_template_kwargs": {"visual_tokens": "many"}}, 400),
        ({"messages": [TEXT], "chat_template_kwargs": {"processor_kwargs": {"images": ["/etc/passwd"]}}}, 400),
        ({"messages": [TEXT], "chat_template_kwargs": {"images": ["http://127.0.0.1/"]}}, 400),
        ({"messages": [TEXT], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, 400),
        ({"messages": [TEXT], "generation_config": "{"}, 400),
        ({"messages": [TEXT], "generation_config": {"do_sample": True}}, 400),
        ({"messages": [TEXT], "generation_config": '{"num_beams": 1000}'}, 400),
        ({"messages": [TEXT], "seed": 10**30}, 400),
        (b'{"messages":' + b"[" * 100_000, 400),
        (request_of("/etc/passwd"), 400),
        (request_of("file:///etc/passwd"), 400),
        (request_of("http://example.com/a.png"), 400),
        (request_of("data:image/png;base64,AAAA"), 400),
        (request_of(data_url(png()[:-30])), 400),
        (request_of(data_url(png((2000, 10)))), 400),  # too long and thin
    ],
)
def test_bad_requests_are_refused_in_a_sentence(backend, config, body, status):
    reply = post(Gate(backend, config), body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (status, status)
    assert error["type"] == "invalid_request_error" and error["message"].endswith(".") and "\n" not in error["message"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_too_large(backend, config, monkeypatch):
    app = Gate(backend, config)
    large = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(large, "PNG")
    assert post(app, request_of(data_url(large.getvalue()))).status_code == 413
    monkeypatch.setattr(serving, "MAX_PIXELS", 500)
    assert post(app, request_of(data_url(png()))).status_code == 200
    assert post(app, request_of(*[data_url(png())] * 2)).status_code == 413  # of all pictures together
    monkeypatch.setattr(serving, "MAX_PICTURES", 2)
    assert post(app, request_of(*[data_url(png((4, 4)))] * 2)).status_code == 200
    assert post(app, request_of(*[data_url(png((4, 4)))] * 3)).status_code == 413
    monkeypatch.setattr(serving, "MAX_BODIES", 100)
    assert post(app, request_of(data_url(png()))).status_code == 503 and app.held == 0
    monkeypatch.setattr(serving, "MAX_BODY", 100)
    assert post(app, request_of(data_url(png()))).status_code == 413


def test_other_endpoints_and_errors_of_the_model(backend, config):
    app = backend
    app.add_middleware(Gate, config=config)  # as the command does it, behind what answers errors with 500
    for path in ("/v1/systemone", "/v1/audio/transcriptions", "/load_model", "/reset"):
        assert post(app, {}, path).status_code == 404
    reply = post(app, {"prompt": "Once"}, "/v1/completions")
    assert reply.status_code == 400 and reply.json()["error"]["message"] == "The processor cannot use this."


def test_a_full_server_refuses_and_loses_nothing(config):
    """Four times as many requests as there are places: each is answered, or told at once to come back."""
    most = inside = 0

    async def run():
        nonlocal most, inside
        release = asyncio.Event()

        async def slow(request):
            nonlocal most, inside
            inside += 1
            most = max(most, inside)
            await release.wait()
            inside -= 1
            return JSONResponse({"seed": (await request.json())["seed"]})

        app = Gate(Starlette(routes=[Route(CHAT, slow, methods=["POST"])]), config, max_requests=4)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            asked = [asyncio.create_task(client.post(CHAT, json={"messages": [TEXT], "seed": i})) for i in range(16)]
            while sum(task.done() for task in asked) < 12 or inside < 4:
                await asyncio.sleep(0.005)
            release.set()
            replies = await asyncio.gather(*asked)
            after = await client.post(CHAT, json={"messages": [TEXT], "seed": 99})
        return [(i, reply) for i, reply in enumerate(replies)], after

    replies, after = asyncio.run(run())
    assert sorted(reply.status_code for _, reply in replies) == [200] * 4 + [503] * 12 and most == 4
    assert all(reply.json() == {"seed": i} for i, reply in replies if reply.status_code == 200)
    assert all(reply.headers["retry-after"] == "1" for _, reply in replies if reply.status_code == 503)
    assert after.status_code == 200


@pytest.fixture
def other_loop():
    """An event loop in a thread of its own, as the command has one for the app."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


SCOPE = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b"", "asgi": {"spec_version": "2.3"}}


class Client:
    """One end of a request: it sends its body, and then goes away when it is told to, or never reads its answer."""

    def __init__(self, reads=True, **options):
        self.messages = [{"type": "http.request", "body": json.dumps({"messages": [TEXT], **options}).encode()}]
        self.leaves = asyncio.Event()
        self.reads = reads

    async def receive(self):
        if not self.messages:
            await self.leaves.wait()
        return self.messages.pop() if self.messages else {"type": "http.disconnect"}

    async def send(self, message):
        if not self.reads:
            await asyncio.Event().wait()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("case", ["leaves", "leaves a stream", "never reads"])
def test_a_client_that_goes_away_frees_its_place(config, other_loop, monkeypatch, apart, case):
    begun, ended, nobody = threading.Event(), threading.Event(), []
    monkeypatch.setattr(serving, "SEND_SECONDS", 0.05 if case == "never reads" else 30)

    async def endless():
        nobody.append(serving.abandoned.get())
        begun.set()
        try:
            yield b"data: {}\n\n"
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def chat(request):
        if case != "leaves":
            return StreamingResponse(endless(), media_type="text/event-stream")
        async for _ in endless():
            pass

    async def run():
        app = Starlette(routes=[Route(CHAT, chat, methods=["POST"])])
        gate = Gate(app, config, max_requests=1, loop=other_loop if apart else None)
        client = Client(reads=case != "never reads")
        task = asyncio.create_task(gate(SCOPE, client.receive, client.send))
        await asyncio.to_thread(begun.wait, 10)
        if case != "never reads":
            assert gate.metrics.in_flight == 1
            client.leaves.set()
        await asyncio.wait_for(task, 10)
        # A stream that is stuck ends when its generator is collected.
        assert case == "never reads" or await asyncio.to_thread(ended.wait, 10)
        return gate

    gate = asyncio.run(run())
    assert gate.metrics.in_flight == gate.held == 0 and gate.metrics.statuses == {serving.CLIENT_LEFT: 1}
    assert nobody[0].is_set()


def test_a_client_that_leaves_in_the_middle_of_its_request(backend, config):
    async def run():
        gate, client = Gate(backend, config), Client()
        client.messages[0] |= {"body": b"{", "more_body": True}
        client.leaves.set()
        await gate(SCOPE, client.receive, client.send)
        return gate

    gate = asyncio.run(run())
    assert gate.metrics.in_flight == gate.held == 0 and gate.metrics.statuses == {serving.CLIENT_LEFT: 1}


def test_a_model_that_is_busy_keeps_nobody_from_asking_how_it_is(config, other_loop):
    """The app opens pictures in its event loop, which stands still meanwhile."""
    begun, release = threading.Event(), threading.Event()

    async def chat(request):
        begun.set()
        release.wait(10)
        return JSONResponse(await request.json())

    async def run():
        app = Starlette(routes=[Route(CHAT, chat, methods=["POST"])])
        gate = Gate(app, config, max_requests=1, loop=other_loop)
        app.add_route("/metrics", gate.metrics.respond)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://server") as client:
            asked = asyncio.create_task(client.post(CHAT, json={"messages": [TEXT]}))
            await asyncio.to_thread(begun.wait, 10)
            full = await client.post(CHAT, json={"messages": [TEXT]})
            during = (await client.get("/metrics")).text
            release.set()
            return full, during, await asked, await client.get("/metrics")

    full, during, answered, after = asyncio.run(run())
    assert (full.status_code, answered.status_code, answered.json()) == (503, 200, {"messages": [TEXT]})
    assert "granulon_requests_in_flight 1\n" in during
    assert after.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = dict(line.rsplit(" ", 1) for line in after.text.splitlines() if not line.startswith("#"))
    assert found["granulon_requests_in_flight"] == "0" and found["granulon_requests_refused_total"] == "1"
    assert found['granulon_requests_total{status="200"}'] == found['granulon_requests_total{status="503"}'] == "1"
    assert found['granulon_request_seconds_bucket{le="+Inf"}'] == found["granulon_request_seconds_count"] == "1"
    assert 0 < float(found["granulon_request_seconds_sum"]) < 10


# --- pictures of other servers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) == public


@pytest.fixture
def site():
    """A server of pictures on this machine, and how often it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Host"]))
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                self.end_headers()
                return
            if self.path == "/drip":
                # Each byte comes in time, and the last one never.
                with contextlib.suppress(OSError):
                    while not closing.wait(0.02):
                        self.wfile.write(b"x")
                return
            self.send_response(404 if self.path == "/missing" else 200)
            self.end_headers()
            self.wfile.write(b"x" * 300 if self.path == "/large" else png())

        def log_message(self, *_):
            pass

    asked: list = []
    closing = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, asked
    closing.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "0"])
def test_nothing_is_fetched_from_private_addresses(site, host, backend, config):
    port, asked = site
    with pytest.raises(Refused):
        fetch(f"http://{host}:{port}/a.png")
    reply = post(Gate(backend, config, allow_remote_images=True), request_of(f"http://{host}:{port}/a.png"))
    assert reply.status_code == 400 and not asked


@pytest.mark.parametrize(
    "url", ["ftp://example.com/a.png", "file:///etc/passwd", "http://", "http://a:b@example.com/", "gopher://x"]
)
def test_addresses_of_other_kinds(url):
    with pytest.raises(Refused):
        fetch(url)


def test_public_pictures(site, backend, config, monkeypatch):
    """This machine stands for a public one under a name; the name is looked up once for every request."""
    port, asked = site
    looked_up = []

    def getaddrinfo(host, port, *_, **__):
        if not host[0].isdigit():
            looked_up.append(host)
            host = "127.0.0.1" if host == "pictures.test" else "10.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]

    monkeypatch.setattr(serving.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(serving, "is_public", lambda address: address == "127.0.0.1")
    here = f"http://pictures.test:{port}"
    app = Gate(backend, config, allow_remote_images=True)
    assert post(app, request_of(f"{here}/a.png")).status_code == 200
    assert asked == [("/a.png", f"pictures.test:{port}")] and looked_up == ["pictures.test"]
    assert post(Gate(backend, config), request_of(f"{here}/a.png")).status_code == 400 and len(asked) == 1
    assert fetch(f"{here}/to/{here}/a.png") == png()
    for bad in (
        f"{here}/to/http://inside.test/a.png",
        f"{here}/to/file:///etc/passwd",
        f"{here}/missing",
        "http://inside.test/",
    ):
        with pytest.raises(Refused):
            fetch(bad)
    with pytest.raises(Refused):
        fetch(here + f"/to/{here}" * 4 + "/a.png")
    monkeypatch.setattr(serving, "FETCH_BYTES", 200)
    with pytest.raises(Refused):
        fetch(f"{here}/large")
    with pytest.raises(Refused):
        fetch(f"{here}/drip", seconds=0.2)
    monkeypatch.setattr(serving, "FETCH_SECONDS", 0)  # of all pictures of a request together
    assert post(app, request_of(f"{here}/a.png")).status_code == 400


# --- stop strings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["END"], "one END two", "one "),
        (["END"], "one EN two", "one EN two"),
        (["b", "ab"], "xxab", "xx"),
        (["aab"], "aaab", "a"),
        (["\n\n", "."], "A cat\n. More", "A cat\n"),
        (["Z"], "", ""),
        (["one"], "one", ""),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_strings_in_pieces(stops, text, expected, size):
    stopper = Stopper(stops)
    said = [stopper.feed(text[i : i + size]) for i in range(0, len(text), size)]
    assert "".join(said) + stopper.feed("", last=True) == expected


def test_stop_strings_do_not_reach_the_client(config):
    pieces = ["A c", "at. ", "EN", "D and", " more"]

    async def chat(request):
        if not (await request.json()).get("stream"):
            return JSONResponse({"choices": [{"message": {"content": "".join(pieces)}, "finish_reason": "stop"}]})

        async def events():
            for piece in pieces:
                yield "data: " + json.dumps({"choices": [{"delta": {"content": piece}}]}) + "\n\n"
            yield "data: " + json.dumps({"choices": [{"delta": {}, "finish_reason": "stop"}]}) + "\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    app = Gate(Starlette(routes=[Route(CHAT, chat, methods=["POST"])]), config)
    for stop, expected in (("END", "A cat. "), (["cat", "END"], "A "), ("missing", "".join(pieces))):
        whole = post(app, {"messages": [TEXT], "stop": stop}).json()
        assert whole["choices"][0]["message"]["content"] == expected
        events = post(app, {"messages": [TEXT], "stop": stop, "stream": True}).text.strip().split("\n\n")
        deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
        assert "".join(delta.get("content", "") for delta in deltas) == expected
