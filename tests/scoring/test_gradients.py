"""The one-pass gradients are those of plain autograd, for every kind of parameter, recomputed or not."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from every_type import tiny_type_model
from families import family_config, family_model
from secateur.errors import ScoreError
from secateur.models.silence import quiet
from secateur.scoring.passes.gradients import stream_gradients, stream_masks
from secateur.scoring.passes.recomputation import Recompute

WINDOWS = torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(0))
# Fused Conv1D with positions that all samples share; biases; routed experts in stacks; a scan; tied and scaled
# embeddings; a block that several layers share; latent attention with experts.
TYPES = ("gpt2", "opt", "mixtral", "mamba2", "gemma2", "zamba", "deepseek_v3")


@cache
def tiny(model_type: str) -> PreTrainedModel:
    with quiet():
        return tiny_type_model(model_type, dtype=torch.float32)


@cache
def sample_gradients(model_type: str) -> tuple[dict[str, Tensor], ...]:
    """The gradient of every parameter by one backward pass of plain autograd for each sample's own loss."""
    model, found = tiny(model_type), []
    for ids in WINDOWS:
        model.zero_grad()
        logits = model(input_ids=ids[None], use_cache=False).logits
        functional.cross_entropy(logits[0, :-1], ids[1:]).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return tuple(found)


def layers_of(model: PreTrainedModel) -> list[str]:
    """The paths of the decoder layers."""
    lists = [path for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    outermost = min(lists, key=len)
    return [f"{outermost}.{i}" for i in range(len(model.get_submodule(outermost)))]  # type: ignore[arg-type]  # a ModuleList


def collected(
    model: PreTrainedModel, *, second_order: bool = False, recompute: Recompute | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """What `stream_gradients` visits, put together: G and A of each weight, and the loss."""
    gradients: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}

    def visit(name: str, rows: slice, weight: Tensor, gradient: Tensor, squared: Tensor | None) -> None:
        parameter = model.get_parameter(name).detach()
        assert torch.equal(weight, parameter[rows].float())
        assert {weight.dtype, gradient.dtype} == {torch.float32}
        gradients.setdefault(name, torch.full(parameter.shape, torch.nan))[rows] = gradient
        if squared is not None:
            squares.setdefault(name, torch.full(parameter.shape, torch.nan))[rows] = squared

    with quiet():
        loss = stream_gradients(model, WINDOWS, visit, second_order=second_order, recompute=recompute)
    return gradients, squares, loss


def assert_near(found: Tensor, expected: Tensor, least: float) -> None:
    """Equal up to rounding, as measured by the largest of all: some biases have a gradient of rounding errors alone."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()) + least)


@pytest.mark.parametrize("recomputed", [False, True], ids=["held", "recomputed"])
@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("model_type", TYPES)
def test_one_pass_gives_the_gradients_of_autograd(model_type: str, second_order: bool, recomputed: bool) -> None:
    model, samples = tiny(model_type), sample_gradients(model_type)
    recompute = Recompute(layers_of(model)) if recomputed else None
    found, found_squares, loss = collected(model, second_order=second_order, recompute=recompute)
    with torch.no_grad():
        logits = model(input_ids=WINDOWS, use_cache=False).logits
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten())
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert bool(found_squares) == second_order
    names = {name for sample in samples for name in sample}
    zero = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    gradients = {name: torch.stack([each.get(name, zero[name]) for each in samples]) for name in names}
    assert {name for name, gradient in gradients.items() if gradient.any()} <= found.keys() <= gradients.keys()
    for name in found:
        assert_near(found[name], gradients[name].mean(0), 1e-8)
        if second_order:
            assert_near(found_squares[name], gradients[name].square().mean(0), 1e-14)


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_derivatives_by_masks_are_those_of_autograd(model_type: str) -> None:
    """The derivative by a mask over a dimension is the sum of W times its gradient over the others."""
    model, samples = tiny(model_type), sample_gradients(model_type)
    found: dict[tuple[str, int], Tensor] = {}

    def visit(name: str, dim: int, derivatives: Tensor) -> None:
        found[name, dim] = derivatives

    with quiet():
        stream_masks(model, WINDOWS, visit, recompute=Recompute(layers_of(model)))
    assert len(found) > 8
    tied = id(model.get_input_embeddings().weight)  # its gradient is of the lookups, too, which read nothing
    for (name, dim), derivatives in found.items():
        weight = model.get_parameter(name).detach()
        if id(model.get_parameter(name)) == tied:
            continue
        others = [other for other in range(weight.dim()) if other != dim]
        expected = [(weight * each.get(name, torch.zeros_like(weight))).sum(others) for each in samples]
        assert_near(derivatives[:, 0], torch.stack(expected) / len(samples), 1e-8)


def test_only_the_parameters_wanted_are_visited() -> None:
    wanted = ["transformer.h.1.mlp.c_fc.weight"]
    visited: list[str] = []
    stream_gradients(tiny("gpt2"), WINDOWS, lambda name, *_: visited.append(name), wanted=wanted)
    assert set(visited) == set(wanted)


def test_the_pass_leaves_the_model_as_it_was() -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    model.requires_grad_(False)
    assert collected(model, second_order=True, recompute=Recompute(layers_of(model)))[0]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


def test_squares_do_not_underflow_in_half_precision() -> None:
    """The square of a gradient of 1e-5 is below what float16 can hold; in float32 it is not lost."""
    half = family_model(family_config("llama"), dtype=torch.float16)
    gradients, squares, _ = collected(half, second_order=True)
    name = "model.layers.1.mlp.up_proj.weight"
    small = (gradients[name].abs() < 1e-4) & (gradients[name] != 0)
    assert small.any()
    assert (squares[name][small] > 0).all()


def test_a_model_spread_over_devices_has_the_same_gradients() -> None:
    """Layers with accelerate's hooks that move what comes in, as with a device_map of several GPUs."""
    with quiet():
        model = tiny_type_model("llama", dtype=torch.float32)
    layers = layers_of(model)
    expected, _, _ = collected(model)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = dispatch_model(model, {**places, **dict.fromkeys(layers, "cpu")}, force_hooks=True)
    found, _, _ = collected(spread, recompute=Recompute(layers))
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-7) for name in found)


def test_offloaded_weights_are_refused() -> None:
    with quiet():
        model = cpu_offload(tiny_type_model("llama", dtype=torch.float32), execution_device=torch.device("cpu"))
    with pytest.raises(ScoreError, match=r"the weight model\.embed_tokens\.weight is not in memory .* --device cpu"):
        stream_gradients(model, WINDOWS, lambda *_: None)


def test_progress_goes_forward_and_backward_to_the_end() -> None:
    model, seen = family_model(family_config("llama"), dtype=torch.float32), []
    recompute = Recompute(layers_of(model))
    stream_gradients(model, WINDOWS, lambda *_: None, recompute=recompute, progress=lambda *at: seen.append(at))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[0][0] < 0.2 * seen[0][1]
    assert 0.9 * seen[-1][1] < seen[-1][0] <= seen[-1][1]
