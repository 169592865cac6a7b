"""Reconstruction: layers come nearer to the dense ones on text left out of their training; nothing else changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from every_type import tiny_type_model
from families import GROUPED, family_config, family_model
from secateur import CutOptions, discover, plan, prune, score
from secateur.discovery.groups import Discovery
from secateur.errors import PlanError
from secateur.pruning.reconstruct import LayerTraining, _Reconstruction, reconstruct_in_place

WINDOWS = torch.randint(3, 97, (96, 16), generator=torch.Generator().manual_seed(0))
HELD_OUT = WINDOWS[7::8]
MIXTURE = AutoConfig.for_model("mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2)
TRAINING = LayerTraining(steps=60, batch_tokens=128, learning_rate=0.03)


def cut_model(
    family: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[PreTrainedModel, PreTrainedModel, Discovery]:
    model = family_model(MIXTURE if family == "mixtral" else family_config(family), dtype=dtype)
    if family == "mixtral":
        model.set_experts_implementation("eager")  # other ways want widths that are multiples
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    discovery = discover(model)
    wanted = CutOptions(**{"ratio": 0.4, "of": "units", "axes": ("mlp",), "score": "l2", **options})
    decided = plan(discovery, wanted, config=model.config, scores=score(model, discovery=discovery, name="l2"))
    return model, prune(model, decided, discovery=discovery), discovery


def copies(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def outputs_of(model: PreTrainedModel, paths: list[str], windows: Tensor) -> list[Tensor]:
    """What the layers give."""
    seen: list[Tensor] = []

    def see(_: Any, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [model.get_submodule(path).register_forward_hook(see) for path in paths]
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_layers_come_nearer_to_the_dense_ones(family: str) -> None:
    model, cut, discovery = cut_model(family)
    before = copies(model)
    paths = [f"{prefix}.{i}" for prefix in discovery.layer_lists for i in range(model.config.num_hidden_layers)]
    dense = outputs_of(model, paths, HELD_OUT)
    errors = reconstruct_in_place(model, cut, discovery, WINDOWS, training=TRAINING)
    assert [*errors] == paths
    assert all(after < first for first, after in errors.values())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in cut.parameters())
    # The errors are of the cut model as it now is, on the windows that are left out.
    for (_, told), wanted, given in zip(errors.values(), dense, outputs_of(cut, paths, HELD_OUT), strict=True):
        share_BT = (given - wanted).square().sum(-1) / wanted.square().sum(-1)
        assert float(share_BT.mean()) == pytest.approx(told, rel=1e-3)


def test_the_same_seed_gives_the_same_weights() -> None:
    found = []
    for seed in (0, 0, 1):
        model, cut, discovery = cut_model("llama")
        reconstruct_in_place(model, cut, discovery, WINDOWS, training=LayerTraining(10, 128, seed=seed))
        found.append(copies(cut))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_bfloat16_is_trained_in_float32_and_stays_bfloat16() -> None:
    model, cut, discovery = cut_model("llama", torch.bfloat16)
    errors = reconstruct_in_place(model, cut, discovery, WINDOWS, training=TRAINING)
    assert {parameter.dtype for parameter in cut.parameters()} == {torch.bfloat16}
    assert all(after < first for first, after in errors.values())


def test_training_that_does_not_help_is_not_kept() -> None:
    model, cut, discovery = cut_model("llama")
    before = copies(cut)
    errors = reconstruct_in_place(model, cut, discovery, WINDOWS, training=LayerTraining(5, 128, learning_rate=100.0))
    assert all(after == first for first, after in errors.values())
    assert all(torch.equal(before[name], parameter) for name, parameter in cut.named_parameters())


def test_layers_that_are_not_cut_are_left_as_they_are() -> None:
    model, cut, discovery = cut_model("llama", layers=(1, 2))
    before = copies(cut)
    errors = reconstruct_in_place(model, cut, discovery, WINDOWS, training=TRAINING)
    assert [*errors] == ["model.layers.1"]
    for name, parameter in cut.named_parameters():
        assert torch.equal(before[name], parameter) != name.startswith("model.layers.1.")


def test_nothing_cut_nothing_changed() -> None:
    model, _, discovery = cut_model("llama")
    again = family_model(family_config("llama"), dtype=torch.float32)
    before = copies(again)
    assert reconstruct_in_place(model, again, discovery, WINDOWS, training=TRAINING) == {}
    assert all(torch.equal(before[name], parameter) for name, parameter in again.named_parameters())


def test_one_window_is_enough() -> None:
    model, cut, discovery = cut_model("llama")
    assert len(reconstruct_in_place(model, cut, discovery, WINDOWS[:1], training=TRAINING)) == 3


@pytest.mark.parametrize(("axis", "said"), [("layers", "needs all layers"), ("hidden", "hidden width")])
def test_layers_and_hidden_width_are_refused(axis: Any, said: str) -> None:
    model, cut, discovery = cut_model("llama", axes=(axis,))
    with pytest.raises(PlanError, match=said):
        reconstruct_in_place(model, cut, discovery, WINDOWS, training=TRAINING)
    with pytest.raises(PlanError, match=f"repair=reconstruct.*axes={axis}"):
        CutOptions(ratio=0.2, axes=(axis,), repair="reconstruct", scope="local", shape="uniform")


def cut_type(model_type: str) -> tuple[PreTrainedModel, PreTrainedModel, Discovery]:
    model = tiny_type_model(model_type)
    discovery = discover(model)
    decided = plan(
        discovery,
        CutOptions(ratio=0.2, of="units", axes=("mlp",), score="l2"),
        config=model.config,
        scores=score(model, discovery=discovery, name="l2"),
    )
    return model, prune(model, decided, discovery=discovery), discovery


@pytest.mark.parametrize("model_type", ["llama", "recurrent_gemma", "qwen3_next"])
def test_a_model_that_is_judged_on_the_way_is_trained_the_same(model_type: str) -> None:
    """It runs as a whole within its own pass, some types with states that they keep in their modules."""
    model, *_ = cut_type(model_type)
    trained = []
    for judged in (False, True):
        _, cut, discovery = cut_type(model_type)
        losses = itertools.count(0, -1)

        def judge(cut: PreTrainedModel = cut, losses: Iterator[int] = losses) -> float:
            cut(input_ids=WINDOWS[:3, :9], use_cache=False)
            return float(next(losses))

        training = LayerTraining(steps=3, batch_tokens=64)
        reconstruct_in_place(model, cut, discovery, WINDOWS[:8], training=training, judge=judge if judged else None)
        trained.append(copies(cut))
    assert next(losses) < -1  # it was judged
    assert all(torch.equal(trained[0][name], weight) for name, weight in trained[1].items())


def test_where_a_layer_cannot_be_trained_those_before_it_get_their_weights_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, cut, discovery = cut_model("llama")
    before, train = copies(cut), _Reconstruction._train
    errors: list[tuple[float, float]] = []

    def fails(self: _Reconstruction, *inputs: Any) -> tuple[float, float]:
        if len(errors) == 2:
            raise PlanError("the third layer refuses")
        errors.append(train(self, *inputs))
        return errors[-1]

    monkeypatch.setattr(_Reconstruction, "_train", fails)
    with pytest.raises(PlanError, match="the third layer refuses"):
        reconstruct_in_place(model, cut, discovery, WINDOWS, training=TRAINING)
    assert any(last < first for first, last in errors)
    assert all(torch.equal(before[name], parameter) for name, parameter in cut.named_parameters())


@pytest.mark.parametrize("model_type", ["reformer", "xlm", "xmod"])
def test_layers_that_cannot_be_trained_alone_are_refused(model_type: str) -> None:
    model, cut, discovery = cut_type(model_type)
    with pytest.raises(PlanError, match=r"(?s)repair=reconstruct .*--repair least-squares"):
        reconstruct_in_place(model, cut, discovery, WINDOWS, training=TRAINING)
