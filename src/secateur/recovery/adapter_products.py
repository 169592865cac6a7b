"""peft's adapters -> the same, each with its matrix in one step of autograd.

peft adds up what the matrix and the adapter give, in four operations and with copies in float32 of what goes in. On a
CPU that multiplies bfloat16 fast, these take as long as the products. Tensor names end in their axes: N position, I
input, O output, R rank.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def fuse_adapters(adapted: nn.Module, *, dtype: torch.dtype | None = None) -> int:
    """Take the product of every linear layer with an adapter in one step; returns how many. In place.

    With `dtype`, products are taken in it as autocast does, and the layers' own weights are stored in it: they are
    frozen, and their products the same. The model is for training alone: peft would merge its adapters into these.
    Layers whose adapter has dropout stay as they are, as do those of which peft or the model computes more.

    >>> import peft
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(3, 2)), peft.LoraConfig(r=1, target_modules=["0"]))
    >>> before = model(torch.ones(1, 3))
    >>> fuse_adapters(model)
    1
    >>> torch.allclose(model(torch.ones(1, 3)), before)
    True
    """
    from peft.tuners.lora.layer import Linear

    cast, count = _SharedCast(), 0
    layers: list[Any] = [module for module in adapted.modules() if type(module) is Linear and _is_plain(module)]
    for layer in layers:
        base = layer.base_layer
        (name,) = layer.lora_A
        if dtype is None and base.weight.dtype != layer.lora_A[name].weight.dtype:
            continue
        if dtype is not None:  # a new parameter: an embedding may share the old one
            base.weight = nn.Parameter(base.weight.detach().to(dtype), requires_grad=False)
        arguments = (base, layer.lora_A[name], layer.lora_B[name], layer.scaling[name], cast, dtype)
        layer.forward = functools.partial(_forward, *arguments)
        count += 1
    return count


def _is_plain(layer: Any) -> bool:
    """Whether a layer of peft's gives its matrix's product and one adapter's, and nothing else."""
    base = layer.base_layer
    plain = type(base).forward is nn.Linear.forward and not (base._forward_hooks or base._forward_pre_hooks)
    adapters = [*layer.lora_A]
    if not plain or len(adapters) != 1 or layer.active_adapters != adapters or layer.lora_variant:
        return False
    first, second = layer.lora_A[adapters[0]], layer.lora_B[adapters[0]]
    undropped = isinstance(layer.lora_dropout[adapters[0]], nn.Identity)
    return undropped and first.bias is None and second.bias is None and not layer.fan_in_fan_out


class _SharedCast:
    """What a tensor is in another dtype; the last one is remembered, since several layers read the same."""

    def __init__(self) -> None:
        self.source: Any = lambda: None  # a weak reference
        self.version = -1
        self.cast: Tensor | None = None

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype:
            return x
        if x.is_inference():  # whether it has changed cannot be told
            return x.to(dtype)
        if self.cast is None or self.source() is not x or self.version != x._version or self.cast.dtype != dtype:
            self.source, self.version, self.cast = weakref.ref(x), x._version, x.detach().to(dtype)
        return self.cast


def _forward(
    base: nn.Linear, first: nn.Linear, second: nn.Linear, scaling: float, cast: _SharedCast, dtype: Any, x: Tensor
) -> Tensor:
    kept: Tensor = x if dtype is None else cast(x, dtype)
    result: Tensor = _AdaptedProduct.apply(  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
        x, kept, base.weight, base.bias, first.weight, second.weight, scaling
    )
    return result


class _AdaptedProduct(torch.autograd.Function):
    """x W' + bias + scaling x A' B', and its gradients in x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
    ) -> Tensor:
        x_NI, dtype = kept.reshape(-1, kept.shape[-1]), kept.dtype
        a_RI, b_OR = a_RI.to(dtype), (scaling * b_OR).to(dtype)
        u_NR = x_NI @ a_RI.mT
        y_NO = functional.linear(x_NI, weight_OI, None if bias_O is None else bias_O.to(dtype))
        y_NO.addmm_(u_NR, b_OR.mT)
        ctx.save_for_backward(x_NI, u_NR, weight_OI, a_RI, b_OR)
        ctx.scaling, ctx.shape = scaling, x.shape
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, u_NR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        dy_NO = gradients[0].reshape(-1, len(weight_OI)).to(x_NI.dtype)
        h_NR = dy_NO @ b_OR
        dx = None
        if ctx.needs_input_grad[0]:
            dx_NI = dy_NO @ weight_OI
            dx = dx_NI.addmm_(h_NR, a_RI).view(ctx.shape)
        da_RI, db_OR = h_NR.mT @ x_NI, ctx.scaling * (dy_NO.mT @ u_NR)
        return dx, None, None, None, da_RI, db_OR, None
