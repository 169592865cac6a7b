"""LoRA adapts every linear layer but the last, and the stacked experts of a mixture, and is merged into them."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from trainings import FLOAT32, ROWS, TEXT, options, weights
from transformers import AutoConfig, AutoModelForCausalLM

from contract import uneven
from every_type import tiny_type_model
from recipes import recipe
from secateur import CalibrationOptions, DataOptions, load, prune, prune_model, recover, verify
from secateur.errors import TrainingError
from secateur.export.merge import merge_adapter
from secateur.models.modeling_per_layer import padded_in
from secateur.models.silence import quiet
from secateur.recovery.lora import add_lora, expert_weights, merge_lora
from secateur.recovery.options import LoraOptions
from secateur.recovery.recipe import RecoverRecipe
from tiny import SIZES, tiny_model, tiny_tokenizer

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
IDS = torch.arange(40)[None]
temporary = functools.cache(tempfile.TemporaryDirectory)  # until the end of all tests


@functools.cache
def mixtures() -> Path:
    """Two cuts of a mixture of experts, and rows to train on."""
    folder = Path(temporary().name)
    torch.manual_seed(0)
    with quiet():
        AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SIZES, **EXPERTS)).save_pretrained(
            folder / "dense"
        )
        tiny_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    for shape in ("uniform", "per-layer"):
        cut: dict[str, Any] = {"ratio": 0.2, "shape": shape, "score": "l2", "repair": "none"}
        text = CalibrationOptions(str(folder / "text.txt"), 4, 16, varied=0.0)
        prune_model(recipe(folder / "dense", cut=cut, calibration=text), folder / shape)
    return folder


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_stacked_experts_have_an_adapter(shape: str) -> None:
    model = load(str(mixtures() / shape), device="cpu")
    stacks = expert_weights(model)
    assert stacks == [f"model.layers.{i}.mlp.experts.{name}_proj" for i in range(3) for name in ("gate_up", "down")]
    before = {name: model.get_parameter(name).data.clone() for name in stacks}
    adapted = add_lora(model, LoraOptions(rank=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        expected = adapted.eval()(input_ids=IDS).logits
        merged = merge_lora(adapted)
        assert torch.allclose(merged(input_ids=IDS).logits, expected, atol=1e-4)
    assert all(not torch.equal(merged.get_parameter(name), before[name]) for name in stacks)


def test_values_that_are_narrower_than_keys_have_an_adapter() -> None:
    model = tiny_model(num_hidden_layers=2)
    model = prune(model, uneven(model, ("attention", "head_dim")))
    padded = padded_in(model)
    adapted = add_lora(model, LoraOptions(rank=4))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
        expected = adapted.eval()(input_ids=IDS).logits
        merged = merge_lora(adapted)
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, atol=1e-4, rtol=0)
    assert padded_in(merged) == padded


@pytest.mark.parametrize(("shape", "packing"), [("uniform", False), ("per-layer", True)])
def test_stacked_experts_are_trained(shape: str, packing: bool, tmp_path: Path) -> None:
    data = DataOptions((str(mixtures() / "rows.json"),), max_length=128, packing=packing)
    training = options(gradient_checkpointing=packing, lora=LoraOptions(rank=4, dropout=0.05), save_adapter=True)
    source, out = mixtures() / shape, tmp_path / "out"
    found = recover(RecoverRecipe(str(source), data, training, loading=FLOAT32), out)
    assert "there is no dropout, though 0.05 was asked for: peft has none for experts" in found.notes
    assert found.loss[-1][1] < found.loss[0][1]
    assert verify(out).problems == ()
    before, after = weights(source), weights(out)
    assert before.keys() == after.keys()
    experts = [name for name in before if ".experts." in name]
    assert experts
    assert all(not torch.equal(before[name], after[name]) for name in experts)
    merge_adapter(str(out / "adapter"), tmp_path / "again")
    assert all(torch.allclose(weights(tmp_path / "again")[name], after[name], atol=1e-6) for name in after)


def test_every_linear_layer_but_the_last_has_an_adapter() -> None:
    model = tiny_model()
    assert expert_weights(model) == []
    adapted = add_lora(model, LoraOptions(rank=2))
    found = {name.split(".lora_")[0].split(".", 4)[-1] for name, p in adapted.named_parameters() if p.requires_grad}
    seven = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj"
    assert found == {f"{i}.{name}" for i in range(3) for name in [*seven.split(), "mlp.down_proj"]}


def test_a_model_that_takes_no_adapter_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model = prune(model, uneven(model, ("attention", "head_dim")))
    before = {name: weight.shape for name, weight in model.named_parameters()}

    def refuse(model: nn.Module, config: object) -> None:
        raise ValueError("no layer\nof this model is known")

    monkeypatch.setattr(peft, "get_peft_model", refuse)
    with pytest.raises(TrainingError, match=r"takes no LoRA \(.*no layer of this model is known\)\. Train all weights"):
        add_lora(model, LoraOptions(rank=2))
    assert {name: weight.shape for name, weight in model.named_parameters()} == before


@pytest.mark.parametrize("model_type", ["zamba", "recurrent_gemma"])
def test_weights_of_mixers_are_no_experts(model_type: str) -> None:
    model = tiny_type_model(model_type, dtype=torch.float32)
    assert [p for p in model.parameters() if p.dim() == 3 and min(p.shape) > 1]
    assert expert_weights(model) == []


KERNELS_READ = ("mamba2", "falcon_h1")  # the weights of `out_proj`
TOWERS = {"gemma4": ("vision_tower", "embed_vision"), "gemma3": ("vision_tower", "multi_modal_projector")}


@pytest.mark.parametrize("model_type", ["llama4_text", "phimoe", "deepseek_v4", *KERNELS_READ, *TOWERS])
def test_what_takes_no_adapter_has_none(model_type: str) -> None:
    """Linear layers with code of their own, which may give more than a product; weights of kernels; image towers."""
    model = tiny_type_model(model_type, dtype=torch.float32)
    modules = dict(model.named_modules())
    if model_type in TOWERS:
        spared = {f"model.{name}" for name in TOWERS[model_type]}
    elif model_type in KERNELS_READ:
        spared = {name for name in modules if name.endswith("out_proj")}
    else:
        spared = {name for name, m in modules.items() if isinstance(m, nn.Linear) and type(m) is not nn.Linear}
    assert spared
    assert spared <= modules.keys()
    adapted = add_lora(model, LoraOptions(rank=2))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert not [name for name in trained if any(f".{each}." in name for each in spared)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in trained:
            parameter = adapted.get_parameter(name)
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    expected = adapted(input_ids=IDS[:, 5:15]).logits
    merged = merge_lora(adapted)
    torch.testing.assert_close(merged(input_ids=IDS[:, 5:15]).logits, expected, rtol=1e-3, atol=1e-4)
    assert merged.state_dict().keys() == tiny_type_model(model_type).state_dict().keys()
