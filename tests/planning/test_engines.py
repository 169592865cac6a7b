"""Plans for a program: widths that its kernels take, a shape that it reads, and one error where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from secateur import CutOptions, discover, plan
from secateur.discovery.groups import Group
from secateur.errors import PlanError
from secateur.planning.engines import FINE, MULTIPLES, check_engine, usual_multiple
from secateur.planning.plan import Plan
from secateur.scoring.scores import Scores
from vllm_cases import CASES, REFUSED, settings_of

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
# Their code calls attention that can be replaced in transformers 5.25, and not yet in 5.19, which vLLM has.
NEWER = {"falcon", "gptj"}
DAILY = ("llama", "bloom", "gpt2", "jamba")  # one of each way to be told
ENGINES = [engine for engine in MULTIPLES if engine is not None]


def planned(model_type: str, options: CutOptions, width: int = 384) -> Plan:
    """A plan for random scores, which make every layer of another size where it may be."""
    config = AutoConfig.for_model(model_type, **SIZES, intermediate_size=width, vocab_size=64)
    discovery = discover(config)
    generator = torch.Generator().manual_seed(0)
    layers = {g.name: (g.layer or 0) + 1 for g in discovery.groups}
    units = {g.name: torch.rand(g.units, generator=generator) * layers[g.name] for g in discovery.groups}
    return plan(discovery, options, config=config, scores=Scores("fisher", "sum", units))


@given(st.sampled_from([None, *ENGINES]), st.integers(1, 5000), st.sampled_from(["mlp", "expert_mlp", "attention"]))
@settings(max_examples=200)
def test_a_multiple_divides_the_dense_width(engine: Any, units: int, kind: str) -> None:
    multiple = usual_multiple(Group("layers.0.x", kind, 0, units, ()), CutOptions(engine=engine))
    assert units % multiple == 0
    assert MULTIPLES[engine] % multiple == 0
    assert multiple == 1 or (kind != "attention" and units >= (FINE if engine is None else 2) * multiple)


@pytest.mark.parametrize(("engine", "multiple"), [("vllm", 64), ("sglang", 64), ("llama.cpp", 32)])
def test_every_width_is_a_multiple(engine: Any, multiple: int) -> None:
    decided = planned("llama", CutOptions(ratio=0.3, engine=engine))
    widths = [group.kept for group in decided.groups if group.kind == "mlp"]
    assert widths
    assert all(width % multiple == 0 for width in widths)
    assert (decided.settings is not None) == (engine == "sglang")
    assert decided.scored["rounding"]["multiple"] == multiple


def test_what_was_asked_for_comes_first() -> None:
    decided = planned("llama", CutOptions(ratio=0.3, engine="vllm", round_to=1))
    assert any(group.kept % 32 for group in decided.groups if group.kind == "mlp")
    assert planned("llama", CutOptions(ratio=0.3, engine="transformers")).groups == decided.groups


@pytest.mark.parametrize(
    ("model_type", "options", "said"),
    [
        ("gemma2", {"engine": "llama.cpp"}, r"engine=llama\.cpp: its architecture for gemma2 \(gemma2\) has layers of"),
        ("helium", {"engine": "llama.cpp"}, r"engine=llama\.cpp: model type 'helium' cannot be written as GGUF"),
    ],
)
def test_a_plan_that_the_program_cannot_run_is_refused(model_type: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        planned(model_type, CutOptions(ratio=0.3, **options))


@pytest.mark.parametrize(("model_type", "engine"), [("gemma2", "llama.cpp"), ("gpt2", "vllm")])
def test_it_is_refused_before_a_weight_is_read(model_type: str, engine: Any) -> None:
    """Without scores, all layers lose the same share, which the family's config can say; with them, they differ."""
    config = AutoConfig.for_model(model_type, **settings_of(model_type))
    discovery = discover(config)
    with pytest.raises(PlanError, match=f"engine={engine}: .* Use shape=uniform"):
        plan(discovery, CutOptions(ratio=0.3, engine=engine), config=config)
    uniform = CutOptions(ratio=0.15, engine=engine, axes=("mlp",), shape="uniform")
    assert plan(discovery, uniform, config=config).settings is not None


def test_sglang_reads_layers_of_one_size() -> None:
    with pytest.raises(PlanError, match="engine=sglang reads layers of one size, and shape=per-layer: use shape=unif"):
        CutOptions(engine="sglang", shape="per-layer")
    with pytest.raises(PlanError, match="engine=sglang: no config of the model can say the cut"):
        check_engine("sglang", AutoConfig.for_model("llama"), stock=False)


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if name in DAILY else pytest.mark.slow) for name in sorted(CASES | REFUSED)],
)
def test_vllm_is_told_from_the_code_of_a_type(model_type: str) -> None:
    """What `tests/export/test_vllm.py` shows of vLLM itself is known before a weight is read."""
    config = AutoConfig.for_model(model_type, **settings_of(model_type))
    check_engine("vllm", config, stock=True)
    if model_type in REFUSED.keys() - NEWER:
        with pytest.raises(PlanError, match=r"engine=vllm: .* does not in every layer\. Use shape=uniform"):
            check_engine("vllm", config, stock=False)
    else:
        check_engine("vllm", config, stock=False)
