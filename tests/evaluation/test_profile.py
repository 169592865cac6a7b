"""All models of a profile stand beside the first, in every batch and length, with or without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from recipes import recipe
from secateur.evaluation import speed
from secateur.evaluation.memory import weight_bytes
from secateur.evaluation.options import ProfileOptions
from secateur.evaluation.profile import profile, profile_models
from secateur.pipeline.run import plan_model
from tiny import tiny_model


class Ticks:
    """Steps that take a known time, and which model took them."""

    def __init__(self, models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
        self.names = {id(model): name for name, model in models.items()}
        self.timed: list[tuple[str, int, int]] = []
        self.memory: list[tuple[str, int, int]] = []
        monkeypatch.setattr(speed, "_time_steps", self.time_steps)
        monkeypatch.setattr(speed, "activation_bytes", self.activation_bytes)

    def time_steps(self, model: nn.Module, prompts_BT: torch.Tensor, *, new_tokens: int) -> list[float]:
        batch, seq_len = prompts_BT.shape
        name = self.names[id(model)]
        self.timed.append((name, batch, seq_len))
        prefill, decode = {"dense": (0.5, 0.25), "cut": (0.25, 0.125)}[name]
        return [prefill * batch * seq_len, *[decode] * new_tokens]

    def activation_bytes(self, model: nn.Module, prompts_BT: torch.Tensor) -> int:
        batch, seq_len = prompts_BT.shape
        self.memory.append((self.names[id(model)], batch, seq_len))
        return 1000 * batch * seq_len


def test_every_batch_and_length_is_warmed_up_and_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"dense": tiny_model(), "cut": tiny_model(intermediate_size=40)}
    ticks = Ticks(models, monkeypatch)
    shown: list[tuple[int, int]] = []
    options = ProfileOptions(seq_lens=(8, 4), batch_sizes=(1, 3), new_tokens=2, repeats=2)
    dense, cut = profile(models, options, progress=lambda done, total: shown.append((done, total)))
    cells = [(1, 8), (3, 8), (1, 4), (3, 4)]
    assert ticks.timed == [(name, *cell) for cell in cells for name in ["dense", "cut"] * 3]  # warm-up, then two runs
    assert ticks.memory == [(name, *cell) for cell in cells for name in ("dense", "cut")]
    assert shown == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [(cost.batch, cost.seq_len) for cost in cut.grid] == cells
    for (batch, seq_len), cost, first in zip(cells, cut.grid, dense.grid, strict=True):
        assert cost.speed is not None
        assert first.speed is not None
        assert cost.against is not None
        assert first.against is None
        assert first.speed.prefill_seconds == 0.5 * batch * seq_len
        assert first.speed.decode_tokens_per_second == 4 * batch  # of all rows of a batch
        assert cost.speed.peak_bytes == weight_bytes(models["cut"]) + 1000 * batch * seq_len
        assert (cost.against.prefill_speedup, cost.against.decode_speedup) == (2.0, 2.0)
        assert cost.against.macs_ratio == cost.macs / first.macs < 1
        assert cost.kv_cache_bytes == 3 * 2 * 3 * 16 * 4 * batch * seq_len  # layers, K and V, KV heads, size, float32
    ratio = cut.weight_bytes / dense.weight_bytes
    assert cut.to_json()["against"] == {
        "model": "dense",
        "macs_ratio": cut.macs / dense.macs,
        "weight_bytes_ratio": ratio,
        "prefill_speedup": 2.0,
        "decode_speedup": 2.0,
    }
    assert cut.to_json()["prefill_seconds"] == cut.to_json()["grid"][0]["prefill_seconds"] == 2.0
    assert "against" not in dense.to_json()
    assert "prefill_speedup" not in dense.to_json()["grid"][0]


def test_models_by_name_are_read_once_and_cut_as_a_plan_says(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of sizes alone: speed does not depend on which units stay."""
    decided = plan_model(recipe(str(tiny), cut={"ratio": 0.3}), sizes_only=True)
    options = ProfileOptions(seq_lens=(8,), new_tokens=1, repeats=1)
    dense, cut = profile_models([str(tiny), str(tiny)], options, plan=decided)
    assert cut.speed is not None
    assert (dense.model, cut.model) == (str(tiny), f"{tiny} + plan")
    assert (cut.parameters, cut.non_embedding_parameters) == (
        decided.parameters["pruned"],
        decided.parameters["pruned_non_embedding"],
    )
    monkeypatch.setattr("secateur.evaluation.profile.load", lambda *_, **__: pytest.fail("weights were read"))
    counted = profile_models([str(tiny)], ProfileOptions(seq_lens=(8,), sizes_only=True), plan=decided)
    assert [costs.macs for costs in counted] == [dense.macs, cut.macs]
    assert [costs.kv_cache_bytes for costs in counted] == [dense.kv_cache_bytes, cut.kv_cache_bytes]
    assert [costs.weight_bytes for costs in counted] == [dense.weight_bytes, cut.weight_bytes]
    assert "prefill_seconds" not in counted[0].to_json()
