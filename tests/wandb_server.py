"""A W&B server on loopback, as far as wandb-core needs one for a run, that can be well, slow, broken or silent."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """`with Server("500", well_for=2) as server:` answers the first two requests as W&B would, then only with 500.

    Behaviours: well, 500, silent (takes the request and never answers), slow (a byte of the answer per second).
    `history` is what the run's history file holds on the server, `views` the workspaces that were saved, and
    `connections` counts whoever came.
    """

    def __init__(self, behaviour: str, well_for: int = 0):
        self.behaviour, self.well_for = behaviour, well_for
        self.connections, self.requests = 0, 0
        self.history, self.views = [], []
        self.over = threading.Event()

    def __enter__(self) -> "Server":
        handler = type("Handler", (_Handler,), {"state": self})
        self.http = _Http(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """From now on connections are refused."""
        self.over.set()
        self.http.shutdown()
        self.http.server_close()


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed leaves in the middle of a request."""


class _Handler(BaseHTTPRequestHandler):
    state: Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.state.connections += 1

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def _answer(self) -> None:
        state = self.state
        state.requests += 1
        behaviour = "well" if state.requests <= state.well_for else state.behaviour
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = json.dumps(self._reply(body) if behaviour in ("well", "slow") else {}).encode()
        if behaviour == "silent":
            state.over.wait()
        try:
            self.send_response(500 if behaviour == "500" else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            for byte in content if behaviour == "slow" else b"":
                self.wfile.write(bytes([byte]))
                if state.over.wait(1.0):
                    return
            self.wfile.write(b"" if behaviour == "slow" else content)
        except OSError:
            return  # the client gave up

    do_GET = do_POST = do_PUT = _answer

    def _reply(self, body: bytes) -> dict[str, Any]:
        if self.path.endswith("/file_stream"):
            files = json.loads(body).get("files") or {}
            lines = files.get("wandb-history.jsonl", {}).get("content", [])
            self.state.history += [json.loads(line) for line in lines]
        if not self.path.endswith("/graphql"):
            return {}
        query = json.loads(body)
        operation = query.get("operationName") or re.findall(r"(?:query|mutation)\s+(\w+)", query["query"])[0]
        if operation == "UpsertView2":
            self.state.views.append(query["variables"])
        return {"data": _graphql(operation, query.get("variables") or {}, self.state.url)}


def _graphql(operation: str, asked: dict[str, Any], url: str) -> dict[str, Any]:
    if operation == "RunResumeStatus":
        return {"model": None}
    if operation == "UpsertBucket":
        project = {"id": "p", "name": asked.get("project"), "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": asked.get("name"), "displayName": asked.get("displayName"), "project": project}
        return {"upsertBucket": {"bucket": {**bucket, "config": None, "historyLineCount": 0}, "inserted": True}}
    if operation == "CreateRunFiles":
        files = [{"name": name, "uploadUrl": f"{url}/put/{name}"} for name in asked["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
    if operation == "Viewer":
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
    if operation == "UpsertView2":
        return {"upsertView": {"view": {"id": "v", "name": asked["name"]}, "inserted": True}}
    return {}
