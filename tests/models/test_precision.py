"""Products that are to be exact are, on whatever units this machine takes them."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from every_type import tiny_config
from secateur.errors import TrainingError
from secateur.models import precision
from secateur.models.loading import EXPERTS
from secateur.models.precision import bfloat16_products, half_products, matmul_precision


@pytest.mark.parametrize(("rows", "inner", "columns"), [(3, 5, 7), (256, 256, 256), (512, 1000, 300)])
def test_exact_products_are_exact(rows: int, inner: int, columns: int) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    with matmul_precision(exact=True):
        found = left @ right
    expected = left.double() @ right.double()
    assert (found - expected).norm() / expected.norm() < 1e-6


def test_the_precision_is_put_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), matmul_precision(exact=False):
        assert 1 / 0
    assert torch.get_float32_matmul_precision() == "highest"


def test_code_that_mixes_dtypes_in_bfloat16_is_one_line() -> None:
    one, total = torch.ones(1, 2), torch.zeros(3, 2)
    said = r"does not run in bfloat16 \(RuntimeError: index_add_.*\)\. Train in float32: --dtype float32"
    with pytest.raises(TrainingError, match=said), bfloat16_products("cpu", enabled=True):
        total.index_add_(0, torch.tensor([1]), one @ torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), bfloat16_products("cpu", enabled=True):
        one @ one


def loss_and_gradients(model: PreTrainedModel, ids_BT: torch.Tensor) -> list[torch.Tensor]:
    loss = model(input_ids=ids_BT, labels=ids_BT).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("entries", [2**24, 2**11])
def test_products_in_float32_round_as_others_do(
    dtype: torch.dtype, model_type: str, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = tiny_config(model_type)
    config._experts_implementation = EXPERTS
    exact = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    model = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(model.state_dict())  # the rounded weights
    ids_BT = torch.randint(0, exact.config.vocab_size, (5, 16))
    monkeypatch.setattr(precision, "_has_units", lambda _: False)
    monkeypatch.setattr(precision, "FEW_ROWS", 2)
    monkeypatch.setattr(precision, "MOST_ENTRIES", entries)
    plain = loss_and_gradients(model, ids_BT)
    with half_products(model):
        found = loss_and_gradients(model, ids_BT)
    expected = loss_and_gradients(exact, ids_BT)
    for ours, native, right in zip(found, plain, expected, strict=True):
        assert ours.dtype == native.dtype
        assert (ours - right).norm() <= 1.5 * (native - right).norm() + 1e-3 * right.norm()


@pytest.mark.parametrize(("added", "rows"), [(False, 40), (True, 40), (True, 3)])
@pytest.mark.parametrize(("batch", "inner", "columns"), [((), 90, 50), ((), 30, 70), ((), 33, 35), ((6,), 50, 40)])
def test_blocks_make_up_the_product(
    added: bool, rows: int, batch: tuple[int, ...], inner: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_has_units", lambda _: False)
    monkeypatch.setattr(precision, "MOST_ENTRIES", 600)
    torch.manual_seed(0)
    left, right = (torch.randn(*batch, *shape).bfloat16() for shape in ((rows, inner), (inner, columns)))
    more = torch.randn(columns).bfloat16()
    take = torch.baddbmm if batch else torch.addmm
    with half_products(nn.Linear(1, 1, dtype=torch.bfloat16)):
        found = take(more, left, right, beta=0.5, alpha=2) if added else left @ right
    expected = left.double() @ right.double()
    expected = 0.5 * more.double() + 2 * expected if added else expected
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 2e-3 * expected.norm()  # rounded once, to eight bits


@pytest.mark.parametrize("few", [1, 32])
def test_each_group_of_rows_has_its_matrix(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_units", lambda _: False)
    monkeypatch.setattr(precision, "FEW_ROWS", few)
    torch.manual_seed(0)
    rows, matrices = torch.randn(26, 16), torch.randn(3, 16, 32)
    ends, gradient = torch.tensor([8, 8, 24], dtype=torch.int32), torch.randn(26, 32)
    halves = [tensor.bfloat16().requires_grad_() for tensor in (rows, matrices)]
    with half_products(nn.Linear(1, 1, dtype=torch.bfloat16)):
        found = functional.grouped_mm(*halves, offs=ends)
        found.backward(gradient.bfloat16())
    left, right = (half.detach().double().requires_grad_() for half in halves)
    expected = torch.cat([left[:8] @ right[0], left[8:24] @ right[2], torch.zeros(2, 32)])
    expected.backward(gradient.bfloat16().double())
    for one, other in ((found, expected), (halves[0].grad, left.grad), (halves[1].grad, right.grad)):
        assert one is not None
        assert other is not None
        assert one.dtype == torch.bfloat16
        assert (one - other).norm() < 5e-3 * other.norm()


def test_products_are_taken_in_float32_under_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def noted(func: Any, *given: Any) -> Any:
        taken.append(func.name())
        return products[func](func, *given)

    products = dict(precision._TAKEN)
    monkeypatch.setattr(precision, "_has_units", lambda _: False)
    monkeypatch.setattr(precision, "_TAKEN", dict.fromkeys(products, noted))
    model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.bfloat16).eval()
    with torch.inference_mode(), half_products(model):
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    assert {"aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"} <= {*taken}


def test_only_halves_without_units_are_taken_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    half, single = nn.Linear(2, 2, dtype=torch.bfloat16), nn.Linear(2, 2)
    monkeypatch.setattr(precision, "_has_units", lambda dtype: dtype == torch.float16)
    assert isinstance(half_products(single), nullcontext)
    assert isinstance(half_products(half.to(torch.float16)), nullcontext)
    assert not isinstance(half_products(half.to(torch.bfloat16)), nullcontext)
