"""The one-pass gradients are those of plain autograd, for every kind of parameter and with layers computed again."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from every_type import tiny_type_model
from secateur.errors import ScoreError
from secateur.models.silence import quiet
from secateur.scoring.gradients import stream_gradients

WINDOWS = torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(0))
# Fused Conv1D with positions that all samples share; biases; routed experts in stacks; a scan; tied and scaled
# embeddings; a block that several layers share; latent attention with experts.
TYPES = ("gpt2", "opt", "mixtral", "mamba2", "gemma2", "zamba", "deepseek_v3")


def plain(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """G and A of every parameter by one backward pass for each sample."""
    gradients: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for ids in WINDOWS:
        model.zero_grad()
        logits = model(input_ids=ids[None], use_cache=False).logits
        functional.cross_entropy(logits[0, :-1], ids[1:]).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                new = parameter.grad / len(WINDOWS)
                gradients[name] = gradients.get(name, 0) + new
                squares[name] = squares.get(name, 0) + new.square() * len(WINDOWS)
    model.zero_grad()
    return gradients, squares


def layers_of(model: PreTrainedModel) -> list[str]:
    """The paths of the decoder layers."""
    lists = [path for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    outermost = min(lists, key=len)
    return [f"{outermost}.{i}" for i in range(len(model.get_submodule(outermost)))]  # type: ignore[arg-type]


@pytest.mark.parametrize("recomputed", [False, True], ids=["remembered", "recomputed"])
@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("model_type", TYPES)
def test_one_pass_gives_the_gradients_of_autograd(model_type: str, second_order: bool, recomputed: bool) -> None:
    with quiet():
        model = tiny_type_model(model_type, dtype=torch.float32)
    gradients, squares = plain(model)
    found: dict[str, Tensor] = {}
    found_squares: dict[str, Tensor] = {}

    def visit(name: str, rows: slice, weight: Tensor, gradient: Tensor, squared: Tensor | None) -> None:
        shape = model.get_parameter(name).shape
        found.setdefault(name, torch.full(shape, torch.nan))[rows] = gradient
        if squared is not None:
            found_squares.setdefault(name, torch.full(shape, torch.nan))[rows] = squared

    with quiet():
        loss = stream_gradients(
            model, WINDOWS, visit, second_order=second_order, recomputed=layers_of(model) if recomputed else ()
        )
        with torch.no_grad():
            logits = model(input_ids=WINDOWS, use_cache=False).logits
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten())
    assert loss == pytest.approx(float(expected), rel=1e-5)
    reached = {name for name, gradient in gradients.items() if gradient.any()}
    assert reached <= found.keys() <= gradients.keys()
    for name in found:
        scale = float(gradients[name].abs().max())  # a bias of keys has a gradient of rounding errors alone
        torch.testing.assert_close(found[name], gradients[name], rtol=0, atol=1e-4 * scale + 1e-8)
        if second_order:
            scale = float(squares[name].max())
            torch.testing.assert_close(found_squares[name], squares[name], rtol=0, atol=1e-4 * scale + 1e-14)


def test_a_part_of_the_parameters_may_be_asked_for() -> None:
    with quiet():
        model = tiny_type_model("gpt2", dtype=torch.float32)
    wanted = ["transformer.h.1.mlp.c_fc.weight"]
    seen: list[str] = []
    stream_gradients(model, WINDOWS, lambda name, *_: seen.append(name), wanted=wanted)
    assert set(seen) == set(wanted)


def test_a_model_spread_over_devices() -> None:
    """Layers with accelerate's hooks that move what comes in, as with a device_map of several GPUs."""
    with quiet():
        model = tiny_type_model("llama", dtype=torch.float32)
    expected: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    stream_gradients(model, WINDOWS, lambda name, rows, w, g, a: expected.update({f"{name} {rows}": g.clone()}))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = dispatch_model(model, {**places, **dict.fromkeys(layers_of(model), "cpu")}, force_hooks=True)
    layers = layers_of(model)
    stream_gradients(
        spread, WINDOWS, lambda name, rows, w, g, a: found.update({f"{name} {rows}": g.clone()}), recomputed=layers
    )
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], expected[key], rtol=1e-4, atol=1e-7) for key in found)


def test_offloaded_weights_are_refused() -> None:
    with quiet():
        model = cpu_offload(tiny_type_model("llama", dtype=torch.float32), execution_device=torch.device("cpu"))
    with pytest.raises(ScoreError, match=r"the weight model\.embed_tokens\.weight is not there .* --device cpu"):
        stream_gradients(model, WINDOWS, lambda *_: None)


def test_progress_goes_forward_and_backward_to_the_end() -> None:
    with quiet():
        model = tiny_type_model("llama", dtype=torch.float32)
    seen: list[tuple[int, int]] = []
    stream_gradients(model, WINDOWS, lambda *_: None, recomputed=layers_of(model), progress=lambda *at: seen.append(at))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[0][0] < 0.2 * seen[0][1]
    assert seen[-1][0] > 0.9 * seen[-1][1]
