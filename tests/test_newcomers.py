"""A package that is too old, in one line; what the hub refuses is in `models/test_hub.py`."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from secateur.errors import LEAST

ROOT = Path(__file__).parents[1]


def test_the_least_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for package, least in LEAST.items():
        assert f"{package}>={'.'.join(map(str, least))}" in project["dependencies"]


@pytest.mark.parametrize("as_command", [True, False])
def test_an_old_transformers_is_named_at_once(as_command: bool, tmp_path: Path) -> None:
    about = tmp_path / "transformers-4.57.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.1\n")
    (tmp_path / "secateur").write_text("import secateur\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'src'}"}
    command = [str(tmp_path / "secateur")] if as_command else ["-c", "import secateur"]
    done = subprocess.run(
        [sys.executable, "-P", *command], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    said = (
        "Secateur needs transformers 5.14 or newer, and 4.57.1 is installed. Run: pip install -U 'transformers>=5.14'"
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == ("secateur: error: " if as_command else "ImportError: ") + said
    assert ("Traceback" in done.stderr) != as_command
