"""Fisher information of masks is that of autograd, whatever computes a matrix and in however many parts."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from families import GROUPED, family_config, family_model
from secateur import discover, score
from secateur.scoring.passes.probe import activation_bytes_by_layer, fitting_batches
from secateur.scoring.scores import statistics_for

WINDOWS = torch.randint(3, 97, (5, 12), generator=torch.Generator().manual_seed(0))


def by_autograd(
    model: PreTrainedModel, masks: dict[str, tuple[str, Tensor]], windows: Tensor = WINDOWS, spans: int = 1
) -> dict[str, Tensor]:
    """Group -> 1/2 tokens x sum over spans of the square of the mean loss's derivative by its masks."""
    parameters = {
        group: torch.ones(spans, int(unit_of.max()) + 1, requires_grad=True) for group, (_, unit_of) in masks.items()
    }
    numbers = torch.arange(windows.shape[1]).tensor_split(spans)
    span_of = torch.cat([torch.full((len(tokens),), number) for number, tokens in enumerate(numbers)])
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, group=group, unit_of=unit_of: (args[0] * parameters[group][span_of][:, unit_of], *args[1:])
        )
        for group, (path, unit_of) in masks.items()
    ]
    total = {group: torch.zeros(parameter.shape[1]) for group, parameter in parameters.items()}
    for window in windows:
        loss = model(input_ids=window[None], labels=window[None]).loss / len(windows)
        for group, gradient in zip(parameters, torch.autograd.grad(loss, [*parameters.values()]), strict=True):
            total[group] += gradient.square().sum(0)
    for handle in handles:
        handle.remove()
    return {group: each * windows.numel() / 2 * (1 - 1 / windows.shape[1]) for group, each in total.items()}


def test_fisher_information_is_autograds() -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    scores = score(model, name="fisher", windows=WINDOWS)
    expected = by_autograd(
        model,
        {
            "layers.1.mlp": ("model.layers.1.mlp.down_proj", torch.arange(84)),
            "layers.2.attention": ("model.layers.2.self_attn.o_proj", torch.arange(60) // 20),
        },
    )
    for group, values in expected.items():
        assert torch.allclose(scores.units[group], values, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "paths"),
    [
        ("llama", ("model.layers.1.mlp.down_proj", "model.layers.2.self_attn.o_proj")),
        ("gpt2", ("transformer.h.1.mlp.c_proj", "transformer.h.2.attn.c_proj")),
    ],
)
def test_tokens_of_longer_windows_count_span_by_span(family: str, paths: tuple[str, str]) -> None:
    windows = torch.randint(3, 97, (3, 40), generator=torch.Generator().manual_seed(1))
    model = family_model(family_config(family), dtype=torch.float64)
    scores = score(model, name="fisher", windows=windows)
    heads = len(scores.units["layers.2.attention"])
    width = model.get_parameter(f"{paths[1]}.weight").shape[int(family == "llama")]
    masks = {
        "layers.1.mlp": (paths[0], torch.arange(84)),
        "layers.2.attention": (paths[1], torch.arange(width) // (width // heads)),
    }
    for group, values in by_autograd(model, masks, windows, spans=3).items():
        assert torch.allclose(scores.units[group].double(), values.double(), rtol=1e-5), group
    at_once = by_autograd(model, masks, windows)
    assert not torch.allclose(scores.units["layers.1.mlp"].double(), at_once["layers.1.mlp"].double(), rtol=0.1)


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    mixed = functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
    return functional.linear(mixed, down)


@pytest.mark.parametrize("name", ["fisher", "param_second"])
def test_products_within_a_scripted_function_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    discovery = discover(model)
    expected = score(model, discovery=discovery, name=name, windows=WINDOWS).units["layers.1.mlp"]
    scripted = torch.jit.script(gated)

    def forward(self: LlamaMLP, x: Tensor) -> Tensor:
        found: Tensor = scripted(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return found

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    found = score(model, discovery=discovery, name=name, windows=WINDOWS).units["layers.1.mlp"]
    assert torch.allclose(found, expected, rtol=1e-4)


def test_only_what_reads_the_groups_is_looked_at() -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    discovery = discover(model)
    groups = [group for group in discovery.groups if group.kind in ("mlp", "attention")]
    found = statistics_for("fisher", model, discovery, WINDOWS, groups=groups)
    assert {name.split(".", 3)[3] for name in found.masks} == {"mlp.down_proj.weight", "self_attn.o_proj.weight"}
    whole = statistics_for("fisher", model, discovery, WINDOWS)
    assert len(whole.masks) > len(found.masks)
    for name, by_dim in found.masks.items():
        assert {dim: torch.allclose(each, whole.masks[name][dim]) for dim, each in by_dim.items()} == {1: True}


def test_fisher_information_of_conv1d() -> None:
    model = family_model(family_config("gpt2"), dtype=torch.float32)
    scores = score(model, name="fisher", windows=WINDOWS)
    expected = by_autograd(model, {"layers.1.mlp": ("transformer.h.1.mlp.c_proj", torch.arange(84))})
    assert torch.allclose(scores.units["layers.1.mlp"], expected["layers.1.mlp"], rtol=1e-4)


def test_fisher_information_of_stacked_experts() -> None:
    config = AutoConfig.for_model("mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2)
    model = family_model(config, dtype=torch.float32)
    scores = score(model, name="fisher", windows=WINDOWS)
    weight = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    experts, channels = torch.zeros(4), torch.zeros(84)
    for window in WINDOWS:
        loss = model(input_ids=window[None], labels=window[None]).loss / len(WINDOWS)
        (gradient,) = torch.autograd.grad(loss, [weight])
        channels += (weight * gradient).sum((0, 1)).square()
        experts += (weight * gradient).sum((1, 2)).square()
    tokens = WINDOWS.numel() * (1 - 1 / WINDOWS.shape[1]) / 2
    assert torch.allclose(scores.units["layers.0.expert_mlp"], channels * tokens, rtol=1e-3)
    whole = scores.units["layers.0.expert"]  # all that an expert reads: its first matrices' inputs as well
    assert whole.shape == (4,)
    assert bool((whole > 0).all())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_fisher_information_in_parts_is_that_at_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if family == "mixtral":
        config = AutoConfig.for_model("mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2)
    else:
        config = family_config(family)
    model = family_model(config, dtype=torch.float32)
    windows = torch.randint(3, 97, (5, 20), generator=torch.Generator().manual_seed(1))  # two spans each
    whole = score(model, name="fisher", windows=windows)
    monkeypatch.setattr(
        "secateur.scoring.collect_backward.fitting_batches", lambda model, windows, *_: list(windows.tensor_split(3))
    )
    parts = score(model, name="fisher", windows=windows)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    for group, values in whole.units.items():
        assert torch.allclose(parts.units[group], values, rtol=1e-3, atol=1e-9 * float(values.max())), group


def test_parts_are_as_many_as_fit() -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    layers = [f"model.layers.{i}" for i in range(3)]
    assert len(fitting_batches(model, WINDOWS, layers, 2**30)) == 1
    assert [len(part) for part in fitting_batches(model, WINDOWS, layers, 1)] == [1] * 5
    whole = sum(activation_bytes_by_layer(model, WINDOWS, layers).values())
    assert [len(part) for part in fitting_batches(model, WINDOWS, layers, whole * 4 // 5)] == [3, 2]


def test_no_graph_stays_behind() -> None:
    """Autograd holds what its hooks give it, and Python's garbage collector does not look there."""

    def graphs() -> int:
        gc.collect()
        return sum(isinstance(each, Tensor) and each.grad_fn is not None for each in gc.get_objects())

    model, before = family_model(family_config("llama"), dtype=torch.float32), graphs()
    score(model, name="fisher", windows=WINDOWS)
    assert graphs() <= before
