"""What the config of a per-layer folder says of its layers in the words of transformers, for any program to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from contract import uneven
from every_type import tiny_type_model
from families import DISTINCT, family_config, family_model
from secateur import discover, prune, save
from secateur.checkpoint.per_layer import as_per_layer
from secateur.models.attention_calls import attention_calls
from secateur.models.loading import load
from secateur.models.silence import quiet
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan, PlannedGroup

BOTH = ("attention", "mlp")


def settings(model: PreTrainedModel, kinds: tuple[str, ...] = BOTH) -> dict[str, Any]:
    """The config that a model cut unevenly is saved with, as JSON has it."""
    found: dict[str, Any] = json.loads(json.dumps(as_per_layer(prune(model, uneven(model, kinds))).config.to_dict()))
    return found


@pytest.mark.parametrize("family", DISTINCT)
def test_heads_are_those_that_attention_is_called_with(family: str) -> None:
    dense = family_model(family_config(family))
    said = settings(dense)
    found = discover(as_per_layer(prune(dense, uneven(dense, BOTH))).config)
    for number, layer in said["per_layer_config"].items():
        name = f"layers.{number}.attention"
        assert layer["num_key_value_heads"] == (found.group(name).units if name in found.names else 1)
    assert said["head_dim"] == attention_calls(dense)[0].head_dim


def test_widths_have_the_name_of_their_setting() -> None:
    widths = {
        family: [layer[name] for layer in settings(family_model(family_config(family)))["per_layer_config"].values()]
        for family, name in (("llama", "intermediate_size"), ("gpt2", "n_inner"), ("opt", "ffn_dim"))
    }
    assert widths == {"llama": [77, 72, 67], "gpt2": [77, 72, 67], "opt": [77, 72, 67]}


def test_the_dense_sizes_stay_for_the_stock_code_and_can_be_read_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = family_model(family_config("llama"))
    decided = uneven(dense, BOTH)
    config: Any = load(str(save(prune(dense, decided), tmp_path / "out", plan=decided)), device="cpu").config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (6, 3, 84)
    assert [layer.num_attention_heads for layer in config.per_layer_config] == [4, 2, 4]
    assert [layer.intermediate_size for layer in config.per_layer_config] == [77, 72, 67]
    assert caplog.text == ""


def test_sublayers_that_are_gone_are_skipped() -> None:
    dense = family_model(family_config("llama"))
    gone = [PlannedGroup(f"layers.{layer}.{kind}", kind, layer, units, 0, ()) for layer, kind, units in
            ((1, "attention", 3), (2, "mlp", 84))]  # fmt: skip
    plan = Plan("m", CutOptions(ratio=0.3), tuple(gone), {}, {})
    layers: Any = as_per_layer(prune(dense, plan)).config.to_dict()["per_layer_config"]
    assert [layers[number].get("skip") for number in "12"] == [["attention"], ["mlp"]]


@pytest.mark.parametrize(
    ("model_type", "width"), [("mixtral", "intermediate_size"), ("qwen3_moe", "moe_intermediate_size")]
)
def test_experts_of_other_sizes_leave_no_model_for_engines_that_read_one_size(model_type: str, width: str) -> None:
    with quiet():
        dense = tiny_type_model(model_type)
    said = settings(dense, ("expert", "expert_mlp"))
    assert {width, "num_local_experts"} <= said["per_layer_config"]["2"].keys()
    assert "AutoModel" not in said["auto_map"]
    assert "AutoModel" in settings(dense, ("attention",))["auto_map"]


def test_code_that_calls_no_registered_attention_says_nothing_of_heads() -> None:
    with quiet():
        said = settings(tiny_type_model("bloom"))
    assert "per_layer_config" not in said
