"""Rotated values: the same logits, the best first channels, and nothing where they pass through something nonlinear."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from families import DISTINCT, family_config, family_model
from recipes import cut_in_memory
from secateur import CutOptions, discover
from secateur.pruning.rotation import principal_axes, rotated
from tiny import VOCABULARY, tiny_model

WINDOWS = torch.randint(3, 97, (6, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: PreTrainedModel, windows: Tensor = WINDOWS) -> Tensor:
    found: Tensor = model(input_ids=windows, use_cache=False).logits
    return found


def changed(model: PreTrainedModel, other: PreTrainedModel) -> set[str]:
    """The modules whose weights are not those of the other model."""
    weights = dict(other.named_parameters())
    return {name.split(".")[-2] for name, weight in model.named_parameters() if weight is not weights[name]}


@pytest.mark.parametrize("family", DISTINCT)
def test_the_logits_stay(family: str) -> None:
    model = family_model(family_config(family))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    same = rotated(model, discover(model), WINDOWS)
    torch.testing.assert_close(logits(same), logits(model), atol=1e-6, rtol=0)  # norms of some compute in float32
    assert len(changed(same, model)) == 2  # what makes values, and what reads them
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_the_first_channels_give_the_outputs_best() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(200, 6, generator=generator).double() @ torch.randn(6, 6, generator=generator).double()
    w_RD = torch.randn(9, 6, generator=generator).double()
    change_DD, back_DD = principal_axes(x_ND.t() @ x_ND / len(x_ND), w_RD.t() @ w_RD)
    torch.testing.assert_close(back_DD @ change_DD, torch.eye(6, dtype=torch.float64))
    for n in (1, 3, 5):
        first_NR = x_ND @ change_DD[:n].t() @ (w_RD @ back_DD[:, :n]).t()
        error = (first_NR - x_ND @ w_RD.t()).square().sum()
        least = torch.linalg.svdvals(x_ND @ w_RD.t())[n:].square().sum()  # of any matrix of this rank
        assert error < 1.001 * least


def test_something_nonlinear_on_the_values_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    model = family_model(family_config("llama"))
    discovery = discover(model)
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _, __, output: output.relu())
    with caplog.at_level(logging.WARNING):
        same = rotated(model, discovery, WINDOWS)
    assert changed(same, model) == set()
    assert "something nonlinear" in caplog.text


def test_values_of_low_rank_are_cut_for_nothing() -> None:
    model, windows = tiny_model(num_hidden_layers=2), torch.randint(VOCABULARY, (8, 24))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            rows = layer.self_attn.v_proj.weight.view(3, 16, 48)
            rows.copy_(torch.randn(3, 16, 5, generator=generator) @ torch.randn(3, 5, 48, generator=generator) * 0.1)
    alone: dict[str, Any] = {
        "repair": "none",
        "choose": "score",
    }  # a repair would make up for any channels of so few ranks
    options = CutOptions(axes=("head_dim",), ratio=10 / 16, of="units", shape="per-layer", **alone)
    smaller, decided = cut_in_memory(model, discover(model), options, windows)
    assert [group.kept for group in decided.groups] == [6, 6]
    assert smaller.model.layers[0].self_attn.v_proj.weight.shape == (3 * 6, 48)
    torch.testing.assert_close(logits(smaller, windows), logits(model, windows), atol=1e-3, rtol=0)
