"""A model whose layers are brought to a device one by one gives what it gives with all of them there.

The CPU stands for the device, and weights that are not on it are NaN, and so would be all that is computed with them.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import secateur.models.loading
from every_type import tiny_type_model
from secateur.data.options import DataOptions
from secateur.discovery.discover import discover
from secateur.errors import ModelError, PlanError, TrainingError
from secateur.models.inputs import arguments
from secateur.models.loading import load
from secateur.models.options import LoadOptions
from secateur.models.streaming import stream_in_place, streamed_layers
from secateur.pipeline.run import prune_model
from secateur.planning.options import CutOptions
from secateur.planning.plan import plan
from secateur.pruning.held_out import checked_repair
from secateur.pruning.prune import prune
from secateur.pruning.reconstruct import reconstruct_in_place
from secateur.pruning.repair import repair
from secateur.pruning.rotation import rotated
from secateur.recovery.options import RecoverOptions
from secateur.recovery.recipe import RecoverRecipe
from secateur.recovery.recover import recover
from secateur.scoring.measured import measured_factors
from secateur.scoring.passes.forward import embedding_device
from secateur.scoring.scores import score
from small_runs import emptied, small, write_inputs
from tiny import tiny_model

TYPES = ["llama", "gpt2", "gpt_neox", "gemma3_text", "mixtral", "mamba"]


def windows(model: PreTrainedModel, samples: int = 4, length: int = 16) -> Tensor:
    size = model.config.get_text_config().vocab_size
    return torch.randint(3, size, (samples, length), generator=torch.Generator().manual_seed(0))


def streamed(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose layers are NaN where they are not needed."""
    apart = copy.deepcopy(model)
    stream_in_place(apart, "cpu", away=lambda weight: weight.new_full((), math.nan).expand(weight.shape))
    assert sum(bool(weight.isnan().all()) for weight in apart.parameters()) > len([*apart.parameters()]) / 2
    return apart


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name].double(), tensor.double(), rtol=1e-9, atol=1e-12), name


SCORES = [("fisher", each) for each in TYPES] + [("param_first", "mixtral"), ("reap", "mixtral")]


@pytest.mark.parametrize(
    ("name", "model_type"), [*SCORES, *((name, "llama") for name in ("param_mix", "wanda", "obs", "fluctuation"))]
)
def test_scores(name: str, model_type: str) -> None:
    model = tiny_type_model(model_type)
    axes: tuple[Any, ...] = ("expert",) if name == "reap" else ("mlp",)
    groups = [group.name for group in discover(model).groups if group.kind in axes] or None
    found, expected = (
        score(each, name=name, windows=windows(model), groups=groups).units for each in (streamed(model), model)
    )
    same(dict(found), dict(expected))


def test_a_gradient_that_is_left_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Every streamed layer is computed again, and Gemma 3n's last layers attend to the keys of earlier ones."""
    model = tiny_type_model("gemma3n_text")
    score(streamed(model), name="fisher", windows=windows(model))
    assert "layers hand on more than they return, such as keys: on the GPU, scores leave" in caplog.text


@pytest.mark.parametrize("model_type", TYPES)
def test_prices_and_repair(model_type: str) -> None:
    model = tiny_type_model(model_type)
    discovery, ids_BT = discover(model), windows(model)
    scores = score(model, name="fisher", windows=ids_BT)
    apart = streamed(model)
    prices = [measured_factors(each, discovery, scores, ids_BT.flip(0)) for each in (apart, model)]
    assert prices[0] == pytest.approx(prices[1])
    options = CutOptions(ratio=0.25, axes=("mlp",), of="units", round_to=1)
    if model_type == "mamba":  # which has no MLP
        options = replace(options, axes=("state",))
    decided = plan(discovery, options, config=model.config, scores=scores)
    found, expected = (repair(each, decided, discovery, ids_BT) for each in (apart, model))
    assert found.plan == expected.plan
    same(dict(found.weights), dict(expected.weights))


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize("shape", ["per-layer", "uniform"])
def test_the_smaller_model_is_streamed_as_well(model_type: str, shape: Any) -> None:
    model = tiny_type_model(model_type)
    apart = copy.deepcopy(model)
    stream_in_place(apart, "cpu")
    discovery, ids_BT = discover(model), windows(model)
    options = CutOptions(ratio=0.25, axes=("mlp",), of="units", shape=shape, round_to=1)
    decided = plan(discovery, options, config=model.config, scores=score(model, name="fisher", windows=ids_BT))
    (found, losses), (_, expected) = (
        checked_repair(each, decided, discovery, ids_BT[:3], ids_BT[3:]) for each in (apart, model)
    )
    assert losses == pytest.approx(expected)
    smaller, reference = (prune(each, found.plan, weights=found.weights) for each in (apart, model))
    assert streamed_layers(smaller) not in (None, streamed_layers(apart))
    with torch.no_grad():
        logits, of_reference = (each(**arguments(each, ids_BT)).logits for each in (smaller, reference))
    assert torch.equal(logits, of_reference)


def test_one_layer_is_there_at_a_time() -> None:
    apart = streamed(tiny_model())
    there: list[int] = []
    layers = apart.model.layers
    for layer in layers:
        layer.mlp.register_forward_hook(
            lambda *_: there.append(sum(bool(each.mlp.up_proj.weight.isfinite().all()) for each in layers))
        )
    apart(**arguments(apart, windows(apart)))
    assert there == [1] * len(layers)
    assert embedding_device(apart).type == "cpu"


class TestLoading:
    """As if there were a GPU, which is the CPU."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Gpu:
            type = "cuda"

        monkeypatch.setattr(secateur.models.loading, "_device", lambda _: Gpu())
        monkeypatch.setattr(secateur.models.loading, "_device_map", lambda _: {})
        monkeypatch.setattr(
            secateur.models.loading, "stream_in_place", lambda model, _: stream_in_place(model, torch.device("cpu"))
        )

    @pytest.mark.parametrize(
        ("device", "free", "is_streamed"), [("auto", 2**20, False), ("auto", 2**16, True), ("streamed", 2**20, True)]
    )
    def test_a_model_that_does_not_fit(
        self, device: str, free: int, is_streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
        with emptied(write_inputs(tmp_path)):
            assert (streamed_layers(load("in/tiny", device=device)) is not None) == is_streamed

    def test_a_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with emptied(write_inputs(tmp_path)):
            usual = prune_model(small(loading=LoadOptions(device="cpu")), "here/usual")
            loading = LoadOptions(device="streamed")
            found = prune_model(small(loading=loading), "here/out")
            assert found.plan.groups == usual.plan.groups
            expected = load("here/usual", device="cpu").state_dict()
            same(load("here/out", device="cpu").state_dict(), expected)
            data, training = DataOptions(("in/text.txt",)), RecoverOptions(max_steps=1)
            with pytest.raises(TrainingError, match="its layers are brought to the GPU one by one, and training needs"):
                recover(RecoverRecipe("in/tiny", data, training, loading=loading), "here/no")


def test_layers_are_not_trained() -> None:
    model = tiny_model()
    discovery, ids_BT = discover(model), windows(model)
    decided = plan(discovery, CutOptions(ratio=0.25, score="l2"), config=model.config, scores=score(model, name="l2"))
    stream_in_place(model, "cpu")
    smaller = prune(model, decided)
    with pytest.raises(PlanError, match="repair=reconstruct changes weights in their places"):
        reconstruct_in_place(model, smaller, discovery, ids_BT)
    with pytest.raises(PlanError, match="axes=head_dim changes weights in their places"):
        rotated(model, discovery, ids_BT)


def test_a_model_without_known_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model._no_split_modules = set()
    with pytest.raises(ModelError, match="does not say what its layers are"):
        stream_in_place(model, "cpu")


def test_there_is_no_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with (
        emptied(write_inputs(tmp_path)),
        pytest.raises(ModelError, match="device 'streamed' brings layers to a GPU; torch sees none"),
    ):
        load("in/tiny", device="streamed")
