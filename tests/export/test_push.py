"""Folders on the hub: what a server that answers as the hub does is sent, and what goes wrong in one line."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from secateur.checkpoint.save import save
from secateur.cli.main import run
from secateur.errors import CheckpointError, ExportError
from secateur.export.push import push
from secateur.models.manifest import MANIFEST_FILE, read_manifest
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan
from tiny import tiny_model


class Hub(ThreadingHTTPServer):
    """A hub for one owner, which keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.status = 200  # of every answer
        self.made: dict[str, Any] = {}
        self.card = ""
        self.commit: dict[str, bytes] = {}


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        answer: dict[str, Any] = {"error": "no"}
        if self.server.status == 200 and self.headers["Authorization"] == "Bearer hf_right":
            answer = self._answer(body)
        else:
            self.server.status = max(self.server.status, 401)
        text = json.dumps(answer).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _answer(self, body: str) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.server.server_port}/me/model"
        if self.path == "/api/repos/create":
            self.server.made = json.loads(body)
            return {"url": url}
        if self.path == "/api/validate-yaml":  # the hub's own check of the card, before anything is uploaded
            self.server.card = json.loads(body)["content"]
            return {"errors": [], "warnings": []}
        if self.path.endswith("/preupload/main"):
            files = [each["path"] for each in json.loads(body)["files"]]
            return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]}
        assert self.path == "/api/models/me/model/commit/main"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.commit[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"commitUrl": f"{url}/commit/1", "commitOid": "1"}

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = Plan("tiny", CutOptions(), (), {}, {}, settings={})
    return save(tiny_model(num_hidden_layers=1), tmp_path_factory.mktemp("made") / "out", plan=plan)


def test_exactly_the_files_of_the_manifest_are_uploaded(
    folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = folder / "secret.txt"
    secret.write_text("mine")
    try:
        assert run(["push", str(folder), "me/model", "--private"]) == 0
    finally:
        secret.unlink()
    assert (hub.made["name"], hub.made["organization"]) == ("model", "me")
    assert hub.made.get("private") is True or hub.made.get("visibility") == "private"
    assert hub.commit.keys() == {MANIFEST_FILE, "README.md", *(read_manifest(folder) or {})}
    assert hub.card == (folder / "README.md").read_text()
    assert all((folder / name).read_bytes() == content for name, content in hub.commit.items())
    assert f"{constants.ENDPOINT}/me/model" in capsys.readouterr().out


def test_a_folder_that_was_changed_is_not_pushed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no secateur_manifest\.json"):
        push(tmp_path, "me/model")
    config = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(config + b"\n")
    try:
        with pytest.raises(
            CheckpointError, match=r"config.json has \d+ bytes.*only a folder that is as it was written"
        ):
            push(folder, "me/model")
    finally:
        (folder / "config.json").write_bytes(config)


@pytest.mark.parametrize(
    ("status", "token", "name", "match"),
    [
        (200, None, "me/model", "there is no token of the hub on this machine. `hf auth login` asks for one"),
        (200, "hf_wrong", "me/model", "the hub does not know the token. `hf auth login`"),
        (403, "hf_right", "you/model", r"may not write there: the name is another's.*`hf auth whoami`"),
        (500, "hf_right", "me/model", "the hub refuses the upload; HfHubHTTPError"),
        (200, "hf_right", "a/b/c", "is no name of a model. Expected owner/model"),
    ],
)
def test_what_the_hub_refuses(
    status: int, token: str | None, name: str, match: str, folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.status = status
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ExportError, match=rf"^[^\n]*{match}[^\n]*$"):
        push(folder, name)


def test_a_network_that_breaks_off(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(*_: Any, **__: Any) -> None:
        raise ConnectionError("reset by peer")

    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", break_off)
    with pytest.raises(ExportError, match=r"the upload has failed; .*reset by peer.* uploads what is missing"):
        push(folder, "me/model")


def test_without_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"HF_HUB_OFFLINE is set, so nothing is uploaded\. Unset it"):
        push(folder, "me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://no-such-host.invalid")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(ExportError, match=r"no-such-host.invalid cannot be reached. Check the network, or HF_ENDPOINT"):
        push(folder, "me/model")
