"""The tutorials of docs/notebooks: run in a kernel, made free of what varies, and compared with what is stored.

`python tests/notebooks.py [NAME...]` runs them all, or those named, and writes them back with their outputs.
"""

from __future__ import annotations

import math
import os
import re
import sys
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "notebooks"
BADGE_PICTURE = "colab.svg"  # ours, in FOLDER: a page asks no other host for anything
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# Tags of cells. The others' outputs must be the same on every machine, but for the last digits.
INSTALL = "install"  # written here
MEASURED = "measured"  # prints times: its outputs are not stored
UNCHECKED = "unchecked"  # prints what a model writes, where two words may be equally likely: not compared

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
SHARE = 0.01  # by which a number may differ from the stored one


def read(path: Path) -> NotebookNode:
    """A notebook file."""
    notebook: NotebookNode = nbformat.read(path, as_version=4)
    return notebook


def notebooks() -> list[Path]:
    """The files, in the order in which they are read."""
    return sorted(FOLDER.glob("*.ipynb"))


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", []))


def repository() -> str | None:
    """The address in pyproject.toml, `Repository` of [project.urls]; None as long as there is none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project.get("urls", {}).get("Repository")
    return None if address is None else str(address)


def badge(address: str | None, name: str) -> str | None:
    """The line below the title that opens the notebook in Colab; None without a repository on GitHub."""
    if address is None or not address.startswith("https://github.com/"):
        return None
    place = f"{address.removeprefix('https://github.com/').strip('/')}/blob/main/docs/notebooks/{name}"
    return f"[![Open in Colab]({BADGE_PICTURE})](https://colab.research.google.com/github/{place})"


def install_source(address: str | None) -> str:
    """The first cell of code: nothing where Secateur is there, else what installs it."""
    wanted = "secateur[gguf,plot,recover]" + ("" if address is None else f" @ git+{address}")
    return (
        "import importlib.util\n\n"
        'if importlib.util.find_spec("secateur") is None:\n'
        f'    %pip install --quiet "{wanted}"'
    )


def put_head(notebook: NotebookNode, name: str, address: str | None) -> None:
    """Write the badge and the cell that installs, in place."""
    title, *lines = notebook.cells[0].source.split("\n")
    text = "\n".join(line for line in lines if not line.startswith("[![Open in Colab]")).strip()
    parts = (title, badge(address, name), text)
    notebook.cells[0].source = "\n\n".join(part for part in parts if part)
    for cell in notebook.cells:
        if INSTALL in tags(cell):
            cell.source = install_source(address)


def run(path: Path, folder: Path) -> NotebookNode:
    """The notebook with the outputs that it has now, run in an empty folder by this Python, without a network.

    Raises `nbclient.exceptions.CellExecutionError` for the first cell that fails.
    """
    notebook = read(path)
    put_head(notebook, path.name, repository())
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's, without ipywidgets; no progress is shown
    }
    # Without folders of kernels the one of this environment is left, whatever the user has installed.
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    place = {"metadata": {"path": str(folder)}}
    quiet = ["--log-level=ERROR"]
    client = NotebookClient(
        notebook, km=manager, timeout=600, resources=place, extra_arguments=quiet, coalesce_streams=True
    )
    client.execute(env=env, cleanup_kc=True)
    tidy(notebook)
    return notebook


def tidy(notebook: NotebookNode) -> None:
    """Leave out what says when, where and how fast it ran, in place."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code" and MEASURED in tags(cell):
            cell.outputs = []


def output_text(cell: NotebookNode) -> str:
    """What a cell of code printed, warnings and errors included."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "error":
            parts.append("\n".join(output.traceback))
        else:
            parts.append(output.text if output.output_type == "stream" else output.data.get("text/plain", ""))
    return "".join(parts)


def pictures(notebook: NotebookNode) -> list[tuple[NotebookNode, str]]:
    """(cell, base64) of every picture."""
    outputs = [(cell, output) for cell in notebook.cells for output in cell.get("outputs", [])]
    return [(cell, output.data["image/png"]) for cell, output in outputs if "image/png" in output.get("data", {})]


def same_text(stored: str, new: str) -> bool:
    """Whether two outputs say the same: equal words, numbers within 1 % or one unit of their last decimal.

    >>> same_text("loss 0.31 of 1,000", "loss 0.32 of 1,005"), same_text("30 layers", "31 layers")
    (True, False)
    """
    if NUMBER.sub("#", stored) != NUMBER.sub("#", new):
        return False
    return all(map(_close, NUMBER.findall(stored), NUMBER.findall(new)))


def _close(stored: str, new: str) -> bool:
    decimals = len(stored.partition(".")[2])
    unit = 1.01 * 10.0**-decimals if decimals else 0.0
    first, second = (float(number.replace(",", "")) for number in (stored, new))
    return math.isclose(first, second, rel_tol=SHARE, abs_tol=unit)


def differences(stored: NotebookNode, new: NotebookNode) -> list[str]:
    """What a run printed and the stored notebook does not say, one line for each cell."""
    found = []
    for number, (before, after) in enumerate(zip(stored.cells, new.cells, strict=True)):
        if before.cell_type == "code" and not {MEASURED, UNCHECKED} & set(tags(before)):
            was, now = output_text(before), output_text(after)
            if not same_text(was, now):
                found.append(f"cell {number}: stored {was!r}, now {now!r}")
    return found


def main(names: list[str]) -> None:
    """Run and write back."""
    for path in notebooks():
        if not names or path.stem in names:
            with TemporaryDirectory() as folder:
                notebook = run(path, Path(folder))
            nbformat.write(notebook, path)
            sys.stdout.write(f"{path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
