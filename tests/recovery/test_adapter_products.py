"""An adapter and its matrix in one step of autograd give what peft's layers give, on models of all kinds."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from every_type import tiny_config, tiny_inputs, tiny_type_model
from secateur.recovery.adapter_products import fuse_adapters
from secateur.recovery.lora import add_lora
from secateur.recovery.options import LoraOptions

TYPES = (
    "llama",
    "gemma2",
    "gpt_neox",
    "opt",
    "qwen2_moe",
    "mixtral",
    "deepseek_v3",
    "mamba",
    "falcon_h1",
    "qwen3_next",
)


def adapted(model_type: str, dtype: torch.dtype, **options: Any) -> Any:
    """A model with an adapter that changes what it gives."""
    model = add_lora(tiny_type_model(model_type, dtype=dtype), LoraOptions(rank=2, **options)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


def outcome(model_type: str, model: nn.Module) -> list[Tensor]:
    """The logits, and the gradients of the adapter."""
    inputs = tiny_inputs(model_type, tiny_config(model_type))
    logits_BTV: Tensor = model(**inputs, use_cache=False).logits
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights_BTV = torch.randn(logits_BTV.shape, generator=torch.Generator().manual_seed(1), dtype=logits_BTV.dtype)
    gradients = torch.autograd.grad((logits_BTV * weights_BTV).sum(), trained, allow_unused=True)
    return [logits_BTV.detach(), *(each for each in gradients if each is not None)]


@pytest.mark.parametrize("model_type", TYPES)
def test_models_give_the_same(model_type: str) -> None:
    model = adapted(model_type, torch.float64).eval()
    expected = outcome(model_type, model)
    assert fuse_adapters(model) > 0
    for found, wanted in zip(outcome(model_type, model), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "opt"])
def test_in_bfloat16_it_rounds_as_autocast_does(model_type: str) -> None:
    model = adapted(model_type, torch.float32)
    exact, expected = outcome(model_type, model), list[list[Tensor]]()
    fused = copy.deepcopy(model)
    assert fuse_adapters(fused, dtype=torch.bfloat16) > 0
    for each in (model, fused):
        with torch.autocast("cpu", torch.bfloat16):
            expected.append(outcome(model_type, each))
    assert [each.dtype for each in expected[0]] == [each.dtype for each in expected[1]]
    errors = [
        torch.tensor([(one - other).norm() / other.norm() for one, other in zip(each, exact, strict=True)]).mean()
        for each in expected
    ]
    assert 0.5 < errors[1] / errors[0] < 1.5  # peft rounds once more


def test_frozen_weights_are_stored_in_bfloat16() -> None:
    model = adapted("llama", torch.float32)
    layers = [module for module in model.modules() if type(module) is peft.tuners.lora.Linear]
    assert fuse_adapters(model, dtype=torch.bfloat16) == len(layers)
    assert {layer.base_layer.weight.dtype for layer in layers} == {torch.bfloat16}
    others = {name: p.dtype for name, p in model.named_parameters() if "base_layer" not in name}
    assert {*others.values()} == {torch.float32}  # adapters, norms, embeddings


@pytest.mark.parametrize("reason", ["dropout", "bias", "variant", "kernel", "dtype"])
def test_what_peft_computes_otherwise_is_left_to_it(reason: str) -> None:
    chosen: dict[str, dict[str, Any]] = {
        "dropout": {"lora_dropout": 0.5},
        "bias": {"lora_bias": True},
        "variant": {"use_dora": True},
    }
    settings = chosen.get(reason, {})
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    if reason == "kernel":
        model[0].register_forward_hook(lambda module, given, result: 2 * result)
    adapter: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"], **settings))
    if reason == "dtype":  # nobody asked for products in another dtype than that of the weights
        adapter.base_model.model[0].base_layer.to(torch.bfloat16)
    assert fuse_adapters(adapter) == 0


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_layers_that_read_the_same_share_its_copy(without_gradients: Any) -> None:
    """A changed tensor is copied anew."""
    model: Any = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))
    model = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["0", "1"])).base_model.model
    fuse_adapters(model, dtype=torch.bfloat16)
    with without_gradients():
        x = torch.ones(1, 3)
        once = [model[0](x), model[1](x)]
        x.mul_(2)
        twice = model[1](x)
        alone = model[1](torch.full((1, 3), 2.0))
    assert not torch.equal(once[1], twice)
    assert torch.equal(twice, alone)
