"""Exceptions that no check has foreseen: those that are not ours end in one line, ours in a traceback."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from class_models import class_tokenizer
from every_type import tiny_type_model
from secateur.cli.failures import MODEL_CODE, PACKAGE, TRACEBACK, explained
from secateur.cli.main import COMMANDS, run
from secateur.models.silence import quiet
from tiny import names, tiny_model

GOLDEN = Path(__file__).parents[1] / "golden"
PRUNE = "prune tiny out --ratio 0.3 --score l2 --repair none --overwrite --quiet".split()


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model in it, which is the working directory."""
    (tmp_path / "tiny").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _allocate(*_: Any, **__: Any) -> None:
    torch.empty(2**50)


def test_out_of_memory(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("secateur.pipeline.pipeline.prune", _allocate)
    assert run(PRUNE) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("secateur: error: out of memory (can't allocate memory: you tried to allocate 4503")
    assert line.endswith("; prune needs less with --preset fast, with --dtype bfloat16")
    assert "out" not in names(here)

    monkeypatch.setenv(TRACEBACK, "1")
    assert run(PRUNE) == 2
    trace = capsys.readouterr().err.splitlines()
    assert trace[0] == "Traceback (most recent call last):"
    assert trace[-1] == line


def test_out_of_memory_on_a_gpu() -> None:
    said = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.10 GiB of which 1.20 GiB is free. Process 1 ..."
    )
    assert explained(torch.OutOfMemoryError(said), "recover") == (
        "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.10 GiB of which 1.20 GiB is "
        "free); recover needs less with --micro-batch-size 1 --gradient-checkpointing, with --dtype bfloat16, with "
        "--device cpu"
    )


def test_what_needs_less_memory_are_options_of_the_command() -> None:
    for command in COMMANDS:
        line = explained(torch.OutOfMemoryError("CUDA out of memory."), command) or ""
        help_ = (GOLDEN / f"help_{command}.txt").read_text()
        options = re.findall(r"--[a-z-]+", line)
        assert all(f"{option} " in help_ for option in options), line
        assert bool(options) == ("--dtype " in help_)


def test_the_code_of_a_model_fails(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():  # a model that reads the states of another one
        tiny_type_model("gemma4_assistant", dtype=torch.float32).save_pretrained("assistant")
    class_tokenizer().save_pretrained("assistant")
    Path("text.txt").write_text("a cat and a dog\n" * 60)
    assert run("evaluate assistant --ppl t=text.txt --protocol served@16 --max-tokens 64 --quiet".split()) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("secateur: error: the model's own code failed in modeling_gemma4_assistant.py, line ")
    assert "shared_kv_states cannot be None" in line


@pytest.mark.parametrize(("name", "ours"), [("hook", True), ("__torch_function__", False)])
def test_what_a_model_calls_of_ours_is_ours_unless_it_only_sees_operators(name: str, ours: bool) -> None:
    functions: dict[str, Any] = {}
    exec(compile(f"def {name}(*_): raise ValueError('a bug')", f"{PACKAGE}hook.py", "exec"), functions)
    model = tiny_model()
    model.model.layers[0].register_forward_hook(functions[name])
    with pytest.raises(ValueError, match="a bug") as failed:
        model(torch.arange(3)[None])
    assert any(MODEL_CODE[0] in str(entry.path) for entry in failed.traceback)
    assert (explained(failed.value, "prune") is None) == ours
