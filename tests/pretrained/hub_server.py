"""A stand-in for the Hugging Face hub on 127.0.0.1: one process, files in memory.

It has the endpoints that ``snapshot_download`` and ``ModelHubMixin.push_to_hub`` call, for files
that need no large-file storage, and writes down every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40
OLD_COMMIT = "2" * 40


class Hub(ThreadingHTTPServer):
    """Attributes: repositories, name -> revision -> file -> content; and what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.commits: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], revision: str = COMMIT) -> None:
        self.repositories.setdefault(name, {})[revision] = files

    def downloaded(self) -> set[str]:
        """Names of the files whose content was asked for."""
        found = (re.fullmatch(r"GET /[^/]+/[^/]+/resolve/[^/]+/(.*)", r) for r in self.requests)
        return {match[1] for match in found if match}


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does; see huggingface_hub's ``hf_api.py`` and ``file_download.py``."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._note()
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?", path):
            self._describe(match[1], match[2], match[3] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*match.groups())
        else:
            self._answer(404, {"error": f"no {path} here"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            self.server.created.append(wanted)
            self.server.repositories.setdefault(name, {COMMIT: {}})
            self._answer(200, {"url": f"{self.server.address}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/[^/]+", path):
            files = [f["path"] for f in json.loads(body)["files"]]
            modes = [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self._answer(200, {"files": modes})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self._commit(match[1], match[2], [json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404, {"error": f"no {path} here"})

    def _note(self) -> None:
        self.server.requests.append(f"{self.command} {unquote(urlsplit(self.path).path)}")
        self.server.tokens.add(self.headers.get("Authorization"))

    def _found(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        revisions = self.server.repositories.get(name)
        commit = {"main": COMMIT, "v1": OLD_COMMIT}.get(revision, revision)
        if revisions is None:
            # As for a private repository without a login.
            self._answer(401, {"error": "no such repository"}, {"X-Error-Code": "RepoNotFound"})
        elif commit not in revisions:
            self._answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            return commit, revisions[commit]
        return None

    def _describe(self, name: str, kind: str | None, revision: str) -> None:
        if (found := self._found(name, revision)) is None:
            return
        commit, files = found
        if kind == "tree":
            self._answer(200, [
                {"type": "file", "path": file, "size": len(content), "oid": _etag(content)}
                for file, content in files.items()
            ])  # fmt: skip
        else:
            siblings = [{"rfilename": file} for file in files]
            self._answer(200, {"id": name, "sha": commit, "siblings": siblings, "private": False})

    def _file(self, name: str, revision: str, file: str) -> None:
        if (found := self._found(name, revision)) is None:
            return
        commit, files = found
        if file not in files:
            self._answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
            return
        etag = f'"{_etag(files[file])}"'
        self._send(200, files[file], {"ETag": etag, "X-Repo-Commit": commit})

    def _commit(self, name: str, revision: str, lines: list[dict[str, Any]]) -> None:
        commit = "3" * 40
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        header = next(line["value"] for line in lines if line["key"] == "header")
        self.server.commits.append({**header, "branch": revision, "files": sorted(files)})
        self.server.repositories[name][COMMIT] |= files
        address = f"{self.server.address}/{name}/commit/{commit}"
        self._answer(200, {"success": True, "commitOid": commit, "commitUrl": address})

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json"}
        self._send(status, json.dumps(content).encode(), {**kind, **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
