"""Two real processes give the scores of one, and one folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from every_type import tiny_type_model
from launching import launch
from secateur import discover, processes, score
from secateur.cli.main import run
from secateur.errors import ScoreError
from secateur.models.silence import quiet
from secateur.planning.plan import read_plan
from secateur.scoring.registry import SCORES

# 3 for one process, 2 for the other.
WINDOWS = torch.randint(3, 100, (5, 12), generator=torch.Generator().manual_seed(3))
SCORING = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from safetensors.torch import save_file
from secateur import processes
from test_processes import all_scores
processes.join()
found = all_scores()
assert processes.count() == 2
if processes.is_first():
    save_file(found, sys.argv[1])
"""


def all_scores() -> dict[str, Tensor]:
    """Every score of every group of a mixture of experts, in float32: some experts get no token of one process."""
    with quiet():
        torch.manual_seed(0)
        model = tiny_type_model("mixtral", dtype=torch.float32)
    discovery = discover(model)
    return {
        f"{name} {group}": units.contiguous()
        for name in SCORES
        for group, units in score(model, windows=WINDOWS, discovery=discovery, name=name).units.items()
    }


def test_two_processes_give_the_scores_of_one(tmp_path: Path) -> None:
    script, out = tmp_path / "scoring.py", tmp_path / "scores.safetensors"
    script.write_text(SCORING)
    done = launch(str(script), str(out))
    assert done.returncode == 0, done.stderr
    found, expected = load_file(out), all_scores()
    assert found.keys() == expected.keys()
    assert len({name.split()[0] for name in found}) == len(SCORES)
    for name, units in expected.items():
        scale = float(units.abs().max())
        worst = float((found[name] - units).abs().max())
        rounding = 1e-4 if name.startswith("obs ") else 1e-5  # products in float32, of which the inverse is taken
        assert worst <= rounding * scale, name


def test_two_processes_write_the_folder_of_one(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--samples", "5", "--length", "16", "--json", "out.json"]
    done = launch("-m", "secateur", "prune", str(tiny), "out", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote out") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.json"]
    monkeypatch.chdir(tmp_path)
    assert run(["prune", str(tiny), "alone", *arguments]) == 0
    one, other = (read_plan(tmp_path / name / "secateur_plan.json") for name in ("out", "alone"))
    assert [group.keep for group in one.groups] == [group.keep for group in other.groups]


def test_fewer_samples_than_processes_are_an_error(tiny: Path, tmp_path: Path) -> None:
    done = launch("-m", "secateur", "prune", str(tiny), "out", "--samples", "1", "--length", "16", cwd=tmp_path)
    assert done.returncode != 0
    assert "1 calibration samples for 2 processes: each needs at least one" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_one_process_is_in_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    processes.join()
    assert (processes.count(), processes.is_first()) == (1, True)
    assert processes.share_of(WINDOWS) is WINDOWS
    with pytest.raises(ScoreError, match="0 calibration samples"):
        processes.share_of(WINDOWS[:0])


def test_nccl_is_given_copies_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "nccl")
    monkeypatch.setattr(Tensor, "cuda", Tensor.clone)
    monkeypatch.setattr("torch.distributed.broadcast", lambda tensor, src: tensor.fill_(7) if src == 0 else None)
    assert processes.from_first(torch.zeros(2)).tolist() == [7, 7]
