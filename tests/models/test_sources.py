"""A MODEL argument leads to the right file, or an error says what it could be."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import constants as hub_constants
from hypothesis import given
from hypothesis import strategies as st

from model_folders import fails
from secateur.errors import ModelError
from secateur.models.sources import Source, hub_is_reachable, resolve


class TestResolve:
    def test_each_kind(self, plain_folder: Path) -> None:
        (plain_folder / "x.gguf").touch()
        assert resolve(str(plain_folder)) == Source(str(plain_folder), "folder", plain_folder)
        gguf = plain_folder / "x.gguf"
        assert resolve(str(gguf)) == Source(str(gguf), "gguf", gguf)
        assert resolve(str(plain_folder / "config.json")).kind == "config"
        assert resolve("organisation/model") == Source("organisation/model", "hub", None)
        assert resolve("model").kind == "hub"

    def test_home_is_expanded(self, plain_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(plain_folder.parent))
        assert resolve("~/tiny") == Source("~/tiny", "folder", plain_folder)

    def test_a_folder_comes_before_the_hub(self, plain_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(plain_folder.parent)
        assert resolve("tiny").kind == "folder"

    @pytest.mark.parametrize(
        "model",
        ["", "./x", "../x", "/no/x", "~/no-such-x", "~nobody-of-that-name/x", "x.gguf", "a/x.json", "a/b/c", ".\\x"],
    )
    def test_a_missing_path(self, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        with fails(f"{model!r}: no such file or folder. Expected the name of a model on the hub"):
            resolve(model)

    @given(st.from_regex(r"(\./|/|~/)[a-z]{9}[a-z0-9/]*", fullmatch=True))
    def test_what_begins_like_a_path_never_reaches_the_hub(self, model: str) -> None:
        with pytest.raises(ModelError, match="no such file or folder"):
            resolve(model)

    def test_a_folder_that_is_no_model(self, tmp_path: Path) -> None:
        with fails(f"{str(tmp_path)!r}: this folder holds no config.json"):
            resolve(str(tmp_path))
        (tmp_path / "x.gguf").touch()
        with fails(f"Name the file itself: {str(tmp_path / 'x.gguf')!r}."):
            resolve(str(tmp_path))

    def test_another_kind_of_file(self, plain_folder: Path) -> None:
        with fails("a file of kind '.safetensors' is not a model. Expected"):
            resolve(str(plain_folder / "model.safetensors"))

    @pytest.mark.demo_model
    def test_demo_means_the_wheel_whatever_the_folder_holds(
        self, plain_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(plain_folder.parent)
        plain_folder.rename("demo")
        source = resolve("demo")
        assert source.kind == "gguf"
        assert source.path is not None
        assert source.path.is_file()
        assert resolve("./demo").kind == "folder"


class TestHub:
    def test_without_an_address_the_hub_is_not_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_address(*_: object) -> None:
            raise socket.gaierror

        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(urllib.request, "getproxies", dict)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
        assert hub_is_reachable()
        monkeypatch.setattr(socket, "getaddrinfo", no_address)
        assert not hub_is_reachable()
        monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "proxy"})
        assert hub_is_reachable()
