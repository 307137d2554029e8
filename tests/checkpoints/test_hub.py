"""Exports on their way to a Hub, which is played by a server on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from helpers.checkpoints import digests
from helpers.exports import svl_export, write_plan
from huggingface_hub import constants


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs: who am I, make a repository, say how files come, take them, commit."""

    token = "hf_secret"
    repos: dict[str, dict[str, bytes]]
    objects: dict[str, bytes]

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any, code: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_request(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        where = f"http://{self.headers['Host']}"
        if self.path.startswith("/upload/"):  # storage: the address is the permission
            self.objects[self.path.removeprefix("/upload/")] = data
            self.answer({})
        elif self.headers.get("Authorization") != f"Bearer {self.token}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        elif self.path == "/api/repos/create":
            body = json.loads(data)
            name = f"{body.get('organization') or 'me'}/{body['name']}"
            self.repos.setdefault(name, {})
            self.answer({"url": f"{where}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
            kinds = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False, "oid": None}
                for f in json.loads(data)["files"]
            ]  # fmt: skip
            self.answer({"files": kinds})
        elif re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.path):
            asked = json.loads(data)["objects"]
            address = {"upload": {"href": f"{where}/upload/", "header": {}}}
            for entry in asked:
                entry["actions"] = {"upload": {**address["upload"], "href": f"{where}/upload/{entry['oid']}"}}
            self.answer({"transfer": "basic", "objects": asked})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            for line in map(json.loads, data.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.repos[found[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.repos[found[1]][value["path"]] = self.objects[value["oid"]]
            self.answer({"commitUrl": f"{where}/{found[1]}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True})
        else:
            self.answer({"error": f"no {self.path}"}, 404)

    do_GET = do_POST = do_PUT = handle_request  # noqa: N815


@pytest.fixture
def hub():
    """A Hub on this machine: its address and what was uploaded to it."""
    handler = type("OneHub", (Hub,), {"repos": {}, "objects": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.repos  # type: ignore[attr-defined]
    server.shutdown()


def test_exports_are_pushed_to_the_hub(hub, checkpoint, tmp_path, monkeypatch):
    address, repos = hub
    write_plan(tmp_path)
    for name, value in {"ENDPOINT": address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)  # as of HF_ENDPOINT, ..., which are read at the first import
    arguments = ("plan=plan.json", f"source={checkpoint('llava')}", "out=out", "push_to_hub=me/pruned")
    refused = svl_export(*arguments, cwd=tmp_path, code=1, HF_TOKEN="hf_wrong")
    assert refused.startswith("svl-export: error: push_to_hub: the Hub refuses")
    assert not (tmp_path / "out").exists()  # found out before the work
    assert repos == {}
    printed = svl_export(*arguments, cwd=tmp_path, HF_TOKEN=Hub.token)
    assert f"uploaded to {address}/me/pruned" in printed
    uploaded = {name: hashlib.sha256(data).hexdigest() for name, data in repos["me/pruned"].items()}
    assert uploaded == digests(tmp_path / "out")
