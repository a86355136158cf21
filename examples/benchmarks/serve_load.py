"""Load of `granulon serve`: as many clients as it has places, four times as many, and bad company among them.

    python examples/benchmarks/serve_load.py                                # a toy model with random weights
    python examples/benchmarks/serve_load.py --model demo --requests 40     # the demo model, or any folder

A server of its own is started on this machine. Before anything else every question is asked alone, once: later answers must be
the same. A client that is refused (503) asks again after the time that `Retry-After` says. The bad company are clients whose
request drips in, who never read their answer, who leave in the middle of it, pictures that are broken, too large or just small
enough, and addresses that nobody may fetch; each must be told what is wrong, and must not be in the others' way.

Printed is a line for each run. `lost` are requests that ended without an answer or with another one, `health` is the slowest
reply of /health meanwhile. p50 and p95 are of the attempt that was answered; the clients' own work is in all times.
"""

import argparse
import asyncio
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from granulon_hf.loading import find_source  # noqa: E402
from tests.conftest import build_tiny, data_url, end, make_picture, make_talkative  # noqa: E402

CHAT = "/v1/chat/completions"
QUESTIONS = ("What is this?", "How many shapes are there, and of what color is the largest?", "Which corner is the brightest?")
SECONDS = 120  # for one answer, and for the server to be ready


def body(url: str, question: str = QUESTIONS[0], **options) -> dict:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8, **options}


@asynccontextmanager
async def serving(folder: str, places: int, batch: int):
    """Start a server, and give a client of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "granulon_hf", "serve", folder, "--device", "cpu", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-requests", str(places), "--max-batch", str(batch)]
    # Private addresses must be refused although addresses are allowed.
    command += ["--allow-remote-images"]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS, limits=limits) as client:
                deadline = time.monotonic() + SECONDS
                while True:
                    with suppress(httpx.TransportError):
                        if (await client.get("/health")).status_code == 200:
                            break
                    if server.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        raise SystemExit(f"The server did not start:\n{log.read().decode()}")
                    await asyncio.sleep(0.2)
                yield client
                if server.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"The server ended:\n{log.read().decode()[-5000:]}")
        finally:
            end(server)


async def ask(client: httpx.AsyncClient, request: dict, found: Counter) -> tuple[str, float]:
    """Ask until the server is not full; return the answer and the seconds of the last attempt."""
    while True:
        began = time.perf_counter()
        reply = await client.post(CHAT, json=request)
        if reply.status_code != 503:
            reply.raise_for_status()
            return reply.json()["choices"][0]["message"]["content"], time.perf_counter() - began
        found["refused"] += 1
        await asyncio.sleep(float(reply.headers["retry-after"]) * random.uniform(0.25, 1))


async def load(client: httpx.AsyncClient, requests: list[dict], answers: list[str], count: int, clients: int) -> dict:
    """Let clients ask `count` questions in all, and compare what they are told."""
    found, times, slowest, numbers = Counter(), [], 0.0, iter(range(count))

    async def work() -> None:
        for number in numbers:
            try:
                answer, seconds = await ask(client, requests[number % len(requests)], found)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                found[f"{type(error).__name__}: {error}"] += 1
                continue
            times.append(seconds)
            found["wrong"] += answer != answers[number % len(answers)]

    async def probe() -> None:
        nonlocal slowest
        while True:
            began = time.perf_counter()
            (await client.get("/health")).raise_for_status()
            slowest = max(slowest, time.perf_counter() - began)
            await asyncio.sleep(0.1)

    began, probing = time.perf_counter(), asyncio.ensure_future(probe())
    await asyncio.gather(*(work() for _ in range(clients)))
    seconds = time.perf_counter() - began
    if probing.done():
        await probing
    probing.cancel()
    quantiles = statistics.quantiles(times, n=20, method="inclusive") if len(times) > 1 else [0.0] * 19
    return {
        "answered": len(times),
        "requests_per_second": count / seconds,
        "p50": quantiles[9],
        "p95": quantiles[18],
        "refused": found.pop("refused", 0),
        "lost": count - len(times) + found.pop("wrong"),
        "health": slowest,
        "errors": dict(found),
    }


# --- bad company ------------------------------------------------------------------------------------------------------


async def drip(client: httpx.AsyncClient, request: dict) -> None:
    """Send a request a byte at a time, until the server has had enough."""
    _, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    text = json.dumps(request).encode()
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n".encode())
    try:
        for i in range(len(text)):
            writer.write(text[i : i + 1])
            await writer.drain()
            await asyncio.sleep(0.2)
    finally:
        writer.close()


async def never_read(client: httpx.AsyncClient, request: dict) -> None:
    """Ask for a long stream and leave it where it is."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.setblocking(False)
        loop, text = asyncio.get_running_loop(), json.dumps({**request, "stream": True, "max_tokens": 10**9}).encode()
        await loop.sock_connect(connection, ("127.0.0.1", client.base_url.port))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        await loop.sock_sendall(connection, head.encode() + text)
        await asyncio.sleep(SECONDS)


async def leave(client: httpx.AsyncClient, request: dict) -> None:
    """Ask for a long answer and go away, again and again."""
    while True:
        with suppress(httpx.TimeoutException):
            await client.post(CHAT, json={**request, "max_tokens": 10**9}, timeout=0.5)
        await asyncio.sleep(0.1)


def pictures() -> dict[str, tuple[str, set[int]]]:
    """What pictures there are in bad company, and what may be said about them; 503 may be said about all."""
    good, bomb, large = data_url(make_picture(0)), io.BytesIO(), data_url(Image.new("L", (7000, 7000)))
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    return {
        "broken": (good[: len(good) // 2], {400}),
        "no picture": ("data:image/png;base64,AAAA", {400}),
        "bomb": (data_url(bomb.getvalue()), {400, 413}),
        "large": (large, {200}),
        "file": ("file:///etc/passwd", {400}),
        "path": ("/etc/passwd", {400}),
        "this machine": ("http://127.0.0.1/a.png", {400}),
        "its other name": ("http://localhost/a.png", {400}),
        "cloud metadata": ("http://169.254.169.254/latest/meta-data/", {400}),
        "private network": ("http://[::ffff:10.0.0.1]/a.png", {400}),
    }


async def insist(client: httpx.AsyncClient, name: str, url: str, allowed: set[int], found: Counter) -> None:
    """Send one picture again and again, and note what is said about it."""
    while True:
        reply = await client.post(CHAT, json=body(url))
        found[f"{name}: {reply.status_code}"] += 1
        if reply.status_code not in {*allowed, 503}:
            found["wrong"] += 1
        await asyncio.sleep(0.5)


async def load_beside_others(client: httpx.AsyncClient, requests: list[dict], answers: list[str], args) -> dict:
    """Let as many clients as there are places ask their questions beside bad company."""
    told: Counter = Counter()
    company = [drip(client, requests[0]) for _ in range(args.places)]
    company += [never_read(client, requests[0]), leave(client, requests[0])]
    company += [insist(client, name, *rest, told) for name, rest in pictures().items()]
    tasks = [asyncio.ensure_future(one) for one in company]
    row = await load(client, requests, answers, args.requests, args.places)
    # One that is done has failed: all of them go on until they are stopped.
    failed = [str(task.exception()) for task in tasks if task.done() and task.exception()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {**row, "wrong": told.pop("wrong", 0) + len(failed), "told": dict(told), "failed": failed}


async def measure(args: argparse.Namespace, folder: str) -> dict:
    requests = [body(data_url(make_picture(i)), question) for i, question in enumerate(QUESTIONS * 2)]
    rows: dict[str, dict] = {}
    async with serving(folder, args.places, args.batch) as client:
        answers = [(await ask(client, request, Counter()))[0] for request in requests]
        for name, clients, count in (
            ("alone", 1, max(4, args.requests // 4)),
            ("1 x", args.places, args.requests),
            ("4 x", 4 * args.places, args.requests),
        ):
            rows[name] = {"clients": clients, **await load(client, requests, answers, count, clients)}
        if not args.good_only:
            rows["bad company"] = {"clients": args.places, **await load_beside_others(client, requests, answers, args)}
        deadline = time.monotonic() + SECONDS
        while "granulon_requests_in_flight 0\n" not in (text := (await client.get("/metrics")).text):
            if time.monotonic() > deadline:
                raise SystemExit("Places are still taken after everybody has left.")
            await asyncio.sleep(0.1)
        rows["after"] = {"clients": 1, **await load(client, requests, answers, len(requests), 1)}
        metrics = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {"rows": rows, "metrics": metrics}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy", help='"toy", "demo" or a folder')
    parser.add_argument("--places", type=int, default=8, help="--max-requests of the server")
    parser.add_argument("--batch", type=int, default=8, help="--max-batch of the server")
    parser.add_argument("--requests", type=int, default=80, help="of each run")
    parser.add_argument("--good-only", action="store_true", help="leave bad company out")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.model == "toy":
            for part in make_talkative(*build_tiny()):
                part.save_pretrained(folder)
        found = asyncio.run(measure(args, folder if args.model == "toy" else find_source(args.model)))
    columns = ("clients", "answered", "requests_per_second", "p50", "p95", "refused", "lost", "health")
    print("| run | clients | answered | requests/s | p50 s | p95 s | refused | lost | health s |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in found["rows"].items():
        cells = (f"{row[key]:.2f}" if isinstance(row[key], float) else row[key] for key in columns)
        print("|", name, *(f"| {cell}" for cell in cells), "|")
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    rows = main()["rows"]
    sys.exit(any(row["lost"] or row.get("wrong") for row in rows.values()))
