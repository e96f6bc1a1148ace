"""Models by their hub names, with the real client against a local server that speaks the few calls it makes."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from distil_jax.errors import UserError
from distil_jax.models import hub

SHA = {"main": "a" * 40, "v1": "b" * 40}
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "consolidated.safetensors": b"the same weights again",
    "pytorch_model.bin": b"a pickle",
    "modeling_own.py": b"code",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE.txt": b"licence",
    "USE_POLICY.md": b"policy",
    "original/params.json": b"{}",
}
KEPT = ["LICENSE.txt", "USE_POLICY.md", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]


class Hub(http.server.BaseHTTPRequestHandler):
    """owner/open has the files at two revisions, owner/gated asks for a licence, there is nothing else."""

    protocol_version = "HTTP/1.1"

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content_Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, kind, revision = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else None, parts[-1]
            if name not in ("owner/open", "owner/gated"):
                self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            elif kind == "tree":
                entries = [{"type": "file", "path": f, "size": len(b), "oid": "0" * 40} for f, b in FILES.items()]
                self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
            elif kind == "revision" and revision not in SHA:
                self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            else:
                info = {"id": name, "sha": SHA[revision], "siblings": [{"rfilename": f} for f in FILES]}
                self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            return
        name, commit, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if name == "owner/gated":
            self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access to model owner/gated is restricted")
            return
        self.server.asked.add(file)
        body = FILES[file] + (b" " if commit == SHA["v1"] else b"")
        self.answer(200, body, X_Repo_Commit=commit, ETag=f'"{commit[:8]}-{file}"')

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


ASK = """
import json, sys
from distil_jax.errors import UserError
from distil_jax.models.download import resolve
for call in json.loads(sys.argv[1]):
    try:
        print(json.dumps(str(resolve(*call))))
    except UserError as error:
        print(json.dumps("refused " + str(error)))
"""


def ask(home: Path, endpoint: str, *calls, offline=False) -> list[str]:
    """What `resolve(*call)` gives, in a process whose client has never seen this hub."""
    env = os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": str(int(offline))}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", ASK, json.dumps(calls)]
    out = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True, text=True, timeout=60).stdout
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_hub_name_gives_a_directory_or_a_line_that_says_what_to_do(server, tmp_path):
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    calls = [["owner/open"], ["owner/open@v1"], ["owner/open", "v1"], ["owner/open@v9"], ["owner/gated"], ["owner/no"]]
    found, at_v1, by_argument, no_revision, gated, nothing = ask(tmp_path, endpoint, *calls)
    assert sorted(path.name for path in Path(found).iterdir()) == KEPT and server.asked == set(KEPT)
    assert at_v1 == by_argument != found
    assert (Path(at_v1) / "config.json").read_bytes() == FILES["config.json"] + b" "
    assert no_revision.startswith("refused owner/open@v9: the repository has no such revision")
    assert gated.startswith(
        f"refused owner/gated is gated: open {endpoint}/owner/gated, accept the licence, then set HF"
    )
    assert nothing.startswith("refused owner/no: no local directory, and no repository on the hub that you may see")
    assert not any("\n" in line for line in (no_revision, gated, nothing))
    # what was fetched once is there without the network
    calls = [["owner/open"], ["owner/open@v1"], ["owner/other"]]
    again, again_v1, missing = ask(tmp_path, endpoint, *calls, offline=True)
    assert (again, again_v1) == (found, at_v1)
    assert missing.startswith(
        "refused owner/other: no local directory, and not whole in the cache, while HF_HUB_OFFLINE"
    )
    again, unreachable = ask(tmp_path, "http://127.0.0.1:9", ["owner/open"], ["owner/other"])
    assert again == found
    assert "the hub did not answer" in unreachable and "check the network" in unreachable and "\n" not in unreachable


def test_a_path_that_is_no_directory_is_named(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        hub.resolve(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        hub.resolve(tmp_path / "file")
    with pytest.raises(UserError, match="has no revision 'v1'"):
        hub.resolve(tmp_path, "v1")
    with pytest.raises(UserError, match="two revisions"):
        hub.resolve("owner/name@v1", "v2")
