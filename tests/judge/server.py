"""An OpenAI-compatible server that misbehaves as told: chat completions, files and batches, of the standard library only."""

import collections
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD = '{"accuracy_score": 70, "hallucination_score": 20}'


@dataclass
class Reply:
    """What one request gets; `raw` replaces the body, `error` is `(code, message)` of a status that is not 200."""

    content: str | None = GOOD
    status: int = 200
    headers: dict = field(default_factory=dict)
    error: tuple[str, str] = ("error", "an error")
    finish: str = "stop"
    refusal: str | None = None
    raw: bytes | None = None
    reset: bool = False
    half: bool = False  # of the body, then the connection breaks off
    delay: float = 0.0
    drip: float = 0.0  # seconds between bytes
    cut: int = 0  # bytes that are announced and do not come

    def body(self, request: dict) -> dict:
        if self.status != 200:
            return {"error": {"code": self.error[0], "type": self.error[0], "message": self.error[1], "param": None}}
        message = {"role": "assistant", "content": self.content, "refusal": self.refusal}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"] + "-2024-11-20",
            "choices": [{"index": 0, "message": message, "finish_reason": self.finish}],
            "usage": {"prompt_tokens": 1000, "completion_tokens": 20, "total_tokens": 1020},
        }


def text_of(body: dict) -> str:
    """The text of the first user message."""
    return next(m for m in body["messages"] if m["role"] == "user")["content"][0]["text"]


def prediction_of(body: dict) -> str:
    fenced = re.search(r"MODEL OUTPUT: \n<<<BEGIN (\w+)>>>\n(.*)\n<<<END \1>>>", text_of(body), flags=re.DOTALL)
    return fenced[2] if fenced else re.search(r"MODEL OUTPUT: (.*)\n\nReturn ONLY", text_of(body), flags=re.DOTALL)[1]


class Server:
    """Context manager. `requests` has the bodies of all chat completions, `headers` their headers, `paid` counts the 200s that
    were handed over, by prediction; `behave(server, body)` says what each gets.

    Args:
        polls: how often a batch is still "in_progress" when looked at.
        name_of: what `paid` counts a request under.
    """

    def __init__(
        self,
        behave: Callable[["Server", dict], Reply] = lambda server, body: Reply(),
        polls: int = 1,
        name_of: Callable[[dict], str] = prediction_of,
    ):
        self.behave, self.polls, self.name_of, self.lock = behave, polls, name_of, threading.Lock()
        self.requests: list[dict] = []
        self.headers: list = []
        self.times: list[float] = []
        self.paid: collections.Counter = collections.Counter()
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.batch_creations = 0
        # Names and errors (status, code, message) of what `GET /models/NAME` is asked; None is a server that lists batches.
        self.models: dict[str, tuple[int, str, str] | None] | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args):
                pass

            def handle(self):
                try:
                    super().handle()
                except (ConnectionError, TimeoutError):
                    self.close_connection = True

            def send(self, status: int, body: bytes, headers: dict | None = None):
                self.send_response(status)
                usual = {"Content-Type": "application/json", "Content-Length": str(len(body))}
                for name, value in (usual | (headers or {})).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self):
                data = self.rfile.read(int(self.headers["Content-Length"]))
                path = self.path.partition("?")[0]  # Azure adds its version
                if path.endswith("/chat/completions"):
                    self.chat(json.loads(data))
                elif path.endswith("/files"):
                    self.send(200, server.upload(data))
                else:
                    status, body = server.create(json.loads(data))
                    self.send(status, body)

            def do_GET(self):
                if "/files/" in self.path:
                    self.send(200, server.files[self.path.split("/")[-2]], {"Content-Type": "application/jsonl"})
                elif "/batches/" in self.path:
                    self.send(200, server.look(self.path.split("/")[-1]))
                elif "/models/" in self.path and server.models is not None:
                    name = self.path.split("/")[-1]
                    status, code, text = server.models.get(name, (404, "not_found", "Not Found")) or (200, "", "")
                    found = {"id": name, "object": "model"} if status == 200 else {"error": {"code": code, "message": text}}
                    self.send(status, json.dumps(found).encode())
                else:
                    data = list(server.batches.values())
                    self.send(200, json.dumps({"object": "list", "data": data, "has_more": False}).encode())

            def chat(self, body: dict):
                with server.lock:
                    server.requests.append(body)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    server.times.append(time.monotonic())
                reply = server.behave(server, body)
                time.sleep(reply.delay)
                if reply.reset:
                    self.close_connection = True
                    self.connection.close()
                    return
                data = reply.raw or json.dumps(reply.body(body)).encode()
                if reply.half:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data[: len(data) // 2])
                    # With nothing of what follows: a reset, not an end.
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    self.connection.close()
                    return
                if reply.drip:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    for i in range(len(data)):
                        self.wfile.write(data[i : i + 1])
                        time.sleep(reply.drip)
                elif reply.cut:
                    self.send(reply.status, data, {"Content-Length": str(len(data) + reply.cut)})
                    self.close_connection = True
                    return
                else:
                    self.send(reply.status, data, reply.headers)
                if reply.status == 200:
                    with server.lock:
                        server.paid[server.name_of(body)] += 1

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, request, client_address):
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def upload(self, data: bytes) -> bytes:
        boundary, _, rest = data.partition(b"\r\n")
        parts = [part.partition(b"\r\n\r\n") for part in rest.split(b"\r\n" + boundary)]
        content = next(body for head, _, body in parts if b'name="file"' in head)
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return json.dumps({"id": name, "object": "file", "bytes": len(content), "purpose": "batch", "created_at": 0}).encode()

    def create(self, body: dict) -> tuple[int, bytes]:
        self.batch_creations += 1
        name = f"batch_{len(self.batches)}"
        self.batches[name] = {
            **{"id": name, "object": "batch", "status": "in_progress", "created_at": 0, "polls": self.polls},
            **{key: body[key] for key in ("endpoint", "input_file_id", "completion_window", "metadata")},
        }
        return 200, json.dumps(self.batches[name]).encode()

    def look(self, name: str) -> bytes:
        batch = self.batches[name]
        batch["polls"] -= 1
        if batch["polls"] < 0 and batch["status"] == "in_progress":
            output, errors = [], []
            for line in self.files[batch["input_file_id"]].splitlines():
                request = json.loads(line)
                reply = self.behave(self, request["body"])
                self.requests.append(request["body"])
                response = {"status_code": reply.status, "body": reply.body(request["body"])}
                (output if reply.status == 200 else errors).append({"custom_id": request["custom_id"], "response": response})
                self.paid[self.name_of(request["body"])] += reply.status == 200
            for key, rows in (("output_file_id", output), ("error_file_id", errors)):
                if rows:
                    batch[key] = f"file-{key}-{name}"
                    self.files[batch[key]] = "\n".join(json.dumps(row) for row in rows).encode()
            batch["status"] = "completed"
        return json.dumps(batch).encode()

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()
