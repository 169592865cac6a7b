"""Quantized folders: transformers computes from them what was in memory; what cannot be quantized is one error."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur import load
from secateur.cli.main import run
from secateur.data.calibration import CalibrationOptions
from secateur.errors import ExportError, ModelError
from secateur.export.formats import export_model
from secateur.export.linear_layers import PackedResult
from secateur.export.options import QuantizeOptions
from secateur.export.quantize import GROUP_SIZES, common_group_size
from secateur.files import PLAN_FILE, RECORD_FILE
from secateur.models.modeling_per_layer import PER_LAYER
from secateur.models.silence import quiet
from stranger import stranger
from tiny import names, write_tiny
from vllm_cases import write

if find_spec("llmcompressor") is None:  # a package of its own that is missing is a failure
    pytest.skip("the extra quantize is not installed", allow_module_level=True)

SCHEMES: tuple[Any, ...] = ("w8a8", "w4a16", "fp8")
TEXT = CalibrationOptions(samples=8, length=32)
IDS = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
CLOSE = {"w8a8": 0.1, "fp8": 0.2, "w4a16": 0.6}  # of the logits' norm; all weights of these models are large and random
STORED = {"w8a8": torch.int8, "fp8": torch.float8_e4m3fn, "w4a16": torch.int32}


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad(), quiet():
        logits: Tensor = model(IDS, use_cache=False).logits
    return logits


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every layer has other sizes, of which 32 divides the widths."""
    return write("llama", tmp_path_factory.mktemp("cut") / "cut", widths=(96, 160, 64))


@pytest.mark.parametrize("scheme", [pytest.param(s, marks=() if s == "w4a16" else pytest.mark.slow) for s in SCHEMES])
def test_a_folder_of_other_sizes_in_every_layer(scheme: Any, cut: Path, tmp_path: Path) -> None:
    before = {name: (cut / name).read_bytes() for name in names(cut)}
    done = export_model(
        str(cut), tmp_path / "out", QuantizeOptions(scheme, TEXT if scheme != "fp8" else CalibrationOptions())
    )
    assert isinstance(done, PackedResult)
    assert {name: (cut / name).read_bytes() for name in names(cut)} == before
    assert len(done.layers) == 21
    assert done.group_size == (32 if scheme == "w4a16" else None)
    assert done.weight_bytes["after"] == done.file_bytes < done.weight_bytes["before"] / 2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["model_type"].startswith(PER_LAYER)
    assert len({json.dumps(layer) for layer in config["per_layer_config"].values()}) > 1
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        stored = [file.get_tensor(name) for name in file.keys() if name.endswith(("q_proj.weight", "weight_packed"))]  # noqa: SIM118 - no mapping
    assert {tensor.dtype for tensor in stored} == {STORED[scheme]}
    loaded, dense = logits_of(load(str(tmp_path / "out"))), logits_of(load(str(cut)))
    apart = float((loaded - dense).norm() / dense.norm())
    assert 0 < apart < CLOSE[scheme]
    assert torch.allclose(stranger().use(tmp_path / "out", IDS).logits, loaded, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_gptq_looks_at_the_text(cut: Path, tmp_path: Path) -> None:
    """Of other windows, the same model becomes other integers."""
    found = set()
    for text in (TEXT, replace(TEXT, seed=1), replace(TEXT, text=("self",))):
        export_model(str(cut), tmp_path / "out", QuantizeOptions("w4a16", text), overwrite=True)
        found.add((tmp_path / "out" / "model.safetensors").read_bytes())
    assert len(found) == 3


def test_a_recipe_makes_the_same_folder_again(cut: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    text = ["--samples", "8", "--length", "32", "--quiet"]
    assert run(["export", str(cut), str(first), "--quantize", "w8a8", *text]) == 0
    assert run(["export", "--recipe", str(first / "recipe.yaml"), str(again), "--quiet"]) == 0
    assert {name: (first / name).read_bytes() for name in names(first)} == {
        name: (again / name).read_bytes() for name in names(again)
    }
    assert {PLAN_FILE, RECORD_FILE} & set(names(cut)) <= set(names(first))
    assert run(["verify", str(first), "--quiet"]) == 0


def test_a_uniform_folder_is_stock(tmp_path: Path) -> None:
    write_tiny(tmp_path / "dense")
    export_model(str(tmp_path / "dense"), tmp_path / "out", QuantizeOptions("fp8"))
    assert not [name for name in names(tmp_path / "out") if name.endswith(".py")]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.sampled_from([1, 8, 32, 64, 128]))
def test_the_largest_group_that_divides_all_widths(factors: list[int], size: int) -> None:
    layers = nn.ModuleDict({str(n): nn.Linear(factor * size, 1, device="meta") for n, factor in enumerate(factors)})
    fitting = [each for each in GROUP_SIZES if all(factor * size % each == 0 for factor in factors)]
    if fitting:
        assert common_group_size(layers, list(layers)) == max(fitting)
    else:
        with pytest.raises(ExportError, match=r"w4a16 gives 32 columns or more a scale, and \d has \d+: prune with"):
            common_group_size(layers, list(layers))


def test_what_cannot_be_quantized(cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"quantize='w3a16' is unknown\. Expected w8a8, w4a16 or fp8"):
        QuantizeOptions("w3a16")  # type: ignore[arg-type]  # what is refused
    write_tiny(tmp_path / "odd")  # widths of 84
    with pytest.raises(ExportError, match=r"q_proj has 48: prune with --round-to 64, or use --quantize w8a8"):
        export_model(str(tmp_path / "odd"), tmp_path / "out", QuantizeOptions("w4a16", TEXT))
    export_model(str(cut), tmp_path / "once", QuantizeOptions("fp8"))
    with pytest.raises(ModelError, match=r"is quantized \(compressed-tensors\), and packed weights cannot be scored"):
        export_model(str(tmp_path / "once"), tmp_path / "out", QuantizeOptions("fp8"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs the package llmcompressor\. Run: pip install 'secateur\[quantize\]'"):
        export_model(str(cut), tmp_path / "out", QuantizeOptions())
    with pytest.raises(ModelError, match=r"compressed_tensors\. Run: pip install 'secateur\[quantize\]'"):
        load(str(tmp_path / "once"))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_computes_something_else_is_not_written(
    cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.export.quantize.CLOSE", -1.0)
    with pytest.raises(ModelError, match="gives other logits than the model in memory"):
        export_model(str(cut), tmp_path / "out", QuantizeOptions("fp8"))
    assert names(tmp_path) == []


def test_code_that_llmcompressor_cannot_run_leaves_nothing(
    cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no such graph")

    monkeypatch.setattr(sys.modules["llmcompressor.entrypoints.oneshot"], "oneshot", refuse)
    said = r"llmcompressor cannot quantize it to w8a8; RuntimeError: no such graph; --quantize fp8 runs no text"
    with pytest.raises(ExportError, match=said):
        export_model(str(cut), tmp_path / "out", QuantizeOptions("w8a8", TEXT))
    assert names(tmp_path) == []
