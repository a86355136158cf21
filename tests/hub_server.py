"""A Hub for the real clients (`HF_ENDPOINT`): repositories in memory, as much of the API as uploading and loading use."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


class HubServer:
    """`with HubServer() as hub:` serves at `hub.url`. `hub.files(kind, name)` are the files of main; `hub.log` all requests.

    `hub.commits[kind, name]` is a list of (sha, files, message), the oldest first; that of another branch is
    `hub.commits[kind, name, branch]`. `hub.user` is who every token belongs to, `hub.readonly` holds others'
    repositories, `hub.large` the files that are kept by their SHA-256, and `hub.card_error` is what is wrong with every card.
    """

    def __init__(self):
        self.commits: dict[tuple[str, ...], list[tuple[str, dict[str, bytes], str]]] = {}
        self.private: dict[tuple[str, str], bool] = {}
        self.log: list[str] = []
        self.user = {"type": "user", "name": "tester", "orgs": [{"name": "org", "roleInOrg": "write"}]}
        self.readonly: set[tuple[str, str]] = set()
        self.large: set[str] = set()
        self.card_error: str | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def reply(self, status, data=b"", **headers):
                data = data if isinstance(data, bytes) else json.dumps(data).encode()
                self.send_response(status)
                headers.setdefault("Content-Type", "application/json")
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def missing(self, code):
                self.reply(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)

            def handle_one(self):
                path = unquote(urlsplit(self.path).path).strip("/")
                hub.log.append(f"{self.command} /{path}")
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = path.split("/")
                if path == "api/repos/create":
                    return self.create(json.loads(body))
                if path == "api/validate-yaml":
                    errors = [{"message": hub.card_error}] if hub.card_error else []
                    return self.reply(400 if errors else 200, {"errors": errors, "warnings": []})
                if path == "api/whoami-v2":
                    return self.reply(200, hub.user)
                if parts[0] == "api":
                    repo, rest = (KINDS[parts[1]], "/".join(parts[2:4])), parts[4:]
                    if repo not in hub.commits:
                        return self.missing("RepoNotFound")
                    return self.api(repo, rest, body)
                kind = KINDS[parts.pop(0)] if parts[0] in KINDS else "model"
                repo = (kind, "/".join(parts[:2]))
                if repo not in hub.commits or parts[2:3] != ["resolve"]:
                    return self.missing("RepoNotFound")
                return self.resolve(repo, parts[3], "/".join(parts[4:]))

            do_GET = do_HEAD = do_POST = handle_one

            def create(self, body):
                repo = (body.get("type") or "model", "/".join(filter(None, (body.get("organization"), body["name"]))))
                url = f"{hub.url}/{'' if repo[0] == 'model' else repo[0] + 's/'}{repo[1]}"
                if repo in hub.commits:
                    return self.reply(409, {"error": "You already created this repo", "url": url})
                hub.private[repo] = bool(body.get("private") or body.get("visibility") == "private")
                hub.commit(repo, {}, "initial commit")
                self.reply(200, {"url": url, "id": repo[1], "name": repo[1], "private": hub.private[repo]})

            def api(self, repo, rest, body):
                if not rest:
                    rest = ["revision", "main"]
                if rest[0] == "auth-check":
                    return self.reply(403 if repo in hub.readonly else 200, {"error": "no right to write"})
                if rest[0] == "preupload":
                    files = json.loads(body)["files"]
                    modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
                    return self.reply(200, {"files": modes})
                if rest[0] == "branch":
                    hub.commits.setdefault((*repo, rest[1]), list(hub.commits[repo]))
                    return self.reply(200, {})
                if rest[0] == "commit":
                    repo = repo if rest[1] == "main" else (*repo, rest[1])
                    lines = [json.loads(line) for line in body.splitlines() if line.strip()]
                    files, message = dict(hub.files(*repo)), ""
                    for line in lines:
                        value = line["value"]
                        if line["key"] == "header":
                            message = value["summary"]
                        elif line["key"] == "file":
                            files[value["path"]] = base64.b64decode(value["content"])
                        elif line["key"] == "deletedFile":
                            files.pop(value["path"], None)
                    sha = hub.commit(repo, files, message)
                    url = f"{hub.url}/{repo[1]}"
                    return self.reply(200, {"commitUrl": f"{url}/commit/{sha}", "commitOid": sha, "success": True})
                found = hub.at(repo, rest[1])
                if found is None:
                    return self.missing("RevisionNotFound")
                sha, files = found
                if rest[0] == "revision":
                    names = [{"rfilename": name} for name in files]
                    info = {"id": repo[1], "sha": sha, "siblings": names, "private": hub.private[repo], "tags": []}
                    return self.reply(200, {**info, "downloads": 0, "likes": 0, "lastModified": "2026-01-01T00:00:00.000Z"})
                if rest[0] == "tree":
                    folder = "/".join(rest[2:])
                    inside = [n for n in files if not folder or n.startswith(folder + "/")]
                    if folder and not inside:
                        return self.missing("EntryNotFound")
                    return self.reply(200, [hub.entry(name, files[name]) for name in inside])
                self.missing("EntryNotFound")

            def resolve(self, repo, revision, path):
                found = hub.at(repo, revision)
                if found is None:
                    return self.missing("RevisionNotFound")
                sha, files = found
                if path not in files:
                    return self.missing("EntryNotFound")
                data, start = files[path], 0
                etag = f'"{hashlib.sha1(data).hexdigest()}"'
                headers = {"ETag": etag, "X_Repo_Commit": sha, "Content_Type": "application/octet-stream"}
                asked = self.headers.get("Range", "")
                if asked.startswith("bytes="):
                    first, _, last = asked.removeprefix("bytes=").partition("-")
                    start = int(first) if first else len(data) - int(last)
                    end = min(int(last), len(data) - 1) if first and last else len(data) - 1
                    headers["Content_Range"] = f"bytes {start}-{end}/{len(data)}"
                    return self.reply(206, data[start : end + 1], **headers)
                self.reply(200, data, **headers, Accept_Ranges="bytes")

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def commit(self, repo, files, message):
        history = self.commits.setdefault(repo, [])
        sha = hashlib.sha1(f"{repo}{len(history)}{message}{sorted(files)}".encode()).hexdigest()
        history.append((sha, files, message))
        return sha

    def at(self, repo, revision):
        """(sha, files) of "main" or of a commit."""
        history = self.commits.get((*repo, revision), self.commits[repo])
        if (*repo, revision) in self.commits:
            return history[-1][:2]
        if revision in ("main", "refs/heads/main"):
            return history[-1][:2]
        return next(((sha, files) for sha, files, _ in history if sha.startswith(revision)), None)

    def files(self, kind, name, *branch):
        return self.commits[(kind, name, *branch)][-1][1]

    def entry(self, name, data):
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return {"type": "file", "oid": oid, "size": len(data), "path": name} | ({"lfs": lfs} if name in self.large else {})

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()
