"""A stand-in for the hub: it takes repositories, branches and commits, and remembers them."""

from __future__ import annotations

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote


class Commit(NamedTuple):
    repository: str
    revision: str
    message: str
    files: dict[str, bytes]


class HubServer(ThreadingHTTPServer):
    """On a port of its own. It takes every token but `wrong`, and refuses the commits whose message
    holds `refused`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.branches: list[str] = []
        self.commits: list[Commit] = []
        self.tokens: set[str | None] = set()
        self.refused = "never"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(self.path).strip("/").split("/")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.server.tokens.add(token or None)
        if token == "wrong":
            self.answer(401, {"error": "Invalid credentials"})
        elif parts[1:] == ["repos", "create"]:
            self.create(json.loads(body))
        elif "preupload" in parts:
            self.take_inline(json.loads(body))
        elif "branch" in parts:
            self.server.branches.append(parts[-1])
            self.answer(200, {})
        elif "commit" in parts:
            self.commit("/".join(parts[2:4]), parts[-1], body)
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.answer(404, {"error": "nothing is read from here"})

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        self.server.repositories[name] = wanted
        self.answer(200, {"url": f"{self.server.address}/{name}", "name": name})

    def take_inline(self, wanted: dict[str, Any]) -> None:
        """No file is asked to be stored elsewhere first."""
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
            for file in wanted["files"]
        ]
        self.answer(200, {"files": files})

    def commit(self, repository: str, revision: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        if self.server.refused in header["summary"]:
            self.answer(403, {"error": "this repository is read-only"})
            return
        self.server.commits.append(Commit(repository, revision, header["summary"], files))
        sha = f"{len(self.server.commits):040x}"
        address = f"{self.server.address}/{repository}/commit/{sha}"
        self.answer(200, {"commitUrl": address, "commitOid": sha, "pullRequestUrl": None})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
