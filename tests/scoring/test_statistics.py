"""Statistics of every kind survive a file, and those of another model are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from secateur.errors import ScoreError
from secateur.scoring.statistics import Statistics, load_statistics, save_statistics

STATISTICS = Statistics(
    sums={"param_first": {"layers.0.weight": (torch.arange(3.0), torch.arange(2.0))}, "l1": {}},
    units={"obs": {"layers.0.mlp": {"layers.0.down.weight": torch.arange(4.0)}}},
    masks={"layers.0.down.weight": {1: torch.arange(6.0).reshape(2, 3)}},
    reads={"layers.0.down.weight": 1},
    loss=2.5,
    tokens=16,
    calibration="abc",
)


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    save_statistics(tmp_path / "s.safetensors", STATISTICS, about="this model")
    loaded = load_statistics(tmp_path / "s.safetensors", about="this model")
    weight, down = "layers.0.weight", "layers.0.down.weight"
    assert [sums.tolist() for sums in loaded.sums["param_first"][weight]] == [[0, 1, 2], [0, 1]]
    assert loaded.units["obs"]["layers.0.mlp"][down].tolist() == [0, 1, 2, 3]
    assert loaded.masks[down][1].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (loaded.reads, loaded.loss, loaded.tokens) == ({down: 1}, 2.5, 16)
    assert loaded.calibration == "abc"


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    save_statistics(tmp_path / "s.safetensors", STATISTICS, about="this model")
    with pytest.raises(ScoreError, match="holds statistics of another model or calibration"):
        load_statistics(tmp_path / "s.safetensors", about="that model")


def test_a_file_that_holds_no_statistics_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.safetensors").write_bytes(b"no")
    for name in ("s.safetensors", "missing.safetensors"):
        with pytest.raises(ScoreError, match=r"holds no statistics .* save_statistics"):
            load_statistics(tmp_path / name)
