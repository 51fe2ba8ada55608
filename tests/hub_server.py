"""Answers the requests of huggingface_hub and modelscope as their hubs do, for one model each."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

NAME = "someone/tiny"


class Hub(ThreadingHTTPServer):
    """
    :ivar model: folder that ModelScope's `NAME` is downloaded from
    :ivar uploaded: path in the repository -> content
    :ivar requests: method and path of each request
    :ivar bodies: JSON of requests that create something, by their path
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.forget()

    def forget(self, model: Path | None = None) -> None:
        """Be as new, with another model."""
        self.model = model
        self.uploaded: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.bodies: dict[str, dict] = {}
        self.tokens: set[str | None] = set()
        self.blobs: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.server.requests.append(f"{self.command} {url.path}")
        if self.command == "POST":
            self.server.tokens.add(self.headers.get("Authorization"))
        for method, pattern, respond in ROUTES:
            if self.command == method and re.fullmatch(pattern, url.path):
                content = respond(self.server, url.path, parse_qs(url.query), body)
                self.send(200, content)
                return
        self.send(404, {"error": f"no answer for {self.command} {self.path}"})

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def send(self, status: int, content: dict | list | bytes) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


# ---------------------------------------------------------------- Hugging Face


def create_repo(hub: Hub, path: str, query: dict, body: bytes) -> dict:
    hub.bodies[path] = json.loads(body)
    return {"url": f"{hub.url}/{NAME}", "name": NAME}


def valid_card(hub: Hub, path: str, query: dict, body: bytes) -> dict:
    return {"errors": [], "warnings": []}


def preupload(hub: Hub, path: str, query: dict, body: bytes) -> dict:
    files = json.loads(body)["files"]
    return {
        "files": [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files
        ]
    }


def commit(hub: Hub, path: str, query: dict, body: bytes) -> dict:
    for line in body.splitlines():
        item = json.loads(line)
        if item["key"] == "header":
            hub.bodies[path] = item["value"]
        else:
            hub.uploaded[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
    return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.url}/{NAME}/commit/0"}


def model_info(hub: Hub, path: str, query: dict, body: bytes) -> dict:
    return {"id": NAME, "sha": "0" * 40, "siblings": [], "private": False, "tags": []}


# ------------------------------------------------------------------ ModelScope


def data(content: object) -> dict:
    return {"Code": 200, "Success": True, "Message": "", "Data": content}


def modelscope_files(hub: Hub, path: str, query: dict, body: bytes) -> dict:
    assert hub.model is not None
    return data(
        {
            "Files": [
                {
                    "Name": file.name,
                    "Path": file.name,
                    "Type": "blob",
                    "Size": file.stat().st_size,
                    "Sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                    "Revision": query["Revision"][0],
                }
                for file in sorted(hub.model.iterdir())
            ]
        }
    )


def modelscope_file(hub: Hub, path: str, query: dict, body: bytes) -> bytes:
    assert hub.model is not None
    return (hub.model / query["FilePath"][0]).read_bytes()


def modelscope_create(hub: Hub, path: str, query: dict, body: bytes) -> dict:
    hub.bodies.setdefault(path, json.loads(body))
    return data({"Id": 1, "Name": NAME})


def modelscope_lfs(hub: Hub, path: str, query: dict, body: bytes) -> dict:
    objects = [
        {"oid": x["oid"], "actions": {"upload": {"href": f"{hub.url}/blob/{x['oid']}"}}}
        for x in json.loads(body)["objects"]
    ]
    return data({"objects": objects})


def modelscope_blob(hub: Hub, path: str, query: dict, body: bytes) -> dict:
    hub.blobs[path.rpartition("/")[2]] = body
    return data({})


def modelscope_commit(hub: Hub, path: str, query: dict, body: bytes) -> dict:
    content = json.loads(body)
    hub.bodies[path] = content
    for action in content["actions"]:
        hub.uploaded[action["path"]] = (
            hub.blobs[action["sha256"]]
            if action["type"] == "lfs"
            else base64.b64decode(action["content"])
        )
    return data({"CommitId": "0"})


ROUTES = (
    ("POST", "/api/repos/create", create_repo),
    ("POST", "/api/validate-yaml", valid_card),
    ("POST", f"/api/models/{NAME}/branch/.+", create_repo),
    ("POST", f"/api/models/{NAME}/preupload/.+", preupload),
    ("POST", f"/api/models/{NAME}/commit/.+", commit),
    ("GET", f"/api/models/{NAME}(/revision/.+)?", model_info),
    ("GET", f"/api/v1/models/{NAME}/repo/files", modelscope_files),
    ("GET", f"/api/v1/models/{NAME}/repo", modelscope_file),
    ("POST", "/api/v1/models", modelscope_create),
    ("POST", f"/api/v1/repos/models/{NAME}/info/lfs/objects/batch", modelscope_lfs),
    ("PUT", "/blob/.+", modelscope_blob),
    ("POST", f"/api/v1/repos/models/{NAME}/commit/.+", modelscope_commit),
)
