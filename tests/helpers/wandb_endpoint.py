"""A stand-in for the W&B server on this machine: it answers what W&B's client asks and keeps what it is sent."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections import defaultdict
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Endpoint(ThreadingHTTPServer):
    """Runs by id: what was said of them (`runs`), their streams by file (`files`), `uploads`; `artifacts` by type."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: dict[str, dict[str, Any]] = defaultdict(dict)
        self.files: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        self.codes: dict[str, int] = {}
        self.uploads: dict[str, bytes] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        self.unknown: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def summary(self, run: str) -> dict[str, Any]:
        """The summary that was streamed last."""
        return json.loads(self.files[run]["wandb-summary.json"][-1])

    def history(self, run: str) -> list[dict[str, Any]]:
        """Everything that was logged."""
        return [json.loads(line) for line in self.files[run]["wandb-history.jsonl"]]

    def close(self) -> None:
        """Stop answering: connections are refused."""
        self.shutdown()
        self.server_close()

    # ------------------------------------------------------------------------------------- requests

    def stream(self, run: str, body: dict[str, Any]) -> dict[str, Any]:
        """Lines of a run's files, or that it has ended."""
        for name, chunk in body.get("files", {}).items():
            self.files[run][name] += chunk["content"]
        if body.get("complete"):
            self.codes[run] = body["exitcode"]
        return {}

    def ask(self, query: str, asked: dict[str, Any]) -> dict[str, Any]:
        """GraphQL: an operation by its name, or a question for what the server knows, which is nothing optional."""
        if types := re.findall(r"(\w+)\s*:\s*__type", query):
            return {"data": {name: {"fields": [], "inputFields": []} for name in types}}
        named = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = getattr(self, f"on_{named[1] if named else 'Viewer'}", None)  # {viewer {id}} has no name
        if operation is None:
            self.unknown.append(query)
            return {"errors": [{"message": "unknown operation"}]}
        return {"data": operation(asked)}

    def upload_to(self, *path: str) -> dict[str, Any]:
        """Where a file may be put."""
        return {"uploadUrl": "/".join((self.url, "upload", *path)), "uploadHeaders": []}

    def on_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "1", "entity": "lab", "username": "lab", "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer}

    def on_GetViewer(self, asked: dict[str, Any]) -> dict[str, Any]:
        names = {"name": "lab", "admin": False, "teams": {"edges": []}, "apiKeys": {"edges": []}}
        return {"viewer": {**self.on_Viewer(asked)["viewer"], **names}}

    def on_ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def on_RunResumeStatus(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"model": None}

    def on_UpsertBucket(self, asked: dict[str, Any]) -> dict[str, Any]:
        known = self.runs[asked["name"]]
        known |= {name: value for name, value in asked.items() if value is not None}
        project = {"id": "p", "name": known["project"], "entity": {"id": "e", "name": "lab"}}
        said = {"name": known["name"], "displayName": known.get("displayName"), "config": known.get("config")}
        bucket = {"id": "r", **said, "historyLineCount": 0, "project": project}
        return {"upsertBucket": {"inserted": True, "bucket": bucket}}

    def on_CreateRunFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, **self.upload_to(asked["run"], name)} for name in asked["files"]]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}

    def on_RunUploadUrls(self, asked: dict[str, Any]) -> dict[str, Any]:
        names = [(name, self.upload_to(asked["run"], name)["uploadUrl"]) for name in asked["files"]]
        nodes = [{"node": {"name": name, "url": url, "updatedAt": None}} for name, url in names]
        return {"model": {"bucket": {"id": "r", "files": {"uploadHeaders": [], "edges": nodes}}}}

    def on_ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def on_CreateArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append(asked.get("input", asked))
        new = {"id": f"artifact{len(self.artifacts) - 1}", "state": "PENDING"}
        return {"createArtifact": {"artifact": {**new, "artifactSequence": {"latestArtifact": None}}}}

    def on_CreateArtifactManifest(self, asked: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "f", **self.upload_to(asked["artifactID"], asked["name"])}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def on_UpdateArtifactManifest(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"updateArtifactManifest": {"artifactManifest": {"id": "m", "file": {"id": "f", **self.upload_to("m")}}}}

    def on_CreateArtifactFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "storagePath": file["name"],
                "uploadMultipartUrls": None,
                "artifact": {"id": file["artifactID"]},
                **self.upload_to(file["artifactID"], file["name"]),
            }
            for file in asked["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def on_CommitArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": "d"}}}


class Handler(BaseHTTPRequestHandler):
    """HTTP."""

    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            question = json.loads(body)
            answer = self.server.ask(question["query"], question.get("variables") or {})
        elif self.path.endswith("/file_stream"):
            answer = self.server.stream(self.path.split("/")[-2], json.loads(body))
        elif self.path.startswith("/upload/"):
            self.server.uploads[self.path.removeprefix("/upload/")] = body
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_PUT = do_GET = do_POST  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client has gone
            super().handle()
