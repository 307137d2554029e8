"""A hub on this machine: the Hugging Face Hub's routes over folders, for what HF_ENDPOINT points to.

Serves models and data sets: repository information, file lists, files by revision with ETags and ranges, redirects of
renamed repositories; and what goes wrong: gated (401, 403), missing (404), busy (429), an interrupted download.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import transformers.utils.hub
from huggingface_hub import constants, hf_api

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs)(?:/([^/]+))?(?:/(.*))?)?$")
FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


@dataclass
class Repository:
    """A folder under a name; `gated` asks for a token, `moved` redirects to another name."""

    folder: Path
    gated: bool = False
    moved: str | None = None
    license: str = "apache-2.0"

    @property
    def commit(self) -> str:
        """40 hex digits of the content."""
        state = hashlib.sha1()
        for file in self.files():
            state.update(f"{file.relative_to(self.folder)}\0".encode() + file.read_bytes())
        return state.hexdigest()

    def files(self) -> list[Path]:
        """All files, by name."""
        return sorted(p for p in self.folder.rglob("*") if p.is_file())


@dataclass
class RecordedHub:
    """Repositories by kind and name, and how requests fail.

    Attributes:
        repositories: ("models" | "datasets", "owner/name") -> repository.
        busy: so many requests are answered 429 before one succeeds.
        cut: so many downloads of a file end after half of its bytes.
        requests: method and path of everything that was asked.
        ranges: files of which a part was asked.
    """

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    busy: int = 0
    cut: int = 0
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    address: str = ""
    _server: ThreadingHTTPServer | None = None

    def add(self, name: str, folder: Path, kind: str = "models", **options: Any) -> Repository:
        """Serve `folder` as the repository `name`."""
        self.repositories[kind, name] = repository = Repository(folder, **options)
        return repository

    def __enter__(self) -> RecordedHub:
        hub = self

        class Handler(_Handler):
            serving = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def use_in_this_process(self, patch: pytest.MonkeyPatch, cache: Path) -> None:
        """Let huggingface_hub ask this hub and no other, with a cache of its own, until `patch` is undone."""
        patch.setattr(constants, "ENDPOINT", self.address)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        for api in (hf_api.api, transformers.utils.hub.hf_api()):  # made once, for all functions
            patch.setattr(api, "endpoint", self.address)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def environment(self, cache: Path) -> dict[str, str]:
        """What a process needs in order to use this hub and no other, with a cache of its own."""
        off = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        return {**off, "HF_ENDPOINT": self.address, "HF_HOME": str(cache), "HF_HUB_ETAG_TIMEOUT": "10"}


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    serving: RecordedHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on the console."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, url = self.serving, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {url.path}")
        if hub.busy > 0:
            hub.busy -= 1
            return self._send(429, b"{}", {"Retry-After": "0"})
        path = unquote(url.path)
        if found := API.fullmatch(path):
            kind, name, what, revision, rest = found.groups()
        elif found := FILE.fullmatch(path):
            kind, name, revision, rest = found[1] or "models", found[2], found[3], found[4]
            what = "file"
        else:
            return self._error(404, "EntryNotFound", "no such route")
        repository = hub.repositories.get((kind, name))
        if repository is None:
            return self._error(401, "RepoNotFound", "Repository not found")  # as the hub does without a token
        if repository.moved:
            return self._send(307, b"", {"Location": self.path.replace(name, repository.moved, 1)})
        if revision not in (None, "main", repository.commit):
            return self._error(404, "RevisionNotFound", f"no revision {revision}")
        if what == "file":
            return self._file(repository, rest)
        return self._about(repository, kind, name, what, rest, url.query, body)

    def _about(
        self, repository: Repository, kind: str, name: str, what: str | None, rest: str | None, query: str, body: bytes
    ) -> None:
        """Information on a repository, its branches and its files."""
        if what == "refs":
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.commit}
            return self._json({"branches": [branch], "tags": [], "converts": []})
        if what in ("tree", "paths-info"):
            listed = [_entry(repository, file) for file in repository.files()]
            if what == "paths-info":
                given = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
                listed = [entry for entry in listed if entry["path"] in given.get("paths", [])]
            elif rest:
                listed = [entry for entry in listed if entry["path"].startswith(f"{rest}/")]
            if what == "tree" and "true" not in parse_qs(query.lower()).get("recursive", []):
                depth = len(rest.split("/")) + 1 if rest else 1
                folders = {"/".join(e["path"].split("/")[:depth]) for e in listed if e["path"].count("/") >= depth}
                listed = [entry for entry in listed if entry["path"].count("/") < depth]
                listed += [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in sorted(folders)]
            return self._json(listed)
        files = [{"rfilename": file.relative_to(repository.folder).as_posix()} for file in repository.files()]
        body_of = {"id": name, "sha": repository.commit, "private": False, "tags": [f"license:{repository.license}"]}
        extra = {"modelId": name} if kind == "models" else {}
        facts = {"gated": "manual" if repository.gated else False, "siblings": files, "downloads": 0, "likes": 0}
        return self._json({**body_of, **extra, **facts, "cardData": {"license": repository.license}})

    def _file(self, repository: Repository, name: str) -> None:
        """A file, whole or a range of it."""
        file = repository.folder / name
        if repository.gated and not self.headers.get("Authorization"):
            return self._error(401, "GatedRepo", "Access to this repository is restricted")
        if repository.gated and self.headers["Authorization"] != "Bearer granted":
            return self._error(403, "GatedRepo", "You are not in the authorized list")
        if not file.is_file():
            return self._error(404, "EntryNotFound", f"no file {name}")
        data = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": repository.commit,
            "Accept-Ranges": "bytes",
            "Content-Disposition": f'inline; filename="{file.name}"',
        }
        start, status = 0, 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            self.serving.ranges.append(name)
            start, stop = int(found[1]), int(found[2] or len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        return self._send(status, data, headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.serving.cut > 0 and len(data) > 1000 and status in (200, 206) and "ETag" in headers:
            self.serving.cut -= 1
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(data)


def _entry(repository: Repository, file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    oid = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": file.relative_to(repository.folder).as_posix(), "size": len(data), "oid": oid}
