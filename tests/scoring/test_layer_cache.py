"""A pass that resumes from its layer cache gives the same bytes, and computes only what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from every_type import tiny_type_model
from families import family_config, family_model
from secateur import discover
from secateur.discovery.groups import Discovery
from secateur.models.silence import quiet
from secateur.scoring.passes.recomputation import ModuleCall
from secateur.scoring.scores import statistics_for
from secateur.scoring.statistics import Statistics

WINDOWS = torch.randint(3, 101, (3, 9), generator=torch.Generator().manual_seed(2))
LAYERS = 3


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return family_model(family_config("llama", num_hidden_layers=LAYERS), dtype=torch.float32)


@pytest.fixture(scope="module")
def discovery(model: PreTrainedModel) -> Discovery:
    return discover(model)


def assert_same(one: Statistics, other: Statistics) -> None:
    assert (one.loss, one.tokens, one.reads) == (other.loss, other.tokens, other.reads)
    for score, by_weight in one.sums.items():
        for name, sums in by_weight.items():
            assert all(torch.equal(a, b) for a, b in zip(sums, other.sums[score][name], strict=True))
    for name, by_dim in one.masks.items():
        assert all(torch.equal(each, other.masks[name][dim]) for dim, each in by_dim.items())
    assert (one.sums.keys(), one.masks.keys()) == (other.sums.keys(), other.masks.keys())


@pytest.mark.parametrize("name", ["param_mix", "fisher"])
def test_a_resumed_pass_is_the_same_and_computes_what_is_missing(
    name: str, model: PreTrainedModel, discovery: Discovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = statistics_for(name, model, discovery, WINDOWS, layer_cache=tmp_path)
    expected = [f"{direction}-{i}.safetensors" for direction in ("backward", "forward") for i in range(LAYERS)]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    (tmp_path / "backward-0.safetensors").unlink()  # killed before the first layer was done
    (tmp_path / "backward-1.safetensors").write_bytes(b"{")  # and the second is damaged
    computed: set[str] = set()
    run = ModuleCall.run

    def recorded(call: ModuleCall, tensors: Sequence[Tensor]) -> list[Tensor]:
        computed.add(call.path)
        return run(call, tensors)

    monkeypatch.setattr(ModuleCall, "run", recorded)
    assert_same(statistics_for(name, model, discovery, WINDOWS, layer_cache=tmp_path), whole)
    assert {path for path in computed if path.count(".") == 2} == {"model.layers.0", "model.layers.1"}


@pytest.mark.parametrize("name", ["param_mix", "fisher"])
def test_layers_that_hand_on_more_than_they_return_are_not_computed_again(name: str, tmp_path: Path) -> None:
    """Gemma 3n's last layers attend to the keys of earlier ones, whose gradient comes back that way as well."""
    with quiet():
        model = tiny_type_model("gemma3n_text")
    discovery = discover(model)
    expected = statistics_for(name, model, discovery, WINDOWS)
    assert_same(statistics_for(name, model, discovery, WINDOWS, layer_cache=tmp_path), expected)
    assert not [*tmp_path.iterdir()]
