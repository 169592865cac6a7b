"""What a newcomer meets at the hub: one line each that says what to do."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants

from model_folders import fails
from secateur.models.config import load_config
from secateur.models.hub import hub_problem


class Refuses(BaseHTTPRequestHandler):
    """A hub on which one model is gated, and no other is there."""

    def do_HEAD(self) -> None:
        gated = "/gated/" in self.path
        self.send_response(403 if gated else 401)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("owner/gated", "it is gated. Ask for access at http://127.0.0.1:"),
        ("owner/gated", "/owner/gated; then `hf auth login` (or HF_TOKEN) gives this machine a token that may read it"),
        (
            "owner/mispelt",
            "the hub has no such name, or it is private. Check the spelling; for a private one, `hf auth",
        ),
    ],
)
def test_a_name_that_may_not_be_read(name: str, match: str, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    with fails(match):
        load_config(name)


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://no-such-host.invalid")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with fails(
        "it is not in the cache, and https://no-such-host.invalid cannot be reached. Check the network, or name a"
    ):
        load_config("owner/model")


def test_too_little_disk_for_a_download() -> None:
    error = RuntimeError("download failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert "the disk of the cache is full. Free some of" in (hub_problem(error, "owner/model") or "")
