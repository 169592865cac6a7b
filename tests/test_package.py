"""The wheel, built from the sdist, in an environment that has the core's packages and nothing else."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from secateur import __version__
from tiny import write_tiny

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def closure(requirements: list[str]) -> Iterator[importlib.metadata.Distribution]:
    """The installed packages that these requirements need, and those that they need in turn."""
    waiting, seen = [Requirement(each) for each in requirements], set()
    while waiting:
        wanted = waiting.pop()
        extras = {"", *wanted.extras}
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        if (wanted.name, *sorted(extras)) in seen:
            continue
        seen.add((wanted.name, *sorted(extras)))
        package = importlib.metadata.distribution(wanted.name)
        yield package
        for needed in map(Requirement, package.requires or ()):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                needed.marker = None
                waiting.append(needed)


def core_alone(folder: Path) -> Path:
    """An empty environment with links to the core's packages; returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = next((folder / "lib").glob("python*/site-packages"))
    for package in closure(PROJECT["dependencies"]):
        for top in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(package.locate_file(top))))
    return python


def done(*command: str | Path, **options: Any) -> str:
    """What a program prints that must succeed."""
    options = {"env": {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}} | options
    words = list(map(str, command))
    ran = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, **options)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_extra_all_has_what_a_user_may_want() -> None:
    extras = PROJECT["optional-dependencies"]
    (whole,) = map(Requirement, extras["all"])
    assert whole.name == "secateur"
    assert set(extras) - whole.extras == {"all", "bench", "dev", "docs", "quantize"}


@pytest.mark.slow
def test_the_wheel_works_with_the_core_alone(tmp_path: Path) -> None:
    pytest.importorskip("build", reason="the wheel is built by build")
    pytest.importorskip("hatchling", reason="the wheel is built by hatchling")
    done(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", ROOT, env=None)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert (tmp_path / "dist" / f"secateur-{__version__}.tar.gz").is_file()
    assert wheel.stat().st_size < 2**20
    with zipfile.ZipFile(wheel) as packed:
        assert {"secateur/py.typed", "secateur/report/templates/style.css"} <= set(packed.namelist())
        assert {name.split("/")[0].split("-")[0] for name in packed.namelist()} == {"secateur"}
    python = core_alone(tmp_path / "env")
    command = python.parent / "secateur"
    done(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", "--quiet", wheel)
    assert done(command, "--version", cwd=tmp_path) == f"secateur {__version__}\n"
    assert str(tmp_path) in done(python, "-c", "import secateur; print(secateur.__file__)", cwd=tmp_path)
    write_tiny(tmp_path / "tiny")
    done(command, "prune", "tiny", "out", "--samples", "4", "--length", "32", "--quiet", cwd=tmp_path)
    assert "perplexity" in done(command, "evaluate", "tiny", "out", "--max-tokens", "400", cwd=tmp_path)


def test_the_citation_has_what_its_format_asks_for() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == PROJECT["license"]


def test_the_container_takes_files_that_are_there_and_not_ignored() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    taken = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    let_in = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert taken == [name for name in taken if (ROOT / name).exists() and f"!{name}" in let_in] != []
