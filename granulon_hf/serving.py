"""What stands before transformers' server: bounds on requests, pictures that may be opened, and `stop`.

transformers' server opens whatever address a picture has, files of its machine included, takes any number of requests, answers
bad ones with error 500 and leaves `stop` strings in answers. [`Gate`] is the ASGI middleware that puts this right.
"""

import asyncio
import base64
import io
import ipaddress
import json
import socket
import threading
import time
from collections.abc import Awaitable, Iterator
from contextvars import ContextVar
from typing import Annotated, Any, Literal

import httpx
from PIL import Image
from pydantic import BaseModel, Field, Json, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from granulon_hf.errors import GranulonError, first_sentence
from granulon_hf.loading import check_choice
from granulon_hf.modeling.configuration_granulon import GranulonConfig
from granulon_hf.modeling.images_granulon import DATA_URL, open_rgb
from granulon_hf.serving_metrics import Metrics

# The rest of what transformers' server offers loads or unloads models, or opens files.
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
MAX_BODY = 32 * 2**20
# Of all requests together that arrive, wait or run.
MAX_BODIES = 32 * MAX_BODY
# Of all pictures of a request together.
MAX_PICTURES, MAX_PIXELS = 64, 50_000_000
# For a request to arrive, and for each piece of its answer to be taken.
BODY_SECONDS, SEND_SECONDS = 30, 30
# Of a picture that is fetched.
FETCH_BYTES, FETCH_SECONDS, REDIRECTS = 16 * 2**20, 10, 3
# What is counted where a client goes away, as nginx does it.
CLIENT_LEFT = 499
# Whether nobody waits for the answer that is being made: to cancel the server's handler does not reach its generation.
abandoned: ContextVar[threading.Event] = ContextVar("abandoned")
# Translators of IPv4 addresses, which Python counts as public.
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Refused(Exception):
    """A request that is not answered, with its HTTP status and one sentence for the client."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class ChatMessage(BaseModel):
    role: str
    content: str | list[dict[str, Any]] | None = None


Text = Annotated[str, Field(min_length=1)]


class TemplateOptions(BaseModel, extra="forbid"):
    """Options of the chat template and of the choice of visual tokens; others would be the processor's, which opens files."""

    granularity: str | None = None
    visual_tokens: int | None = None
    price: float | None = None
    enable_thinking: bool | None = None
    date_string: str | None = None
    tools_in_user_message: bool | None = None


class Beams(BaseModel):
    """Options of a generation config that multiply the memory of an answer."""

    num_beams: Annotated[int, Field(ge=1, le=8)] | None = None
    num_return_sequences: Annotated[int, Field(ge=1, le=8)] | None = None


class Options(BaseModel):
    """Options of a request that transformers' server takes as they come."""

    model: str | None = None
    stream: bool | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    n: Literal[1] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    generation_config: Json[Beams] | None = None


class ChatOptions(Options):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]


class Gate:
    """ASGI middleware that checks requests, opens their pictures, bounds how many there are at a time, and counts them.

    Args:
        app: transformers' server.
        config ([`GranulonConfig`], *optional*): of the served model, for the choice of visual tokens.
        allow_remote_images (`bool`): fetch pictures from public addresses.
        max_requests (`int`): requests that run or wait; further ones are told to come back later (503).
        metrics ([`Metrics`], *optional*): what is counted.
        loop (`asyncio.AbstractEventLoop`, *optional*): of another thread, in which the app handles what passes the gate. The
            app opens and resizes pictures in its event loop; in the gate's own, nobody else would be answered meanwhile.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: GranulonConfig | None = None,
        allow_remote_images: bool = False,
        max_requests: int = 32,
        metrics: Metrics | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ):
        self.app = app
        self.config = config
        self.allow_remote_images = allow_remote_images
        self.max_requests = max_requests
        self.metrics = metrics or Metrics()
        self.loop = loop
        self.held = 0
        # A decoded picture is much larger than its file.
        self.decoders = threading.Semaphore(2)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        began, status = time.monotonic(), 500

        async def watch(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.answer(scope, receive, watch)
        except Refused as error:
            headers = None
            if error.status == 503:
                headers = {"Retry-After": "1"}
                self.metrics.refused += 1
            kind = "server_error" if error.status >= 500 else "invalid_request_error"
            content = {"error": {"message": f"{str(error).rstrip('.')}.", "type": kind, "code": error.status}}
            await JSONResponse(content, error.status, headers)(scope, receive, watch)
        except ClientDisconnect:
            status = CLIENT_LEFT
        finally:
            self.metrics.observe(status, time.monotonic() - began)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read and check a request, and let the server answer it; raise [`Refused`] where it does not get there."""
        if scope["path"] not in PATHS:
            raise Refused(f"There is no {scope['path']} here; POST to {', '.join(PATHS)}.", 404)
        body = bytearray()
        try:
            # A slow client takes no place.
            await self.read(Request(scope, receive), body)
            if self.metrics.in_flight >= self.max_requests:
                raise Refused(f"The server is full ({self.max_requests} requests); try again in a moment.", 503)
            self.metrics.in_flight += 1
            try:
                try:
                    data = await run_in_threadpool(self.prepare, scope["path"], bytes(body))
                except RecursionError as error:
                    raise Refused("The body is nested too deeply.") from error
                stops = [data["stop"]] if isinstance(data.get("stop"), str) else data.get("stop") or []
                await self.forward(scope, data, receive, StopFilter(send, stops) if stops else send)
            finally:
                self.metrics.in_flight -= 1
        finally:
            self.held -= len(body)

    async def read(self, request: Request, body: bytearray) -> None:
        """Read a request's body; raise [`Refused`] if it is too large or too slow, or there are too many of them."""
        too_large = Refused(f"The request is larger than {MAX_BODY // 2**20} MiB; send smaller pictures.", 413)
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > MAX_BODY:
            raise too_large

        async def read() -> None:
            async for chunk in request.stream():
                body.extend(chunk)
                self.held += len(chunk)
                if len(body) > MAX_BODY:
                    raise too_large
                if self.held > MAX_BODIES:
                    raise Refused("The server is full; try again in a moment.", 503)

        try:
            await asyncio.wait_for(read(), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise Refused(f"The request did not arrive within {BODY_SECONDS} seconds.", 408) from None

    async def forward(self, scope: Scope, data: dict[str, Any], receive: Receive, send: Send) -> None:
        """Let the server answer the prepared request, for as long as its client is there and reads."""
        body: list[Message] = [{"type": "http.request", "body": json.dumps(data).encode(), "more_body": False}]
        started = complete = False
        nobody = threading.Event()
        abandoned.set(nobody)

        async def replay() -> Message:
            if body:
                return body.pop()
            # The app is cancelled before it could be told that the client has left.
            return await asyncio.get_running_loop().create_future()

        async def watch(message: Message) -> None:
            nonlocal started, complete
            started, complete = True, message["type"] == "http.response.body" and not message.get("more_body", False)
            try:
                await asyncio.wait_for(send(message), SEND_SECONDS)
            except asyncio.TimeoutError:
                left.cancel()

        async def wait_until_it_leaves() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        left = asyncio.ensure_future(wait_until_it_leaves())
        answer = asyncio.ensure_future(self.call(scope, replay, watch))
        try:
            await asyncio.wait({left, answer}, return_when=asyncio.FIRST_COMPLETED)
            # Servers call it a disconnect, too, that the answer is complete.
            if not answer.done() and not complete:
                raise ClientDisconnect
            await answer
        except ValueError as error:  # the processor's and the model's word for what they cannot use
            if started:
                raise
            raise Refused(first_sentence(error)) from error
        finally:
            nobody.set()
            left.cancel()
            answer.cancel()
            await asyncio.gather(left, answer, return_exceptions=True)

    def call(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Call the app, in its own loop where it has one."""
        if self.loop is None:
            return self.app(scope, receive, send)
        here = asyncio.get_running_loop()

        async def receive_here() -> Message:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(receive(), here))  # type: ignore[arg-type]

        async def send_here(message: Message) -> None:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(send(message), here))  # type: ignore[arg-type]

        answer = self.app(scope, receive_here, send_here)
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(answer, self.loop))  # type: ignore[arg-type]

    def prepare(self, path: str, body: bytes) -> dict[str, Any]:
        """Check a request, and put the bytes of every picture in place of its address."""
        try:
            data = json.loads(body)
            (ChatOptions if path == PATHS[0] else Options).model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the body"
            raise Refused(f"{where}: {first['msg']}.") from error
        except ValueError as error:  # also of bytes that are no text
            raise Refused("The body is not JSON.") from error
        choice = {
            name: (data.get("chat_template_kwargs") or {}).get(name) for name in ("granularity", "visual_tokens", "price")
        }
        if self.config is not None and any(value is not None for value in choice.values()):
            try:
                check_choice(self.config, **choice)
            except (GranulonError, TypeError) as error:
                raise Refused(first_sentence(error)) from error
        pictures = pixels = 0
        deadline = time.monotonic() + FETCH_SECONDS
        for part in find_parts(data.get("messages"), data.get("input")):
            if part.get("type") in ("text", "input_text", "output_text"):
                if not isinstance(part.get("text"), str):
                    raise Refused(f"A part of the type {part['type']} must have a text.")
                continue
            if part.get("type") not in ("image_url", "input_image"):
                raise Refused(f"A message's part has the type {str(part.get('type'))[:40]!r}; use text or image_url.")
            given = part.get("image_url")
            url = given.get("url") if isinstance(given, dict) else given
            if not isinstance(url, str):
                raise Refused("A picture must have an image_url: a data URL, base64 text or an address.")
            pictures += 1
            if pictures > MAX_PICTURES:
                raise Refused(f"A request may have {MAX_PICTURES} pictures; this one has more.", 413)
            found = self.read_picture(url, deadline)
            pixels += measure(found)
            if pixels > MAX_PIXELS:
                raise Refused(f"The pictures have more than {MAX_PIXELS // 10**6} million pixels; send smaller ones.", 413)
            try:
                with self.decoders:
                    open_rgb(found)
            except ValueError as error:
                raise Refused(first_sentence(error)) from error
            part["image_url"] = {"url": "data:image/*;base64," + base64.b64encode(found).decode()}
        return data

    def read_picture(self, url: str, deadline: float) -> bytes:
        """Return the bytes behind a data URL, base64 text or, where that is allowed, an address."""
        if "://" in url[:20]:
            if not self.allow_remote_images:
                raise Refused("This server fetches no pictures; send a data URL, or start it with --allow-remote-images.")
            return fetch(url, deadline - time.monotonic())
        try:
            return base64.b64decode("".join(DATA_URL.sub("", url, count=1).split()), validate=True)
        except ValueError as error:
            raise Refused("A picture is neither a data URL nor base64 text.") from error


def find_parts(messages: Any, items: Any) -> Iterator[dict[str, Any]]:
    """Find the parts of chat messages, and of the input items of /v1/responses, at any depth."""
    for value in (messages, items):
        values = [value] if isinstance(value, dict) else value if isinstance(value, list) else []
        for one in values:
            if not isinstance(one, dict):
                raise Refused("Messages and their parts must be objects.")
            nested = one.get("content", one.get("output"))
            if isinstance(nested, list | dict):
                yield from find_parts(nested, None)
            elif "role" not in one and str(one.get("type")) not in (
                "function_call",
                "function_call_output",
                "message",
                "reasoning",
            ):
                yield one


def measure(found: bytes) -> int:
    """Return the pixels that a picture says it has, without decoding it."""
    try:
        with Image.open(io.BytesIO(found)) as image:
            return image.width * image.height
    except Exception:  # what Pillow cannot open, or calls a bomb: `open_rgb` says so
        return 0


# --- pictures of other servers ---------------------------------------------------------------------------------------


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, and does not stand for another one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped or ip.sixtofour or ip.teredo or ip in NAT64):
        return False
    return ip.is_global and not ip.is_multicast


def resolve(host: str, port: int) -> str:
    """Return one address of a host; raise [`Refused`] if any of them is not public."""
    try:
        found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise Refused(f"The host {host[:200]!r} of a picture cannot be found.") from error
    if not all(is_public(address) for address in found):
        raise Refused(f"The host {host[:200]!r} of a picture is not on the public internet; nothing is fetched from there.")
    return found[0]


def fetch(url: str, seconds: float = FETCH_SECONDS) -> bytes:
    """Fetch a picture from a public address, in so many seconds, whatever they are spent on."""
    try:
        return asyncio.run(asyncio.wait_for(fetch_pinned(url), seconds))
    except (asyncio.TimeoutError, httpx.TimeoutException) as error:
        raise Refused(f"A request's pictures were not there within {FETCH_SECONDS} seconds.") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Refused(f"A picture cannot be fetched ({type(error).__name__}).") from error


async def fetch_pinned(url: str) -> bytes:
    """Fetch a picture from an address that is looked up once: what was checked is what is asked."""
    # No proxy of the environment, which would look names up by itself.
    async with httpx.AsyncClient(trust_env=False, timeout=FETCH_SECONDS / 2) as client:
        target = httpx.URL(url)
        for _ in range(REDIRECTS + 1):
            if target.scheme not in ("http", "https") or not target.host or target.userinfo:
                raise Refused("The address of a picture must be a plain http or https one.")
            port = target.port or (443 if target.scheme == "https" else 80)
            address = await asyncio.to_thread(resolve, target.host, port)
            headers = {"Host": target.netloc.decode(), "User-Agent": "granulon", "Accept-Encoding": "identity"}
            pinned = target.copy_with(host=address)
            async with client.stream("GET", pinned, headers=headers, extensions={"sni_hostname": target.host}) as response:
                if response.has_redirect_location:
                    target = target.join(response.headers["location"])
                    continue
                response.raise_for_status()
                found = bytearray()
                async for chunk in response.aiter_raw():
                    found += chunk
                    if len(found) > FETCH_BYTES:
                        raise Refused(f"A picture is larger than {FETCH_BYTES // 2**20} MiB.", 413)
                return bytes(found)
        raise Refused(f"A picture is more than {REDIRECTS} redirects away.")


# --- stop strings ----------------------------------------------------------------------------------------------------


class Stopper:
    """Cuts a text that comes in pieces at the first of some strings."""

    def __init__(self, stops: list[str]):
        self.stops = stops
        self.held = ""
        self.done = False

    def feed(self, text: str, last: bool = False) -> str:
        """Return what can be said by now: what may be the beginning of a stop string is held back."""
        if self.done:
            return ""
        self.held += text
        found = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        keep = 0
        if found:
            self.done, said = True, self.held[: min(found)]
        else:
            if not last:
                sizes = range(1, min(len(self.held) + 1, max(map(len, self.stops))))
                keep = max((n for n in sizes if any(stop.startswith(self.held[-n:]) for stop in self.stops)), default=0)
            said = self.held[: len(self.held) - keep]
        self.held = self.held[len(said) :] if not self.done else ""
        return said


class StopFilter:
    """Takes stop strings out of a chat completion on its way to the client, streamed or not."""

    def __init__(self, send: Send, stops: list[str]):
        self.send = send
        self.stopper = Stopper(stops)
        self.start: Message | None = None
        self.streamed = False
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.streamed = any(b"event-stream" in value for name, value in message["headers"] if name == b"content-type")
            self.start = message
            if self.streamed:
                await self.send(message)
            return
        self.body += message.get("body", b"")
        more = message.get("more_body", False)
        if self.streamed:
            *events, self.body = self.body.split(b"\n\n")
            sent = b"".join(self.cut(event) + b"\n\n" for event in events)
            await self.send({"type": "http.response.body", "body": sent if more else sent + self.body, "more_body": more})
        elif not more and self.start is not None:
            if self.start["status"] == 200:
                data = json.loads(self.body)
                for choice in data["choices"]:
                    choice["message"]["content"] = self.stopper.feed(choice["message"].get("content") or "", last=True)
                self.body = json.dumps(data).encode()
            headers = [pair for pair in self.start["headers"] if pair[0] != b"content-length"]
            headers.append((b"content-length", str(len(self.body)).encode()))
            await self.send({**self.start, "headers": headers})
            await self.send({"type": "http.response.body", "body": self.body, "more_body": False})

    def cut(self, event: bytes) -> bytes:
        """Return a server-sent event with what may be said by now."""
        try:
            data = json.loads(event.removeprefix(b"data: "))
            (choice,) = data["choices"]
        except (ValueError, KeyError, TypeError):  # [DONE], or an error
            return event
        last = choice.get("finish_reason") is not None
        if last or choice["delta"].get("content"):
            choice["delta"]["content"] = self.stopper.feed(choice["delta"].get("content") or "", last)
        return b"data: " + json.dumps(data).encode()
