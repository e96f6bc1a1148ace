"""A push brings every file to the hub, or says in one line why not and what to do. A real client, a local server."""

import http.server
import json
import os
import subprocess
import sys
import threading
from base64 import b64decode
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent


class Hub(http.server.BaseHTTPRequestHandler):
    """The endpoints of the hub that a push of small files asks, over HTTP. State is on the server object."""

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.asked.append(self.path)
        self.answer(200, {"id": self.server.repo, "private": self.server.private, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self.path)
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.answer(200, {"url": f"http://{self.headers['Host']}/{self.server.repo}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/{self.server.repo}/commit/1"
            return self.answer(200, {"success": True, "commitOid": "1", "commitUrl": url})
        self.answer(404, {"error": self.path})

    def log_message(self, *args):
        pass


@pytest.fixture
def local_hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repo, server.private, server.files, server.asked, server.created = "me/Llama-tiny", True, {}, [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def pushed(folder, endpoint, home, repo="me/Llama-tiny", **env):
    """A push in a process of its own: the client reads its environment when it is imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"} | env
    code = (
        "import sys, pathlib; from distil_jax.push import push; from distil_jax.errors import UserError\n"
        "try: print(push(pathlib.Path(sys.argv[1]), sys.argv[2], private=True))\n"
        "except UserError as error: print('error:', error)"
    )
    command = [sys.executable, "-c", code, str(folder), repo]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=PROJECT, check=True).stdout


def test_a_push_brings_every_file_byte_for_byte(local_hub, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 300)
    (folder / "NOTICE").write_bytes("Copyright © us\r\n".encode())
    endpoint = f"http://127.0.0.1:{local_hub.server_port}"
    assert pushed(folder, endpoint, tmp_path / "home", HF_TOKEN="hf_right").strip().endswith("/commit/1")
    assert local_hub.files == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert local_hub.created["name"] == "Llama-tiny" and "private" in json.dumps(local_hub.created)
    # A public repository is not filled by a push that was to be private.
    local_hub.private, local_hub.files = False, {}
    said = pushed(folder, endpoint, tmp_path / "home", HF_TOKEN="hf_right")
    assert "it is public; set --config.export.private=false" in said and local_hub.files == {}


def test_a_push_that_cannot_be_is_one_line_with_the_way_on(local_hub, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("# x\n")
    endpoint = f"http://127.0.0.1:{local_hub.server_port}"
    closed = "http://127.0.0.1:9"
    for said, arguments in {
        "no token": (endpoint, {}),
        "(401)": (endpoint, {"HF_TOKEN": "hf_wrong"}),
        "HF_HUB_OFFLINE is set": (endpoint, {"HF_TOKEN": "hf_right", "HF_HUB_OFFLINE": "1"}),
        "ConnectError": (closed, {"HF_TOKEN": "hf_right"}),
    }.items():
        out = pushed(folder, arguments[0], tmp_path / "home", **arguments[1])
        assert out.startswith("error: not pushed to me/Llama-tiny") and said in out and out.count("\n") == 1
        assert "--config.export.push_to=me/Llama-tiny" in out and "hf_" not in out
    assert local_hub.files == {}
    assert "config.export.push_to is 'a/b/c'" in pushed(folder, endpoint, tmp_path, "a/b/c", HF_TOKEN="hf_right")
