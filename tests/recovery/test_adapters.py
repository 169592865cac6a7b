"""LoRA reaches the stacked experts of a mixture, in stock folders and in free ones, and is merged into them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recover import ROWS, TEXT, weights
from transformers import AutoConfig, AutoModelForCausalLM

from recipes import recipe
from secateur import CalibrationOptions, DataOptions, RecoverOptions, load, recover, verify
from secateur.export.merge import merge_adapter
from secateur.models.loading import LoadOptions
from secateur.models.silence import quiet
from secateur.pipeline.run import prune_model
from secateur.recovery.lora import LoraOptions, merged, stacked_weights, with_adapter
from tiny import SIZES, tiny_model, tiny_tokenizer

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
IDS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cuts of a mixture of experts, and rows to train on."""
    folder = tmp_path_factory.mktemp("shelf")
    torch.manual_seed(0)
    with quiet():
        AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SIZES, **EXPERTS)).save_pretrained(
            folder / "dense"
        )
        tiny_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    for shape in ("uniform", "free"):
        prune_model(
            recipe(
                str(folder / "dense"),
                cut={"ratio": 0.2, "shape": shape},
                calibration=CalibrationOptions(str(folder / "text.txt"), 4, 16),
            ),
            folder / shape,
        )
    return folder


@pytest.fixture
def place(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the models in reach under short names."""
    for path in shelf.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("shape", ["uniform", "free"])
class TestExperts:
    def test_they_have_an_adapter(self, shape: str, place: Path) -> None:
        model = load(shape, device="cpu")
        stacks = stacked_weights(model)
        assert stacks == [f"model.layers.{i}.mlp.experts.{name}_proj" for i in range(3) for name in ("gate_up", "down")]
        before = {name: model.get_parameter(name).data.clone() for name in stacks}
        adapted = with_adapter(model, LoraOptions(rank=4))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            expected = adapted.eval()(input_ids=IDS).logits
            whole = merged(adapted)
            assert torch.allclose(whole(input_ids=IDS).logits, expected, atol=1e-4)
        assert all(not torch.equal(whole.get_parameter(name), before[name]) for name in stacks)

    @pytest.mark.parametrize("packing", [False, True])
    def test_they_are_trained(self, shape: str, packing: bool, place: Path) -> None:
        given: dict[str, Any] = {
            "max_steps": 4,
            "global_batch_size": 8,
            "eval_steps": 2,
            "learning_rate": 3e-3,
            "gradient_checkpointing": packing,
        }
        found = recover(
            shape,
            "out",
            data=DataOptions(("rows.json",), max_length=128, packing=packing),
            options=RecoverOptions(**given, lora=LoraOptions(rank=4, dropout=0.05)),
            loading=LoadOptions("float32", "cpu"),
            save_adapter=True,
        )
        assert "there is no dropout, though 0.05 was asked for: peft has none for experts" in found.notes
        assert found.loss[-1][1] < found.loss[0][1]
        assert verify("out").problems == ()
        before, after = weights(shape), weights("out")
        assert before.keys() == after.keys()
        experts = [name for name in before if ".experts." in name]
        assert experts
        assert all(not torch.equal(before[name], after[name]) for name in experts)
        merge_adapter("out/adapter", "again")
        assert all(torch.allclose(weights("again")[name], after[name], atol=1e-6) for name in after)


def test_other_models_have_none() -> None:
    assert stacked_weights(tiny_model()) == []
